"""Several examples in a row, so that few columns are lost to padding. On the host, in NumPy.

n: examples.  R: packed rows.  T: columns.
"""

from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Examples side by side; a row's padding is at its end."""

    tokens: np.ndarray     # int32 [R,T]; 0 at padding
    mask: np.ndarray       # bool [R,T]: real tokens
    loss_mask: np.ndarray  # bool [R,T]: tokens to be learnt
    segments: np.ndarray   # int32 [R,T]: 0 at padding, else the example's number in its row, from 1


def pack(tokens, mask, loss_mask, rows):
    """`(Packed, count)`: the first `count` of n examples in `rows` rows; the others are left for the next call.

    tokens int32 [n,T], mask and loss_mask bool [n,T] with real tokens at the start, at
    most T of them: as `encode_completions` gives them. Examples are taken in their order, so
    that none is passed over, and as many as `prefix` finds room for.
    """
    sizes = mask.sum(axis=1)
    places = prefix(sizes, rows, mask.shape[1])
    packed = Packed(*(np.zeros((rows, mask.shape[1]), dtype) for dtype in (np.int32, bool, bool, np.int32)))
    filled, segment = np.zeros((2, rows), np.int64)
    for example, row in enumerate(places):
        size, start = sizes[example], filled[row]
        at, filled[row], segment[row] = slice(start, start + size), start + size, segment[row] + 1
        packed.tokens[row, at], packed.mask[row, at] = tokens[example, :size], True
        packed.loss_mask[row, at], packed.segments[row, at] = loss_mask[example, :size], segment[row]
    return packed, len(places)


def prefix(sizes, rows, columns):
    """The row of each of the first examples, int list [count]: as many of them as a search by halves finds room for.

    sizes int [n], each at most `columns`. The result depends on the arguments alone; the first `rows`
    examples always fit, one a row.
    """
    low, high = min(len(sizes), rows), int(np.sum(np.cumsum(sizes) <= rows * columns))
    places = first_fit_decreasing(sizes[:low], rows, columns)
    while low < high:
        middle = (low + high + 1) // 2
        found = first_fit_decreasing(sizes[:middle], rows, columns)
        if found is None:
            high = middle - 1
        else:
            low, places = middle, found
    return places


def first_fit_decreasing(sizes, rows, columns):
    """The row of each example, the longest placed first and each in the first row with room; None if one has none."""
    room, places = np.full(rows, columns), [0] * len(sizes)
    for example in np.argsort(-np.asarray(sizes), kind="stable"):
        row = int(np.argmax(room >= sizes[example]))
        if room[row] < sizes[example]:
            return None
        places[example], room[row] = row, room[row] - sizes[example]
    return places
