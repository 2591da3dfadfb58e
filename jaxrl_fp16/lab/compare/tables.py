"""A comparison as tables: what became of each run, first and last values, verdicts on each pair of sides."""

import dataclasses
import itertools
import math

import numpy as np

from jaxrl_fp16.lab.compare.runs import series
from jaxrl_fp16.lab.compare.verdicts import hold_together, pair, sentence, standing

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number of a run that verdicts are given on."""

    name: str
    key: str             # a metric, or a field of the run's outcome
    over: str            # its value, of the steps: `mean`, `median`, `sum`, `last`, `tail` (mean of a tenth); `outcome`
    ratio: bool = False  # compared as a factor: what is positive and may differ by powers of ten
    unit: float = 1.0    # the value is divided by it


REWARDS = (
    Quantity("training reward, last tenth", "reward", "tail"),
    Quantity("training reward, all steps", "reward", "mean"),
)
NUMERICS = (
    Quantity("token KL (k3), sampler | scorer", "mismatch/kl_k3", "mean", True),
    Quantity("|probability difference|, sampler | scorer", "mismatch/prob_abs_diff_mean", "mean", True),
    Quantity("spread of sequence log-ratio", "mismatch/seq_log_ratio_std", "mean", True),
    Quantity("effective sample size", "mismatch/ess_seq", "mean"),
    Quantity("token KL (k3), scorer | gradient", "mismatch_grad/kl_k3", "mean", True),
    Quantity("|probability difference|, scorer | gradient", "mismatch_grad/prob_abs_diff_mean", "mean", True),
    Quantity("gradient norm", "grad_norm", "mean", True),
    Quantity("entropy, last tenth", "entropy", "tail"),
    Quantity("skipped steps", "skipped", "sum"),
)
COSTS = (
    Quantity("tokens/s", "tokens_per_second", "median", True),
    Quantity("CPU seconds", "cpu_seconds", "outcome", True),
    Quantity("wall seconds", "seconds", "outcome", True),
    Quantity("peak resident memory, MiB", "peak_bytes", "outcome", True, MIB),
    Quantity("peak device memory, MiB", "memory/device_peak_bytes", "last", True, MIB),
)


def quantities(comparison):
    """Those that any run has, the evaluated accuracies after the rewards."""
    keys = dict.fromkeys(
        key for run in comparison.runs for record in run.records for key in record
        if key.startswith("eval/") and key.endswith("/accuracy")
    )
    accuracies = [Quantity(f"{key.split('/')[1]} accuracy, last", key, "last") for key in keys]
    return [
        quantity for quantity in (*REWARDS, *accuracies, *NUMERICS, *COSTS)
        if any(math.isfinite(value_of(run, quantity)) for run in comparison.runs)
    ]


def value_of(run, quantity, until=math.inf):
    """The run's value of a quantity over its steps up to `until`; NaN where it has none.

    What a whole run took is NaN for one that did not end with 0.
    """
    if quantity.over == "outcome":
        return run.outcome.get(quantity.key, math.nan) / quantity.unit if run.code == 0 else math.nan
    steps, values = series(run, quantity.key)
    values = values[steps <= until]
    return reduce(values, quantity.over) / quantity.unit if len(values) else math.nan


def reduce(values, over):
    """One number of a run's values in the order of its steps."""
    if over == "tail":
        return float(np.mean(values[-max(1, len(values) // 10):]))
    if over == "last":
        return float(values[-1])
    return float({"mean": np.mean, "median": np.median, "sum": np.sum}[over](values))


# -- verdicts ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One quantity of two sides."""

    quantity: Quantity
    first: str
    second: str
    pairing: object      # a Pairing; None: no seed has it on both sides
    standing: str        # as `verdicts.standing` names it
    text: str


def verdicts(comparison):
    """`{(first label, second label): [Verdict, ...]}` for every two sides."""
    names = quantities(comparison)
    return {
        (first, second): _of_pair(comparison, first, second, names)
        for first, second in itertools.combinations(comparison.sides, 2)
    }


def _of_pair(comparison, first, second, names):
    sides = [{run.seed: run for run in comparison.of(label) if run.steps} for label in (first, second)]
    seeds = [seed for seed in sides[0] if seed in sides[1]]
    until = {seed: min(side[seed].steps[-1]["step"] for side in sides) for seed in seeds}
    pairings = [
        pair(*({seed: value_of(side[seed], quantity, until[seed]) for seed in seeds} for side in sides), quantity.ratio)
        for quantity in names
    ]
    chances = [None if pairing is None else pairing.p for pairing in pairings]
    tests = sum(p is not None for p in chances)
    return [
        Verdict(quantity, first, second, pairing, standing(pairing, held),
                sentence(pairing, quantity.name, first, second, held, tests))
        for quantity, pairing, held in zip(names, pairings, hold_together(chances))
    ]


ONCE = ("seeds", "95 % interval", "p", "verdict")     # what is said once where it is the same in every row
VERDICT_COLUMNS = ("seeds", "difference, or factor", "95 % interval", "p", "verdict")


def verdict_rows(rows):
    """Rows of one pair's table: quantity, both sides' means, then `VERDICT_COLUMNS`."""
    for row in rows:
        p, text = row.pairing, row.text.replace(f"{row.first}'s {row.quantity.name} is", f"{row.first}'s is")
        if p is None:
            yield (row.quantity.name, "-", "-", 0, "-", "-", "-", text)
            continue
        times = "x " if p.ratio else ""
        interval = "-" if p.interval is None else " to ".join(f"{end:.3g}" for end in p.interval)
        chance = "-" if p.p is None else f"{p.p:.2g}"
        yield (
            row.quantity.name, spread(p.first), spread(p.second), len(p.first), f"{times}{p.difference:.3g}", interval,
            chance, text,
        )


def collapse_sentences(comparison):
    """One a side: in how many seeds the reward collapsed, and when."""
    for label in comparison.sides:
        found = comparison.collapses(label)
        ran = {run.seed for run in comparison.of(label) if run.steps}
        at = [f"seed {seed} at step {step}" for seed, step in found.items() if step is not None]
        if not ran:
            yield f"{label}: no run took a step."
        elif at:
            yield f"{label} collapsed in {len(at)} of {len(ran)} {_seeds(ran)} ({', '.join(at)})."
        else:
            yield f"{label} did not collapse in {len(ran)} {_seeds(ran)}."


def _seeds(those):
    return "seed" if len(those) == 1 else "seeds"


# -- values and runs -----------------------------------------------------------------------------------


def spread(values):
    """The mean of some numbers with their standard deviation (ddof 1), as text."""
    mean = f"{np.mean(values):.4g}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.2g}"


VALUE_COLUMNS = ("metric", "side", "seeds", "first", "last", "mean of the last tenth")


def value_rows(comparison, keys):
    """First, last and mean of the last tenth of each metric and side, with the spread over seeds."""
    for key in keys:
        for label in comparison.sides:
            lines = [series(run, key)[1] for run in comparison.of(label)]
            lines = [values for values in lines if len(values)]
            if lines:
                ends = ([values[0] for values in lines], [values[-1] for values in lines],
                        [reduce(values, "tail") for values in lines])
                yield (key, label, len(lines), *map(spread, ends))


RUN_COLUMNS = ("run", "how it ended", "step", "wall s", "CPU s", "peak MiB", "cores", "starts", "last line of stderr")


def run_rows(comparison):
    """What became of each run and warm start, and what it took."""
    for run in (*comparison.warm, *comparison.runs):
        o = run.outcome
        step = run.records[-1]["step"] if run.records else "-"
        if not o:
            yield (run.name, run.ending, step, *["-"] * 5, "")
            continue
        how = run.ending if run.code == 0 else f"{run.ending}, exit code {run.code}"
        cores = "all" if o["cores"] is None else o["cores"]
        yield (run.name, how, step, f"{o['seconds']:.0f}", f"{o['cpu_seconds']:.0f}", f"{o['peak_bytes'] / MIB:,.0f}",
               cores, o["attempts"], run.error)
