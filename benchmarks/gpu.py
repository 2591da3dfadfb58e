"""What there is to measure on one NVIDIA GPU, in calls of under ten minutes each: their steps in order.

    python benchmarks/gpu.py right      tests, the quickstart's run, the mismatch by attention
    python benchmarks/gpu.py fast       decoding and updating against the card's limits and against PyTorch; kernels
    python benchmarks/gpu.py paper      the paper's sanity test, shortened; the tests beside it

A step is a script of benchmarks/gpu/ in a process of its own, behind a time limit. It writes NAME.json, row by row as
they are measured, and its output is NAME.log, both in --out. A step that fails or is late does not stop the next.
gpu_call_CALL.json says how each step ended, as soon as it has.

With --dry-run the same steps run in tiny sizes on the CPU, in a temporary folder or --out.
The exit code is 1 where a step failed, was late or has a row with an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import tempfile
import time

from record import ROOT, machine, save

SCRIPTS = ROOT / "benchmarks" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
DRY_SECONDS = 300  # a dry run measures no time, and the machine may be busy
GRACE = 5          # seconds from SIGTERM to SIGKILL
INTERRUPTED = 20   # seconds that pytest with workers takes to end


@dataclasses.dataclass(frozen=True)
class Step:
    """One script and how it is run."""

    script: str
    name: str            # of its results
    seconds: int         # its limit
    flags: str = ""
    tiny: str = ""       # flags of a dry run: they come after the others, and win
    xla: str = ""        # more of XLA_FLAGS
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    beside: bool = False  # the next step starts at once, and both end before a third
    needs: str = ""      # the package without which the step is left out


DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
SHARED = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"}    # the tests run on the same card

# -- what a dry run takes in place of a model, a run, a suite --------------------------------------

TINY_MODEL = ("--model.hidden_size 32 --model.intermediate_size 48 --model.num_layers 1 --model.num_heads 2 "
              "--model.num_kv_heads 2 --model.head_dim 16")
TINY_RUN = "--task.heldout_size 6 --evaluation.rows 8 --logging.tensorboard false --run.export false"
TINY_SFT = f"{TINY_MODEL} {TINY_RUN} --sft.batch_size 4 --sft.microbatch_size 4"
TINY_RL = (f"{TINY_MODEL} {TINY_RUN} --task.train_size 64 --training.prompts_per_step 4 --training.minibatch_size 32 "
           "--training.microbatch_size 32 --evaluation.every 0 --evaluation.sets []")
TINY_JOB = f"--precisions fp16 --steps 1 --flags '{TINY_RL} --sft.steps 0 --sft.until_accuracy null'"
TINY_PAPER = ("--precisions fp16 --terms 2 --tokens 16 --warm-steps 1 --steps 1 "
              f"--warm-flags '{TINY_SFT}' --flags '{TINY_RL}'")
TINY_SPEED = "--model tiny --rows 2 --positions 64 --side 64 --copied 4096 --attention plain"
TINY_TESTS = "--tests tests/tasks/test_arithmetic.py"


def tests(name, seconds, which, beside=False):
    return Step("suite.py", name, seconds, f"--limit {seconds - INTERRUPTED} --tests='{which}'", TINY_TESTS,
                environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_ENABLE_COMPILATION_CACHE": "true"},
                beside=beside)


def speed(name, seconds, flags, tiny, **settings):
    return Step("speed.py", name, seconds, flags, f"{TINY_SPEED} {tiny}", **settings)


FOLDERS = "-n 8 tests/models tests/sampling tests/training"
CALLS = {
    "right": (
        tests("gpu_tests_marked", 90, "-m gpu -n 0 tests/models"),
        Step("main_job.py", "gpu_main_job", 230, "", TINY_JOB, DETERMINISTIC),
        tests("gpu_tests", 300, FOLDERS, beside=True),
        Step("mismatch.py", "gpu_mismatch", 310, "", "--models tiny --attention blockwise --precisions fp16 --rows 2 "
             "--columns 8 --tokens 8 --micro 2", DETERMINISTIC, SHARED),
    ),
    "fast": (
        tests("gpu_tests_marked", 60, "-m gpu -n 0 tests/models/test_attention.py"),
        Step("invariance.py", "gpu_invariance", 50, "",
             "--model tiny --most 64 --rows 1 16 --attention plain --columns 64 --attention-rows 2", DETERMINISTIC),
        speed("gpu_speed", 235, "--limit 190", "--slots 64 --columns 32 --precisions fp16"),
        Step("torch_speed.py", "gpu_torch_speed", 150, "--limit 110",
             "--model tiny --rows 2 --slots 64 --columns 32 --positions 64 --precisions bf16 --compiled",
             needs="torch"),
        Step("kernels.py", "gpu_profile", 85, "",
             "--model tiny --rows 2 --slots 64 --columns 32 --update-rows 2 --attention plain"),
    ),
    "paper": (
        speed("gpu_speed_bf16", 60, "--attention cudnn --precisions bf16", "--slots 64 --columns 32"),
        speed("gpu_speed_without_remat", 30, "--attention cudnn --precisions fp16 --slots --remat 0", "--columns 32"),
        speed("gpu_speed_plain", 35, "--attention plain --precisions fp16 --slots 2048 --columns 2048",
              "--slots 64 --columns 32"),
        speed("gpu_speed_deterministic", 35, "--attention cudnn --precisions fp16 --slots 2048 --columns 2048",
              "--slots 64 --columns 32", xla=DETERMINISTIC),
        Step("main_job.py", "gpu_main_job_auto", 45, "--steps 5 --precisions fp16", TINY_JOB),
        tests("gpu_tests", 400, FOLDERS, beside=True),
        Step("paper_test.py", "gpu_paper_test", 420, "--warm-seconds 170 --seconds 100", TINY_PAPER, DETERMINISTIC,
             SHARED),
    ),
}


# -- running them -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A step that runs."""

    step: Step
    process: subprocess.Popen
    log: Path
    limit: int       # seconds
    began: float     # on the clock of files

    def seconds(self):
        return time.time() - self.began


def environment_of(step, out, dry):
    """The environment of a step: its own over the caller's over what is usual."""
    xla = DETERMINISTIC if dry else step.xla    # one for all: compiled programs are kept by these flags too
    caches = out if dry else Path(tempfile.gettempdir())
    usual = {"JAX_PLATFORMS": "cuda,cpu", "JAX_COMPILATION_CACHE_DIR": str(caches / "jaxcache")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "OUT": str(out),
           "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla}".strip()}
    return {**usual, **os.environ, **own, **step.environment, **({"JAX_PLATFORMS": "cpu"} if dry else {})}


def start(step, out, dry):
    flags = shlex.split(step.flags) + (shlex.split(step.tiny) if dry else [])
    log, began = out / f"{step.name}.log", time.time()
    with open(log, "w") as file:
        # Its own session, so that what it starts ends with it.
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / step.script), "--name", step.name, *flags], cwd=ROOT,
            env=environment_of(step, out, dry), stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    return Job(step, process, log, DRY_SECONDS if dry else step.seconds, began)


def stop(job):
    """Ends a job's process and all that it started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(job.process.pid, sent)
            job.process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def problem_of(job, out, late):
    """What is wrong with a job that ended, in a line; None: nothing."""
    path = out / f"{job.step.name}.json"
    written = path.exists() and path.stat().st_mtime >= job.began - 1    # file systems round times
    if late:
        return f"ended after its limit of {job.limit} s"
    if job.process.returncode:
        last = job.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"exit code {job.process.returncode}: {''.join(last)[:300]}"
    rows = json.loads(path.read_text())["rows"] if written else []
    errors = [row["error"] for row in rows if "error" in row]
    if errors:
        return f"{len(errors)} of {len(rows)} rows have an error: {errors[0][:300]}"
    return None if rows else f"no row in {path.name}"


def wait_for(jobs, ended):
    """Until all of `jobs` have ended; each is taken out and given to `ended(job, late)` when it has."""
    while jobs:
        for job in list(jobs):
            late = job.process.poll() is None and job.seconds() > job.limit
            if late:
                stop(job)
            if job.process.poll() is not None:
                jobs.remove(job)
                ended(job, late)
        time.sleep(0.05)


def run(call, steps, out, dry):
    """Runs `steps` in their order; the rows of `gpu_call_CALL.json`, which is written anew after each."""
    rows, jobs, facts = [], [], {**machine(), "dry_run": dry}

    def note(step, **found):
        rows.append({"step": step.name, "script": step.script, "flags": step.flags, "limit": step.seconds, **found})
        save(f"gpu_call_{call}", rows, facts, out)
        print(f"=== {step.name}:", ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)

    def ended(job, late):
        for line in job.log.read_text(errors="replace").splitlines()[-12:]:
            print(line[:300])
        note(job.step, exit=job.process.returncode, seconds=round(job.seconds(), 1),
             problem=problem_of(job, out, late))

    try:
        for step in steps:
            if step.needs and importlib.util.find_spec(step.needs) is None:
                note(step, left_out=f"{step.needs} is not installed")
            else:
                jobs.append(start(step, out, dry))
            if not step.beside:
                wait_for(jobs, ended)
        wait_for(jobs, ended)
    finally:
        for job in jobs:
            stop(job)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results; else $OUT, or benchmarks/results")
    given = parser.parse_args()
    if given.dry_run and given.out and given.out.resolve() == RESULTS:
        parser.error("--out is benchmarks/results; allowed in a dry run: another folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))    # so that no step outlives this
    with tempfile.TemporaryDirectory() as temporary:
        usual = temporary if given.dry_run else os.environ.get("OUT") or RESULTS
        out = (given.out or Path(usual)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        rows = run(given.call, CALLS[given.call], out, given.dry_run)
    return 1 if any(row.get("problem") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
