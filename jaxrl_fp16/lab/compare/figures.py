"""A comparison as plots over steps: one colour a precision, a line for the mean over seeds, a band for their spread.

Where engines are compared each has lines of its own kind.
"""

import math

import numpy as np

from jaxrl_fp16.lab.compare.runs import band, series, window_of
from jaxrl_fp16.lab.figures import FAINT, colour_of, legend, name_axes, new_figure

LINES = ("-", "--", ":", "-.", (0, (1, 2, 3, 2)), (0, (6, 1)))     # of several engines
DASHES = {None: "-", "fp16": "--", "bf16": ":", "fp32": "-."}     # by the sampler's precision, where it differs
REWARD = ("reward", "training reward", "linear")
MAIN = (
    ("mismatch/kl_k3", "token KL (k3), sampler | scorer", "log"),
    ("mismatch/prob_abs_diff_mean", "mean |probability difference|", "log"),
    ("mismatch/seq_log_ratio_std", "spread of sequence log-ratios", "log"),
    ("mismatch/ess_seq", "effective sample size, share of rows", "linear"),
)
OTHER_MISMATCH = (
    ("mismatch/kl_k1", "mean log-ratio (k1)", "linear"),
    ("mismatch/logprob_abs_diff_mean", "mean |log-prob difference|", "log"),
    ("mismatch/logprob_abs_diff_max", "largest |log-prob difference|", "log"),
    ("mismatch/prob_diff_max", "largest probability difference", "linear"),
    ("mismatch/prob_diff_min", "smallest probability difference", "linear"),
    ("mismatch/seq_log_ratio_mean", "mean sequence log-ratio", "linear"),
    ("mismatch/seq_log_ratio_min", "smallest sequence log-ratio", "linear"),
    ("mismatch/seq_log_ratio_max", "largest sequence log-ratio", "linear"),
    ("mismatch/seq_kl", "sequence KL", "linear"),
    ("mismatch/chi2_token", "chi², tokens", "linear"),
    ("mismatch/chi2_seq", "chi², sequences", "linear"),
    ("mismatch/exact_fraction", "share of tokens without difference", "linear"),
)
GRADIENT = (
    ("mismatch_grad/kl_k3", "token KL (k3)", "log"),
    ("mismatch_grad/prob_abs_diff_mean", "mean |probability difference|", "log"),
    ("mismatch_grad/seq_log_ratio_std", "spread of sequence log-ratios", "log"),
    ("mismatch_grad/ess_seq", "effective sample size", "linear"),
    ("mismatch_grad/logprob_abs_diff_max", "largest |log-prob difference|", "log"),
    ("mismatch_grad/exact_fraction", "share without difference", "linear"),
)
TERMS = (
    ("terms/numerics_update", "numerics, scorer | gradient", "log"),
    ("terms/staleness", "staleness, later minibatches", "linear"),
    ("terms/truncation", "truncation of the distribution", "linear"),
    ("terms/tokenisation", "tokenisation, share of responses", "linear"),
)
RANGES = (
    ("telemetry/activation_max", "largest activation", "log"),
    ("telemetry/gradient_max", "largest gradient", "log"),
    ("telemetry/gradient_underflow", "share of gradients that underflow", "linear"),
)
TRAINING = (
    REWARD,
    ("loss_scale", "loss scale", "log2"),
    ("skipped", "optimizer steps skipped", "linear"),
    ("grad_norm", "gradient norm, before clipping", "linear"),
    ("entropy", "entropy, nats a token", "linear"),
    ("response_length", "response tokens", "linear"),
    ("truncated", "share of responses cut", "linear"),
    ("tokens_per_second", "tokens/s", "linear"),
    ("seconds/sample", "seconds of sampling", "linear"),
    ("seconds/learn", "seconds of learning", "linear"),
    ("memory/device_peak_bytes", "peak device memory, bytes", "linear"),
)


def draw_main(comparison, title):
    """Reward and accuracy beside token KL: the picture of a comparison."""
    figure, axes = new_figure(1, 2, title=title, height=3.8)
    reward, kl = axes[0]
    _draw(reward, comparison, *REWARD)
    accuracies = [key for key in _evaluated(comparison) if key.endswith("/accuracy")][:1]
    for key in accuracies:
        name = key.split("/")[1]
        for label in comparison.sides:
            _dots(reward, comparison, label, key)
        name_axes(reward, f"training reward; dots: {name} accuracy, held out", "step")
    _draw(kl, comparison, *MAIN[0])
    legend(reward, loc="best")
    return figure


def draw_panels(comparison, panels, columns=3, height=2.3, width=10.0):
    """Those of `panels`, (key, title, scale), that any run logged; None without any."""
    panels = [panel for panel in panels if any(len(series(run, panel[0])[0]) for run in comparison.runs)]
    if not panels:
        return None
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(rows, columns, height=height, width=width)
    for place, panel in zip(axes.flat, panels):
        _draw(place, comparison, *panel)
    for place in axes.flat[len(panels):]:
        place.set_visible(False)
    legend(axes.flat[0], loc="best")
    return figure


def evaluation_panels(comparison):
    """Panels of everything that was evaluated as a share."""
    wanted = ("/accuracy", "/finished", "/response_length")
    keys = [key for key in _evaluated(comparison) if key.endswith(wanted) or "/pass@" in key]
    return tuple((key, " ".join(key.split("/")[1:]), "linear") for key in keys)


def _evaluated(comparison):
    return dict.fromkeys(
        key for run in comparison.runs for record in run.records for key in record if key.startswith("eval/")
    )


def look_of(comparison, label):
    """`{color, linestyle}` of a side."""
    run = comparison.of(label)[0]
    place = [other for other in dict.fromkeys(run.precision for run in comparison.runs)].index(run.precision)
    line = DASHES.get(run.rollout, (0, (1, 2, 3, 2)))
    if len({other.engine for other in comparison.runs}) > 1:
        kinds = [*dict.fromkeys((other.engine, other.rollout) for other in comparison.runs)]
        line = LINES[kinds.index((run.engine, run.rollout)) % len(LINES)]
    return {"color": colour_of(run.precision, place), "linestyle": line}


# -- one plot ------------------------------------------------------------------------------------------


def _draw(axes, comparison, key, title, scale):
    width = window_of(comparison)
    lines = {label: [series(run, key, width) for run in comparison.of(label)] for label in comparison.sides}
    seen = np.concatenate([values for side in lines.values() for _, values in side] or [np.zeros(0)])
    shown = _log_axis(axes, seen) if scale == "log" else lambda values: values
    for label, side in lines.items():
        _draw_side(axes, comparison, label, [(steps, shown(values)) for steps, values in side if len(steps)])
    if scale == "log2" and len(seen) and seen.min() > 0:
        axes.set_yscale("log", base=2)
    axes.set_xlim(left=0)
    name_axes(axes, title, "step")


def _draw_side(axes, comparison, label, lines):
    look = look_of(comparison, label)
    shared = band(lines)
    if len(lines) > 1:
        for steps, values in lines:
            axes.plot(steps, values, linewidth=0.6, alpha=0.55, **look)
    if shared is not None:
        steps, mean, lowest, highest = shared
        marker = dict(marker="o", markersize=3) if len(steps) < 12 else {}
        axes.plot(steps, mean, linewidth=1.8, label=label, **marker, **look)
        if len(lines) > 1:
            axes.fill_between(steps, lowest, highest, color=look["color"], alpha=0.16, linewidth=0)
    for run in comparison.of(label):
        if run.code not in (0, None) and run.steps and lines:
            ends = [(steps[-1], values[-1]) for steps, values in lines if steps[-1] <= run.steps[-1]["step"]]
            for end in ends[:1]:
                axes.plot(*end, marker="X", markersize=7, color=look["color"], linestyle="")


def _dots(axes, comparison, label, key):
    lines = [series(run, key) for run in comparison.of(label)]
    shared = band([line for line in lines if len(line[0])])
    if shared is not None:
        axes.plot(*shared[:2], marker="o", markersize=4, linestyle="", color=look_of(comparison, label)["color"])


def _log_axis(axes, seen):
    """Makes `axes` logarithmic, with a row for exact zeros below; gives what turns values into places on it."""
    positive = seen[seen > 0]
    if not len(positive):       # nothing but zeros: they are where they are
        axes.set_ylim(-0.05, 1)
        return lambda values: values
    low, high = math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))
    high = max(high, low + 1)
    marks = range(low, high + 1, max(1, math.ceil((high - low) / 6)))
    ticks, names = [10.0**mark for mark in marks], [f"1e{mark}" for mark in marks]
    axes.set_yscale("log")
    bottom, floor = 10.0**low, 10.0 ** (low - (high - low) / 8)
    if len(positive) < len(seen):
        ticks, names = [floor, *ticks], ["0", *names]
        axes.axhline(math.sqrt(floor * bottom), color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)))
        bottom = floor / math.sqrt(bottom / floor)
    axes.set_yticks(ticks, names)
    axes.set_ylim(bottom, 10.0**high)
    axes.minorticks_off()
    return lambda values: np.where(values > 0, values, floor)
