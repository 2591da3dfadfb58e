"""The rows of a part: taken out of the batch and put back within the program that works on them.

B: rows of a batch.  T: its columns.  R: rows of a part that are worked on at once.  W: their columns.
"""

import contextlib
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.masking import align, left_align


@struct.dataclass
class Places:
    """Where the tokens of R of a part's rows stand in the batch."""

    index: jax.Array    # int32 [R], of Part's
    order: jax.Array    # int32 [R,T], or [R,2,T] of pairs: `left_align` of their mask
    inverse: jax.Array  # likewise
    present: jax.Array  # bool [R]: False where there is no row
    width: int = struct.field(pytree_node=False)
    sharding: Any = struct.field(pytree_node=False, default=None)  # of arrays [R,...]; None: as it comes

    def take(self, tree):
        """The part's rows of a tree of arrays of the batch, their real tokens in columns 0 on.

        Arrays [B] give [R]; [B,T,...] or [B,2,T,...] give [R,W,...] or [R,2,W,...]. With fewer columns than T they
        are those of the last ones, as a support is, and the others are filled with -1. A row that is not there is 0.
        """
        return jax.tree.map(self._take, tree)

    def _take(self, x):
        x = jnp.asarray(x).at[self.index].get(mode="clip")
        if x.ndim >= self.order.ndim:
            x = self._columns(x)
        x = jnp.where(self.present.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))
        return x if self.sharding is None else lax.with_sharding_constraint(x, self.sharding)

    def _columns(self, x):
        axis = self.order.ndim - 1
        missing = self.order.shape[-1] - x.shape[axis]
        if missing:
            x = jnp.pad(x, [(missing if at == axis else 0, 0) for at in range(x.ndim)], constant_values=-1)
        order = self.order[..., :self.width]
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - order.ndim)), axis=axis)

    def put(self, whole, x):
        """`whole` [B,T,...] with the part's rows replaced by those of `x` [R,W,...]; 0 in columns that it lacks."""
        x = jnp.pad(x, ((0, 0), (0, self.order.shape[1] - self.width)) + ((0, 0),) * (x.ndim - 2))
        return whole.at[self.index].set(align(x, self.inverse), mode="drop")


def places(mask, index, width, sharding=None):
    """The `Places` of rows `index` [R] in a batch of mask [B,T] or [B,2,T], bool or 0/1."""
    count = mask.shape[0]
    order, inverse = left_align(jnp.asarray(mask).at[index].get(mode="clip"))
    return Places(index, order, inverse, index < count, width, sharding)


def by_parts(function, jit, told=None):
    """`run(params, tree, parts, sharding) -> results`, and how many programs it has made.

    Args:
      function: `(params, rows) -> results`, float32 [R,W] each, of a tree of arrays whose second is the mask.
      jit: `jax.jit`, or what stands for it.
      told: a `Told`.

    `run` takes the tree's arrays [B,T,...] whole, the `cut` of its rows, and their `row_sharding`; its results are
    [B,T], 0 in rows of no part. There is one program for each width, and one that begins.
    """
    def begin(params, tree, sharding):
        shapes = jax.eval_shape(function, params, tree)
        return jax.tree.map(lambda x: pinned(jnp.zeros(x.shape, x.dtype), sharding), shapes)

    def add(found, params, tree, index, count, width, sharding):
        def body(i, found):
            at = places(tree[1], index[i], width, sharding)
            results = function(params, at.take(tree))
            return jax.tree.map(lambda whole, x: pinned(at.put(whole, x), sharding), found, results)

        return lax.fori_loop(0, count, body, found)

    begin = jit(begin, static_argnames="sharding")
    add = jit(add, static_argnames=("width", "sharding"), donate_argnums=0)
    told = told or Told("")

    def run(params, tree, parts, sharding=None):
        tree = jax.device_put(tree)  # once, and not for each part
        found = begin(params, tree, sharding=sharding)
        for part in parts:
            with told.of(part):
                found = add(found, params, tree, part.index, part.count, width=part.width, sharding=sharding)
        return found

    return run, lambda: begin._cache_size() + add._cache_size()


def pinned(x, sharding):
    """`x` where a program is told to keep it; None: as it comes."""
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)


class Told:
    """Says of each program of a part that it compiles, the first time.

    Args:
      name: what the programs are.
      announce: a text to a context manager, as `Console.announce`; None: says nothing.
    """

    def __init__(self, name, announce=None):
        self._name, self._announce, self._seen = name, announce, set()

    def of(self, part):
        """Around the call of the program of a Part."""
        shape = part.index.shape[1], part.width
        if shape in self._seen or self._announce is None:
            return contextlib.nullcontext()
        self._seen.add(shape)
        return self._announce(
            f"compiling {self._name} for {shape[0]} rows of {shape[1]} tokens, width {len(self._seen)} of its programs"
        )
