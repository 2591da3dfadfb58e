"""Which rows are worked on together, settled on the host from their lengths.

B: rows of a batch.  T: its columns.  R: rows that are worked on at once.  W: their columns.
"""

import math
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from jaxrl_fp16.parallel import to_host

# By thirds while it matters, then coarser: a row is padded by a sixth on average.
SHARES = (1, 4 / 3, 16 / 9, 64 / 27, 256 / 81, 4.5, 7, 14)
STEP = 32  # columns; narrower rows save little, and take programs of their own
# Positions at once: at most the root of FINE x B x T. Rows of like length are few, so that many at once are filled up
# with others or with none; a few at once add their gradient more often, which costs as much as some FINE positions.
FINE, LEAST = 32, 1024


class Part(NamedTuple):
    """The rows of one width."""

    index: np.ndarray  # int32 [N,R]: rows of the batch, R at once; B where there is none. N is what B rows take
    count: int         # how many of the N have rows, the first ones
    width: int         # W

    @property
    def rows(self):
        """int32 [count x R]: what is worked on, with B where there is none."""
        return self.index[:self.count].ravel()


def widths(columns):
    """The widths that parts of a batch of `columns` may have, in ascending order; eight at most, the last is T."""
    return sorted({min(columns, STEP * math.ceil(columns / share / STEP)) for share in SHARES})


def rows_at(width, rows, tokens=None, shards=1):
    """R at a width: `rows`, or fewer where they would have more than `tokens` positions; a multiple of `shards`."""
    fitting = rows if tokens is None else min(rows, tokens // width)
    return max(fitting // shards, 1) * shards


def dividing(count, most, shards=1):
    """The largest divisor of `count` that is no more than `most`; a multiple of shards, if there is one."""
    sizes = [size for size in range(1, min(most, count) + 1) if count % size == 0]
    return max([size for size in sizes if size % shards == 0] or sizes)


class BatchShape(NamedTuple):
    """Of a batch that is worked on at its full width."""

    count: int                        # B
    columns: int                      # T
    at_once: int                      # rows at once; a divisor of B where `tokens` limits them
    sharding: NamedSharding | None    # how a mesh has spread the rows, and over how many devices
    shards: int


def batch_shape(mask, rows, tokens=None):
    """The BatchShape of a batch with a mask [B,T] or [B,2,T]; rows, tokens: as `rows_at` takes them."""
    (count, *_, columns), (sharding, shards) = mask.shape, row_sharding(mask)
    at_once = rows if tokens is None else dividing(count, rows_at(columns, rows, tokens, shards), shards)
    return BatchShape(count, columns, at_once, sharding, shards)


def cut(lengths, columns, rows, tokens=None, shards=1):
    """The parts of a batch, a list of `Part`, the widest first; None where all of it would be as wide as the batch.

    Args:
      lengths: int [B], on the host: how many real tokens each row has.
      columns: T.
      rows: most rows at once.
      tokens: most positions at once; None: as many as `rows` of T columns have.
      shards: how many devices share the rows that are worked on at once.
    """
    allowed, count = widths(columns), len(lengths)
    if rows_at(columns, rows, tokens, shards) < count:
        fine = shards * max(LEAST, math.isqrt(FINE * count * columns // shards))
        tokens = min(fine, rows * columns if tokens is None else tokens)
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    found, at = {}, 0
    while at < count:
        width = next(width for width in allowed if width >= lengths[order[at]])
        # The last rows may fit into fewer, wider ones, of another program.
        fitting = [other for other in allowed
                   if other >= width and rows_at(other, rows, tokens, shards) >= count - at]
        width = min(fitting, key=lambda other: other * rows_at(other, rows, tokens, shards), default=width)
        size = rows_at(width, rows, tokens, shards)
        found.setdefault(width, []).append(_filled(order[at:at + size], size, count))
        at += size
    if [*found] == [columns]:
        return None
    return [Part(_filled(np.concatenate(index), -(-count // len(index[0])) * len(index[0]), count)
                 .reshape(-1, len(index[0])), len(index), width) for width, index in found.items()]


def _filled(index, size, nothing):
    """`index` [n] with `nothing` after it, up to `size`."""
    return np.pad(index, (0, size - len(index)), constant_values=nothing)


def row_lengths(*masks):
    """int [B], on the host: real tokens of each row of masks [B,T] or [B,2,T]; of several those of the longest."""
    sizes = [to_host(mask).astype(bool).sum(axis=-1) for mask in masks]
    return np.max([size.reshape(len(size), -1).max(axis=1) for size in sizes], axis=0)


def row_sharding(mask):
    """How a mesh has spread the rows of an array: a NamedSharding of [R,...] and over how many; None and 1 without."""
    sharding = getattr(mask, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None, 1
    shards = mask.shape[0] // sharding.shard_shape(mask.shape)[0]
    return (NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0])), shards) if shards > 1 else (None, 1)


def traced(*trees):
    """Whether these hold an array of a program that is being traced: nothing is known of its values."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))
