"""Which rows are worked on together."""

import numpy as np
import pytest

from jaxrl_fp16.lengths import cut, dividing, rows_at, widths


def drawn(rows=40, columns=320, seed=0):
    return np.minimum(np.random.default_rng(seed).geometric(1 / 60, rows), columns)


@pytest.mark.parametrize("columns", [1, 20, 32, 33, 96, 320, 1000, 9216])
def test_widths_are_few_and_end_with_the_batchs(columns):
    found = widths(columns)
    assert found == sorted(set(found)) and found[-1] == columns and len(found) <= 7
    assert all(width % 32 == 0 for width in found[:-1])
    assert columns > 32 or found == [columns]


def test_the_widths_of_320_columns():
    assert widths(320) == [32, 64, 96, 128, 160, 256, 320]


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
def test_every_row_is_in_one_part_that_is_wide_enough(budget, shards):
    lengths = drawn()
    parts = cut(lengths, 320, 8, budget, shards)
    index = np.concatenate([part.index for part in parts])
    assert sorted(index[index < 40]) == [*range(40)] and (budget is not None or len(index) == 40)
    for part in parts:
        real = part.index[part.index < 40]
        assert lengths[real].max() <= part.width and len(part.index) % shards == 0 and len(part.index) <= 8
        assert budget is None or len(part.index) * part.width <= max(budget, shards * part.width)
    assert len({(len(part.index), part.width) for part in parts}) == len({part.width for part in parts})
    assert [part.width for part in parts][0] == max(part.width for part in parts)


def test_equal_lengths_are_the_whole_batch():
    assert cut(np.full(8, 320), 320, 4) is None and cut(np.full(8, 257), 320, 4) is None
    assert [part.width for part in cut(np.full(8, 200), 320, 4)] == [256, 256]


def test_rows_without_a_token_are_worked_on_too():
    assert [part.width for part in cut(np.zeros(8, int), 320, 4)] == [32, 32]


def test_a_short_rest_goes_into_fewer_wider_rows():
    parts = cut(np.array([320] * 2 + [40]), 320, 16, 640)
    assert [(len(part.index), part.width) for part in parts] == [(2, 320), (2, 256)]
