"""What runs of several precisions say about each other, and no more: paired differences over seeds, collapse.

Two runs of one seed began from the same weights and saw the same data, so their values are
paired: what is tested is the mean of the n differences against their own spread, by Student's
t with n - 1 degrees of freedom (two-sided). It assumes that the differences are normal, which so few
cannot show. n: seeds that both sides ran.  w: steps of a moving average.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np

LEVEL = 0.05
ONE_SEED = "one seed: no spread is known"
NO_SPREAD = 1e-9    # of the mean difference: less is rounding


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The values of two sides, compared seed by seed."""

    first: tuple[float, ...]     # of the seeds that both sides have
    second: tuple[float, ...]
    ratio: bool                  # whether logarithms were compared: `difference` is then a factor, first / second
    difference: float            # mean of first - second, or the geometric mean of first / second
    error: float | None          # its standard error over seeds (of the logarithm, with `ratio`); None with one seed
    interval: tuple[float, float] | None  # that holds the difference at 95 %
    p: float | None              # of so large a difference, or a larger one, where none is


def pair(first: Mapping[int, float], second: Mapping[int, float], ratio: bool = False) -> Pairing | None:
    """`{seed: value}` of two sides; None where they have no seed in common.

    With `ratio` the logarithms are compared, unless a value is 0 or negative.
    Values that are not finite are left out.
    """
    seeds = [seed for seed in first if math.isfinite(first[seed]) and math.isfinite(second.get(seed, math.nan))]
    if not seeds:
        return None
    a, b = (tuple(float(side[seed]) for seed in seeds) for side in (first, second))
    ratio = ratio and min(*a, *b) > 0
    differences = np.log(a) - np.log(b) if ratio else np.subtract(a, b)
    mean, error, half, p = paired_t(differences)
    shown = math.exp if ratio else float
    interval = None if half is None else (shown(mean - half), shown(mean + half))
    return Pairing(a, b, ratio, shown(mean), error, interval, p)


def paired_t(differences: Sequence[float]):
    """`(mean, standard error, half of the 95 % interval, p)` of n differences; the last three None for n = 1.

    The last two are None too where all differ alike and by more than nothing, as shares of a few problems do: that two
    such numbers agree does not say that there is no noise.
    """
    from scipy import stats  # here: it takes a second, and only verdicts need it

    differences = np.asarray(differences, np.float64)
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return mean, None, None, None
    error = float(stats.sem(differences))
    if error <= NO_SPREAD * abs(mean):
        return mean, error, *((None, None) if mean else (0.0, 1.0))
    spread = stats.t(n - 1)
    return mean, error, float(spread.ppf(1 - LEVEL / 2)) * error, 2 * float(spread.sf(abs(mean) / error))


def hold_together(chances: Sequence[float | None], level: float = LEVEL) -> list[bool]:
    """Which of several tests hold when all are counted (Holm 1979): one wrong among them in `level` of all tables.

    None stands for a comparison that was not tested.
    """
    tested = sorted((p, place) for place, p in enumerate(chances) if p is not None)
    held = [False] * len(chances)
    for rank, (p, place) in enumerate(tested):
        if p > level / (len(tested) - rank):
            break
        held[place] = True
    return held


def standing(pairing: Pairing | None, held: bool) -> str:
    """What the seeds carry: `held`, beyond noise among all tests of a table; `alone`, taken by itself; `noise`; `one
    seed`, which has no spread; `alike`, all seeds by as much, which has none either; `same`; `absent`, with no seed on
    both sides."""
    if pairing is None:
        return "absent"
    if pairing.first == pairing.second:
        return "same"
    if pairing.p is None:
        return "one seed" if len(pairing.first) == 1 else "alike"
    if pairing.p > LEVEL:
        return "noise"
    return "held" if held else "alone"


def sentence(pairing: Pairing | None, name: str, first: str, second: str, held: bool, tests: int) -> str:
    """The verdict on one quantity, `name`, of the sides `first` and `second`.

    held: whether it holds among all `tests` of its table.
    """
    said = {
        "absent": "no seed ran on both sides", "noise": "no difference beyond seed noise",
        "same": "the same in every seed", "one seed": ONE_SEED,
        "alike": "by as much in every seed: no spread is known",
    }
    found = standing(pairing, held)
    if found == "same" and pairing.p is None:
        return f"the same; {ONE_SEED}"
    if found in said:
        return said[found]
    verdict = f"{first}'s {name} is {size(pairing)} than {second}'s"
    return verdict if found == "held" else f"{verdict}, taken alone; not beyond chance among {tests} comparisons"


def turned(pairing: Pairing | None) -> Pairing | None:
    """The same with its sides exchanged."""
    if pairing is None:
        return None
    turn = (lambda x: 1 / x) if pairing.ratio else (lambda x: -x)
    interval = None if pairing.interval is None else tuple(map(turn, reversed(pairing.interval)))
    return dataclasses.replace(pairing, first=pairing.second, second=pairing.first,
                               difference=turn(pairing.difference), interval=interval)


def size(pairing: Pairing) -> str:
    """`12 times smaller`, `0.031 higher`: of the first side."""
    if pairing.ratio:
        smaller = pairing.difference < 1
        factor = 1 / pairing.difference if smaller else pairing.difference
        return f"{factor:.3g} times {'smaller' if smaller else 'larger'}"
    return f"{abs(pairing.difference):.3g} {'lower' if pairing.difference < 0 else 'higher'}"


# -- collapse ------------------------------------------------------------------------------------


def find_collapse(rewards: Sequence[float], share: float = 0.25) -> int | None:
    """The index from which on a run's reward has collapsed; None for a run that did not.

    Collapsed: from there to the end every moving average (over w steps, a twentieth of the
    run and at least 5) lies below the highest one before it by more than `share` of that
    peak's size, by more than six standard errors of such an average (from the
    spread of neighbouring steps), and for at least w steps. A reward that fell and came back
    has not collapsed. The size of a peak is its value, or its height above the first average,
    whichever is larger.
    """
    rewards = np.asarray(rewards, np.float64)
    rewards = np.where(np.isfinite(rewards), rewards, np.nanmin(rewards, initial=0.0))
    w = window(len(rewards))
    if len(rewards) < 3 * w:
        return None
    averages = np.convolve(rewards, np.full(w, 1 / w), "valid")     # [i] is over the steps i to i + w - 1
    peak = np.maximum.accumulate(averages)
    noise = np.std(np.diff(rewards)) / math.sqrt(2) / math.sqrt(w)
    fall = np.maximum(share * np.maximum(np.abs(peak), peak - averages[0]), 6 * noise)
    above = np.flatnonzero(averages >= peak - fall)
    first = int(above[-1]) + w                                      # the last step of the first average below
    return first if len(averages) - 1 - above[-1] >= w else None


def window(steps: int) -> int:
    """Steps of the moving average that `find_collapse` looks at."""
    return max(5, steps // 20)
