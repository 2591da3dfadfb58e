"""What telemetry costs: CPU time of iterations with a look at the ranges against those without, taking turns.

    JAX_PLATFORMS=cpu python benchmarks/telemetry.py [--pairs 30] [--config configs/quickstart.yaml] [--key value ...]

One run, without its warm start and evaluations, that looks in every second iteration, as
often as no default would; what a look costs is divided by `telemetry.every`.
CPU time of the process, by `getrusage`; the iterations that compile are left out and their
look is reported separately. Keys of the config may follow.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile

from jaxrl_fp16.commands.train import train
from jaxrl_fp16.config import load_config, parse_overrides
from jaxrl_fp16.telemetry import TelemetryConfig
from jaxrl_fp16.training.loops import iterations as loop
from jaxrl_fp16.training.loops.nonfinite import Watch
from jaxrl_fp16.training.runs.run_config import Config
from record import record

WARM = 2  # pairs that compile, and one more
ALONE = ("--sft.steps", "0", "--sft.until_accuracy", "null", "--evaluation", "{}", "--checkpoint.every", "0",
         "--run.export", "false", "--logging.tensorboard", "false", "--telemetry.every", "2")


def cpu_seconds():
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


class Timed(Watch):
    """Notes the CPU time at which each iteration's look begins and ends."""

    notes: list[tuple[float, float]] = []

    def look(self, step, state, taken):
        began = cpu_seconds()
        found = super().look(step, state, taken)
        self.notes.append((began, cpu_seconds()))
        return found


def measure(config):
    """Per iteration: `(CPU seconds without its look, CPU seconds of the look)`; the first has no beginning."""
    Timed.notes.clear()
    original, loop.Watch = loop.Watch, Timed
    try:
        train(config)
    finally:
        loop.Watch = original
    return [(now[0] - before[1], now[1] - now[0]) for before, now in zip(Timed.notes, Timed.notes[1:])]


def summarize(name, spent, every):
    """A row of the table. Iterations 2, 4, 6, ... look; each is held against the one after it.

    `cost` is the look's own CPU time by that of the plain iteration, divided by `every`: a share of all
    CPU time, with the least and the most of the pairs. `pair_difference` is the same share
    by the whole iterations' difference, with its quartiles; it includes their own scatter.
    """
    looking, plain = spent[0::2], spent[1::2]
    pairs = [(own + look, look, other + nothing) for (own, look), (other, nothing) in zip(looking, plain)][WARM:]
    costs = [look / step for _, look, step in pairs]
    ratios = [(with_it / step - 1) / every for with_it, _, step in pairs]
    step = statistics.median(step for *_, step in pairs)
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "config": name, "pairs": len(pairs), "every": every, "step_cpu_s": step,
        "look_cpu_s": statistics.median(look for _, look, _ in pairs),
        "compile_cpu_s": looking[0][1],
        "look_by_step": statistics.median(costs),
        "cost": statistics.median(costs) / every, "cost_least": min(costs) / every, "cost_most": max(costs) / every,
        "pair_difference": statistics.median(ratios), "pair_low": low, "pair_high": high,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--name", default="telemetry", help="of the file of results")
    given, rest = parser.parse_known_args()
    steps = 2 * (given.pairs + WARM) + 1
    with tempfile.TemporaryDirectory() as folder:
        flags = [*ALONE, "--run.steps", str(steps), "--run.dir", folder, "--run.compile_cache", "null"]
        config = load_config(Config, given.config, parse_overrides([*flags, "--run.name", "telemetry", *rest]))
        row = summarize(given.config, measure(config), TelemetryConfig().every)
    print(record(given.name, [row], {"overrides": rest, "bound": 0.02}))


if __name__ == "__main__":
    main()
