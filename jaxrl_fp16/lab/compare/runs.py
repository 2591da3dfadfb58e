"""The runs of a comparison: which there are, what became of them, and their metrics over steps.

A side is one engine that samples, in one precision of trainer and sampler; its label is `fp16`, or `fp16<-bf16` where
the sampler computes in another, after the engine where `compare.engines` names any: `vllm fp16`.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import math
from pathlib import Path
import re
from typing import Any

import numpy as np

from jaxrl_fp16.config import load_config
from jaxrl_fp16.lab.compare.verdicts import find_collapse
from jaxrl_fp16.logs import METRICS, read_metrics
from jaxrl_fp16.objectives import rule_of
from jaxrl_fp16.training.runs.run_config import Config

CONFIGS, OUTCOMES = "configs", "outcomes.json"
GUARD = 3


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run that is to be started."""

    name: str                # of its folder
    label: str               # of its side
    precision: str
    rollout: str | None      # the sampler's, where it differs
    seed: int
    config: Any
    engine: str = "jit"      # what samples


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as far as it came."""

    name: str
    label: str
    precision: str
    rollout: str | None
    seed: int
    code: int | None                 # None: not started, or not ended
    error: str                       # of a run that did not end with 0
    outcome: Mapping[str, Any]       # seconds, cpu_seconds, peak_bytes, cores, attempts; empty: not started
    records: Sequence[Mapping]       # metrics.jsonl
    engine: str = "jit"

    @property
    def steps(self):
        """The records of RL steps, which have a `reward`."""
        return [record for record in self.records if "reward" in record]

    @property
    def ending(self):
        """How it ended, in words."""
        if self.code is None:
            return "not at its end" if self.records else "not started"
        words = {0: "done", GUARD: "stopped itself", 2: "refused", 130: "interrupted", 143: "terminated"}
        return words.get(self.code, f"killed (signal {self.code - 128})" if self.code > 128 else "crashed")


@dataclasses.dataclass(frozen=True)
class Comparison:
    folder: Path
    config: Any
    runs: Sequence[Run]
    warm: Sequence[Run]      # the warm starts
    sides: Sequence[str]     # labels, in the order in which they were asked for

    def of(self, label):
        """The runs of one side."""
        return [run for run in self.runs if run.label == label]

    def collapses(self, label):
        """`{seed: step from which the reward has collapsed, or None}`."""
        share = self.config.compare.collapse
        found = {run.seed: find_collapse([step["reward"] for step in run.steps], share) for run in self.of(label)}
        steps = {run.seed: run.steps for run in self.of(label)}
        return {seed: None if at is None else steps[seed][at]["step"] for seed, at in found.items()}


def plan_runs(config, folder, warm=True):
    """The runs of section `compare`, those of one seed side by side.

    With `warm` they begin from the warm start of their seed in `folder`, where `sft.steps` asks for one.
    """
    section = config.compare
    runs = []
    for seed in section.seeds or (config.run.seed,):
        for engine, precision in itertools.product(section.engines or (config.rollout.engine,), section.precisions):
            for rollout in section.rollout_precisions or (precision,):
                rollout = None if rollout == precision else rollout
                name = "_rollout_".join(map(_plain, filter(None, (precision, rollout)))) + f"-seed{seed}"
                label = f"{precision}<-{rollout}" if rollout else precision
                if section.engines:
                    name, label = f"{engine}_{name}", f"{engine} {label}"
                own = _config_of(config, folder, name, precision, rollout, seed, warm, engine)
                runs.append(Planned(name, label, precision, rollout, seed, own, engine))
    return runs


def _plain(precision):
    return re.sub(r"[^A-Za-z0-9]+", "_", precision)


def _config_of(config, folder, name, precision, rollout, seed, warm, engine):
    run = dataclasses.replace(config.run, name=name, dir=str(folder), stamp=False, seed=seed)
    own = dataclasses.replace(config, precision=precision, rollout_precision=rollout, run=run, resume=None,
                              rollout=dataclasses.replace(config.rollout, engine=engine))
    if not (warm and config.sft.steps):
        return own
    start = str((folder / f"warm-seed{seed}" / "model").resolve())     # however a resumed folder is spelled
    return dataclasses.replace(
        own, model=dataclasses.replace(config.model, path=start), sft=dataclasses.replace(config.sft, steps=0)
    )


# -- what became of them -----------------------------------------------------------------------------


def read_comparison(folder):
    """A `Comparison` from the files in `folder`, whatever is there by now."""
    folder = Path(folder)
    config = load_config(Config, folder / "config.yaml")
    path = folder / OUTCOMES
    outcomes = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    planned = plan_runs(config, folder)
    seeds = list(dict.fromkeys(run.seed for run in planned)) if config.sft.steps else []
    warm = [Planned(f"warm-seed{seed}", "warm start", "fp32", None, seed, None) for seed in seeds]
    runs, warm = ([_read_run(folder, run, outcomes.get(run.name)) for run in group] for group in (planned, warm))
    return Comparison(folder, config, runs, warm, list(dict.fromkeys(run.label for run in runs)))


def _read_run(folder, run, outcome):
    outcome = dict(outcome or {})
    code, error = outcome.pop("code", None), outcome.pop("error", "")
    records = read_metrics(folder / run.name) if (folder / run.name / METRICS).exists() else []
    return Run(run.name, run.label, run.precision, run.rollout, run.seed, code, error, outcome, records, run.engine)


def last_step(path, tail=2**16):
    """The step of the last whole line of a metrics file, which may be growing; 0 without any."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - tail))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return 0


# -- over steps ----------------------------------------------------------------------------------------

POINTS = 100    # of a line at most


def series(run, key, width=1):
    """`(steps, values)` of one metric as float64 arrays, each value over `width` steps in a row; finite ones alone.

    Over a window a metric is combined as over an iteration's optimizer steps: extremes for `_max`
    and `_min`, sums for counts, the last loss scale, means for all else. What is
    evaluated now and then is taken as it is.
    """
    found = [(record["step"], record[key]) for record in run.records if math.isfinite(_number(record.get(key)))]
    if key.startswith("eval/"):
        width = 1
    windows = collections.defaultdict(list)
    for step, value in found:
        windows[-(-step // width)].append((step, value))
    combine = rule_of(key).steps
    steps = np.array([np.mean([step for step, _ in window]) for window in windows.values()])
    return steps, np.array([combine([value for _, value in window]) for window in windows.values()], np.float64)


def _number(value):
    return float(value) if isinstance(value, (int, float)) else math.nan


def window_of(comparison):
    """How many steps a point of the plots stands for."""
    longest = max((run.steps[-1]["step"] for run in comparison.runs if run.steps), default=1)
    return max(1, math.ceil(longest / POINTS))


def band(lines):
    """`(steps, mean, lowest, highest)` over several `(steps, values)`, at the steps that all of them have."""
    shared = sorted(set.intersection(*(set(steps) for steps, _ in lines))) if lines else []
    if not shared:
        return None
    values = np.array([[dict(zip(steps, values))[step] for step in shared] for steps, values in lines])
    return np.array(shared), values.mean(0), values.min(0), values.max(0)


def logged_keys(comparison):
    """Every metric of which any run logged a finite number, in order of appearance."""
    keys = (
        key for run in comparison.runs for record in run.records for key, value in record.items()
        if key != "step" and math.isfinite(_number(value))
    )
    return list(dict.fromkeys(keys))
