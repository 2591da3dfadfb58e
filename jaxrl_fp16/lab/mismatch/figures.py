"""The paper's offline figures (arXiv 2510.26788), from stored rollouts and `stats.py`.

`rollouts` are `{label: ScoredRollout}`; a label is a precision, after its engine where there are several.
"""

import itertools

import numpy as np

from jaxrl_fp16.lab.figures import FAINT, INK, colour_of, legend, name_axes, new_figure
from jaxrl_fp16.lab.mismatch.stats import DRAWN, by_length, probabilities

POINTS = 20_000  # of a scatter at most: more are no more to be seen, and the page has to be opened
ALONG = {
    "position": "tokens of the response before it",
    "entropy": "entropy of the reference's distribution, nats",
    "length": "tokens of its response",
}
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))   # of the engines, in their order


def looks_of(sides):
    """`{label: {color, linestyle, marker}}` of `{label: {engine, precision, ...}}`: one colour a precision, one line an
    engine."""
    engines, precisions = (list(dict.fromkeys(side[key] for side in sides.values())) for key in ("engine", "precision"))
    lines = dict(zip(engines, itertools.cycle(LINES)))
    return {
        label: {"color": colour_of(side["precision"], precisions.index(side["precision"])),
                "linestyle": lines[side["engine"]][0], "marker": lines[side["engine"]][1]}
        for label, side in sides.items()
    }


def draw_scatter(rollouts, sides):
    """A column a precision, two rows an engine: the scorer's probability of a token against the sampler's; below, their
    log-ratio."""
    engines, precisions = (list(dict.fromkeys(side[key] for side in sides.values())) for key in ("engine", "precision"))
    shape = 2 * len(engines), len(precisions)
    figure, axes = new_figure(*shape, width=5.0 * max(2, len(precisions)), sharex="row", sharey="row")
    looks, empty = looks_of(sides), set(np.ndindex(axes.shape))
    for label, rollout in rollouts.items():
        row, column = 2 * engines.index(rollout.engine), precisions.index(rollout.precision)
        mu, pi = thin(probabilities(rollout))
        style = dict(color=looks[label]["color"], s=4, linewidths=0, alpha=0.5, rasterized=True)
        above, below = axes[row:row + 2, column]
        empty -= {(row, column), (row + 1, column)}
        above.plot((0, 1), (0, 1), color=FAINT, linewidth=0.8)
        above.scatter(mu, pi, **style)
        name_axes(above, label, "probability, by the sampler", "by the scorer")
        drawn = (mu > 0) & (pi > 0)
        below.axhline(0, color=FAINT, linewidth=0.8)
        below.scatter(mu[drawn], np.log(pi[drawn]) - np.log(mu[drawn]), **style)
        below.set_xscale("log")
        name_axes(below, "", "probability, by the sampler", "log scorer - log sampler")
    for place in empty:
        axes[place].set_visible(False)
    return figure


def thin(arrays, most=POINTS):
    """Arrays [n] cut to at most `most` entries, at even distances."""
    total = len(arrays[0])
    index = np.arange(total) if total <= most else np.linspace(0, total - 1, most).astype(int)
    return tuple(x[index] for x in arrays)


def draw_length(rollouts, sides, reference):
    """A column a pair: each response's log-ratio against its length, with the straight line of each side."""
    figure, axes = new_figure(1, len(DRAWN), width=12.0, sharex=True)
    looks = looks_of(sides)
    for each, pair in zip(axes[0], DRAWN):
        each.axhline(0, color=FAINT, linewidth=0.8)
        for label, rollout in rollouts.items():
            found, look = by_length(rollout, pair, reference), looks[label]
            each.scatter(*thin((found["length"], found["log_ratio"])), color=look["color"], marker=look["marker"], s=8,
                         linewidths=0, alpha=0.5, rasterized=True)
            line = {name: look[name] for name in ("color", "linestyle")}
            if np.isfinite(found["slope"]):
                ends = np.array([found["length"].min(), found["length"].max()])
                each.plot(ends, found["intercept"] + found["slope"] / 1000 * ends, linewidth=1.6, **line,
                          label=f"{label}: {found['slope']:+.2g} per 1K tokens")
            else:
                each.plot([], [], **line, label=f"{label}: one length, no slope")
        name_axes(each, titles(reference)[pair], "tokens of the response", "log-ratio of the response")
        legend(each)
    return figure


def draw_binned(found, along, sides, reference):
    """A column a pair: mean token KL in bins along `along`, with standard errors; `found` as `binned_kl` gives it."""
    figure, axes = new_figure(1, len(DRAWN), width=12.0, sharex=True, sharey=True)
    for each, pair in zip(axes[0], DRAWN):
        drawn = [draw_bins(each, pairs[pair], label, looks_of(sides)[label]) for label, pairs in found[along].items()]
        name_axes(each, titles(reference)[pair], ALONG[along], "token KL (k3)")
        finish_log(each, any(drawn))
    return figure


def draw_bins(axes, bins, label, look):
    """One line of what `in_bins` gives; tells whether there was anything to draw."""
    bins = {name: np.array(values) for name, values in bins.items()}
    some = bins["mean"] > 0  # a bin without any difference has no logarithm
    if not some.any():
        return False
    x, mean, error = (bins[name][some] for name in ("x", "mean", "error"))
    error = np.nan_to_num(error)
    # Downwards no farther than a log axis can show. Lists: of an array with one value matplotlib makes a
    # number, which NumPy deprecates.
    errors = np.minimum(error, 0.9 * mean).tolist(), error.tolist()
    axes.errorbar(x, mean, errors, linewidth=1.4, markersize=3.5, capsize=2, label=label, **look)
    return True


def finish_log(axes, drawn):
    """A logarithmic axis with a legend, or the words that nothing differs."""
    if drawn:
        axes.set_yscale("log")
        legend(axes)
    else:
        axes.text(0.5, 0.5, "no difference", color=INK, ha="center", transform=axes.transAxes)


def titles(reference):
    """What the pairs are called above a plot."""
    return {pair: pair.replace("|", " | ").replace("reference", f"{reference} reference") for pair in DRAWN}
