"""The compilers of GPUs and TPUs: where they are, and a program compiled by one in a process of its own.

They are Python packages. In the environment itself they would make every process look for a device, so they have a
folder of their own, with `cuda/` and `tpu/` in it, which `launch/compilers.sh` makes.
"""

import importlib.util
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys

FOLDER = "JAXRL_FP16_COMPILERS"     # the variable that names the folder
PLACES = {"gpu": "cuda", "tpu": "tpu"}
# A module of each compiler, by which it is known.
MODULES = {"gpu": ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), "tpu": ("libtpu",)}
# Several processes may compile at once, and none looks for a TPU or for what is known of one. XLA's autotuning would
# run kernels on the device.
ENVIRONMENT = {
    "gpu": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
    "tpu": {"XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
}
# Untuned, XLA's own generator of matmuls does not take every shape; a card's tuning would choose the library's there.
OTHERWISE = {"gpu": {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}}
FALSE_ALARMS = ("Could not find cuda drivers", "before absl::InitializeLog", "Unable to initialize")


class CompileError(Exception):
    """A program that its compiler did not take, in one line."""


def find_compiler(platform):
    """What has to be on the module path for the compiler of a `gpu` or `tpu`: a list of folders, empty where this
    environment has it. Raises ValueError with what to do where there is none."""
    folders = [os.environ[FOLDER]] if os.environ.get(FOLDER) else [Path(sys.prefix) / "compilers"]
    for folder in folders:
        place = Path(folder).expanduser() / PLACES[platform]
        if any((place / module.replace(".", "/")).is_dir() for module in MODULES[platform]):
            return [str(place)]
    for module in MODULES[platform]:
        # The parent package of a plugin need not be there.
        parent = module.partition(".")[0]
        if importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None:
            return []
    raise ValueError(
        f"the compiler for a {platform.upper()} is not installed in {folders[0]}; launch/compilers.sh puts it there "
        f"(0.5 GB for each of GPU and TPU), or {FOLDER} names another folder"
    )


def has_cudnn(folders):
    """Whether cuDNN, which compiles its own attention, is in one of the folders or in this environment."""
    if any((Path(folder) / "nvidia" / "cudnn").is_dir() for folder in folders):
        return True
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cudnn") is not None


def compile_program(config, target, program, layers=None, text=None, seconds=None):
    """What `summary_of` says of one program of a config, compiled for a Target.

    Args:
      config: a mapping of plain values.
      target: a `Target`.
      program: one of `programs.names_of`; None: the `facts` of the run alone.
      layers: of the model; None: all.
      text: a file for the optimised HLO; None: it is not kept.
      seconds: after which the compiler is given up; None: never.

    `otherwise` in it: whether a GPU's program was compiled with the library's matmuls alone, after XLA's own generator
    had not taken it.

    Raises CompileError, and ValueError for what is refused before the compiler.
    """
    platform = target.chip.platform
    request = {"config": config, "target": target.name, "program": program, "layers": layers,
               "text": None if text is None else str(text)}
    path = [*find_compiler(platform), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    attempts = [ENVIRONMENT[platform], *([OTHERWISE[platform]] if platform in OTHERWISE else [])]
    for number, own in enumerate(attempts):
        environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu",
                       "TF_CPP_MIN_LOG_LEVEL": "2"}
        try:
            done = subprocess.run([sys.executable, "-m", "jaxrl_fp16.plan.child"], input=json.dumps(request), text=True,
                                  capture_output=True, env=environment, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"the compiler for {target.name} had not finished the {program} after {seconds:g} s; "
                               "allowed: a larger plan.seconds") from error
        if not done.returncode:
            break
    else:
        raise CompileError(f"the compiler for {target.name} did not take the {program}: "
                           f"{_reason(done.stderr, done.returncode)}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise ValueError(answer["refused"])
    return {**answer, "otherwise": number > 0}


def _reason(text, code):
    """The line of a process's errors that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not any(alarm in line for alarm in FALSE_ALARMS)]
    # A failed check of XLA's names itself before it prints a stack; an exception of Python's comes after its own.
    telling = [line for line in lines if "Check failed" in line or "RESOURCE_EXHAUSTED" in line]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    line = (telling[:1] or raised[-1:] or lines[-1:] or ["it said nothing"])[0]
    ended = f"ended by {signal.Signals(-code).name}, " if code < 0 else ""
    return ended + " ".join(line.split())[:400]
