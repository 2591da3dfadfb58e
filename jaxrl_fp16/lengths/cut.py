"""Which rows are worked on together, settled on the host from their lengths.

B: rows of a batch.  T: its columns.  R: rows of a part.  W: its columns.
"""

import math
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from jaxrl_fp16.parallel import to_host

# By roots of 2 while it matters, then by halves: a row is padded by a fifth on average.
SHARES = (1, 2**0.5, 2, 2**1.5, 4, 8, 16)
STEP = 32  # columns; narrower parts save little, and with few rows starve the matmul


class Part(NamedTuple):
    """Rows that are worked on at once."""

    index: np.ndarray  # int32 [R]: rows of the batch; B where there is none
    width: int         # W


def widths(columns):
    """The widths that parts of a batch of `columns` may have, in ascending order; seven at most, the last is T."""
    return sorted({min(columns, STEP * math.ceil(columns / share / STEP)) for share in SHARES})


def rows_at(width, rows, tokens=None, shards=1):
    """R at a width: `rows`, or fewer where they would have more than `tokens` positions; a multiple of `shards`."""
    fitting = rows if tokens is None else min(rows, tokens // width)
    return max(fitting // shards, 1) * shards


def dividing(count, most, shards=1):
    """The largest divisor of `count` that is no more than `most`; a multiple of shards, if there is one."""
    sizes = [size for size in range(1, min(most, count) + 1) if count % size == 0]
    return max([size for size in sizes if size % shards == 0] or sizes)


def cut(lengths, columns, rows, tokens=None, shards=1):
    """The parts of a batch, a list of `Part`, the widest first; None where all of them would be as wide as the batch.

    Args:
      lengths: int [B], on the host: how many real tokens each row has.
      columns: T.
      rows: most rows of a part.
      tokens: most positions of a part; None: as many as `rows` of T columns have.
      shards: how many devices share the rows of each part.
    """
    allowed = widths(columns)
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    parts, at = [], 0
    while at < len(order):
        width = next(width for width in allowed if width >= lengths[order[at]])
        left = len(order) - at
        # The last rows may fit into fewer, wider ones, of another program.
        fitting = [other for other in allowed if other >= width and rows_at(other, rows, tokens, shards) >= left]
        width = min(fitting, key=lambda other: other * rows_at(other, rows, tokens, shards), default=width)
        count = rows_at(width, rows, tokens, shards)
        index = order[at:at + count]
        parts.append(Part(np.pad(index, (0, count - len(index)), constant_values=len(order)), width))
        at += count
    return None if all(part.width == columns for part in parts) else parts


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
