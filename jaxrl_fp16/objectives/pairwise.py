"""What a reward model learns from: pairs of responses of which one was preferred.

B: pairs.
"""

import jax
import jax.numpy as jnp


def pairwise_reward_loss(chosen, rejected, pairs=None):
    """The mean of `-log sigmoid(r_chosen - r_rejected)` (Bradley-Terry; arXiv 2203.02155, equation 1).

    It sees differences alone: scores are known up to a constant.

    Args:
      chosen, rejected: [B], scores of the two texts of each pair; they carry the gradient.
      pairs: how many pairs the whole batch has, when these are one of its microbatches:
        losses and metrics then are shares, which add up. None: these are the batch.

    Returns:
      `(loss, metrics)`, float32 scalars. `metrics`: `accuracy`, the share of pairs in order,
      a tie being half in order; `margin`, the mean of `r_chosen - r_rejected`; `score`, the
      mean of all scores.

    Raises:
      ValueError: the two have different shapes, or more than one axis.
    """
    if chosen.shape != rejected.shape or chosen.ndim != 1:
        raise ValueError(f"chosen has shape {chosen.shape} and rejected {rejected.shape}; allowed: [B] and [B]")
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    pairs = max(chosen.shape[0], 1) if pairs is None else pairs
    margin = chosen - rejected
    metrics = {
        "accuracy": jnp.sum(0.5 * (1 + jnp.sign(margin))) / pairs,
        "margin": jnp.sum(margin) / pairs,
        "score": jnp.sum(chosen + rejected) / (2 * pairs),
    }
    return jnp.sum(jax.nn.softplus(-margin)) / pairs, jax.tree.map(jax.lax.stop_gradient, metrics)
