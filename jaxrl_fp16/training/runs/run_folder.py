"""A run's folder: made, checked before it is resumed, and the record of what its numerics depend on."""

from collections.abc import Mapping
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
from pathlib import Path
import platform as host

from jaxrl_fp16.config import ConfigError, diff, load_unchecked, to_yaml
from jaxrl_fp16.models.families.config_json import read_json
from jaxrl_fp16.training.runs.inputs import NAME, PATHS, recorded_inputs
from jaxrl_fp16.training.runs.run_config import GONE, MAY_CHANGE, Config

RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "jmp", "numpy")


def new_folder(config):
    """Makes a run folder that was not there yet, `dir/name-YYYYMMDD-HHMMSS`, or `dir/name` without `run.stamp`.

    Where it is there, -2 follows, or -3 ... Raises ConfigError where it cannot be made.
    """
    stamp = datetime.datetime.now().strftime("-%Y%m%d-%H%M%S") if config.run.stamp else ""
    base = Path(config.run.dir) / f"{config.run.name}{stamp}"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise ConfigError(f"run.dir: {base.parent} cannot be written to ({error.strerror})") from error


def check_run_folder(folder):
    """Refuses a folder of `resume` that is no run's."""
    if not (Path(folder) / "config.yaml").is_file():
        what = "has no config.yaml" if Path(folder).exists() else "does not exist"
        raise ConfigError(f"resume: {folder} {what}; allowed: the folder of an earlier run")


def check_resumed(config, folder, command=None):
    """Refuses to resume `folder` under a config that would not have led there, naming what differs; and by
    another command, where one is given."""
    check_run_folder(folder)
    started_by = _command_of(folder)
    if command is not None and started_by not in (None, command):
        raise ConfigError(
            f"resume: {folder} is a run of the command {started_by}; allowed: that command, or a folder of {command}'s"
        )
    before = load_unchecked(Config, Path(folder) / "config.yaml")
    known = [key for key in PATHS if key in recorded_inputs(folder)]     # their content is compared, wherever it lies
    changed = {
        key: pair for key, pair in diff(before, config, ignore=(*MAY_CHANGE, *known)).items()
        if not (key in GONE and pair[0] == GONE[key])
        and not (key in PATHS and _same_place(pair, (before["run"]["dir"], config.run.dir)))
    }
    if changed:
        shown = "; ".join(_difference(key, *pair, config) for key, pair in list(changed.items())[:3])
        allowed = ", ".join(MAY_CHANGE)
        raise ConfigError(f"resume: {folder} was started otherwise: {shown}; allowed to differ: {allowed}")


def _difference(key, old, new, config):
    if not _has(config, key):
        was = f", whose default was {GONE[key]!r}" if key in GONE else ""
        return f"{key} was {old!r}, and is no key any more{was}"
    return f"{key} was {old!r}, is {new!r}"


def _has(config, key):
    """Whether a dotted key is one of the config's, or may be inside a mapping or a section that is null."""
    for name in key.split("."):
        if config is None or isinstance(config, Mapping):
            return True
        if not hasattr(config, name):
            return False
        config = getattr(config, name)
    return True


def _same_place(paths, folders):
    """Whether two paths name one place, or one part of two folders: a comparison's runs begin from a warm start that
    lies beside them and moves along."""
    old, new = (None if path is None else Path(path).expanduser() for path in paths)
    if old is None or new is None:
        return False
    parts = [_below(path, Path(folder)) for path, folder in zip((old, new), folders)]
    return old.resolve() == new.resolve() or (parts[0] is not None and parts[0] == parts[1])


def _below(path, folder):
    """What follows the parts of `folder` in `path`, which may name it from elsewhere; None where they are not there."""
    parts, size = path.parts, len(folder.parts)
    ends = (end for end in range(size, len(parts)) if parts[end - size:end] == folder.parts)
    return next((parts[end:] for end in ends), None) if size else None


def _command_of(folder):
    """The command whose run lies in `folder`; None where no record says so."""
    path = Path(folder) / "environment.json"
    return read_json(path).get("command") if path.is_file() else None


def write_record(setup, folder, command, inputs=None, reward_policy=None):
    """`config.yaml`, resolved, and `environment.json`: the command, and what the run's numerics depend on.

    inputs: as `inputs_of` gives them, of a run that may be resumed.  reward_policy: of the reward model, where the
    run has one.
    """
    reward = None if reward_policy is None else _policy_text(reward_policy)
    _replace(folder / "config.yaml", to_yaml(setup.config))
    devices = setup.mesh.devices.flatten()
    record = {
        "command": command,
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
        **({"engine": setup.engines.facts()} if setup.engines.facts() else {}),
        **({} if reward is None else {"reward_model": setup.config.task.reward_model.path, "reward_policy": reward}),
    }
    _replace(folder / "environment.json", json.dumps(record, indent=2) + "\n")
    if inputs is not None:
        write_inputs(folder, inputs)


def write_inputs(folder, inputs):
    """What `recorded_inputs` reads where no checkpoint says it."""
    _replace(folder / NAME, json.dumps(inputs, indent=2) + "\n")


def _replace(path, text):
    """Writes a file in one piece: a resumed run that is killed here must find its config again."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _policy_text(policy):
    params, compute, output = policy.param_dtype.name, policy.compute_dtype.name, policy.output_dtype.name
    return f"params={params},compute={compute},output={output}"
