"""The stop table against a search in the bytes of the text."""

import time

from hypothesis import given, settings, strategies
import numpy as np
import pytest

from jaxrl_fp16.sampling.stopping import stop_table


def first_stop(stop_strings, pieces):
    """How many pieces it takes until one of the strings is in the text; None if it never does."""
    text = b""
    for count, piece in enumerate(pieces, 1):
        text += piece
        if any(stop.encode() in text for stop in stop_strings):
            return count
    return None


def first_accepted(table, accept, ids):
    state = 0
    for count, index in enumerate(ids, 1):
        state = table[state, index]
        if state == accept:
            assert (table[accept] == accept).all()
            return count
    return None


letters = strategies.text("ab€", min_size=1, max_size=5)
pieces = strategies.lists(strategies.binary(max_size=4) | letters.map(str.encode), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(strategies.lists(letters, min_size=1, max_size=4), pieces, strategies.data())
def test_against_search(stop_strings, vocabulary, data):
    table, accept = stop_table(stop_strings, vocabulary)
    assert table.dtype == np.uint16 and table.shape == (accept + 1, len(vocabulary))
    ids = data.draw(strategies.lists(strategies.integers(0, len(vocabulary) - 1), max_size=20))
    expected = first_stop(stop_strings, [vocabulary[index] for index in ids])
    assert first_accepted(table, accept, ids) == expected


def test_a_stop_string_over_several_tokens_and_inside_one():
    vocabulary = [b"</", b"answer", b">", b"x</answer>y", b""]
    table, accept = stop_table(["</answer>"], vocabulary)
    assert first_accepted(table, accept, [0, 1, 4, 2]) == 4
    assert first_accepted(table, accept, [0, 0, 1, 2]) == 4
    assert first_accepted(table, accept, [0, 2, 1, 2]) is None
    assert first_accepted(table, accept, [1, 3]) == 2


def test_a_stop_string_that_begins_or_sits_in_another():
    table, accept = stop_table(["abc", "b", "bd"], [b"a", b"b", b"c"])
    assert first_accepted(table, accept, [0, 1]) == 2


def test_a_large_vocabulary_is_quick():
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.geometric(0.15, size=152_000), 128)
    vocabulary = [bytes(row[:length]) for row, length in
                  zip(generator.integers(97, 110, size=(152_000, 128), dtype=np.uint8), lengths, strict=True)]
    start = time.perf_counter()
    table, accept = stop_table(["abcabcabcdabcabcabcd"], vocabulary)
    assert time.perf_counter() - start < 3 and table.shape == (21, 152_000) and accept == 20


@pytest.mark.parametrize("stop", [[], [""], "text", ["a", ""]])
def test_bad_stop_strings(stop):
    with pytest.raises(ValueError, match="stop is"):
        stop_table(stop, [b"a"])


def test_too_many_states():
    with pytest.raises(ValueError, match="2000 prefixes"):
        stop_table(["x" * 2000], [b"a"])
