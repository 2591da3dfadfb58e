"""Importance weights: what separates the sampler's distribution from the trainer's.

B: rows (responses).  T: columns.

The weight is a constant to the gradient. It is taken per token, or per row as
the product over the row's tokens, and then capped, masked or left alone. Below
it stand the statistics of ratios, in a form that adds up over microbatches.
"""

from __future__ import annotations

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.masking import masked_sum

# exp(20) is 4.9e8: far beyond any ratio that should train, and its square still fits float32.
LOG_RATIO_LIMIT = 20.0


def clamp_log_ratio(log_ratio):
    """`log_ratio` within +-20; a clamped entry has gradient 0, every other one the full gradient."""
    # lax.clamp, unlike jnp.clip, passes no half gradient at the limits.
    return lax.clamp(-LOG_RATIO_LIMIT, log_ratio, LOG_RATIO_LIMIT)


def clamp_bites(log_ratio):
    """bool: where `clamp_log_ratio` changes the value."""
    return jnp.abs(log_ratio) > LOG_RATIO_LIMIT


def untouched(ratio, *_):
    """1, whatever the ratio: no correction."""
    return jnp.ones_like(ratio), jnp.zeros_like(ratio, bool)


def importance_sampling(ratio, *_):
    """`w`: unbiased, of unbounded variance."""
    return ratio, jnp.zeros_like(ratio, bool)


def truncated(ratio, cap, _):
    """`min(w, cap)` (TIS)."""
    cut = ratio > cap
    return jnp.where(cut, cap, ratio), cut


def masked(ratio, cap, _):
    """`w * 1[w <= cap]` (MIS)."""
    cut = ratio > cap
    return jnp.where(cut, 0.0, ratio), cut


def icepop(ratio, cap, floor):
    """`w * 1[floor <= w <= cap]` (IcePop)."""
    cut = (ratio < floor) | (ratio > cap)
    return jnp.where(cut, 0.0, ratio), cut


# name -> (ratio, cap, floor) -> (weight, where the weight is not the ratio), all of one shape
IMPORTANCES = {
    "none": untouched,
    "is": importance_sampling,
    "tis": truncated,
    "mis": masked,
    "icepop": icepop,
}


def token_level(log_ratio, _):
    """`d[b,t]`: each token weighs for itself."""
    return log_ratio


def sequence_level(log_ratio, mask):
    """`sum_t m*d`: [B,1], one weight for a row."""
    return masked_sum(log_ratio, mask, axis=1)[:, None]


# name -> (log_ratio [B,T], mask [B,T]) -> log ratio [B,T] or [B,1]
LEVELS = {"token": token_level, "sequence": sequence_level}


@struct.dataclass
class Importance:
    """Weights and what they were made of. `[B,T]` at token level, `[B,1]` at sequence level."""

    weight: jax.Array     # float32: what multiplies the token loss, after the cap
    log_ratio: jax.Array  # float32: before the clamp to +-20
    cut: jax.Array        # bool: truncated or masked by cap or floor


def importance_weights(log_ratio, mask, importance="is", level="token", cap=None, floor=None):
    """Weights `w` between two policies' log-probs of the same tokens.

        token level: w[b,t] = exp(d[b,t]);  sequence level: w[b] = exp(sum_t m*d)

    then `none`: 1, `is`: w, `tis`: min(w, cap), `mis`: w*1[w <= cap],
    `icepop`: w*1[floor <= w <= cap].

    Args:
      log_ratio: [B,T], `d`; anything where `mask` is 0.
      mask: [B,T], 1 on tokens that count.
      importance, level: names out of `IMPORTANCES` and `LEVELS`.
      cap, floor: bounds of the ratio, for the corrections that use them.

    Returns:
      An `Importance`, without gradient. Weights at masked tokens mean nothing.
    """
    log_ratio = lax.stop_gradient(jnp.where(mask.astype(bool), log_ratio, 0.0))
    log_ratio = LEVELS[level](log_ratio, mask)
    weight, cut = IMPORTANCES[importance](jnp.exp(clamp_log_ratio(log_ratio)), cap, floor)
    return Importance(weight, log_ratio, cut)


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
        f"{name}_max": jnp.max(jnp.where(counted, ratio, -jnp.inf)),
        f"{name}_min": jnp.min(jnp.where(counted, ratio, jnp.inf)),
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
    """The minibatch's metrics out of its microbatches', stacked on axis 0 as `lax.scan` stacks them.

    A name that ends in `_max` or `_min` says how it combines; every other one adds up.
    """
    extremes = {"max": jnp.max, "min": jnp.min}

    def reduce(name, x):
        return extremes.get(name.rpartition("_")[2], jnp.sum)(x, axis=0)

    return finish_metrics({name: reduce(name, x) for name, x in stacked.items()})


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


__all__ = [
    "IMPORTANCES",
    "LEVELS",
    "LOG_RATIO_LIMIT",
    "Importance",
    "Normalizer",
    "clamp_bites",
    "clamp_log_ratio",
    "finish_metrics",
    "importance_metrics",
    "importance_weights",
    "mean_metric",
    "merge_metrics",
    "normalizer_of",
    "ratio_metrics",
]
