"""Metrics of a loss, and how each combines: over the microbatches of a minibatch, and over optimizer steps.

B: rows (responses).  T: columns.

A microbatch gives its share of the minibatch's metrics: sums divided by what the whole minibatch has.
"""

from collections.abc import Callable
import dataclasses
from operator import itemgetter

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.finite import largest, smallest
from jaxrl_fp16.masking import masked_sum
from jaxrl_fp16.objectives.importance import clamp_bites, clamp_log_ratio


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a metric combines."""

    microbatches: Callable  # of shares stacked on axis 0, into the minibatch's
    steps: Callable         # of a list of numbers, one an optimizer step or an iteration, in order
    start: float = 0.0      # of no microbatch at all


MEAN = Rule(jnp.sum, lambda values: float(np.mean(values)))  # shares add up to the mean
# By the whole name behind its last slash, or by its ending; every other metric is a MEAN.
RULES = {
    "_max": Rule(largest, np.max, -np.inf),
    "_min": Rule(smallest, np.min, np.inf),
    "skipped": Rule(jnp.sum, sum),
    "empty": Rule(jnp.sum, sum),
    "loss_scale": Rule(jnp.max, itemgetter(-1)),  # one for all microbatches of a step
}


def rule_of(name):
    """The Rule of a metric."""
    last = name.rpartition("/")[2]
    return RULES.get(last) or RULES.get(f"_{last.rpartition('_')[2]}", MEAN)


def combine_steps(steps):
    """An iteration's metrics out of those of its optimizer steps, dicts of numbers with the same names."""
    return {name: rule_of(name).steps([float(step[name]) for step in steps]) for name in steps[0]}


def host_floats(metrics):
    """Scalars on a device as Python's, fetched at once."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


@struct.dataclass
class Normalizer:
    """What a minibatch's sums are divided by. Its microbatches all use the same one."""

    tokens: jax.Array     # int32 []: sum(mask)
    rows: jax.Array       # int32 []: B, rows without a token included
    responses: jax.Array  # int32 []: rows with a token; only metrics per row divide by it


def normalizer_of(mask):
    """The `Normalizer` of a whole minibatch's mask [B,T]."""
    mask = mask.astype(bool)
    return Normalizer(
        tokens=jnp.sum(mask), rows=jnp.asarray(mask.shape[0]), responses=jnp.sum(jnp.any(mask, axis=1))
    )


def _counted(x, mask):
    """Which entries of `x` count: the tokens of [B,T], the rows with a token of [B,1]."""
    mask = mask.astype(bool)
    return jnp.any(mask, axis=1, keepdims=True) if x.shape[1] == 1 else mask


def mean_metric(x, mask, normalizer):
    """This call's share of the minibatch's mean of `x`: over tokens for [B,T], over responses for [B,1]."""
    # With T = 1 the two readings agree: a response is a token.
    total = normalizer.responses if x.shape[1] == 1 else normalizer.tokens
    return masked_sum(x, _counted(x, mask)) / jnp.maximum(total, 1)


def ratio_metrics(name, log_ratio, mask, normalizer):
    """Mean, extremes and biting clamps of `exp(log_ratio)`, [B,T] or [B,1]."""
    ratio, counted = jnp.exp(clamp_log_ratio(log_ratio)), _counted(log_ratio, mask)
    return {
        f"{name}_mean": mean_metric(ratio, mask, normalizer),
        f"{name}_max": largest(ratio, counted),
        f"{name}_min": smallest(ratio, counted),
        f"{name}_clamp_count": masked_sum(clamp_bites(log_ratio), counted),
    }


def importance_metrics(importance, mask, normalizer):
    """Statistics of the raw ratio, before the cap, and the share that cap and floor cut."""
    square = jnp.exp(2.0 * clamp_log_ratio(importance.log_ratio))
    return ratio_metrics("importance", importance.log_ratio, mask, normalizer) | {
        "importance_square_mean": mean_metric(square, mask, normalizer),
        "importance_cut_fraction": mean_metric(importance.cut, mask, normalizer),
    }


def merge_metrics(stacked):
    """The minibatch's metrics out of its microbatches', stacked on axis 0 as `lax.scan` stacks them."""
    return finish_metrics({name: stacked_shares(name, x.reshape(-1)) for name, x in stacked.items()})


def stacked_shares(name, shares):
    """One metric's share, a scalar, of several microbatches: from theirs stacked on axis 0, or from a scalar."""
    return rule_of(name).microbatches(shares, axis=0) if shares.ndim else shares


def no_shares(names):
    """What `add_shares` begins with."""
    return {name: jnp.asarray(rule_of(name).start, jnp.float32) for name in names}


def add_shares(total, shares):
    """The shares of several microbatches out of those before and of one more; `finish_metrics` ends it."""
    return {name: rule_of(name).microbatches(jnp.stack([total[name], x]), axis=0) for name, x in shares.items()}


def finish_metrics(metrics):
    """A whole minibatch's metrics from its sums; once finished they stay as they are.

    `x_square_mean` becomes `x_ess`, the effective sample size `(sum w)^2 / (n * sum w^2)`
    as a share of the `n` weights: it does not add up, the two means that make it do.
    The extremes of no token at all, infinite so as to lose to every other, become 0.
    """
    finished = {}
    for name, value in metrics.items():
        if name.endswith("_square_mean"):
            mean = metrics[name.replace("_square_mean", "_mean")]
            finished[name.replace("_square_mean", "_ess")] = jnp.where(value > 0, mean**2 / value, 0.0)
        elif name.endswith(("_max", "_min")):
            finished[name] = jnp.where(jnp.isinf(value), 0.0, value)
        else:
            finished[name] = value
    return finished
