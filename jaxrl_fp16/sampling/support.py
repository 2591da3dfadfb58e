"""Which ids a truncated distribution keeps, and how a token is drawn.

B: rows.  V: vocabulary.  K: kept ids at most.
"""

import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.forward import logprob_of, tempered

PIECE = 64  # ids in the second stage of a draw


def support_size(config, vocab_size):
    """K: how many ids a truncated distribution can keep; 0 where it is not truncated."""
    truncated = config.temperature > 0 and (config.top_k > 0 or config.top_p < 1)
    if not truncated:
        return 0
    return min(config.max_support, config.top_k or config.max_support, vocab_size)


def kept_ids(logits, size, top_k, top_p):
    """int32 [B,K] of float32 `logits` [B,V] at their temperature: top-k, renormalise, top-p; filled with -1.

    Top-p keeps the likeliest ids up to the first whose mass reaches `top_p` (1904.09751),
    at least one and at most `size`.
    """
    best, ids = lax.top_k(logits, size)
    whole = best if top_k else logits
    probs = jnp.exp(best - jax.nn.logsumexp(whole, axis=-1, keepdims=True))
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    return jnp.where((mass_before < top_p) | (jnp.arange(size) == 0), ids, -1)


def draw(config, logits, keys):
    """One token a row from float32 `logits` [B,V], with a key a row.

    Returns `(token int32 [B], logprob float32 [B], support int32 [B,K] or None,
    full_logprob float32 [B] or None)`: the log-prob under the distribution that
    was sampled, its kept ids, and the log-prob under all of them at that temperature.
    """
    if config.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, logprob_of(logits, token), None, None
    logits = tempered(logits, config.temperature)
    size = support_size(config, logits.shape[-1])
    if not size:
        token = _categorical(keys, logits)
        return token, logprob_of(logits, token), None, None
    support = kept_ids(logits, size, config.top_k, config.top_p)
    scores = jnp.take_along_axis(logits, jnp.maximum(support, 0), axis=-1)
    place = _categorical(keys, jnp.where(support >= 0, scores, -jnp.inf))
    token = jnp.take_along_axis(support, place[:, None], axis=-1)[:, 0]
    return token, logprob_of(logits, token, support), support, logprob_of(logits, token)


def _categorical(keys, logits):
    """int32 [B]: an index out of `softmax(logits)` [B,V] by inversion, in two stages, with two uniforms a row.

    A uniform float32 has 2^23 values: the first picks one of some 64-wide pieces
    by their mass, the second an index within it, so that rare tokens keep their
    share. One Gumbel noise an id, the other way, costs V random numbers a row.
    """
    rows, size = logits.shape
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, -size % PIECE))).reshape(rows, -1, PIECE)
    first, second = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys).T
    piece = _invert(jnp.sum(mass, axis=-1), first)
    inside = jnp.take_along_axis(mass, piece[:, None, None], axis=1)[:, 0]
    return (piece * PIECE + _invert(inside, second)).astype(jnp.int32)


def _invert(mass, uniform):
    """int32 [B]: the first index whose cumulated `mass` [B,N] exceeds `uniform` [B] of the whole."""
    cumulated = jnp.cumsum(mass, axis=-1)
    index = jnp.sum(cumulated <= (uniform * cumulated[:, -1])[:, None], axis=-1)
    # XLA sums in a tree, which need not rise at every step: an index of mass 0 could be met by a rounding.
    found = jnp.take_along_axis(mass, index[:, None], axis=-1, mode="fill", fill_value=0.0)[:, 0]
    return jnp.where(found > 0, index, jnp.argmax(mass, axis=-1))
