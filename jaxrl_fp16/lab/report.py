"""A finished run as a picture and a table: reward, loss scale, mismatch."""

import math
from pathlib import Path

import numpy as np

from jaxrl_fp16.lab.figures import ACCENT, FAINT, GRID, INK, SECOND, legend, name_axes, new_figure, save_png
from jaxrl_fp16.logs import read_metrics

TABLE = (
    ("reward", "reward", ".3f"),
    ("response tokens", "response_length", ".1f"),
    ("token KL (k3), sampler | scorer", "mismatch/kl_k3", ".1e"),
    ("token KL (k3), scorer | gradient", "mismatch_grad/kl_k3", ".1e"),
    ("|probability difference|", "mismatch/prob_abs_diff_mean", ".1e"),
    ("largest |log-prob difference|", "mismatch/logprob_abs_diff_max", ".1e"),
    ("effective sample size", "mismatch/ess_seq", ".4f"),
    ("policy staleness, nats a token", "terms/staleness", ".1e"),
    ("truncation, nats a token", "terms/truncation", ".1e"),
    ("share of responses with other ids as text", "terms/tokenisation", ".3f"),
    ("entropy, nats a token", "entropy", ".3f"),
    ("loss scale", "loss_scale", ",g"),
    ("steps skipped", "skipped", ".0f"),
)


def summary(folder):
    """Rows (name, first, last) of a run: evaluations before and after, then the first and last step."""
    records = read_metrics(folder)
    steps = [record for record in records if "reward" in record]
    rows = []
    evaluated = [record for record in records if any(key.startswith("eval/") for key in record)]
    if evaluated:
        for key in evaluated[-1]:
            if key.startswith("eval/") and key.endswith("/accuracy"):
                before, after = evaluated[0].get(key), evaluated[-1][key]
                name = f"{key.split('/')[1]} accuracy, held out"
                rows.append((name, _text(before, ".3f"), _text(after, ".3f")))
    if steps:
        rows += [
            (name, _text(steps[0].get(key), form), _text(steps[-1].get(key), form))
            for name, key, form in TABLE if key in steps[-1]
        ]
    return rows


def _text(value, form):
    return "-" if value is None else format(value, form)


def draw_run(folder, title):
    """Writes `plot.png` into the run folder and gives its path; None for a run without a step."""
    records = read_metrics(folder)
    steps = [record for record in records if "reward" in record]
    if not steps:
        return None
    figure, ((reward, scale), (mismatch, entropy)) = new_figure(2, 2, title=title)
    _reward(reward, records, steps)
    _scale(scale, steps)
    _mismatch(mismatch, steps)
    _entropy(entropy, steps)
    for axes in (reward, scale, mismatch, entropy):
        axes.set_xlim(left=0)
    return save_png(figure, Path(folder) / "plot.png")


def _line(axes, records, key, **style):
    steps = [record["step"] for record in records if math.isfinite(record.get(key, math.nan))]
    values = [record[key] for record in records if math.isfinite(record.get(key, math.nan))]
    if steps:
        axes.plot(steps, values, **style)


def _reward(axes, records, steps):
    name_axes(axes, "reward, and accuracy on held-out problems", "step")
    _line(axes, steps, "reward", color=FAINT, linewidth=1.2, label="training reward")
    colours = iter((ACCENT, SECOND, INK))
    names = dict.fromkeys(key for record in records for key in record if key.endswith("/accuracy"))
    for key, colour in zip(names, colours, strict=False):
        label = key.split("/")[1]
        _line(axes, records, key, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set_ylim(-0.02, 1.02)
    legend(axes, loc="lower right")


def _scale(axes, steps):
    name_axes(axes, "loss scale; a mark where a step was skipped", "step")
    _line(axes, steps, "loss_scale", color=ACCENT, linewidth=1.6, drawstyle="steps-post")
    skipped = [step for step in steps if step.get("skipped")]
    if skipped:
        _line(axes, skipped, "loss_scale", color=INK, marker="x", markersize=6, linestyle="")
    axes.set_yscale("log", base=2)


def _mismatch(axes, steps):
    name_axes(axes, "token KL (k3): which programs disagree, and how much", "step")
    lines = (("mismatch", ACCENT, "sampler | scorer"), ("mismatch_grad", SECOND, "scorer | gradient program"))
    for prefix, colour, label in lines:
        key = f"{prefix}/kl_k3"
        differ = [step for step in steps if step.get(key, 0) > 0]  # a step without any difference has no logarithm
        equal = len(steps) - len(differ)
        label += f" (equal in {equal} of {len(steps)} steps)" if equal else ""
        _line(axes, differ, key, color=colour, linewidth=1.2, marker=".", markersize=4, label=label)
        if differ:
            axes.set_yscale("log")
    if axes.lines:
        legend(axes)


def _entropy(axes, steps):
    name_axes(axes, "entropy, nats a token", "step")
    _line(axes, steps, "entropy", color=ACCENT, linewidth=1.4)
    axes.set_ylim(bottom=0)


# -- a filtered task -----------------------------------------------------------------------------

BINS = 20


def histogram(accuracies):
    """Rows (range, problems) of a table: none solved, ten ranges between, all solved."""
    edges = np.linspace(0, 1, 11)
    inner = accuracies[(accuracies > 0) & (accuracies < 1)]
    counts, _ = np.histogram(inner, edges)
    rows = [(f"{low:.1f} to {high:.1f}", int(count)) for low, high, count in zip(edges, edges[1:], counts)]
    return [("0", int((accuracies == 0).sum())), *rows, ("1", int((accuracies == 1).sum()))]


def draw_accuracies(folder, accuracies, low, high):
    """Writes `histogram.png` into the folder of a filter run and gives its path."""
    figure, ((axes,),) = new_figure(title=f"accuracy on {len(accuracies):,} problems", width=7, height=3.6)
    name_axes(axes, "", "share of the samples that were right", "problems")
    axes.axvspan(low, high, color=GRID, alpha=0.6, linewidth=0, label=f"kept: {low:g} to {high:g}")
    axes.hist(accuracies, np.linspace(0, 1, BINS + 1), color=ACCENT, rwidth=0.9)
    legend(axes)
    return save_png(figure, Path(folder) / "histogram.png")
