"""The scorer: the trainer's forward alone, over many rows a few at a time.

B: rows.  T: columns.
"""

from functools import partial

import jax
from jax import lax

from jaxrl_fp16.forward import NONE, numerics_of, score, token_values
from jaxrl_fp16.lengths import Told, batch_shape, by_parts, cut, row_lengths, traced
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.training.updates.step import join_rows, split_rows


def make_scorer(
    model, policy, *, microbatch_size, microbatch_tokens=None, temperature=1.0, with_entropy=False, announce=None
):
    """A `(params, tokens, mask, decisions) -> (logprobs, entropies)`, float32 [B,T] each.

    Args:
      model: a Decoder.
      policy: a `jmp.Policy`, the run's precision.
      microbatch_size: most rows in memory at once, a divisor of B.
      microbatch_tokens: most positions in memory at once; None: those of `microbatch_size` rows of T columns.
      temperature: the sampler's.
      with_entropy: computes the entropies, in nats; otherwise they are zeros.
      announce: a text to a context manager, which is told what compiles, as `Console.announce`; None: nothing is said.

    Returns:
      The scorer, of tokens int32 [B,T], their mask bool [B,T] and a rollout's `decisions`. Log-probs are those
      of `token_logprobs`. It looks at the mask, orders the rows by length and works on them in parts as wide as
      their longest row, one jitted program for each of at most eight widths; where a mask cannot be looked at, in
      a function that is traced, on T columns. `lengths` int [B] on the host, the mask's sums, spare it the look.

    Raises:
      ValueError: the scorer, where `microbatch_size` does not divide B.
    """

    def rows(params, chunk):
        tokens, mask, decisions = chunk
        return score(model, params, tokens, mask, policy, temperature, decisions, with_entropy)

    told = Told("the scorer", announce)
    run = _over_rows(rows, numerics_of(model), microbatch_size, microbatch_tokens, told)

    def scorer(params, tokens, mask, decisions=NONE, lengths=None):
        return run(params, (tokens, mask, decisions), lengths)

    scorer._cache_size = run._cache_size
    scorer.lower = lambda params, tokens, mask, decisions=NONE: run.lower(params, (tokens, mask, decisions))
    return scorer


def make_valuer(critic, policy, *, microbatch_size, microbatch_tokens=None, announce=None):
    """A `(params, tokens, mask) -> values`, float32 [B,T]: those of `token_values`.

    Args:
      critic: a Critic.
      policy: a `jmp.Policy`, the critic's precision.
      microbatch_size, microbatch_tokens, announce: as for `make_scorer`.

    Returns:
      The valuer, of tokens int32 [B,T] and their mask bool [B,T]; `lengths` as the scorer takes them.

    Raises:
      ValueError: the valuer, where `microbatch_size` does not divide B.
    """

    def rows(params, chunk):
        return token_values(critic, params, *chunk, policy=policy)

    told = Told("the critic's values", announce)
    run = _over_rows(rows, numerics_of(critic), microbatch_size, microbatch_tokens, told)

    def valuer(params, tokens, mask, lengths=None):
        return run(params, (tokens, mask), lengths)

    valuer._cache_size = run._cache_size
    valuer.lower = lambda params, tokens, mask: run.lower(params, (tokens, mask))
    return valuer


def _over_rows(function, numerics, size, budget, told):
    """`run(params, tree, lengths) -> results`: `function` over the rows of a tree of arrays, the second its mask."""

    def whole(params, tree, size):
        results = lax.map(partial(function, params), split_rows(tree, size))
        return jax.tree.map(join_rows, results)

    whole = jit(whole, numerics, static_argnames="size")
    narrow, narrow_programs = by_parts(function, partial(jit, numerics=numerics), told)

    def run(params, tree, lengths=None):
        mask = tree[1]
        count, columns, at_once, sharding, shards = batch_shape(mask, size, budget)
        if traced(params, tree) or count % size:    # which `split_rows` refuses
            return whole(params, tree, size=at_once if count % size == 0 else size)
        lengths = row_lengths(mask) if lengths is None else lengths
        parts = cut(lengths, columns, size, budget, shards)
        if parts is None:
            return whole(params, tree, size=at_once)
        return narrow(params, tree, parts, sharding)

    run.lower = lambda params, tree: whole.lower(params, tree, size=batch_shape(tree[1], size, budget).at_once)
    run._cache_size = lambda: whole._cache_size() + narrow_programs()
    return run
