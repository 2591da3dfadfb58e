"""The sanity test in miniature: does RL in BF16 end otherwise than in FP16, with one numerics and with two?

    JAX_PLATFORMS=cpu python benchmarks/sanity_mini.py [--presets dr_grpo ...] [--arms fp16 bf16 bf16/fp32 ...] \
        [--seeds 0 1 2] [--steps 60]

An arm is the precision of a run, and after a slash the sampler's where it is another: `bf16/fp32` trains in BF16 on
what FP32 samples. All runs start from one warm start, made once in FP32. Each is a process of its own; a run that
collapsed or was stopped by a guard is a row like any other. Started again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
import statistics

from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.objectives import PRESETS
from presets import FINISHED, INTERRUPTED, RESULTS, command, environment, is_of, newest
from record import ROOT, machine, print_table, save

WARM, CONFIG = ROOT / "configs" / "sanity_mini_warm.yaml", ROOT / "configs" / "sanity_mini.yaml"
WINDOW = 10  # iterations in each point of a curve

# preset -> flags that differ from the config's, for a reason that has nothing to do with precision.
OVERRIDES = {
    # Its range is for rows of thousands of tokens; the mean log ratio over twenty is larger.
    "gspo": {"algorithm.clip_low": 0.03, "algorithm.clip_high": 0.04},
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run."""

    preset: str
    arm: str       # precision, or precision/rollout_precision
    seed: int
    steps: int

    def settings(self):
        return {**dataclasses.asdict(self), "overrides": OVERRIDES.get(self.preset, {})}


def warm_start(work):
    """The exported folder that every run starts from."""
    folder = newest(work, "warm")
    if folder is None or not (folder / "model").is_dir():
        print("warm start", flush=True)
        code, error = command("sft", WARM, work / "warm.log", **{
            "run.dir": work, "run.name": "warm", "logging.tensorboard": "false",
        })
        if code:
            raise SystemExit(f"the warm start ended with {code}: {error}")
        folder = newest(work, "warm")
    return folder / "model"


def run(job, model, work):
    """Runs a job; its row."""
    precision, _, sampler = job.arm.partition("/")
    name = f"{job.preset}-{job.arm.replace('/', '-')}-{job.seed}"
    before = newest(work, name)
    code, error = command("train", CONFIG, work / f"{name}.log", **{
        "model.path": model, "run.dir": work, "run.name": name, "run.seed": job.seed, "run.steps": job.steps,
        "run.export": "false", "precision": precision, **({"rollout_precision": sampler} if sampler else {}),
        "algorithm.preset": job.preset, "checkpoint.every": job.steps, "logging.tensorboard": "false",
        **OVERRIDES.get(job.preset, {}),
    })
    folder = newest(work, name)
    folder = None if folder == before else folder  # refused before it made one
    return {**job.settings(), **measured(folder), "exit_code": code, "failure": error if code else None,
            **machine(), "environment": environment(folder)}


def measured(folder):
    """Curves and totals of a run, as far as it came; figures that are not finite are left out."""
    records = read_metrics(folder) if folder and (folder / "metrics.jsonl").exists() else []
    steps = [record for record in records if "seconds/learn" in record]
    if not steps:
        return {"steps_done": 0}
    windows = [steps[start:start + WINDOW] for start in range(0, len(steps), WINDOW)]

    def curve(key):
        means = [statistics.mean(record[key] for record in window) for window in windows]
        return [mean if math.isfinite(mean) else None for mean in means]

    rewards = [value for value in curve("reward") if value is not None]
    return {
        "steps_done": steps[-1]["step"], "reward": curve("reward"), "reward_first": rewards[0],
        "reward_best": max(rewards), "reward_last": rewards[-1],
        "heldout": {str(record["step"]): record[key] for record in records
                    for key in ["eval/sampled/accuracy"] if key in record},
        **{name: curve(f"mismatch/{name}") for name in ("prob_abs_diff_mean", "kl_k3", "seq_log_ratio_std")},
        "entropy": curve("entropy"), "grad_norm": curve("grad_norm"),
        "skipped": sum(record["skipped"] for record in steps),
        "seconds_per_step": statistics.median(
            record["seconds/sample"] + record["seconds/learn"] for record in steps[1:] or steps
        ),
    }


def summary(rows):
    """One line a preset and arm: mean over seeds of where runs began, their best and their end, and the spread."""
    lines = []
    for preset, arm in dict.fromkeys((row["preset"], row["arm"]) for row in rows):
        group = [row for row in rows if (row["preset"], row["arm"]) == (preset, arm)]
        done = [row for row in group if row["steps_done"]]
        lasts = [row["reward_last"] for row in done]
        heldout = [list(row["heldout"].values())[-1] for row in done if row["heldout"]]
        differences = [row["prob_abs_diff_mean"] for row in done]
        lines.append({
            "preset": preset, "arm": arm, "seeds": len(group),
            "first": _mean([row["reward_first"] for row in done]), "best": _mean([row["reward_best"] for row in done]),
            "last": _mean(lasts), "spread of last": statistics.stdev(lasts) if len(lasts) > 1 else math.nan,
            "held out": _mean(heldout), "prob diff, first": _mean([curve[0] for curve in differences]),
            "prob diff, last": _mean([curve[-1] for curve in differences]),
            "ended": ", ".join(f"seed {row['seed']}: {row['failure']}" for row in group if row["exit_code"]) or "done",
        })
    return lines


def _mean(values):
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else math.nan


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["dr_grpo"])
    parser.add_argument("--arms", nargs="+", default=["fp16", "bf16", "fp16/fp32", "bf16/fp32", "fp32"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "sanity_mini", help="warm start, runs, logs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of sanity_mini.json")
    parser.add_argument("--again", action="store_true", help="repeat finished runs too")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    path = given.out / "sanity_mini.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []

    # Seed by seed and the arms in turn, so that a stop leaves whole comparisons.
    jobs = [
        Job(preset, arm, seed, given.steps) for preset in given.presets for seed in given.seeds for arm in given.arms
    ]
    for job in jobs:
        done = next((row for row in rows if is_of(row, job)), None)
        if done and done["exit_code"] in FINISHED and not given.again:
            continue
        print(f"{job.preset} in {job.arm}, seed {job.seed}", flush=True)
        row = run(job, warm_start(work), work)
        if row["exit_code"] in INTERRUPTED:
            raise SystemExit(f"stopped with exit code {row['exit_code']}; started again, it continues from here")
        rows = [other for other in rows if not is_of(other, job)] + [json.loads(json.dumps(row))]
        save("sanity_mini", rows, {"window": WINDOW}, given.out)
    print_table("sanity_mini", summary([row for row in rows if any(is_of(row, job) for job in jobs)]))


if __name__ == "__main__":
    main()
