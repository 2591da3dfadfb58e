"""Rows of several examples: what goes where, against lists of lists."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_fp16.packing import first_fit_decreasing, pack, prefix


@st.composite
def workloads(draw):
    """(sizes, rows, columns)"""
    columns = draw(st.integers(1, 20))
    return draw(st.lists(st.integers(1, columns), min_size=1, max_size=40)), draw(st.integers(1, 6)), columns


def examples(sizes, columns):
    """tokens, mask, loss_mask [n,T]; every token of every example is another number."""
    mask = np.arange(columns) < np.array(sizes)[:, None]
    tokens = np.where(mask, 1 + np.arange(mask.size).reshape(mask.shape), 77).astype(np.int32)
    return tokens, mask, mask & (tokens % 3 > 0)


def contents(packed):
    """The examples of the packed rows as a sorted list of (tokens, which of them are learnt)."""
    found = []
    for tokens, mask, learnt, segments in zip(*packed):
        assert (np.diff(mask.astype(int)) <= 0).all()                       # padding is at the end
        assert (mask == (segments > 0)).all() and not (learnt & ~mask).any() and not tokens[~mask].any()
        assert (np.isin(np.diff(segments[mask]), (0, 1))).all()             # 1, 2, 3, ... without a gap
        found += [(tuple(tokens[segments == s]), tuple(learnt[segments == s])) for s in range(1, segments.max() + 1)]
    return sorted(found)


@settings(deadline=None)
@given(workloads())
def test_the_first_examples_stand_in_the_rows_once_each_and_whole(workload):
    sizes, rows, columns = workload
    arrays = examples(sizes, columns)
    packed, count = pack(*arrays, rows)
    assert all(x.shape == (rows, columns) for x in packed)
    assert [x.dtype for x in packed] == [np.int32, bool, bool, np.int32]
    expected = [(tuple(t[:size]), tuple(learnt[:size])) for t, learnt, size in zip(arrays[0], arrays[2], sizes)]
    assert contents(packed) == sorted(expected[:count])
    again, same = pack(*arrays, rows)
    assert same == count
    for x, y in zip(packed, again):
        np.testing.assert_array_equal(x, y)


@settings(deadline=None)
@given(workloads())
def test_no_example_waits_without_need(workload):
    """At least what placing one after the other in any row with room would take before it halts, or all."""
    sizes, rows, columns = workload
    places = prefix(np.array(sizes), rows, columns)
    assert len(places) >= min(rows, len(sizes)) and sum(sizes[: len(places)]) <= rows * columns
    loads = np.bincount(places, weights=sizes[: len(places)], minlength=rows)
    assert len(loads) == rows and (loads <= columns).all()
    if len(places) < len(sizes):  # the search's last failure: with one more, the longest first do not fit
        assert first_fit_decreasing(sizes[: len(places) + 1], rows, columns) is None


@pytest.mark.parametrize("low, high, least", [(20, 300, 0.98), (10, 100, 0.99), (50, 256, 0.97)])
def test_few_columns_stay_empty(low, high, least):
    sizes = np.random.default_rng(0).integers(low, high, 2000)
    places = prefix(sizes, 64, 512)
    assert sizes[: len(places)].sum() > least * 64 * 512


def test_what_does_not_fit_waits_for_the_next_rows():
    tokens, mask, learnt = examples([3, 4, 4, 1], 8)
    packed, count = pack(tokens, mask, learnt, 1)
    assert count == 2 and packed.segments.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0]]
    packed, count = pack(tokens[count:], mask[count:], learnt[count:], 1)
    assert count == 2 and packed.segments.tolist() == [[1, 1, 1, 1, 2, 0, 0, 0]]
