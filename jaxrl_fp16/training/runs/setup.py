"""What a command starts from: platform, precision, mesh, model, tokenizer, run folder.

Everything that can be refused is refused here, before anything compiles or a
folder is made.
"""

import contextlib
import dataclasses
import datetime
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxrl_fp16.config import ConfigError, load_unchecked, naming, naming_at_entry
from jaxrl_fp16.console import Console
from jaxrl_fp16.engines import Engines
from jaxrl_fp16.folders import local_folder
from jaxrl_fp16.models import (
    Decoder, DecoderConfig, LoraConfig, init_lora, init_params, load_adapter, load_pretrained, merge_lora, read_adapter,
    read_config,
)
from jaxrl_fp16.models.init import adapter_table
from jaxrl_fp16.models.families.config_json import read_json
from jaxrl_fp16.parallel import check_same_config, from_first_process, initialize_distributed, make_mesh
from jaxrl_fp16.precision import Precision, get_precision, get_precision_on
from jaxrl_fp16.tasks import TASKS, Task, asks_for_date, check_template, open_task, remark_on
from jaxrl_fp16.tokenizer import character_tokenizer, check_vocabulary, end_ids, load_tokenizer, pad_id, vocabulary_size
from jaxrl_fp16.training.runs.run_config import Config, check_mesh_rows
from jaxrl_fp16.training.safety.memory import device_bytes, estimate
from jaxrl_fp16.training.runs.run_folder import check_run_folder

PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "jmp", "numpy")


@dataclasses.dataclass(frozen=True)
class Setup:
    """An opened command: nothing has been compiled, and no file written."""

    config: Config                # resolved: no `auto` is left
    precision: Precision          # of scorer and update
    rollout_precision: Precision  # of the sampler: the same but for the ablation
    critic_precision: Precision   # of PPO's critic: the same unless it has its own
    mesh: Mesh
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    engines: Engines              # the process of `rollout.engine`, once a sampler has started it

    @property
    def keys(self):
        """The run's `Keys`."""
        return Keys(*jax.random.split(jax.random.key(self.config.run.seed), len(Keys._fields)))


class Keys(NamedTuple):
    """What each part of a command draws from; all of `run.seed`."""

    weights: jax.Array      # random ones, where no folder is read
    supervised: jax.Array   # the train state of supervised steps
    learning: jax.Array     # the actor's, from which sampling and data order come, and the critic's
    evaluation: jax.Array   # the same at each evaluation


@dataclasses.dataclass(frozen=True)
class Opened:
    """A command with its task and model, none of whose weights is read yet."""

    setup: Setup
    task: Task
    model: Decoder

    def load_params(self, **which):
        """`load_params` of this model."""
        return load_params(self.setup, self.model, **which)


@contextlib.contextmanager
def opened(setup, prompts=True, problems=None):
    """Gives `Opened`; the task's grading processes and the engine's end with the context. Raises ConfigError.

    prompts: whether the command makes any, by the task's template.  problems: as for `open_task`.
    """
    with naming_at_entry("task", open_task(setup.config.task, problems)) as task:
        remark = ""
        if prompts:
            with naming("task"):
                check_template(task.template, task.train[0], setup.tokenizer)
                remark = remark_on(task.template, setup.tokenizer)
        for line in filter(None, (remark, task.note)):
            Console(quiet=jax.process_index() != 0).say(line)
        with contextlib.closing(setup.engines):
            yield Opened(setup, task, make_model(setup))


def set_up_alone(command, config):
    """`set_up` of a command that reads no run folder."""
    if config.resume is not None:
        raise ConfigError(f"{command} reads no run folder; allowed: --model.path {config.resume}/model, after export")
    return set_up(config, command)


def set_up(config, command="train"):
    """Checks `config` against this machine and gives a `Setup` for a command. Raises ConfigError.

    Chooses JAX's platform, so it comes before any other use of JAX.
    """
    wanted = config.platform or config.run.platform
    if wanted != "auto":
        jax.config.update("jax_platforms", PLATFORMS[wanted])
    with naming("several processes"):
        if initialize_distributed(heartbeat=config.run.heartbeat_seconds):
            # A folder of compiled programs may be each host's own.
            check_same_config(dataclasses.replace(config, run=dataclasses.replace(config.run, compile_cache=None)))
    config = _at_home(config)
    _check_folders(config)
    found = _platform(wanted)
    if config.run.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.run.compile_cache))
    return _set_up_on(config, found, command)


def set_up_for(config, platform, devices):
    """`set_up` for devices that this machine need not have, of a `gpu` or `tpu`: programs can be compiled with it."""
    config = _at_home(config)
    _check_folders(config)
    return _set_up_on(config, platform, "train", devices)


def _set_up_on(config, found, command, devices=None):
    """The Setup on a platform that is settled; devices: of the mesh, None: all that JAX finds."""
    with naming("precision"):
        precision = get_precision_on(found, config.precision, config.loss_scale)
    with naming("rollout_precision"):
        rollout = get_precision_on(found, config.rollout_precision or precision.name, config.loss_scale)
    critic = precision
    if config.trains:
        with naming("critic.precision"):
            critic = get_precision_on(found, config.critic.precision or precision.name, config.critic.loss_scale)
    with naming("mesh"):
        mesh = make_mesh(config.mesh, devices)
        if config.trains:
            check_mesh_rows(config, mesh, command)
    with naming("model.tokenizer" if config.model.tokenizer else "model.path"):
        tokenizer = _tokenizer(config)
        files = [_json_of_folder(config.model, name) for name in ("generation_config.json", "config.json")]
        eos_ids = end_ids(tokenizer, *files)
    with naming("sampling.end_tokens"):
        eos_ids = end_ids(tokenizer, names=config.sampling.end_tokens) if config.sampling.end_tokens else eos_ids
    config = dataclasses.replace(
        config, precision=precision.name, rollout_precision=rollout.name if config.rollout_precision else None,
        platform=None, run=dataclasses.replace(config.run, platform=found), task=dated(config, tokenizer),
        model=dataclasses.replace(config.model, attention=attention_of_run(config, mesh, (precision, rollout, critic))),
    )
    engines = Engines(Console(quiet=jax.process_index() != 0).say)
    return Setup(config, precision, rollout, critic, mesh, tokenizer, eos_ids, pad_id(tokenizer), engines)


def _at_home(config):
    """`config` with `~` expanded in the folders that it names."""
    home = lambda section, *keys: dataclasses.replace(section, **{
        key: os.path.expanduser(getattr(section, key)) for key in keys if getattr(section, key) is not None})
    task = dataclasses.replace(config.task, reward_model=home(config.task.reward_model, "path", "tokenizer"))
    return dataclasses.replace(
        home(config, "resume"), run=home(config.run, "dir"), model=home(config.model, "path", "tokenizer"),
        lora=home(config.lora, "path"),
        critic=home(config.critic, "path"), task=task,
    )


def _check_folders(config):
    """Refuses folders of the run and of section `model` that are none, or no model's, before JAX looks for devices."""
    if config.resume is not None:
        check_run_folder(config.resume)
    model = config.model
    _check_there({"model.path": (model.path, "model"), "model.tokenizer": (model.tokenizer, "tokenizer"),
                  "lora.path": (config.lora.path, "adapter")})
    if model.path is not None:
        with _naming_model():
            read_config(model.path)
    lora_of(config)


def check_models_beside(config, critic, rewarded):
    """The same for folders of the models beside the policy; critic, rewarded: whether the command will open them."""
    judge = config.task.reward_model
    if critic:
        _check_there({"critic.path": (config.critic.path, "model")})
    if rewarded and judge.path is not None:
        _check_there({"task.reward_model.path": (judge.path, "model"),
                      "task.reward_model.tokenizer": (judge.tokenizer, "tokenizer")})


def _check_there(folders):
    """Refuses folders, as `{key: (folder or None, whose)}`, that are not there."""
    for key, (folder, kind) in folders.items():
        if folder is not None:
            with naming(key):
                local_folder(folder, kind)


def _platform(wanted):
    """`cpu`, `gpu` or `tpu`: where JAX runs. An absent one that was asked for is refused, never replaced."""
    try:
        found, reason = jax.default_backend(), ""
    except RuntimeError as error:
        found, reason = None, " ".join(str(error).split())[:200]
    found = {"cuda": "gpu", "rocm": "gpu"}.get(found, found)
    if found is None or wanted not in ("auto", found):  # JAX itself would fall back to the CPU
        raise ConfigError(f"run.platform: JAX finds no {wanted} here, {reason or f'but {found}'}; allowed: auto, cpu")
    return found


def attention_of_run(config, mesh, precisions):
    """`model.attention` with `auto` resolved: NVIDIA's kernel is chosen where every program can use it. On an H200
    an update at 8,192 columns took 67 times as long without it (benchmarks/results/gpu_speed.json)."""
    section, n = config.model, config.numerics
    if section.attention != "auto":
        return section.attention
    with _naming_model():
        head_dim = section.head_dim if section.path is None else read_config(section.path).head_dim
    half = all(precision.policy.compute_dtype.itemsize == 2 for precision in precisions)
    needs_others = config.sft.packing or n.float32_weights or n.float32_cache
    fits = half and not needs_others and head_dim is not None and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if fits and "NVIDIA" in mesh.devices.flatten()[0].device_kind else "blockwise"


def _tokenizer(config):
    folder = config.model.tokenizer or config.model.path
    return character_tokenizer(TASKS[config.task.name].alphabet) if folder is None else load_tokenizer(folder)


def dated(config, tokenizer):
    """Section `task` with the date of the run's start, where its prompts may hold one."""
    task = config.task
    if task.date is not None or not asks_for_date(tokenizer):
        return task
    if config.resume is None:
        return dataclasses.replace(task, date=from_first_process(lambda: datetime.date.today().isoformat()))
    try:
        before = load_unchecked(Config, Path(config.resume) / "config.yaml")
    except ConfigError:  # no run's folder; what reads it says so
        return task
    return dataclasses.replace(task, date=before["task"]["date"])


def _json_of_folder(model, name):
    """What the model folder's file of that name holds; None where there is none."""
    if model.path is None:
        return None
    path = Path(model.path) / name
    return read_json(path) if path.is_file() else None


def make_model(setup):
    """The Decoder of section `model`, none of whose weights is read yet. Raises ConfigError."""
    section = setup.config.model
    with _naming_model():
        if section.path is not None:
            config = read_config(section.path)
            _check_shape(section, config)
        else:
            config = _decoder_config(section, setup.tokenizer)
        check_vocabulary(setup.tokenizer, config.vocab_size)
        model = Decoder(config, attention=section.attention, remat=False, numerics=setup.config.numerics,
                        lora=lora_of(setup.config))
        with naming("lora"):
            adapter_table(model)
        return model.clone(remat=_needs_remat(setup, model) if section.remat == "auto" else section.remat)


def _needs_remat(setup, model):
    """Whether an update keeps layer inputs alone: unless all would fit with room to spare. On an H200 an update was
    slower without (benchmarks/results/gpu_speed_without_remat.json)."""
    device = setup.mesh.devices.flatten()[0]
    if device.platform != "cpu":
        return True
    needs = estimate(setup.config, model, setup.mesh, setup.precision.policy.compute_dtype)
    # Hosts may differ, their programs may not.
    return sum(needs.values()) > int(from_first_process(lambda: str(device_bytes(setup.mesh.local_devices[0])))) / 8


def lora_of(config):
    """The `LoraConfig` of section `lora`, or of the folder that it names; None without adapters. Raises ConfigError."""
    section = config.lora
    given = {field.name: getattr(section, field.name) for field in dataclasses.fields(LoraConfig)
             if getattr(section, field.name) is not None}
    with naming("lora"):
        if section.path is None:
            return LoraConfig(**given) if section.rank is not None else None
        found = read_adapter(section.path)
        asked = dataclasses.replace(found, **given)
        for name in ("rank", "alpha", "targets", "rslora"):
            if getattr(asked, name) != getattr(found, name):
                raise ValueError(f"{name} is {given[name]} and path {section.path} has {getattr(found, name)}; "
                                 "allowed: the folder's, or null")
        return asked


def check_no_dropout(config, command):
    """Refuses adapters that drop for a command whose gradients are RL's."""
    lora = lora_of(config)
    if lora is not None and lora.dropout:
        raise ConfigError(f"lora.dropout is {lora.dropout} with {command}; allowed: 0, as a policy that drops is not "
                          "the one that samples; sft, warmup and dpo take it")


def load_params(setup, model, *, any_weights=False, several=False):
    """float32 parameters of `make_model`'s model on the mesh: from `model.path`, or random. With adapters `{"base",
    "lora"}`, the base in the run's compute dtype. Raises ConfigError.

    any_weights: also weights that are no finite numbers of the compute dtype.
    several: they are computed with in several precisions, and no base is rounded to one.
    """
    config, policy = setup.config, setup.precision.policy
    path, compute = config.model.path, None if any_weights else policy.compute_dtype.name
    several = several or any_weights or model.lora is None
    with _naming_model():
        if path is None:
            params = init_params(model, setup.keys.weights, setup.mesh)
        else:
            dtype = "float32" if several else policy.compute_dtype.name
            params = load_pretrained(path, mesh=setup.mesh, compute_dtype=compute, dtype=dtype)[1]
    if model.lora is None:
        return params
    policy = get_precision("fp32").policy if several else policy
    with naming("lora"):
        if config.lora.path is None:
            return init_lora(model, params, jax.random.fold_in(setup.keys.weights, 1), policy=policy)
        return load_adapter(config.lora.path, model, params, policy=policy)


def merged(setup, model, params):
    """`(the plain Decoder, float32 parameters)`: adapters added to what `model.path` holds, which is read again: what
    the run computed with was rounded once already."""
    _, base = load_pretrained(setup.config.model.path, mesh=setup.mesh, compute_dtype=None)
    return merge_lora(model, params, base)


@contextlib.contextmanager
def _naming_model():
    """As `naming`, always with the section: "model family ..." would pass there for a text that names it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error


def _check_shape(section, found):
    """Refuses a shape beside a path that the folder does not have."""
    for name, value in _shape_fields(section).items():
        if value != getattr(found, name):
            raise ValueError(
                f"{name} is {value!r} and path {section.path} has {getattr(found, name)!r}; "
                "allowed: the folder's, or null"
            )


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
