"""Tiny runs that are disturbed, resumed, and compared bit by bit with the same run left alone.

Each run is a command of its own, `jaxrl_fp16.cli train`, on the CPU: a model of 17,000 parameters, FP16 with a loss
scale that falls and grows every few steps, a checkpoint every third. Programs are compiled once a work folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time

import jax
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from jaxrl_fp16.logs import METRICS, SAMPLES  # noqa: E402
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig, Checkpoints  # noqa: E402
from record import ROOT, record  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "runs" / "reliability"
EVERY = 3                # steps between checkpoints
PATIENCE = 180.0         # seconds after which a process that should have moved is taken for hung
POLL = 0.001             # seconds

BASE = {
    "run": {"export": False, "platform": "cpu", "stamp": False},
    "precision": "fp16",
    "model": {"family": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2,
              "num_kv_heads": 1, "head_dim": 16, "tie_embeddings": True},
    "task": {"arithmetic": {"kinds": ["add"], "digits": 1}, "train_size": 64, "heldout_size": 6},
    "sampling": {"max_new_tokens": 4, "group_size": 4},
    "optimizer": {"learning_rate": 1e-2},
    "loss_scale": {"initial": 2.0**20, "growth_interval": 3},     # the first steps overflow
    "algorithm": {"preset": "grpo", "kl_coef": 0.1},
    "training": {"prompts_per_step": 8, "minibatch_size": 16, "microbatch_size": 8, "max_prompt_tokens": 6,
                 "truncated": "keep"},
    "checkpoint": {"every": EVERY, "keep": 3},
    "logging": {"tensorboard": False},
}
REWARD = '''
def reward(prompts, responses, examples):
    """The share of digits among four characters: what an untrained model earns some of."""
    return [sum(character.isdigit() for character in response) / 4 for response in responses]
'''
# What a step may depend on besides: a reference, a position that skips ahead, a critic, weights from a warm start.
RUNS = {
    "plain": {"algorithm": {"kl_coef": 0.0}, "loss_scale": {"initial": 2.0**15, "growth_interval": 400}},
    "grpo": {},
    "dapo": {"algorithm": {"preset": "dapo"}, "training": {"max_sampling_rounds": 3}},
    "ppo": {"algorithm": {"preset": "ppo", "kl_in": "reward"}},
    "warm": {"sft": {"steps": 4, "batch_size": 16, "microbatch_size": 16, "max_length": 10}},
}
HARD = [run for run in RUNS if run != "plain"]     # those whose loss scale moves


def arguments(description, count, name):
    """The flags that every script here has: `count`, `seed`, `work` (emptied by nobody), `out`."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=WORK / name, help="run folders, logs, compiled programs")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of reliability_{name}.json")
    return parser


def split(count, names):
    """How many of `count` each name gets, as evenly as may be."""
    return {name: count // len(names) + (index < count % len(names)) for index, name in enumerate(names)}


def conclude(name, rows, facts, problems, out):
    """Writes the result file, prints rows and problems; the exit code, 1 if there are problems."""
    record(f"reliability_{name}", rows, {**facts, "problems": problems[:20], "passed": not problems}, out)
    for problem in problems[:20]:
        print(f"problem: {problem}")
    print(f"{name}: {'passed' if not problems else f'{len(problems)} problems'}", flush=True)
    return 1 if problems else 0


# -- a process ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Life:
    """One process of a run, from its start to its end."""

    process: subprocess.Popen
    folder: Path      # of the run
    log: Path         # what it said; errors in the same place, `.err`
    began: float      # seconds since the epoch

    def last_step(self):
        """The last step that this process has recorded or has found there on resuming; None before that."""
        try:
            if (self.folder / METRICS).stat().st_mtime < self.began:
                return None
        except FileNotFoundError:
            return None
        return last_recorded(self.folder)

    def saving(self):
        """Whether a checkpoint is half written or half removed, by this process."""
        for path in self.folder.glob("*/*.partial"):       # in `checkpoints`, or those of a warm start
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ctime >= self.began:
                    return True
        return False

    def wait_until(self, condition, seconds=PATIENCE):
        """True once `condition()` holds, False if the process ends before; RuntimeError for one that hangs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(POLL)
        raise RuntimeError(f"{self.log}: nothing happened for {seconds:g} s")

    def errors(self):
        return self.log.with_suffix(".err").read_text(errors="replace")


def last_recorded(folder):
    """The last step of `metrics.jsonl`; -1 in an empty one, None where there is none. Reads its end alone."""
    try:
        with open(folder / METRICS, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2**16))
            lines = file.read().split(b"\n")[:-1]        # what has no end yet is no record yet
    except FileNotFoundError:
        return None
    return json.loads(lines[-1])["step"] if lines else -1


def config_file(run, work):
    """The file with a run's config, a section of `RUNS` over `BASE`."""
    config = {section: dict(values) if isinstance(values, dict) else values for section, values in BASE.items()}
    for section, values in RUNS[run].items():
        config[section] = config.get(section, {}) | values
    work.mkdir(parents=True, exist_ok=True)
    path, rewards = work / f"{run}.json", work / "digits.py"
    config["task"]["reward_file"] = str(rewards)
    for file, text in ((rewards, REWARD), (path, json.dumps(config, indent=1))):
        if not file.exists() or file.read_text() != text:       # another lane may be reading it
            file.write_text(text)
    return path


@contextlib.contextmanager
def started(run, folder, work, steps, **flags):
    """Gives the `Life` of `run` in `folder`: a new one, or resumed where the folder holds one."""
    flags = {"run.dir": folder.parent, "run.name": folder.name, "run.steps": steps,
             "run.compile_cache": work / "compiled", **flags}
    if (folder / "config.yaml").exists():
        flags["resume"] = folder
    else:
        shutil.rmtree(folder, ignore_errors=True)       # of a process that was killed as it made the folder
    log = work / "logs" / f"{folder.name}-{time.monotonic_ns()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    given = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                   "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    with open(log, "w") as out, open(log.with_suffix(".err"), "w") as err:
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxrl_fp16.cli", "train", str(config_file(run, work)), *given],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        )
    try:
        yield Life(process, folder, log, began)
    finally:
        process.kill()
        process.wait()


def undisturbed(run, work, steps):
    """The folder of `run` left alone, every step's checkpoint kept. Made once for the same code and config."""
    folder, mark = work / f"{run}-undisturbed", work / f"{run}-undisturbed.json"
    made = {"steps": steps, "config": config_file(run, work).read_text(), "code": _digest_of_code(),
            "jax": jax.__version__}
    if mark.exists() and json.loads(mark.read_text()) == made:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with started(run, folder, work, steps, **{"checkpoint.every": 1, "checkpoint.keep": steps + 1}) as life:
        code = life.process.wait(600)
    if code:
        raise RuntimeError(f"{run}, left alone, ended with {code}: {life.errors()}")
    mark.write_text(json.dumps(made))
    return folder


def _digest_of_code():
    digest = hashlib.blake2b()
    for path in sorted((ROOT / "jaxrl_fp16").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# -- comparing ---------------------------------------------------------------------------------------------


def differences(folder, expected, shared=False):
    """In what two finished runs differ, as lines: metrics (times excepted), samples, every checkpoint of `folder`.
    shared: of the metrics only those that both have, as where code of two commits wrote them."""
    found = []
    mine, theirs = _without_times(folder), _without_times(expected)
    if shared:
        mine, theirs = ([{key: a[key] for key in a if key in b} for a, b in zip(these, those)] + these[len(those):]
                        for these, those in ((mine, theirs), (theirs, mine)))
    if mine != theirs:
        step = next((a["step"] for a, b in zip(mine, theirs) if a != b), min(len(mine), len(theirs)))
        found.append(f"{METRICS} differs at step {step}, {len(mine)} records against {len(theirs)}")
    if (folder / SAMPLES).read_bytes() != (expected / SAMPLES).read_bytes():
        found.append(f"{SAMPLES} differs")
    steps = finished_steps(folder)
    if not steps or steps[-1] != theirs[-1]["step"]:
        found.append(f"the last checkpoints are {steps[-3:]}, the last step is {theirs[-1]['step']}")
    return found + [line for step in steps for line in checkpoint_differences(folder, expected, step)]


def checkpoint_differences(folder, expected, step):
    """In what two checkpoints of a step differ: arrays by their bits, and the position in the data."""
    try:
        (mine, place), (theirs, wanted) = read_checkpoint(folder, step), read_checkpoint(expected, step)
    except Exception as error:
        return [f"checkpoint {step} is not restored: {' '.join(str(error).split())[:200]}"]
    wrong = [name for name in {**mine, **theirs} if not same_bits(mine.get(name), theirs.get(name))]
    found = [f"checkpoint {step}: {len(wrong)} arrays differ, {wrong[0]} among them"] if wrong else []
    return found + ([f"checkpoint {step}: {place} against {wanted}"] if place != wanted else [])


def finished_steps(folder):
    """The steps whose checkpoint has its final name and a manifest, oldest first."""
    return sorted(int(path.parent.name) for path in (folder / "checkpoints").glob("*/manifest.json")
                  if path.parent.name.isdecimal())


def read_checkpoint(folder, step):
    """`(arrays by their path, extra values)` of one step; keys as their integers. Raises CheckpointError."""
    with Checkpoints(folder / "checkpoints", CheckpointConfig(), say=lambda text: None) as checkpoints:
        return checkpoints.arrays(step)


def arrays_of(tree):
    """The leaves as NumPy arrays by their path; keys as their integers."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        leaves[jax.tree_util.keystr(path, simple=True, separator=".")] = np.asarray(
            jax.random.key_data(leaf) if key else leaf)
    return leaves


def same_bits(a, b):
    """Whether both are there and equal in dtype, shape and every bit."""
    if a is None or b is None:
        return False
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _without_times(folder):
    """The records of `metrics.jsonl` as they are written, where NaN is a text and equal to itself."""
    timed = lambda key: key.startswith(("seconds/", "memory/")) or key == "tokens_per_second"
    records = map(json.loads, (folder / METRICS).read_text().splitlines())
    return [{key: value for key, value in record.items() if not timed(key)} for record in records]
