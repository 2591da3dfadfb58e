"""PPO's critic: its update, on a train state and a loss scale of its own.

B: rows of a minibatch.  T: columns.
"""

import jax.numpy as jnp

from jaxrl_fp16.forward import token_values
from jaxrl_fp16.objectives import normalizer_of, value_loss
from jaxrl_fp16.training.updates.by_length import Microbatches, Objective, make_step


def make_value_update(critic, policy, algorithm, optimizer, *, microbatch_size=8, microbatch_tokens=None,
                      max_new_tokens=None, state_shardings=None, frozen=False, announce=None):
    """`update(state, batch) -> (state, metrics)`, jitted, that regresses the critic on `batch.returns`.

    Args:
      critic: a Critic.
      policy: a `jmp.Policy`, the critic's precision.
      algorithm: an `AlgorithmConfig`, of which `value_clip` and `aggregation` are read.
      optimizer: an `optax.GradientTransformation`.
      microbatch_size, microbatch_tokens, announce: as for `make_update`.
      max_new_tokens: tokens, the constant of the aggregation `fixed_length`; None: T - 1.
      state_shardings: on a mesh, a tree like the state that keeps it where it lies.
      frozen: the parameters stay, and all else runs.

    Returns:
      The update. It donates `state`, the critic's `TrainState`, and takes the minibatch as a `Batch`: its
      `values` float32 [B,T] are the critic's at the iteration's start, its `returns` float32 [B,T] the
      targets. Its metrics are those of `value_loss` and of `guarded_step`.

    Raises:
      ValueError: the update, for a batch without values or returns, or where `microbatch_size` does not divide B.
    """

    def loss_of(batch):
        if batch.values is None or batch.returns is None:
            raise ValueError("the critic's batch lacks values or returns; both are float32 [B,T], from `gae`")
        limit = max_new_tokens or batch.tokens.shape[1] - 1
        normalizer = normalizer_of(batch.response_mask)

        def loss_fn(params, rows):
            values = token_values(critic, params, rows.tokens, rows.mask, policy=policy)
            loss, metrics = value_loss(
                algorithm, values, rows.values, rows.returns, rows.response_mask,
                max_new_tokens=limit, normalizer=normalizer,
            )
            return loss, (metrics, None)

        return loss_fn

    return make_step(
        critic, optimizer, Objective(loss_of, _nothing_to_learn),
        Microbatches(microbatch_size, microbatch_tokens, announce, "the critic's update"),
        state_shardings=state_shardings, frozen=frozen,
    )


def _nothing_to_learn(batch):
    return ~jnp.any(batch.response_mask.astype(bool))
