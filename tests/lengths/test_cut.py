"""Which rows are worked on together."""

import numpy as np
import pytest

from jaxrl_fp16.lengths import cut, dividing, rows_at, widths


def drawn(rows=40, columns=320, seed=0):
    return np.minimum(np.random.default_rng(seed).geometric(1 / 60, rows), columns)


@pytest.mark.parametrize("columns", [1, 20, 32, 33, 96, 320, 1000, 9216])
def test_widths_are_few_and_end_with_the_batchs(columns):
    found = widths(columns)
    assert found == sorted(set(found)) and found[-1] == columns and len(found) <= 8
    assert all(width % 32 == 0 for width in found[:-1])
    assert columns > 32 or found == [columns]


def test_the_widths_of_320_columns():
    assert widths(320) == [32, 64, 96, 128, 160, 192, 256, 320]


@pytest.mark.parametrize(("given", "rows"), [
    ((320, 8), 8), ((64, 8), 8), ((320, 32, 2560), 8), ((64, 32, 2560), 32), ((256, 32, 2560), 10),
    ((320, 32, 100), 1), ((256, 32, 2560, 4), 8), ((320, 32, 100, 4), 4),
])
def test_a_budget_bounds_the_rows(given, rows):
    assert rows_at(*given) == rows


@pytest.mark.parametrize(("given", "size"), [((128, 10), 8), ((128, 200), 128), ((7, 3), 1), ((12, 6, 4), 4)])
def test_the_largest_divisor(given, size):
    assert dividing(*given) == size


@pytest.mark.parametrize("budget", [None, 640, 1280])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("count", [9, 40])
def test_every_row_is_in_one_part_that_is_wide_enough(budget, shards, count):
    lengths = drawn(count)
    parts = cut(lengths, 320, 8, budget, shards)
    rows = np.concatenate([part.rows for part in parts])
    assert sorted(rows[rows < count]) == [*range(count)]
    for part in parts:
        real, at_once = part.rows[part.rows < count], part.index.shape[1]
        assert lengths[real].max() <= part.width and at_once % shards == 0 and at_once <= 8
        assert budget is None or at_once * part.width <= max(budget, shards * part.width)
        assert len(part.index) == -(-count // at_once) and np.all(part.index[part.count:] == count)
    assert len({part.width for part in parts}) == len(parts)
    assert [part.width for part in parts] == sorted((part.width for part in parts), reverse=True)


def shape(part):
    return part.count, part.index.shape[1], part.width


def test_equal_lengths_are_the_whole_batch():
    assert cut(np.full(8, 320), 320, 4) is None and cut(np.full(8, 257), 320, 4) is None
    assert [shape(part) for part in cut(np.full(8, 200), 320, 4)] == [(2, 4, 256)]


def test_rows_without_a_token_are_worked_on_too():
    assert [shape(part) for part in cut(np.zeros(8, int), 320, 4)] == [(2, 4, 32)]


def test_few_rows_of_many_go_together_that_they_be_alike():
    """The root of 32 x 128 x 320 positions, 3 rows of 320; what fits at once stays together."""
    lengths = np.linspace(320, 1, 128).astype(int)
    assert [shape(part) for part in cut(lengths, 320, 32, 2560)][:2] == [(9, 3, 320), (6, 4, 256)]
    assert cut(lengths, 320, 128) is None and [shape(part) for part in cut(lengths // 2, 320, 128)] == [(1, 128, 160)]


def test_the_shape_of_a_widths_rows_is_the_same_whatever_the_lengths():
    shapes = {}
    for seed in range(20):
        for part in cut(drawn(seed=seed), 320, 16, 2560):
            shapes.setdefault(part.width, set()).add(part.index.shape)
    assert len(shapes) > 3 and all(len(found) == 1 for found in shapes.values())


def test_a_short_rest_goes_into_fewer_wider_rows():
    parts = cut(np.array([320] * 2 + [40]), 320, 16, 640)
    assert [shape(part) for part in parts] == [(1, 2, 320), (1, 2, 256)]
