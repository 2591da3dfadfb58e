"""The arrays of a state by name, and what a checkpoint must know of each to give it back as it was."""

from collections.abc import Mapping
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.models.frozen import BASE, LORA


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


def saved_and_frozen(leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(those that are saved, those of frozen parts)`: what lies below a "base" beside which there is a "lora"."""
    frozen = {name: leaf for name, leaf in leaves.items() if _is_frozen(name, leaves)}
    return {name: leaf for name, leaf in leaves.items() if name not in frozen}, frozen


def _is_frozen(name, leaves):
    path = name.split(".")
    stems = (".".join([*path[:place], LORA]) + "." for place, part in enumerate(path) if part == BASE)
    return any(other.startswith(stem) for stem in stems for other in leaves)


def describe_frozen(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Dtypes, bytes and a digest of the bits of frozen arrays, as JSON holds them; {} of none. The same on any mesh."""
    if not leaves:
        return {}
    sums, found = jax.device_get(_bit_sums(list(leaves.values()))), hashlib.blake2b(digest_size=16)
    for (name, leaf), pair in zip(leaves.items(), sums, strict=True):
        found.update(f"{name} {leaf.dtype} {list(leaf.shape)} {pair.tolist()}\n".encode())
    return {"dtypes": sorted({str(leaf.dtype) for leaf in leaves.values()}), "arrays": len(leaves),
            "bytes": sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves.values()),
            "digest": found.hexdigest()}


@jax.jit
def _bit_sums(arrays):
    """uint32 [2] of each array: sums of its bits, weighted by their places. Sums of integers do not depend on where the
    parts of an array lie."""
    return [_bit_sum(x) for x in arrays]


def _bit_sum(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    # An index along each axis, so that no array is reshaped: a mesh may have divided it.
    places = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = [(places ^ jnp.uint32(salt)) * jnp.uint32(2_654_435_761) | 1 for salt in (0, 0x9E3779B9)]
    return jnp.stack([jnp.sum(bits * factor, dtype=jnp.uint32) for factor in mixed])


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
