"""A probe's steps as a table: what the set-up's mismatch is, how it scatters, and whether it drifts."""

import math

import numpy as np

from jaxrl_fp16.lab.lines import fit_line
from jaxrl_fp16.logs import read_metrics

MEASURED = ("mismatch/", "mismatch_grad/", "terms/")
# What the mismatch depends on besides the weights: where these drift, it may.
BESIDE = ("reward", "response_length", "entropy", "grad_norm")
COLUMNS = ("", "mean", "std over steps", "slope a step", "its standard error")


def probe_table(folder):
    """Rows like COLUMNS for each mismatch metric of a run and what it depends on besides the weights.

    A step whose value is not finite is left out, and the row says how many there were.
    """
    steps = [record for record in read_metrics(folder) if "reward" in record]
    names = [name for name in (steps[-1] if steps else ()) if name.startswith(MEASURED)]
    names += [name for name in BESIDE if steps and name in steps[-1]]
    rows = []
    for name in names:
        at, values = zip(*((record["step"], record.get(name, math.nan)) for record in steps))
        finite = np.isfinite(values)
        lost = len(steps) - int(finite.sum())
        label = f"{name} (not finite in {lost} of {len(steps)} steps)" if lost else name
        rows.append((label, *map(_text, spread_and_drift(np.asarray(at)[finite], np.asarray(values)[finite]))))
    return rows


def spread_and_drift(at, values):
    """`(mean, std, slope, standard error of the slope)` of `values` [n] at steps `at` [n], by least squares.

    std has ddof 1. NaN is what too few values do not carry: std and slope take two, the
    error three. It holds where steps are independent, as they are while no weight moves.
    """
    if not len(values):
        return (math.nan,) * 4
    slope, _, error = fit_line(at, values)
    std = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return tuple(map(float, (np.mean(values), std, slope, error)))


def _text(value):
    return "-" if math.isnan(value) else f"{value:.3g}"
