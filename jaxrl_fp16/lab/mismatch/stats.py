"""The numbers behind the offline figures: plain NumPy in float64, from stored rollouts alone.

B: rows (responses).  T: columns.  n: response tokens.

A pair names two programs, `a|b`; of a token `x = log b - log a`, and its KL is k3,
`exp(x) - 1 - x`: an estimate of KL(a || b) where the token was drawn from `a`, as it
is, but for roundings, in every pair here.
"""

import numpy as np

from jaxrl_fp16.lab.lines import fit_line

PAIRS = ("sampler|scorer", "scorer|gradient", "sampler|reference", "scorer|reference")
DRAWN = ("sampler|scorer", "sampler|reference", "scorer|reference")


def program_logprobs(rollout, program, reference):
    """float32 [B,T] of `sampler`, `scorer`, `gradient` (both in the sampler's precision) or `reference`."""
    if program == "sampler":
        return rollout.logprobs
    if program == "reference":
        return rollout.scorer[reference]
    return getattr(rollout, program)[rollout.precision]


def pair_logprobs(rollout, pair, reference):
    """(log a, log b) float32 [B,T] of a pair."""
    return tuple(program_logprobs(rollout, program, reference) for program in pair.split("|"))


def log_ratio(rollout, pair, reference):
    """float64 [B,T]: `log b - log a`; 0 off the response, and where either is not finite."""
    a, b = (np.asarray(x, np.float64) for x in pair_logprobs(rollout, pair, reference))
    counts = rollout.response_mask & np.isfinite(a) & np.isfinite(b)
    return np.where(counts, np.where(counts, b, 0.0) - np.where(counts, a, 0.0), 0.0)


def not_finite(rollout, reference):
    """How many response tokens have a log-prob that is not finite, by program."""
    counts = {}
    for program in ("sampler", "scorer", "gradient", "reference"):
        found = program_logprobs(rollout, program, reference)
        counts[program] = int((rollout.response_mask & ~np.isfinite(found)).sum())
    return counts


def k3(x):
    """`exp(x) - 1 - x` in float64, where the cancellation is harmless: 1e-8 of it at x = 1e-8."""
    return np.expm1(x) - x


def probabilities(rollout):
    """(sampler's, scorer's) probability of every response token, float64 [n]."""
    logprobs = pair_logprobs(rollout, "sampler|scorer", None)
    return tuple(np.exp(np.asarray(x, np.float64)[rollout.response_mask]) for x in logprobs)


def by_length(rollout, pair, reference):
    """The rows' log-ratio against their length, and the straight line through them.

    Returns a dict: `length` int [B], `log_ratio` float64 [B] (sums over the row of
    `log b - log a`), `slope` per 1,000 tokens and `intercept` by least squares,
    `slope_error`, its standard error. With rows of one length there is no slope: NaN.
    """
    present = rollout.response_mask.any(axis=1)
    lengths = rollout.response_mask.sum(axis=1)[present]
    ratios = log_ratio(rollout, pair, reference).sum(axis=1)[present]
    slope, intercept, error = fit_line(lengths, ratios)
    return dict(length=lengths, log_ratio=ratios, slope=1000 * slope, intercept=intercept, slope_error=1000 * error)


def mean_over_tokens(x, mask):
    """`(mean, its standard error)` of `x` [B,T] where `mask` is 1. A row's tokens are one draw; NaN for one row."""
    rows = np.where(mask, x, 0.0)[mask.any(axis=1)].sum(axis=1)
    n, count = len(rows), mask.sum()
    error = np.sqrt(((rows - rows.mean()) ** 2).sum() * n / (n - 1)) / count if n > 1 else np.nan
    return rows.sum() / count, error


# -- token KL in bins ----------------------------------------------------------------------------


def token_positions(rollout):
    """int [n]: the response tokens before each one of its row."""
    return (np.cumsum(rollout.response_mask, axis=1) - 1)[rollout.response_mask]


def token_lengths(rollout):
    """int [n]: the length of the response that each token is of."""
    return np.broadcast_to(rollout.response_mask.sum(axis=1)[:, None], rollout.mask.shape)[rollout.response_mask]


def token_entropies(rollout, reference):
    """float64 [n]: of the reference's distribution that each token was drawn from, whatever drew it."""
    return np.asarray(rollout.entropy[reference], np.float64)[rollout.response_mask]


def equal_steps(values, bins):
    """Edges [bins + 1] at most, in equal steps over the integers `values`."""
    return np.unique(np.round(np.linspace(values.min(), values.max() + 1, bins + 1)))


def equal_shares(values, bins):
    """Edges [bins + 1] at most, with about as many of the `values` between each two of them."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))
    return edges if len(edges) > 1 else np.repeat(edges, 2)


def in_bins(x, y, edges):
    """What lies between each two edges, a value on an edge above it and the last bin closed.

    Returns a dict of lists, empty bins left out: mean of `x`, `mean` of `y` and its standard
    `error` (over tokens, as if they were independent; NaN for one), `count`.
    """
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    bins = [(x[place == i], y[place == i]) for i in range(len(edges) - 1)]
    bins = [(x, y) for x, y in bins if len(x)]
    return dict(
        x=[float(x.mean()) for x, _ in bins],
        mean=[float(y.mean()) for _, y in bins],
        error=[float(y.std(ddof=1) / np.sqrt(len(y))) if len(y) > 1 else np.nan for _, y in bins],
        count=[len(y) for _, y in bins],
    )


def binned_kl(rollouts, reference, bins):
    """`{"position" | "entropy" | "length": {label: {pair: what in_bins gives}}}` of the tokens' k3.

    The edges are those of all `{label: rollout}` together, so that they share them.
    """
    along = {
        "position": (token_positions, equal_steps),
        "entropy": (lambda rollout: token_entropies(rollout, reference), equal_shares),
        "length": (token_lengths, equal_shares),
    }
    return {name: _binned(rollouts, reference, bins, *rule) for name, rule in along.items()}


def _binned(rollouts, reference, bins, measure, cut):
    values = {label: measure(rollout) for label, rollout in rollouts.items()}
    edges = cut(np.concatenate(list(values.values())), bins)
    return {
        label: {
            pair: in_bins(values[label], k3(log_ratio(rollout, pair, reference)[rollout.response_mask]), edges)
            for pair in PAIRS
        }
        for label, rollout in rollouts.items()
    }


# -- which of the two is wrong? ------------------------------------------------------------------


def distances(rollout, reference):
    """Sampler, scorer and reference on the same tokens: how far each two are apart, and what that says.

    Returns a dict of floats: the token KL (k3) of `sampler|scorer`, `sampler|reference` and
    `scorer|reference`; `difference`, the second less the third, with its standard `error`
    over rows; and `shared`, the correlation over tokens of the two errors: 1 where
    sampler and scorer are wrong together, 0 where each is on its own. NaN where one has no error.
    """
    mask = rollout.response_mask
    kl = {pair: k3(log_ratio(rollout, pair, reference)) for pair in DRAWN}
    difference, error = mean_over_tokens(kl["sampler|reference"] - kl["scorer|reference"], mask)
    sampler, scorer = (log_ratio(rollout, pair, reference)[mask] for pair in DRAWN[1:])
    spread = sampler.std() * scorer.std()
    shared = ((sampler - sampler.mean()) * (scorer - scorer.mean())).mean() / spread if spread else np.nan
    return {
        **{pair: mean_over_tokens(kl[pair], mask)[0] for pair in DRAWN},
        "difference": difference, "error": error, "shared": shared,
    }


def verdict(found):
    """One sentence on `distances`: which of the two is farther from the reference, if the numbers carry that."""
    sampler, scorer = found["sampler|reference"], found["scorer|reference"]
    if not sampler and not scorer:
        return "both equal the reference to the last bit"
    if not np.isfinite(found["error"]) or abs(found["difference"]) <= 2 * found["error"]:
        return "neither: no difference beyond two standard errors"
    name, far, near = ("sampler", sampler, scorer) if sampler > scorer else ("scorer", scorer, sampler)
    return f"the {name}, {far / near:.2f} times as far" if near else f"the {name} alone"
