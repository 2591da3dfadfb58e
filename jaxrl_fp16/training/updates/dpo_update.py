"""Preference optimization on the same forward, policy, loss scale and guarded step.

B: pairs.  T: columns.  The axis of 2 has the chosen response first, then the rejected one.
"""

from flax import struct
import jax

from jaxrl_fp16.forward import numerics_of, score
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.objectives import dpo_loss, merge_metrics, pair_normalizer
from jaxrl_fp16.training.updates.scorer import make_scorer
from jaxrl_fp16.training.updates.step import guarded_step, jit_update


@struct.dataclass
class PreferencePairs:
    """Prompts with two responses each. A pair is one row, so that no microbatch splits it."""

    tokens: jax.Array                      # int32 [B,2,T]
    mask: jax.Array                        # bool [B,2,T]: real tokens
    response_mask: jax.Array               # bool [B,2,T]: tokens of the response
    ref_logprobs: jax.Array | None = None  # float32 [B,2,T]: log pi_ref, by the scorer with the reference's weights


def make_dpo_update(model, policy, config, optimizer, *, microbatch_size=8, state_shardings=None):
    """A jitted `update(state, pairs) -> (state, metrics)`: one optimizer step of `dpo_loss`, or none.

    Args:
      model: the policy's Decoder.
      policy: a `jmp.Policy`, the run's precision.
      config: a `PreferenceConfig`.
      optimizer: an `optax.GradientTransformation`.
      microbatch_size: pairs in memory at once, a divisor of B; the result is that of all pairs at once.
      state_shardings: on a mesh, a tree like the state that keeps it where it lies.

    Returns:
      The update. It donates `state`, a `TrainState`, and takes `PreferencePairs`. Its metrics are those of
      `dpo_loss` and of `guarded_step`.

    Raises:
      ValueError: the update, for pairs without `ref_logprobs`, or where `microbatch_size` does not divide B.
    """

    def update(state, pairs):
        if pairs.ref_logprobs is None:
            raise ValueError("the pairs lack ref_logprobs, float32 [B,2,T]; `make_pair_scorer` gives them")
        normalizer = pair_normalizer(pairs.response_mask[:, 0], pairs.response_mask[:, 1])

        def loss_fn(params, rows):
            logprobs, _ = score(model, params, _joined(rows.tokens), _joined(rows.mask), policy)
            return pair_loss(config, rows, logprobs.reshape(rows.tokens.shape), normalizer)

        empty = normalizer.responses == 0
        state, metrics, shares = guarded_step(loss_fn, optimizer, state, pairs, microbatch_size, empty=empty)
        return state, {**merge_metrics(shares), **metrics}

    return jit_update(update, model, state_shardings)


def make_pair_scorer(model, policy, *, microbatch_size=8):
    """A jitted `(params, pairs) -> logprobs`, float32 [B,2,T] of `PreferencePairs`.

    Args:
      model: a Decoder.
      policy: a `jmp.Policy`, the run's precision.
      microbatch_size: pairs in memory at once, a divisor of B.
    """
    score_rows = make_scorer(model, policy, microbatch_size=2 * microbatch_size)

    def scorer(params, pairs):
        logprobs, _ = score_rows(params, _joined(pairs.tokens), _joined(pairs.mask))
        return logprobs.reshape(pairs.tokens.shape)

    return jit(scorer, numerics_of(model))


def pair_loss(config, pairs, logprobs, normalizer=None):
    """`dpo_loss` of `pairs`, scored by the policy as `logprobs` float32 [B,2,T]."""
    return dpo_loss(
        config, chosen_logprobs=logprobs[:, 0], rejected_logprobs=logprobs[:, 1],
        ref_chosen_logprobs=pairs.ref_logprobs[:, 0], ref_rejected_logprobs=pairs.ref_logprobs[:, 1],
        chosen_mask=pairs.response_mask[:, 0], rejected_mask=pairs.response_mask[:, 1], normalizer=normalizer,
    )


def _joined(x):
    """[B,2,T] as rows [2B,T]; on a mesh both rows of a pair stay on its devices."""
    return x.reshape(-1, x.shape[-1])
