"""A reward model's training on pairs, on the same forward, policy, loss scale and guarded step.

B: pairs.  T: columns.
"""

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.forward import sequence_scores
from jaxrl_fp16.objectives import merge_metrics, pairwise_reward_loss
from jaxrl_fp16.training.updates.step import guarded_step, jit_update


@struct.dataclass
class RewardPairs:
    """Two texts to each prompt, whole: what the reward model will read."""

    chosen: jax.Array         # int32 [B,T]
    chosen_mask: jax.Array    # bool [B,T]: real tokens
    rejected: jax.Array       # int32 [B,T]
    rejected_mask: jax.Array  # bool [B,T]


def make_reward_update(model, policy, optimizer, *, microbatch_size=8, state_shardings=None):
    """A jitted `update(state, pairs) -> (state, metrics)` by `pairwise_reward_loss`, for `RewardPairs`.

    Args:
      model: a Critic without a bias, whose gradient would be rounding alone.
      policy: a `jmp.Policy`, the run's precision.
      optimizer: an `optax.GradientTransformation`.
      microbatch_size: pairs in memory at once, a divisor of B; the result is that of all pairs at once.
      state_shardings: on a mesh, a tree like the state that keeps it where it lies.

    Returns:
      The update. It donates `state`, a `TrainState`, and takes `RewardPairs`. Its metrics are those of
      `pairwise_reward_loss` and of `guarded_step`.

    Raises:
      ValueError: the update, where `microbatch_size` does not divide B.
    """

    def update(state, pairs):
        count = pairs.chosen.shape[0]

        def loss_fn(params, rows):
            tokens = jnp.concatenate([rows.chosen, rows.rejected])
            mask = jnp.concatenate([rows.chosen_mask, rows.rejected_mask])
            scores = sequence_scores(model, params, tokens, mask, policy=policy)
            chosen, rejected = jnp.split(scores, 2)
            return pairwise_reward_loss(chosen, rejected, pairs=count)

        state, metrics, shares = guarded_step(loss_fn, optimizer, state, pairs, microbatch_size)
        return state, {**merge_metrics(shares), **metrics}

    return jit_update(update, model, state_shardings)
