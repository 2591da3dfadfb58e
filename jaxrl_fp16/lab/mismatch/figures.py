"""The paper's offline figures (arXiv 2510.26788), from stored rollouts and `stats.py`."""

import numpy as np

from jaxrl_fp16.lab.figures import FAINT, INK, colour_of, legend, name_axes, new_figure
from jaxrl_fp16.lab.mismatch.stats import DRAWN, by_length, probabilities

POINTS = 20_000  # of a scatter at most: more are no more to be seen, and the page has to be opened
ALONG = {
    "position": "tokens of the response before it",
    "entropy": "entropy of the reference's distribution, nats",
    "length": "tokens of its response",
}


def draw_scatter(rollouts):
    """A column a precision: the scorer's probability of a token against the sampler's; below, their log-ratio."""
    figure, axes = new_figure(2, len(rollouts), width=5.0 * max(2, len(rollouts)), sharex="row", sharey="row")
    for place, rollout in enumerate(rollouts):
        mu, pi = thin(probabilities(rollout))
        style = dict(color=colour_of(rollout.precision, place), s=4, linewidths=0, alpha=0.5, rasterized=True)
        above, below = axes[:, place]
        above.plot((0, 1), (0, 1), color=FAINT, linewidth=0.8)
        above.scatter(mu, pi, **style)
        name_axes(above, rollout.precision, "probability, by the sampler", "by the scorer")
        drawn = (mu > 0) & (pi > 0)
        below.axhline(0, color=FAINT, linewidth=0.8)
        below.scatter(mu[drawn], np.log(pi[drawn]) - np.log(mu[drawn]), **style)
        below.set_xscale("log")
        name_axes(below, "", "probability, by the sampler", "log scorer - log sampler")
    return figure


def thin(arrays, most=POINTS):
    """Arrays [n] cut to at most `most` entries, at even distances."""
    total = len(arrays[0])
    index = np.arange(total) if total <= most else np.linspace(0, total - 1, most).astype(int)
    return tuple(x[index] for x in arrays)


def draw_length(rollouts, reference):
    """A column a pair: each response's log-ratio against its length, with the straight line of each precision."""
    figure, axes = new_figure(1, len(DRAWN), width=12.0, sharex=True)
    for each, pair in zip(axes[0], DRAWN):
        each.axhline(0, color=FAINT, linewidth=0.8)
        for place, rollout in enumerate(rollouts):
            found, colour = by_length(rollout, pair, reference), colour_of(rollout.precision, place)
            each.scatter(*thin((found["length"], found["log_ratio"])), color=colour, s=8, linewidths=0, alpha=0.5,
                         rasterized=True)
            label = rollout.precision
            if np.isfinite(found["slope"]):
                ends = np.array([found["length"].min(), found["length"].max()])
                each.plot(ends, found["intercept"] + found["slope"] / 1000 * ends, color=colour, linewidth=1.6,
                          label=f"{label}: {found['slope']:+.2g} per 1K tokens")
            else:
                each.plot([], [], color=colour, label=f"{label}: one length, no slope")
        name_axes(each, titles(reference)[pair], "tokens of the response", "log-ratio of the response")
        legend(each)
    return figure


def draw_binned(found, along, reference):
    """A column a pair: mean token KL in bins along `along`, with standard errors; `found` as `binned_kl` gives it."""
    figure, axes = new_figure(1, len(DRAWN), width=12.0, sharex=True, sharey=True)
    for each, pair in zip(axes[0], DRAWN):
        drawn = False
        for place, (precision, pairs) in enumerate(found[along].items()):
            bins = {name: np.array(values) for name, values in pairs[pair].items()}
            some = bins["mean"] > 0  # a bin without any difference has no logarithm
            if not some.any():
                continue
            x, mean, error = (bins[name][some] for name in ("x", "mean", "error"))
            error = np.nan_to_num(error)
            # Downwards no farther than a log axis can show. Lists: of an array with one value matplotlib makes a
            # number, which NumPy deprecates.
            errors = np.minimum(error, 0.9 * mean).tolist(), error.tolist()
            each.errorbar(x, mean, errors, color=colour_of(precision, place),
                          linewidth=1.4, marker="o", markersize=3.5, capsize=2, label=precision)
            drawn = True
        name_axes(each, titles(reference)[pair], ALONG[along], "token KL (k3)")
        if drawn:
            each.set_yscale("log")
            legend(each)
        else:
            each.text(0.5, 0.5, "no difference", color=INK, ha="center", transform=each.transAxes)
    return figure


def titles(reference):
    """What the pairs are called above a plot."""
    return {pair: pair.replace("|", " | ").replace("reference", f"{reference} reference") for pair in DRAWN}
