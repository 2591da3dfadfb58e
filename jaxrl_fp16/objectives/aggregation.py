"""From losses of tokens to the loss of a minibatch.

B: rows (responses).  T: columns.  L: max_new_tokens, a constant.
"""

import jax.numpy as jnp

from jaxrl_fp16.masking import masked_sum


def token_mean(x, mask, normalizer, _):
    """`sum(m*x) / sum(m)`: every token of the minibatch weighs the same (DAPO, arXiv 2503.14476)."""
    return masked_sum(x, mask) / jnp.maximum(normalizer.tokens, 1)


def sequence_mean(x, mask, normalizer, _):
    """`mean_b(sum_t(m*x) / n_b)`: every response weighs the same (GRPO, arXiv 2402.03300)."""
    tokens = jnp.sum(mask.astype(bool), axis=1)
    return jnp.sum(masked_sum(x, mask, axis=1) / jnp.maximum(tokens, 1)) / normalizer.rows


def fixed_length(x, mask, normalizer, max_new_tokens):
    """`mean_b(sum_t(m*x) / L)`: no length bias (Dr. GRPO, arXiv 2503.20783)."""
    return masked_sum(x, mask) / (normalizer.rows * max_new_tokens)


# name -> (x [B,T], mask [B,T], normalizer, max_new_tokens) -> scalar
AGGREGATIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "fixed_length": fixed_length}
