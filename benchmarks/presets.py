"""Every preset from one warm start: accuracy, seconds, mismatch, and how each run ended.

    JAX_PLATFORMS=cpu python benchmarks/presets.py [--presets grpo gspo] [--steps 340] [--seeds 0 1] [--docs]

The warm start of the config is trained once, in FP32, and exported; each run starts from that folder, in a
process of its own. A run that failed is a row like any other. Started again, it continues where it was stopped:
finished runs of the same settings are not repeated, and refused or killed ones are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
import statistics
import subprocess
import sys

import yaml

from jaxrl_fp16.config import load_config
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.models import DecoderConfig
from jaxrl_fp16.objectives import PRESETS
from jaxrl_fp16.training.runs.run_config import Config
from record import ROOT, machine, save

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "algorithms.md"
MARKS = "<!-- presets: start -->", "<!-- presets: end -->"
FINISHED = (0, 3)  # exit codes that are a result: done, or stopped by a guard
INTERRUPTED = (130, 143, -2, -15)

# preset -> (flags, why they differ from the config's). One learning rate serves all: Adam divides by the
# gradient's size, so what an aggregation divides by does not matter.
OVERRIDES = {
    "gspo": (
        {"algorithm.clip_low": 0.03, "algorithm.clip_high": 0.04},
        "its range is for rows of thousands of tokens; a mean log ratio over ten is larger, and this clips a tenth",
    ),
    "dapo": (
        {"algorithm.overlong_penalty": 0.05},
        "right answers take up to nine of the ten tokens: a zone of two would punish them",
    ),
    "ppo": (
        {"critic.optimizer.learning_rate": 1e-3},
        "the critic's default is for large models; its head starts at zero",
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run."""

    preset: str
    precision: str
    seed: int
    steps: int
    every: int
    config: str   # name of the file

    def settings(self):
        overrides, _ = OVERRIDES.get(self.preset, ({}, ""))
        return {**dataclasses.asdict(self), "overrides": dict(overrides)}


def command(name, path, log, **flags):
    """Runs one command of the package on config `path`; its exit code and the last line that it wrote as an error."""
    given = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    arguments = [sys.executable, "-m", "jaxrl_fp16.cli", name, str(path), *given]
    errors = log.with_suffix(".err")
    with open(log, "w") as out, open(errors, "w") as err:
        code = subprocess.run(arguments, cwd=ROOT, stdout=out, stderr=err).returncode
    text = errors.read_text(errors="replace")
    for folder in (log.parent, ROOT):
        text = text.replace(f"{folder}/", "")  # a result is read on other machines
    lines = text.split("\n")
    return code, next((line.strip() for line in reversed(lines) if line.strip()), "")


def newest(folder, name):
    """The latest run folder of that name; None where there is none."""
    return max(folder.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime, default=None)


def warm_start(config, work):
    """The config file from which each run starts: the exported warm start in the place of a random model."""
    start = work / "start.yaml"
    if start.exists():
        return start
    print("warm start", flush=True)
    code, error = command("warmup", config, work / "warm.log", **{
        "run.dir": work, "run.name": "warm", "precision": "fp32", "evaluation.every": 0,
        "logging.tensorboard": "false",
    })
    if code:
        raise SystemExit(f"the warm start ended with {code}: {error}")
    model = load_config(Config, config).model
    shape = [field.name for field in dataclasses.fields(DecoderConfig) if getattr(model, field.name) is not None]
    start.write_text(yaml.safe_dump({
        "extends": str(config), "sft": {"steps": 0},
        "model": {"path": str(newest(work, "warm") / "model"), **dict.fromkeys(shape)},
    }))
    return start


def run(job, start, work):
    """Runs a job; its row."""
    name = f"{job.preset}-{job.precision}-{job.seed}"
    before = newest(work, name)
    code, error = command("train", start, work / f"{name}.log", **{
        "run.dir": work, "run.name": name, "run.seed": job.seed, "run.steps": job.steps, "run.export": "false",
        "precision": job.precision, "algorithm.preset": job.preset, "evaluation.every": job.every,
        "checkpoint.every": job.steps, "logging.tensorboard": "false", **job.settings()["overrides"],
    })
    folder = newest(work, name)
    folder = None if folder == before else folder  # refused before it made one
    return {**job.settings(), **measured(folder), "exit_code": code, "failure": error if code else None,
            **machine(), "environment": environment(folder)}


def environment(folder):
    """Versions, device, flags and policy, as the run wrote them down."""
    path = folder and folder / "environment.json"
    return json.loads(path.read_text()) if path and path.exists() else {}


def measured(folder):
    """What a run's metrics say; figures that are not finite are left out."""
    records = read_metrics(folder) if folder and (folder / "metrics.jsonl").exists() else []
    steps = [record for record in records if "seconds/learn" in record]
    last = steps[-1] if steps else {}
    wanted = ("mismatch/kl_k3", "mismatch_grad/kl_k3", "reward", "clip_fraction")
    evaluated = {
        name: {record["step"]: record[key] for record in records if key in record}
        for name in ("sampled", "greedy") for key in [f"eval/{name}/accuracy"]
    }
    row = {
        "accuracy": evaluated, "steps_done": last.get("step", 0),
        "skipped": sum(record.get("skipped", 0) for record in steps),
        **{key: last[key] for key in wanted if key in last},
    }
    if steps:
        timed = steps[1:] or steps  # the first one compiles
        seconds = [record["seconds/sample"] + record["seconds/learn"] for record in timed]
        row["seconds_per_step"] = statistics.median(seconds)
    return {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}


def is_of(row, job):
    return all(row.get(key) == value for key, value in job.settings().items())


# -- the table ---------------------------------------------------------------------------------------


def markdown(rows):
    """One line a preset and precision, means over its seeds: accuracy sampled / greedy by step."""
    steps = sorted({int(step) for row in rows for step in row["accuracy"]["sampled"]})
    head = ["preset", *(f"step {step}" for step in steps), "s/step", "token KL", "seeds", "ended"]
    if len({row["precision"] for row in rows}) > 1:
        head.insert(1, "precision")
    lines = [head, ["---"] * len(head)]
    for preset, precision in sorted({(row["preset"], row["precision"]) for row in rows}, key=_place):
        group = [row for row in rows if (row["preset"], row["precision"]) == (preset, precision)]
        cells = [f"`{preset}`" + "*" * bool(group[0]["overrides"])]
        cells += [precision] * ("precision" in head)
        cells += [_accuracy(group, step) for step in steps]
        cells += [_mean(group, "seconds_per_step", ".2f"), _mean(group, "mismatch/kl_k3", ".1e"), str(len(group))]
        lines.append([*cells, _endings(group)])
    notes = [
        f"\\* `{preset}`: " + ", ".join(f"`{key}: {value}`" for key, value in flags.items()) + f": {why}."
        for preset, (flags, why) in OVERRIDES.items() if any(row["preset"] == preset for row in rows)
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    row = max(rows, key=lambda row: bool(row["environment"]))
    commits = ", ".join(sorted({str(row["commit"]) for row in rows}))
    where = (
        f"Held-out accuracy, sampled at temperature 1 / greedy, from one warm start of `configs/{row['config']}`, in "
        f"{' and '.join(sorted({row['precision'] for row in rows}))}; token KL (k3) of sampler and scorer at the last "
        f"step; median seconds of an iteration. On {_device(row)}, commit {commits}."
    )
    return "\n\n".join([where, table, "\n".join(notes)]).rstrip()


def _device(row):
    return f"{row['environment'].get('device_kind', 'no device')} ({row['processor']}, {row['cores']} cores)"


def _place(key):
    return list(PRESETS).index(key[0]), key[1]


def _mean(rows, key, form):
    values = [row[key] for row in rows if key in row]
    return format(statistics.mean(values), form) if values else "-"


def _accuracy(rows, step):
    def of(name):
        values = [found[str(step)] for row in rows if str(step) in (found := row["accuracy"][name])]
        return f"{statistics.mean(values):.3f}" if values else "-"

    return f"{of('sampled')} / {of('greedy')}"


def _endings(rows):
    failed = [f"seed {row['seed']}: exit {row['exit_code']}, {row['failure']}" for row in rows if row["exit_code"]]
    return "; ".join(failed).replace("|", "/") or "done"


def write_page(table):
    text = PAGE.read_text()
    before, found, rest = text.partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not found or not closed:
        raise SystemExit(f"{PAGE} lacks the lines {' and '.join(MARKS)}")
    PAGE.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="*", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--precision", nargs="*", default=["fp16"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=340)
    parser.add_argument("--every", type=int, default=40, help="steps between evaluations")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "presets", help="warm start, run folders, logs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of presets.json")
    parser.add_argument("--again", action="store_true", help="repeat finished runs too")
    parser.add_argument("--docs", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    given = parser.parse_args()
    config, work = given.config.resolve(), given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    path = given.out / "presets.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []

    jobs = [
        Job(preset, precision, seed, given.steps, given.every, config.name)
        for precision in given.precision for seed in given.seeds for preset in given.presets
    ]
    for job in jobs:
        done = next((row for row in rows if is_of(row, job)), None)
        if done and done["exit_code"] in FINISHED and not given.again:
            continue
        print(f"{job.preset} in {job.precision}, seed {job.seed}", flush=True)
        row = run(job, warm_start(config, work), work)
        if row["exit_code"] in INTERRUPTED:
            raise SystemExit(f"stopped with exit code {row['exit_code']}; started again, it continues from here")
        rows = [other for other in rows if not is_of(other, job)] + [json.loads(json.dumps(row))]
        save("presets", rows, {}, given.out)
    table = markdown([row for row in rows if any(is_of(row, job) for job in jobs)])
    print(table)
    if given.docs:
        write_page(table)


if __name__ == "__main__":
    main()
