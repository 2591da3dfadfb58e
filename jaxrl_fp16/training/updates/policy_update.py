"""The policy's update: one optimizer step of a PPO or GRPO loss, jitted, state donated.

B: rows of a minibatch.  T: columns.
"""

from functools import partial

import jax.numpy as jnp

from jaxrl_fp16.forward import dropout_of, score
from jaxrl_fp16.objectives import normalizer_of, policy_loss
from jaxrl_fp16.training.updates.by_length import Microbatches, Objective, make_step


def make_update(
    model, policy, algorithm, optimizer, *,
    microbatch_size=8, microbatch_tokens=None, temperature=1.0, max_new_tokens=None, keep_logprobs=False,
    state_shardings=None, frozen=False, announce=None,
):
    """`update(state, batch) -> (state, metrics)`, jitted: one optimizer step, or none (see `guarded_step`).

    Args:
      model: the policy's Decoder.
      policy: a `jmp.Policy`, the run's precision.
      algorithm: an `AlgorithmConfig`.
      optimizer: an `optax.GradientTransformation`.
      microbatch_size: most rows in memory at once, a divisor of B; the result is that of all rows at once.
      microbatch_tokens: most positions in memory at once, a longest row's at least; None: those of
        `microbatch_size` rows of T columns.
      temperature: the sampler's.
      max_new_tokens: tokens, the constant of the aggregation `fixed_length`; None: T - 1.
      keep_logprobs: adds `logprobs` float32 [B,T] to the metrics: the gradient program's own, before the step.
      state_shardings: on a mesh, a tree like the state that keeps it where it lies.
      frozen: the parameters stay, and all else runs.
      announce: a text to a context manager, which is told what compiles, as `Console.announce`; None: nothing is said.

    Returns:
      The update. It donates `state`, a `TrainState`, and takes the minibatch as a `Batch`. Its metrics are
      those of `policy_loss` and of `guarded_step`. It works on rows of like length together, as `make_step` says;
      `lengths` int [B] on the host, the mask's sums, spares it a look at the mask.

    Raises:
      ValueError: for adapters that drop; the update, where `microbatch_size` does not divide B or the batch lacks what
        the loss reads.
    """
    if dropout_of(model):
        raise ValueError(f"the adapters' dropout is {dropout_of(model)}; allowed in RL: 0, as a policy that drops is "
                         "not the one that samples")

    def loss_of(batch):
        limit = max_new_tokens or batch.tokens.shape[1] - 1
        normalizer = normalizer_of(batch.response_mask)

        def loss_fn(params, rows):
            logprobs, entropy = score(
                model, params, rows.tokens, rows.mask, policy, temperature, rows.decisions,
                with_entropy=algorithm.entropy_coef != 0,
            )
            loss, metrics = loss_of_rows(algorithm, logprobs, entropy, rows, limit, normalizer)
            return loss, (metrics, logprobs if keep_logprobs else None)

        return loss_fn

    return make_step(
        model, optimizer, Objective(loss_of, partial(_nothing_to_learn, algorithm)),
        Microbatches(microbatch_size, microbatch_tokens, announce), keep="logprobs" if keep_logprobs else None,
        state_shardings=state_shardings, frozen=frozen,
    )


def loss_of_rows(algorithm, logprobs, entropy, rows, max_new_tokens, normalizer):
    """`policy_loss` of a microbatch, a `Batch`, out of its log-probs and entropies float32 [B,T]."""
    return policy_loss(
        algorithm, logprobs=logprobs, old_logprobs=rows.old_logprobs, rollout_logprobs=rows.rollout_logprobs,
        advantages=rows.advantages, mask=rows.response_mask, ref_logprobs=rows.ref_logprobs,
        entropy=entropy if algorithm.entropy_coef else None, max_new_tokens=max_new_tokens, normalizer=normalizer,
    )


def _nothing_to_learn(algorithm, batch):
    """bool []: no token counts, or every advantage is 0 and no other term pulls. Adam's momentum and
    weight decay would move the weights all the same."""
    mask = batch.response_mask.astype(bool)
    other_terms = (algorithm.kl_coef != 0 and algorithm.kl_in == "loss") or algorithm.entropy_coef != 0
    if other_terms:
        return ~jnp.any(mask)
    advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
    return ~jnp.any(mask & (advantages != 0))
