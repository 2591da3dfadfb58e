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

    model: a Critic without a bias, whose gradient would be rounding alone. Metrics as those of
    `guarded_step`, with the loss's. The state is donated; on a mesh `state_shardings` keeps it where it lies.
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
