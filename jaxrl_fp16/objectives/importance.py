"""Importance weights: what separates the sampler's distribution from the trainer's.

B: rows (responses).  T: columns.

The weight is a constant to the gradient. It is taken per token, or per row as
the product over the row's tokens, and then capped, masked or left alone.
"""

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
