"""The scorer: the trainer's forward alone, over many rows a few at a time.

B: rows.  T: columns.
"""

import jax
from jax import lax

from jaxrl_fp16.forward import NONE, numerics_of, score, token_values
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.training.updates.step import join_rows, split_rows


def make_scorer(model, policy, *, microbatch_size, temperature=1.0, with_entropy=False):
    """A jitted `(params, tokens, mask, decisions) -> (logprobs, entropies)`, float32 [B,T] each.

    Args:
      model: a Decoder.
      policy: a `jmp.Policy`, the run's precision.
      microbatch_size: rows in memory at once, a divisor of B.
      temperature: the sampler's.
      with_entropy: computes the entropies, in nats; otherwise they are zeros.

    Returns:
      The scorer, of tokens int32 [B,T], their mask bool [B,T] and a rollout's `decisions`. Log-probs are those
      of `token_logprobs`.

    Raises:
      ValueError: the scorer, where `microbatch_size` does not divide B.
    """

    def scorer(params, tokens, mask, decisions=NONE):
        def rows(chunk):
            tokens, mask, decisions = chunk
            return score(model, params, tokens, mask, policy, temperature, decisions, with_entropy)

        results = lax.map(rows, split_rows((tokens, mask, decisions), microbatch_size))
        return jax.tree.map(join_rows, results)

    return jit(scorer, numerics_of(model))


def make_valuer(critic, policy, *, microbatch_size):
    """A jitted `(params, tokens, mask) -> values`, float32 [B,T]: those of `token_values`.

    Args:
      critic: a Critic.
      policy: a `jmp.Policy`, the critic's precision.
      microbatch_size: rows in memory at once, a divisor of B.

    Returns:
      The valuer, of tokens int32 [B,T] and their mask bool [B,T].

    Raises:
      ValueError: the valuer, where `microbatch_size` does not divide B.
    """

    def valuer(params, tokens, mask):
        def rows(chunk):
            return token_values(critic, params, *chunk, policy=policy)

        return join_rows(lax.map(rows, split_rows((tokens, mask), microbatch_size)))

    return jit(valuer, numerics_of(critic))
