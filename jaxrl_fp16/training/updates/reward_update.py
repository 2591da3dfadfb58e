"""A reward model's training on pairs, on the same forward, policy, loss scale and guarded step.

B: pairs.  T: columns.
"""

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.forward import sequence_scores
from jaxrl_fp16.objectives import pairwise_reward_loss
from jaxrl_fp16.training.updates.by_length import Microbatches, Objective, make_step


@struct.dataclass
class RewardPairs:
    """Two texts to each prompt, whole: what the reward model will read."""

    chosen: jax.Array         # int32 [B,T]
    chosen_mask: jax.Array    # bool [B,T]: real tokens
    rejected: jax.Array       # int32 [B,T]
    rejected_mask: jax.Array  # bool [B,T]


def make_reward_update(model, policy, optimizer, *, microbatch_size=8, state_shardings=None, announce=None):
    """`update(state, pairs) -> (state, metrics)`, jitted, by `pairwise_reward_loss`, for `RewardPairs`.

    Args:
      model: a Critic without a bias, whose gradient would be rounding alone.
      policy: a `jmp.Policy`, the run's precision.
      optimizer: an `optax.GradientTransformation`.
      microbatch_size: pairs in memory at once, a divisor of B; the result is that of all pairs at once.
      state_shardings, announce: as for `make_update`.

    Returns:
      The update. It donates `state`, a `TrainState`, and takes `RewardPairs`. Its metrics are those of
      `pairwise_reward_loss` and of `guarded_step`.

    Raises:
      ValueError: the update, where `microbatch_size` does not divide B.
    """

    def loss_of(pairs):
        count = pairs.chosen.shape[0]

        def loss_fn(params, rows):
            tokens = jnp.concatenate([rows.chosen, rows.rejected])
            mask = jnp.concatenate([rows.chosen_mask, rows.rejected_mask])
            scores = sequence_scores(model, params, tokens, mask, policy=policy)
            chosen, rejected = jnp.split(scores, 2)
            loss, metrics = pairwise_reward_loss(chosen, rejected, pairs=count)
            return loss, (metrics, None)

        return loss_fn

    return make_step(
        model, optimizer, Objective(loss_of, masks=lambda x: (x.chosen_mask, x.rejected_mask), rows=_rows_of_part),
        Microbatches(microbatch_size, announce=announce, name="the reward model's step"),
        state_shardings=state_shardings,
    )


def _rows_of_part(pairs, place):
    """Both texts of a part's pairs, each with its first token in column 0."""
    chosen = place(pairs.chosen_mask).take((pairs.chosen, pairs.chosen_mask))
    return RewardPairs(*chosen, *place(pairs.rejected_mask).take((pairs.rejected, pairs.rejected_mask)))
