"""Several engines side by side: a section of the `mismatch` page, one table and one picture of engines x precisions."""

import numpy as np

from jaxrl_fp16.lab.figures import FAINT, colour_of, legend, name_axes, new_figure, svg_of
from jaxrl_fp16.lab.mismatch.figures import ALONG, draw_bins, finish_log, looks_of
from jaxrl_fp16.lab.page import Figure, Section, Table

PAIR = "sampler|scorer"
COLUMNS = ("engine", "precision", "tokens", "token KL (k3)", "sequence log-ratio", "100 responses weigh",
           "slope per 1K tokens", "KL where sure", "KL where unsure")


def engines_of(sides):
    """The engines of `{label: {engine, ...}}`, in their order."""
    return list(dict.fromkeys(side["engine"] for side in sides.values()))


def engine_table(found, tokens):
    """An engine in a precision a row. `tokens`: by label."""
    rows = []
    for label, side in found["sides"].items():
        metrics, line = found["metrics"][label][PAIR], found["by_length"][label][PAIR]
        bins = found["binned"]["entropy"][label][PAIR]["mean"]
        slope = f"{line['slope']:+.2g} ± {line['slope_error']:.1g}" if np.isfinite(line["slope"]) else "one length"
        rows.append((
            f"{side['engine']} {side['version']}".strip(), side["precision"], f"{tokens[label]:,}",
            f"{metrics['kl_k3']:.2e} ± {found['kl_error'][label]:.0e}", f"{metrics['seq_log_ratio_std']:.2g}",
            f"{100 * metrics['ess_seq']:.3g}", slope, f"{bins[0]:.1e}", f"{bins[-1]:.1e}",
        ))
    return Table(COLUMNS, rows, "Of sampler against scorer, which compute in the same precision. Sequence log-ratio: "
                 "its standard deviation over responses. Sure and unsure: the tokens of the lowest and of the highest "
                 "bin of entropy.")


def engine_section(found, tokens, reference):
    """The section; none for a single engine."""
    if len(engines_of(found["sides"])) > 1:
        yield Section(
            "Engines side by side", "The same weights, each engine's own samples, one trainer that scores them.",
            tables=[engine_table(found, tokens)],
            figures=[Figure(svg_of(draw_engines(found, reference)), "Bars: one standard error, over responses; by "
                            "entropy over tokens. What is exactly 0 has no place on a logarithmic axis.")],
        )


def draw_engines(found, reference):
    """Token KL, spread of sequence log-ratios and slope with length by engine, and token KL by entropy."""
    figure, axes = new_figure(2, 2, width=10.0, height=3.4)
    (kl, spread), (slope, entropy) = axes
    metrics, lines = found["metrics"], found["by_length"]
    _draw_points(kl, found["sides"], {label: (metrics[label][PAIR]["kl_k3"], found["kl_error"][label])
                                      for label in metrics}, log=True)
    name_axes(kl, "token KL (k3), sampler | scorer")
    _draw_points(spread, found["sides"], {label: (metrics[label][PAIR]["seq_log_ratio_std"], 0.0)
                                          for label in metrics}, log=True)
    name_axes(spread, "standard deviation of sequence log-ratios")
    slope.axhline(0, color=FAINT, linewidth=0.8)
    _draw_points(slope, found["sides"], {label: (line[PAIR]["slope"], line[PAIR]["slope_error"])
                                         for label, line in lines.items()})
    name_axes(slope, "slope of the log-ratio, per 1K tokens")
    looks, bins = looks_of(found["sides"]), found["binned"]["entropy"]
    drawn = [draw_bins(entropy, pairs[PAIR], label, looks[label]) for label, pairs in bins.items()]
    name_axes(entropy, "token KL (k3) by entropy", ALONG["entropy"].replace("the reference", reference))
    finish_log(entropy, any(drawn))
    return figure


def _draw_points(axes, sides, values, log=False):
    """`{label: (value, error)}`: engines from left to right, precisions in their colours."""
    engines, precisions = engines_of(sides), list(dict.fromkeys(side["precision"] for side in sides.values()))
    for place, precision in enumerate(precisions):
        labels = [label for label, side in sides.items() if side["precision"] == precision
                  and np.isfinite(values[label][0]) and (values[label][0] > 0 or not log)]
        x = [engines.index(sides[label]["engine"]) + 0.16 * (place - (len(precisions) - 1) / 2) for label in labels]
        y, error = ([float(np.nan_to_num(values[label][which])) for label in labels] for which in (0, 1))
        low = [min(size, 0.9 * value) if log else size for size, value in zip(error, y)]
        axes.errorbar(x, y, (low, error), linestyle="", marker="o", markersize=5, capsize=3, label=precision,
                      color=colour_of(precision, place))
    axes.set_xticks(range(len(engines)), engines)
    axes.set_xlim(-0.6, len(engines) - 0.4)
    if log and any(value > 0 for value, _ in values.values()):
        axes.set_yscale("log")
    legend(axes)
