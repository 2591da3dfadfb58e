"""Supervised fine-tuning on the same forward, policy, loss scale and guarded step.

B: rows of a batch.  T: columns.
"""

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.forward import score
from jaxrl_fp16.masking import masked_sum
from jaxrl_fp16.training.updates.by_length import Microbatches, Objective, make_step


@struct.dataclass
class SFTRows:
    """Prompts and completions, one a row, or several with `segments`."""

    tokens: jax.Array     # int32 [B,T]
    mask: jax.Array       # bool [B,T]: real tokens
    loss_mask: jax.Array  # bool [B,T]: tokens to be learnt
    segments: jax.Array | None = None  # int32 [B,T]: of packed rows, as `token_logprobs` takes them


def make_sft_update(model, policy, optimizer, *, microbatch_size=8, state_shardings=None, announce=None):
    """`update(state, pairs) -> (state, metrics)`, jitted: masked next-token cross-entropy, mean over tokens.

    Args:
      model: a Decoder.
      policy: a `jmp.Policy`, the run's precision.
      optimizer: an `optax.GradientTransformation`.
      microbatch_size: rows in memory at once, a divisor of B; the result is that of all rows at once.
      state_shardings, announce: as for `make_update`.

    Returns:
      The update. It donates `state`, a `TrainState`, and takes `SFTRows`; examples that are packed into a row
      count as they would in rows of their own. Its metrics are those of `guarded_step`; `loss` is in nats a token.
      It works on rows of like length together, as `make_step` says.

    Raises:
      ValueError: the update, where `microbatch_size` does not divide B.
    """

    def loss_of(pairs):
        tokens = jnp.maximum(jnp.sum(pairs.loss_mask), 1)

        def loss_fn(params, rows):
            logprobs, _ = score(model, params, rows.tokens, rows.mask, policy, segments=rows.segments)
            return sft_loss(logprobs, rows, tokens), ({}, None)

        return loss_fn

    return make_step(
        model, optimizer, Objective(loss_of, _nothing_to_learn),
        Microbatches(microbatch_size, announce=announce, name="the supervised step"), state_shardings=state_shardings,
    )


def _nothing_to_learn(pairs):
    return ~jnp.any(pairs.loss_mask)


def sft_loss(logprobs, rows, tokens):
    """float32 []: the share of a microbatch, `SFTRows` with float32 [B,T] log-probs, in a batch of `tokens`."""
    return -masked_sum(logprobs, rows.loss_mask) / tokens
