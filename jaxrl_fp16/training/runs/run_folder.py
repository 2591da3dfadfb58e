"""A run's folder: made, checked before it is resumed, and the record of what its numerics depend on."""

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
from pathlib import Path
import platform as host

from jaxrl_fp16.config import ConfigError, diff, load_config, to_yaml
from jaxrl_fp16.models.families.config_json import read_json
from jaxrl_fp16.training.runs.run_config import MAY_CHANGE, Config

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


def check_resumed(config, folder, command=None):
    """Refuses to resume `folder` under a config that would not have led there, naming what differs; and by
    another command, where one is given."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"resume: {folder} has no config.yaml; allowed: the folder of an earlier run")
    started_by = _command_of(folder)
    if command is not None and started_by not in (None, command):
        raise ConfigError(
            f"resume: {folder} is a run of the command {started_by}; allowed: that command, or a folder of {command}'s"
        )
    changed = diff(load_config(Config, path), config, ignore=MAY_CHANGE)
    if changed:
        shown = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in list(changed.items())[:3])
        allowed = ", ".join(MAY_CHANGE)
        raise ConfigError(f"resume: {folder} was started otherwise: {shown}; allowed to differ: {allowed}")


def _command_of(folder):
    """The command whose run lies in `folder`; None where no record says so."""
    path = Path(folder) / "environment.json"
    return read_json(path).get("command") if path.is_file() else None


def write_record(setup, folder, command, reward_policy=None):
    """`config.yaml`, resolved, and `environment.json`: the command, and what the run's numerics depend on.

    reward_policy: of the reward model, where the run has one.
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
        **({} if reward is None else {"reward_model": setup.config.task.reward_model.path, "reward_policy": reward}),
    }
    _replace(folder / "environment.json", json.dumps(record, indent=2) + "\n")


def _replace(path, text):
    """Writes a file in one piece: a resumed run that is killed here must find its config again."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _policy_text(policy):
    params, compute, output = policy.param_dtype.name, policy.compute_dtype.name, policy.output_dtype.name
    return f"params={params},compute={compute},output={output}"
