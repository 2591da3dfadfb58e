"""Largest and smallest numbers that keep a NaN.

The reductions `jnp.max` and `jnp.min` that XLA compiles for CPUs drop a NaN at many widths (openxla/xla#21461: 4,096
ones with one NaN among them give 1), so no check of finiteness and no reported extreme may hang on them alone.
Elementwise maxima, sums and `isfinite` keep it.
"""

from jax import lax
import jax.numpy as jnp


def peak(x, axis=None):
    """float32: the largest magnitude of `x` over `axis`, 0 of nothing; NaN where `x` holds one.

    One reduction of both, without an array between: `x` may be a model's weights. It has no gradient.
    """
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    size = jnp.abs(x).astype(jnp.float32)
    found, nan = lax.reduce(
        (size, jnp.isnan(x)), (jnp.float32(0), False), lambda a, b: (jnp.maximum(a[0], b[0]), a[1] | b[1]), tuple(axes)
    )
    return jnp.where(nan, jnp.nan, found)


def largest(x, mask=True, axis=None):
    """The largest entry of `x` where `mask` is 1, minus infinity where there is none; NaN where one of them is."""
    kept = jnp.where(mask, x, -jnp.inf)
    return _with_nan(jnp.max(kept, axis=axis), kept, axis)


def smallest(x, mask=True, axis=None):
    """The smallest entry of `x` where `mask` is 1, infinity where there is none; NaN where one of them is."""
    kept = jnp.where(mask, x, jnp.inf)
    return _with_nan(jnp.min(kept, axis=axis), kept, axis)


def _with_nan(found, x, axis):
    return jnp.where(jnp.any(jnp.isnan(x), axis=axis), jnp.nan, found)
