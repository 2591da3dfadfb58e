"""Preference optimization on the same forward, policy, loss scale and guarded step.

B: pairs.  T: columns.  The axis of 2 has the chosen response first, then the rejected one.
"""

from flax import struct
import jax

from jaxrl_fp16.forward import score
from jaxrl_fp16.objectives import dpo_loss, pair_normalizer
from jaxrl_fp16.training.updates.by_length import Microbatches, Objective, make_step
from jaxrl_fp16.training.updates.scorer import make_scorer


@struct.dataclass
class PreferencePairs:
    """Prompts with two responses each. A pair is one row, so that no microbatch splits it."""

    tokens: jax.Array                      # int32 [B,2,T]
    mask: jax.Array                        # bool [B,2,T]: real tokens
    response_mask: jax.Array               # bool [B,2,T]: tokens of the response
    ref_logprobs: jax.Array | None = None  # float32 [B,2,T]: log pi_ref, by the scorer with the reference's weights


def make_dpo_update(model, policy, config, optimizer, *, microbatch_size=8, state_shardings=None, announce=None):
    """`update(state, pairs) -> (state, metrics)`, jitted: one optimizer step of `dpo_loss`, or none.

    Args:
      model: the policy's Decoder.
      policy: a `jmp.Policy`, the run's precision.
      config: a `PreferenceConfig`.
      optimizer: an `optax.GradientTransformation`.
      microbatch_size: pairs in memory at once, a divisor of B; the result is that of all pairs at once.
      state_shardings, announce: as for `make_update`.

    Returns:
      The update. It donates `state`, a `TrainState`, and takes `PreferencePairs`. Its metrics are those of
      `dpo_loss` and of `guarded_step`. It works on pairs of like length together, that of the longer response, as
      `make_step` says.

    Raises:
      ValueError: the update, for pairs without `ref_logprobs`, or where `microbatch_size` does not divide B.
    """

    def loss_of(pairs):
        if pairs.ref_logprobs is None:
            raise ValueError("the pairs lack ref_logprobs, float32 [B,2,T]; `make_pair_scorer` gives them")
        normalizer = _normalizer(pairs)

        def loss_fn(params, rows):
            logprobs, _ = score(model, params, _joined(rows.tokens), _joined(rows.mask), policy)
            loss, metrics = pair_loss(config, rows, logprobs.reshape(rows.tokens.shape), normalizer)
            return loss, (metrics, None)

        return loss_fn

    return make_step(
        model, optimizer, Objective(loss_of, lambda pairs: _normalizer(pairs).responses == 0),
        Microbatches(microbatch_size, announce=announce, name="the preference step"), state_shardings=state_shardings,
    )


def _normalizer(pairs):
    return pair_normalizer(pairs.response_mask[:, 0], pairs.response_mask[:, 1])


def make_pair_scorer(model, policy, *, microbatch_size=8, announce=None):
    """A `(params, pairs) -> logprobs`, float32 [B,2,T] of `PreferencePairs`, jitted as `make_scorer` is.

    Args:
      model: a Decoder.
      policy: a `jmp.Policy`, the run's precision.
      microbatch_size: pairs in memory at once, a divisor of B.
      announce: as for `make_update`.
    """
    score_rows = make_scorer(model, policy, microbatch_size=2 * microbatch_size, announce=announce)

    def scorer(params, pairs):
        logprobs, _ = score_rows(params, _joined(pairs.tokens), _joined(pairs.mask))
        return logprobs.reshape(pairs.tokens.shape)

    scorer._cache_size = score_rows._cache_size
    return scorer


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
