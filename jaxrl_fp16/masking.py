"""Masks over rows of tokens.

B: rows.  T: columns.  A mask is bool or 0/1; where it is 0 a value may be
anything, NaN too, and reaches neither a result nor a gradient.
"""

from jax import lax
import jax.numpy as jnp


def zero_where_masked(x, mask):
    """`x` in float32 with 0 where `mask` is 0. `jnp.where` before any arithmetic
    keeps a NaN behind the mask out of the gradient too."""
    return jnp.where(mask.astype(bool), x, 0.0).astype(jnp.float32)


def masked_sum(x, mask, axis=None):
    """Float32 sum of `x` over the entries where `mask` is 1."""
    return jnp.sum(zero_where_masked(x, mask), axis=axis)


def masked_mean(x, mask, axis=None):
    """Float32 mean of `x` over the entries where `mask` is 1; 0 where there are none."""
    count = jnp.sum(mask.astype(bool), axis=axis)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1)


def segment_positions(segments):
    """int32 [B,T]: how many columns of its own segment come before each column of `segments` int32 [B,T].

    The columns of a segment are adjacent.
    """
    columns = jnp.arange(segments.shape[1])
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return columns - lax.cummax(jnp.where(begins, columns, 0), axis=1)


def left_align(mask):
    """The gather that moves each row's real tokens to its start, and its inverse.

    Column `c` of an aligned array holds the row's `c`-th real token, so that a
    column is a position whatever the caller's padding. Returns `(order, inverse)`,
    int32 [B,T], for `jnp.take_along_axis(x, order, axis=1)`.
    """
    order = jnp.argsort(~mask.astype(bool), axis=-1, stable=True)
    return order, jnp.argsort(order, axis=-1)


def align(x, order):
    """`x` [B,T,...] with each row gathered by `order` [B,T]."""
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
