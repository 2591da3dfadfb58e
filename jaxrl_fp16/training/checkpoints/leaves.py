"""The arrays of a state by name, and what a checkpoint must know of each to give it back as it was."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def named_leaves(tree: Any) -> dict[str, Any]:
    """The arrays by their dotted path: a flat dict outlives changes of the containers' types."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(f"{name}: {type(leaf).__name__} is not allowed in a state; allowed: an array")
        if name in leaves:
            raise ValueError(f"{name}: two leaves of this path")
        leaves[name] = leaf
    return leaves


def table_of(leaves: Mapping[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}


def is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def abstract_leaf(dtype: str, shape: list[int]) -> jax.ShapeDtypeStruct:
    """A leaf of the table that `table_of` makes."""
    if not dtype.startswith("key<"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    kinds = (jax.random.key(0, impl=name).dtype for name in ("threefry2x32", "rbg", "unsafe_rbg"))
    return jax.ShapeDtypeStruct(shape, next(kind for kind in kinds if str(kind) == dtype))


def target_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """What orbax shall restore for a template's leaf; a key's sharding fits its data too."""
    data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def like_leaf(leaf: Any, data: jax.Array | None) -> jax.Array:
    """Restored data as the template's leaf is: a typed key, or the array itself."""
    if data is None:
        return jnp.zeros(leaf.shape, leaf.dtype)
    if not is_key(leaf):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(jnp.empty((), leaf.dtype)))
