"""How far the sampler's log-probs are from the trainer's, on the same tokens with the same weights.

B: rows (responses).  T: columns.

`mu`: the sampler's probabilities.  `pi`: the trainer's.  `d = log mu - log pi`;
`r = pi/mu`, so `log r = -d`. KL is KL(mu || pi).
"""

import jax.numpy as jnp

from jaxrl_fp16.finite import largest, smallest
from jaxrl_fp16.masking import masked_mean, masked_sum, zero_where_masked
from jaxrl_fp16.objectives.importance import clamp_log_ratio
from jaxrl_fp16.objectives.kl import k3


def _or_zero(extreme, x, mask):
    """`extreme` of the entries where `mask` is 1; 0 where there is none."""
    return jnp.where(jnp.any(mask), extreme(x, mask), 0.0)


def _probability_change(log_mu, log_pi):
    """`pi - mu` without cancellation, and without overflow where one of the two is tiny."""
    d = log_mu - log_pi
    # mu * expm1(-d), written from the larger probability so that the exponent is never positive.
    return jnp.sign(d) * jnp.exp(jnp.maximum(log_mu, log_pi)) * jnp.expm1(-jnp.abs(d))


def _token_metrics(log_mu, log_pi, mask):
    """Statistics over tokens with `mask` 1."""
    d = log_mu - log_pi
    change = _probability_change(log_mu, log_pi)
    return {
        "kl_k1": masked_mean(d, mask),
        "kl_k3": masked_mean(k3(-d), mask),
        "logprob_abs_diff_mean": masked_mean(jnp.abs(d), mask),
        "logprob_abs_diff_max": _or_zero(largest, jnp.abs(d), mask),
        "prob_abs_diff_mean": masked_mean(jnp.abs(change), mask),
        "prob_diff_max": _or_zero(largest, change, mask),
        "prob_diff_min": _or_zero(smallest, change, mask),
        "chi2_token": masked_mean(jnp.expm1(2.0 * clamp_log_ratio(-d)), mask),
        "exact_fraction": masked_mean(d == 0.0, mask),
    }


def _row_metrics(log_ratio, rows):
    """Statistics over `log_ratio` [B], the rows' `sum_t m * log r`, where `rows` [B] is 1."""
    mean = masked_mean(log_ratio, rows)
    clamped = clamp_log_ratio(log_ratio)
    weights = jnp.exp(clamped)
    squares = jnp.maximum(jnp.sum(rows) * masked_sum(weights**2, rows), jnp.finfo(weights.dtype).tiny)
    return {
        "seq_log_ratio_mean": mean,
        "seq_log_ratio_std": jnp.sqrt(masked_mean((log_ratio - mean) ** 2, rows)),
        "seq_log_ratio_min": _or_zero(smallest, log_ratio, rows),
        "seq_log_ratio_max": _or_zero(largest, log_ratio, rows),
        "seq_kl": masked_mean(-log_ratio, rows),
        "chi2_seq": masked_mean(jnp.expm1(2.0 * clamped), rows),
        "ess_seq": masked_sum(weights, rows) ** 2 / squares,
    }


def mismatch_metrics(rollout_logprobs, train_logprobs, mask, prefix="mismatch"):
    """Every measure of the training-inference mismatch (arXiv 2510.26788), in float32.

    | key | value |
    |---|---|
    | `kl_k1`, `kl_k3` | mean `d`; mean `r - 1 - log r` |
    | `logprob_abs_diff_mean`, `_max` | of `abs(d)` |
    | `prob_abs_diff_mean`, `prob_diff_max`, `prob_diff_min` | of `abs(pi - mu)`, of `pi - mu` |
    | `seq_log_ratio_mean`, `_std`, `_min`, `_max` | of the rows' `sum_t m * log r` |
    | `seq_kl` | mean over rows of `sum_t m * d` |
    | `chi2_token`, `chi2_seq` | mean `r^2 - 1`, per token and per row, `log r` clamped to +-20 |
    | `ess_seq` | effective sample size of the rows' `r` (clamped likewise), as a share of the rows |
    | `exact_fraction` | share of tokens with `d` exactly 0 |

    Args:
      rollout_logprobs: [B,T], `log mu`, written while sampling.
      train_logprobs: [B,T], `log pi`, by the program that is compared.
      mask: [B,T], 1 on response tokens; elsewhere both may hold anything.
      prefix: what comes before the slash: `mismatch`, or `mismatch_grad` for the gradient program.

    Returns:
      A dict of float32 scalars. Rows without a token are left out of the row
      statistics; with no token at all every value is 0.
    """
    mask = mask.astype(bool)
    log_mu, log_pi = zero_where_masked(rollout_logprobs, mask), zero_where_masked(train_logprobs, mask)
    metrics = _token_metrics(log_mu, log_pi, mask)
    metrics |= _row_metrics(masked_sum(log_pi - log_mu, mask, axis=1), jnp.any(mask, axis=1))
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
