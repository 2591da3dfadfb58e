"""Estimators of a KL divergence from the log-probs of sampled tokens.

B: rows (responses).  T: columns.

With `x` sampled from `p` and `d = log q(x) - log p(x)`, the mean of each
estimator is KL(p || q), or near it for `k2`. For the KL to a reference, `p` is
the policy that trains and `q` the reference.
"""

from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.masking import masked_sum, zero_where_masked
from jaxrl_fp16.objectives.importance import clamp_log_ratio

# Below this k3 is its series: `expm1(d) - d` cancels. XLA's float32 expm1 is off by up to 3e-7, which the
# subtraction turns into 3e-6 of k3 at 0.25, 1e-5 at 0.07 and 11 % at 1e-6.
SERIES_BELOW = 0.25
# k3 = d^2/2 * (1 + d/3 * (1 + d/4 * (...))), to the term in d^7: what is left out is 1e-8 of k3 at 0.25.
SERIES_DIVISORS = (7, 6, 5, 4, 3)


def k1(d):
    """`-d`: unbiased, of high variance, negative at times."""
    return -d


def k2(d):
    """`d^2 / 2`: biased, of low variance, never negative."""
    return 0.5 * d**2


def k3(d):
    """`exp(d) - 1 - d`: unbiased, of low variance, never negative.

    `d` is clamped to +-20, with gradient 0 outside. Value and gradient are
    within 1e-5 of the exact ones for every float32 `d` inside, the tiny ones of
    FP16 included.
    """
    # Both branches of a `where` see the clamped value, so neither can overflow into the other's gradient.
    d = clamp_log_ratio(d)
    series = 1.0
    for divisor in SERIES_DIVISORS:
        series = 1.0 + d / divisor * series
    return jnp.where(jnp.abs(d) < SERIES_BELOW, 0.5 * d**2 * series, jnp.expm1(d) - d)


# name -> (d) -> estimate, elementwise
KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
# The others take no exp and clamp nothing.
CLAMPED_ESTIMATORS = frozenset({"k3"})


def kl_penalized_rewards(rewards, old_logprobs, ref_logprobs, mask, kl_coef):
    """Rewards less `kl_coef * (log pi_old - log pi_ref)`: a KL term placed in the reward.

    Args:
      rewards: [B,T] for `gae`, where the penalty is per token, or [B] for a
        group baseline, where it is summed over the row's tokens first.
      old_logprobs, ref_logprobs: [B,T], of the sampled tokens.
      mask: [B,T], 1 on tokens that count.
      kl_coef: the penalty's weight.

    Returns:
      float32, shaped as `rewards`, without gradient.

    Raises:
      ValueError: for rewards of another rank.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    # Each is cleaned alone: a NaN behind the mask would survive a product with 0.
    difference = zero_where_masked(old_logprobs, mask) - zero_where_masked(ref_logprobs, mask)
    if rewards.ndim == 2:
        return lax.stop_gradient(zero_where_masked(rewards, mask) - kl_coef * difference)
    if rewards.ndim == 1:
        return lax.stop_gradient(rewards - kl_coef * masked_sum(difference, mask, axis=1))
    raise ValueError(f"rewards of shape {rewards.shape}; allowed: [B] or [B,T]")
