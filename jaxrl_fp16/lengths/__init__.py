"""Rows by length: a batch is cut into parts, each as wide as its own longest row. There are few widths, whatever the
lengths are, and a program for each."""

from jaxrl_fp16.lengths.cut import (
    Part, batch_shape, cut, dividing, row_lengths, row_sharding, rows_at, traced, widths,
)
from jaxrl_fp16.lengths.parts import Places, Told, by_parts, pinned, places

__all__ = [
    "Part", "Places", "Told", "batch_shape", "by_parts", "cut", "dividing", "pinned", "places", "row_lengths",
    "row_sharding", "rows_at", "traced", "widths",
]
