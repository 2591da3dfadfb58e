"""Run folders and checkpoints that an earlier commit wrote: today's code resumes, evaluates and exports them.

    JAX_PLATFORMS=cpu python benchmarks/reliability/earlier_commit.py --commit REV

The earlier commit, checked out beside this tree, runs each kind to its end, and again to its middle. Today's code
continues the second folder, which must end bitwise as the first (metrics but times, samples, every array of the last
checkpoint); exports the first one's checkpoint to the bytes that the earlier commit exported; and evaluates that
model to the numbers that the earlier commit finds. The kinds: `grpo`, a policy; `ppo`, with a critic and a
reference; `dpo`, always with a reference.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys

from runs import ROOT, arguments, conclude, config_file, differences

STEPS, MIDDLE = 6, 3
KINDS = {"grpo": "train", "ppo": "train", "dpo": "dpo"}
CONFIGS = {"dpo": "plain"}      # a kind's section of `RUNS`, where it has another name
EVALUATED = ("--evaluation.sets", "[{name: sampled, samples: 2, temperature: 1}]")


@contextlib.contextmanager
def checked_out(commit, work):
    """Gives the folder of a worktree of `commit`."""
    folder = work / "earlier"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
    subprocess.run(["git", "worktree", "add", "--detach", "--force", str(folder), commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def command(tree, *arguments):
    """The console of a command of the code in `tree`; RuntimeError with what it said where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                   "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    done = subprocess.run([sys.executable, "-m", "jaxrl_fp16.cli", *map(str, arguments)], cwd=tree, env=environment,
                          text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def train(tree, kind, folder, work, steps, *more):
    """Runs `kind` in `folder` with the code in `tree`."""
    config = config_file(CONFIGS.get(kind, kind), work)
    flags = {"run.dir": folder.parent, "run.name": folder.name, "run.compile_cache": work / "compiled",
             "run.export": "true", "run.steps": steps, "dpo.steps": steps, "dpo.batch_size": 16,
             "dpo.microbatch_size": 8, "dpo.max_length": 10, "checkpoint.every": 1, "checkpoint.keep": STEPS + 1,
             "evaluation.every": 1}   # a run also evaluates at its last step, which the cut one reaches earlier
    command(tree, KINDS[kind], config, *[text for key, value in flags.items() for text in (f"--{key}", value)], *more)


def evaluate(tree, kind, model, work):
    """The numbers of `eval` of a model folder."""
    config = config_file(CONFIGS.get(kind, kind), work)
    shape = [text for name in json.loads(config.read_text())["model"] for text in (f"--model.{name}", "null")]
    said = command(tree, "eval", config, *shape, "--model.path", model, *EVALUATED)
    return json.loads(said.splitlines()[-1])


def check(kind, tree, work):
    """`(row, problems)` of one kind."""
    whole, cut = work / f"{kind}-whole", work / f"{kind}-cut"
    for folder in (whole, cut):
        shutil.rmtree(folder, ignore_errors=True)
    train(tree, kind, whole, work, STEPS)
    train(tree, kind, cut, work, MIDDLE)
    exported = (whole / "model" / "model.safetensors").read_bytes()
    train(ROOT, kind, cut, work, STEPS, "--resume", cut)
    problems = differences(cut, whole, shared=True)
    if (cut / "model" / "model.safetensors").read_bytes() != exported:
        problems.append("what the resumed run exports differs")
    if evaluate(tree, kind, whole / "model", work) != evaluate(ROOT, kind, whole / "model", work):
        problems.append("eval gives other numbers")
    shutil.rmtree(whole / "model")
    command(ROOT, "export", config_file(CONFIGS.get(kind, kind), work), "--resume", whole, "--run.dir", whole.parent,
            "--run.name", whole.name, "--dpo.batch_size", 16, "--dpo.microbatch_size", 8, "--dpo.max_length", 10)
    if (whole / "model" / "model.safetensors").read_bytes() != exported:
        problems.append("export writes other weights")
    row = {"kind": kind, "command": KINDS[kind], "steps": STEPS, "resumed_after": MIDDLE, "bitwise_equal": not problems}
    return row, [f"{kind}: {text}" for text in problems]


def main():
    parser = arguments(__doc__, len(KINDS), "earlier_commit")
    parser.add_argument("--commit", required=True, help="that wrote the folders")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    with checked_out(given.commit, work) as tree:
        done = [check(kind, tree, work) for kind in list(KINDS)[: given.count]]
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, text=True, capture_output=True)
    rows, problems = [row for row, _ in done], [problem for _, found in done for problem in found]
    return conclude("earlier_commit", rows, {"earlier": head.stdout.strip()}, problems, given.out)


if __name__ == "__main__":
    sys.exit(main())
