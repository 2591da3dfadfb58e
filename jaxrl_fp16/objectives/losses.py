"""Policy and value losses: a loss per token, weighed, and aggregated over a minibatch.

B: rows (responses).  T: columns.  L: max_new_tokens, a constant.

`m`: mask.  `lp`, `old`, `mu`, `ref`: log-probs of the sampled tokens under the
policy that trains, under the scorer with the sampling weights, by the sampler,
under the frozen reference.  `A`: advantages.  All is float32.
"""

import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.masking import masked_sum, zero_where_masked
from jaxrl_fp16.objectives.aggregation import AGGREGATIONS
from jaxrl_fp16.objectives.algorithms import LOSSES, SCORER_FREE_LOSSES
from jaxrl_fp16.objectives.importance import clamp_bites, importance_weights
from jaxrl_fp16.objectives.kl import CLAMPED_ESTIMATORS, KL_ESTIMATORS, k3
from jaxrl_fp16.objectives.metrics import finish_metrics, importance_metrics, mean_metric, normalizer_of, ratio_metrics


def _constant(x, mask):
    """`x` in float32, 0 where masked, without gradient."""
    return lax.stop_gradient(zero_where_masked(x, mask))


def _token_rows(advantages, mask):
    """Advantages [B] spread over their rows, or [B,T] as they are."""
    if advantages.ndim not in (1, 2):
        raise ValueError(f"advantages of shape {advantages.shape}; allowed: [B] or [B,T]")
    return _constant(advantages[:, None] if advantages.ndim == 1 else advantages, mask)


def _check_terms(algorithm, ref_logprobs, entropy):
    """Whether the KL term is in the loss; refuses a term whose input is missing."""
    has_kl = algorithm.kl_coef > 0 and algorithm.kl_in == "loss"
    if has_kl and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is None; kl_coef {algorithm.kl_coef} in the loss needs them")
    if algorithm.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy is None; entropy_coef {algorithm.entropy_coef} needs it")
    return has_kl


def _policy_metrics(algorithm, token, importance, lp, old, mask, normalizer):
    """What the policy term did; `policy_loss` lists the names."""
    metrics = {"approx_kl": mean_metric(k3(lp - old), mask, normalizer)}
    if token.log_ratio is not None:
        metrics |= ratio_metrics("ratio", token.log_ratio, mask, normalizer)
        metrics["clip_fraction"] = mean_metric(token.cut, mask, normalizer)
    if algorithm.importance != "none":
        metrics |= importance_metrics(importance, mask, normalizer)
    return metrics


def policy_loss(
    algorithm,
    *,
    logprobs,
    old_logprobs,
    rollout_logprobs,
    advantages,
    mask,
    ref_logprobs=None,
    entropy=None,
    max_new_tokens,
    normalizer=None,
):
    """The whole loss of a minibatch, or of a microbatch as its share of one.

        agg(w*l) + kl_coef * agg(k) - entropy_coef * agg(H)

    with `l` out of `LOSSES`, `w` the importance weight (of `old` to `mu`, for
    `pg` of `sg(lp)` to `mu`), `k` the KL estimate of `d = ref - lp` where `kl_in`
    is `loss`, and `agg` out of `AGGREGATIONS`. Where `mask` is 0 every array may
    hold anything; with no token at all loss and gradient are 0.

    Args:
      algorithm: an `AlgorithmConfig`; static under `jit`.
      logprobs: [B,T] `lp`, which carries the gradient.
      old_logprobs, rollout_logprobs: [B,T] `old` and `mu`, constants.
      advantages: [B], spread over the row, or [B,T]; constants.
      mask: [B,T], bool or 0/1: response tokens that count.
      ref_logprobs: [B,T] `ref`, for a KL term in the loss.
      entropy: [B,T] `H`, the policy's entropy per token, which carries gradient.
      max_new_tokens: `L`, for the aggregation `fixed_length`.
      normalizer: the minibatch's, when these rows are one of its microbatches:
        the losses then sum to the minibatch's. None: the rows are a minibatch.

    Returns:
      `(loss, metrics)`, float32 scalars. `metrics` holds `policy_loss`,
      `approx_kl` (k3 of KL(old || current)), `entropy` if given, and where they apply
      `kl` and `kl_clamp_count`; `clip_fraction` and `ratio_{mean,min,max,clamp_count}` of
      the loss's own ratio; `importance_{mean,min,max,clamp_count,cut_fraction,ess}` of the
      raw importance ratio. Means are over tokens, or over rows with a token for
      a ratio per row. With a `normalizer` they are the microbatch's shares:
      `merge_metrics` makes the minibatch's of them.

    Raises:
      ValueError: when a term is on and its input missing, or for advantages of another rank.
    """
    has_kl = _check_terms(algorithm, ref_logprobs, entropy)
    whole = normalizer is None
    normalizer = normalizer_of(mask) if whole else normalizer

    def aggregate(x):
        return AGGREGATIONS[algorithm.aggregation](x, mask, normalizer, max_new_tokens)

    lp = zero_where_masked(logprobs, mask)
    old, mu = _constant(old_logprobs, mask), _constant(rollout_logprobs, mask)
    token = LOSSES[algorithm.loss](algorithm, lp, old, mask, _token_rows(advantages, mask))
    sampled = lp if algorithm.loss in SCORER_FREE_LOSSES else old
    correction = algorithm.importance, algorithm.level, algorithm.cap, algorithm.floor
    importance = importance_weights(sampled - mu, mask, *correction)
    loss = aggregate(importance.weight * token.loss)
    metrics = _policy_metrics(algorithm, token, importance, lp, old, mask, normalizer)
    metrics["policy_loss"] = loss
    if has_kl:
        d = _constant(ref_logprobs, mask) - lp
        kl = KL_ESTIMATORS[algorithm.kl](d)
        loss += algorithm.kl_coef * aggregate(kl)
        metrics["kl"] = mean_metric(kl, mask, normalizer)
        if algorithm.kl in CLAMPED_ESTIMATORS:
            metrics["kl_clamp_count"] = masked_sum(clamp_bites(d), mask)
    if entropy is not None:
        entropy = zero_where_masked(entropy, mask)
        if algorithm.entropy_coef != 0:
            loss -= algorithm.entropy_coef * aggregate(entropy)
        metrics["entropy"] = mean_metric(entropy, mask, normalizer)
    metrics = jax.tree.map(lax.stop_gradient, metrics)
    return loss, finish_metrics(metrics) if whole else metrics


def value_loss(algorithm, values, old_values, returns, mask, *, max_new_tokens, normalizer=None):
    """PPO's clipped value loss (arXiv 1707.06347), aggregated as the policy loss is.

        0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2),  c = value_clip

    Args:
      algorithm: an `AlgorithmConfig`; static under `jit`.
      values: [B,T] `V`, the critic's, which carry the gradient.
      old_values, returns: [B,T] `V_old` and `R`, constants.
      mask: [B,T], response tokens that count; elsewhere values may be anything.
      max_new_tokens, normalizer: as for `policy_loss`.

    Returns:
      `(loss, metrics)`, float32 scalars; `metrics` holds `value_loss`,
      `value_clip_fraction`, `value_mean`, `return_mean` and `value_error` (mean
      `(V - R)^2`), over tokens, and combines as that of `policy_loss`.
    """
    normalizer = normalizer_of(mask) if normalizer is None else normalizer
    values = zero_where_masked(values, mask)
    old_values, returns = _constant(old_values, mask), _constant(returns, mask)
    reach = algorithm.value_clip
    plain = (values - returns) ** 2
    clipped = (lax.clamp(old_values - reach, values, old_values + reach) - returns) ** 2
    cut = clipped > plain  # a tie keeps the unclipped term's gradient
    per_token = 0.5 * jnp.where(cut, clipped, plain)
    loss = AGGREGATIONS[algorithm.aggregation](per_token, mask, normalizer, max_new_tokens)
    means = {"value_clip_fraction": cut, "value_mean": values, "return_mean": returns, "value_error": plain}
    metrics = {"value_loss": loss, **{name: mean_metric(x, mask, normalizer) for name, x in means.items()}}
    return loss, jax.tree.map(lax.stop_gradient, metrics)
