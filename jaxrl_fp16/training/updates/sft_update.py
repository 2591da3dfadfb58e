"""Supervised fine-tuning on the same forward, policy, loss scale and guarded step.

B: rows of a batch.  T: columns.
"""

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.forward import score
from jaxrl_fp16.masking import masked_sum
from jaxrl_fp16.training.updates.step import guarded_step, jit_update


@struct.dataclass
class SFTRows:
    """Prompts and completions, one a row, or several with `segments`."""

    tokens: jax.Array     # int32 [B,T]
    mask: jax.Array       # bool [B,T]: real tokens
    loss_mask: jax.Array  # bool [B,T]: tokens to be learnt
    segments: jax.Array | None = None  # int32 [B,T]: of packed rows, as `token_logprobs` takes them


def make_sft_update(model, policy, optimizer, *, microbatch_size=8, state_shardings=None):
    """A jitted `update(state, pairs) -> (state, metrics)`: masked next-token cross-entropy, mean over tokens.

    Args:
      model: a Decoder.
      policy: a `jmp.Policy`, the run's precision.
      optimizer: an `optax.GradientTransformation`.
      microbatch_size: rows in memory at once, a divisor of B; the result is that of all rows at once.
      state_shardings: on a mesh, a tree like the state that keeps it where it lies.

    Returns:
      The update. It donates `state`, a `TrainState`, and takes `SFTRows`; examples that are packed into a row
      count as they would in rows of their own. Its metrics are those of `guarded_step`; `loss` is in nats a token.

    Raises:
      ValueError: the update, where `microbatch_size` does not divide B.
    """

    def update(state, pairs):
        tokens = jnp.maximum(jnp.sum(pairs.loss_mask), 1)

        def loss_fn(params, rows):
            logprobs, _ = score(model, params, rows.tokens, rows.mask, policy, segments=rows.segments)
            return sft_loss(logprobs, rows, tokens), None

        empty = ~jnp.any(pairs.loss_mask)
        state, metrics, _ = guarded_step(loss_fn, optimizer, state, pairs, microbatch_size, empty=empty)
        return state, metrics

    return jit_update(update, model, state_shardings)


def sft_loss(logprobs, rows, tokens):
    """float32 []: the share of a microbatch, `SFTRows` with float32 [B,T] log-probs, in a batch of `tokens`."""
    return -masked_sum(logprobs, rows.loss_mask) / tokens
