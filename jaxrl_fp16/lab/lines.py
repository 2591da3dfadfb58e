"""The straight line through some points, by least squares."""

import math

import numpy as np


def fit_line(x, y):
    """`(slope, intercept, standard error of the slope)` through points `x`, `y` [n], by least squares.

    NaN is what too few points do not carry: the slope takes two different `x`, its error
    three points. Without a slope the intercept is the mean of `y`.
    """
    centred, mean = x - np.mean(x), np.mean(y)
    across = np.sum(centred**2)
    if not across:
        return math.nan, mean, math.nan
    slope = np.sum(centred * (y - mean)) / across
    rest = y - mean - slope * centred
    error = np.sqrt(np.sum(rest**2) / (len(x) - 2) / across) if len(x) > 2 else math.nan
    return slope, mean - slope * np.mean(x), error
