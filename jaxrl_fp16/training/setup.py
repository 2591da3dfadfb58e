"""What a command starts from: platform, precision, mesh, model, tokenizer, run folder.

Everything that can be refused is refused here, before anything compiles or a
folder is made.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import platform as host
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrl_fp16.config import ConfigError, diff, load_config, to_yaml
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params, load_pretrained
from jaxrl_fp16.parallel import initialize_distributed, make_mesh
from jaxrl_fp16.precision import Precision, get_precision, resolve_precision
from jaxrl_fp16.tasks import ALPHABET
from jaxrl_fp16.tokenizer import (
    character_tokenizer, check_vocabulary, end_ids, load_tokenizer, pad_id, vocabulary_size,
)
from jaxrl_fp16.training.run_config import MAY_CHANGE, Config, check_mesh_rows

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "jmp", "numpy")


@dataclasses.dataclass(frozen=True)
class Setup:
    """An opened command: nothing has been compiled, and no file written."""

    config: Config                # resolved: no `auto` is left
    precision: Precision          # of scorer and update
    rollout_precision: Precision  # of the sampler: the same but for the ablation
    mesh: Mesh
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int


def set_up(config):
    """Checks `config` against this machine and gives a `Setup`. Raises ConfigError.

    Chooses JAX's platform, so it stands before any other use of JAX.
    """
    wanted = config.platform or config.run.platform
    if wanted != "auto":
        jax.config.update("jax_platforms", PLATFORMS[wanted])
    initialize_distributed()
    found = _platform(wanted)
    if config.run.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.run.compile_cache))
    precision = resolve_precision(config.precision, found)
    rollout = resolve_precision(config.rollout_precision or precision, found)
    mesh = make_mesh(config.mesh)
    check_mesh_rows(config, mesh)
    tokenizer = _tokenizer(config.model)
    config = dataclasses.replace(
        config, precision=precision, rollout_precision=rollout if config.rollout_precision else None, platform=None,
        run=dataclasses.replace(config.run, platform=found),
    )
    return Setup(
        config=config,
        precision=get_precision(precision, config.loss_scale),
        rollout_precision=get_precision(rollout, config.loss_scale),
        mesh=mesh,
        tokenizer=tokenizer,
        eos_ids=end_ids(tokenizer, _generation_config(config.model)),
        pad_id=pad_id(tokenizer),
    )


def _platform(wanted):
    """`cpu`, `gpu` or `tpu`: where JAX runs. An absent one that was asked for is refused, never replaced."""
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"run.platform: {wanted!r} is not here ({reason}); allowed: auto, cpu") from None
    return {"cuda": "gpu", "rocm": "gpu"}.get(found, found)


def _tokenizer(model):
    folder = model.tokenizer or model.path
    if folder is None:
        return character_tokenizer(ALPHABET)
    return load_tokenizer(folder)


def _generation_config(model):
    if model.path is None:
        return None
    path = Path(model.path) / "generation_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_model(setup, key):
    """(Decoder, float32 parameters on the mesh): from `model.path`, or random. Raises ConfigError."""
    section, compute = setup.config.model, setup.precision.policy.compute_dtype
    options = dict(attention=section.attention, remat=section.remat)
    try:
        if section.path is not None:
            given = _shape_fields(section)
            if given:
                raise ValueError(f"{', '.join(given)} given beside path {section.path}; allowed: one of the two")
            model, params = load_pretrained(section.path, mesh=setup.mesh, compute_dtype=compute.name, **options)
        else:
            model = Decoder(_decoder_config(section, setup.tokenizer), **options)
            params = init_params(model, key, setup.mesh)
        check_vocabulary(setup.tokenizer, model.config.vocab_size)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    return model, params


def _shape_fields(section):
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    return {name: getattr(section, name) for name in names if getattr(section, name) is not None}


def _decoder_config(section, tokenizer):
    fields = {"vocab_size": vocabulary_size(tokenizer), **_shape_fields(section)}
    required = [f.name for f in dataclasses.fields(DecoderConfig) if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in fields]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; allowed: model.path, or all of {', '.join(required)}")
    return DecoderConfig(**fields)


# -- run folders ---------------------------------------------------------------------------------


def new_folder(config):
    """The path of a run folder that is not there yet: `dir/name-YYYYMMDD-HHMMSS`."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path(config.run.dir) / f"{config.run.name}-{stamp}"
    taken = (base.with_name(f"{base.name}-{n}") for n in range(2, 1000))
    folder = base
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = next(taken)


def check_resumed(config, folder):
    """Refuses to resume `folder` under a config that would not have led there, naming what differs."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume: {folder} has no config.yaml; allowed: the folder of an earlier run")
    changed = diff(load_config(Config, path), config, ignore=MAY_CHANGE)
    if changed:
        shown = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in list(changed.items())[:3])
        allowed = ", ".join(MAY_CHANGE)
        raise ConfigError(f"resume: {folder} was started otherwise: {shown}; allowed to differ: {allowed}")


def write_record(setup, folder):
    """`config.yaml`, resolved, and `environment.json`: what the run's numerics hang on."""
    (folder / "config.yaml").write_text(to_yaml(setup.config), encoding="utf-8")
    devices = setup.mesh.devices.flatten()
    record = {
        "versions": {name: importlib.metadata.version(name) for name in RECORDED},
        "python": host.python_version(),
        "platform": setup.config.run.platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(setup.mesh.shape),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "policy": _policy_text(setup.precision.policy),
        "rollout_policy": _policy_text(setup.rollout_precision.policy),
        "seed": setup.config.run.seed,
    }
    (folder / "environment.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _policy_text(policy):
    params, compute, output = policy.param_dtype.name, policy.compute_dtype.name, policy.output_dtype.name
    return f"params={params},compute={compute},output={output}"


__all__ = ["Setup", "set_up", "load_model", "new_folder", "check_resumed", "write_record"]
