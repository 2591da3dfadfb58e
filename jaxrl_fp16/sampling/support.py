"""Which ids a truncated distribution keeps, and how a token is drawn.

B: rows.  V: vocabulary.  K: kept ids at most.
"""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.forward import logprob_of


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
    logits = logits / config.temperature
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
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


__all__ = ["support_size", "kept_ids", "draw"]
