"""From an engine's arrays to a Rollout: stop strings, padding, masks, kept ids."""

import numpy as np
import pytest

from jaxrl_fp16.engines import EngineError, cut_at_stops, make_rollout
from jaxrl_fp16.engines.answers import join_responses, read_responses
from jaxrl_fp16.sampling.stopping import stop_table

PIECES = [b"", b"", b"a", b"b", b"ab", b"c"]    # 0: pad, 1: end
ROWS = [[2, 3, 5, 1], [5, 5, 5, 5, 5], [5, 4, 2, 1], [5, 5, 2, 1], [2, 2, 2, 2, 3]]


def arrays_of(rows, ends=(1,), **changes):
    flat = [token for row in rows for token in row]
    found = {"tokens": np.array(flat, np.int32), "lengths": np.array([len(row) for row in rows], np.int32),
             "logprobs": -1 - np.arange(len(flat), dtype=np.float32) / 64,
             "finished": np.array([row[-1] in ends for row in rows], np.int32)}
    return {name: value for name, value in {**found, **changes}.items() if value is not None}


def read(rows=ROWS, limit=5, most=0, **changes):
    return read_responses(arrays_of(rows, **changes), len(rows), limit, len(PIECES), (1,), most)


def test_rows_are_laid_out():
    found = read()
    assert found.tokens.tolist() == [row + [0] * (5 - len(row)) for row in ROWS]
    assert found.lengths.tolist() == [4, 5, 4, 4, 5] and found.finished.tolist() == [True, False, True, True, False]
    np.testing.assert_array_equal(found.logprobs[2], np.append(-1 - np.arange(9, 13) / 64, 0).astype(np.float32))
    joined = join_responses([found, read([[1]])])
    assert joined.lengths.tolist() == [4, 5, 4, 4, 5, 1] and joined.support is None


def test_the_token_that_completes_a_stop_string_ends_a_response():
    """However the text is cut into tokens; also one that completes it at the limit, and not one after the end."""
    found = cut_at_stops(read(), stop_table(["ab"], PIECES))
    assert found.lengths.tolist() == [2, 5, 2, 4, 5] and found.finished.tolist() == [True, False, True, True, True]
    assert found.tokens.tolist() == [[2, 3, 0, 0, 0], [5] * 5, [5, 4, 0, 0, 0], [5, 5, 2, 1, 0], [2, 2, 2, 2, 3]]
    assert (found.logprobs[0, 2:] == 0).all() and found.logprobs.dtype == np.float32


def test_a_rollout_is_padded_and_masked():
    tokens, mask = np.array([[0, 2, 3], [4, 4, 4]], np.int32), np.array([[0, 1, 1], [1, 1, 1]], bool)
    rollout = make_rollout(tokens, mask, read(ROWS[:4]), pad_id=9)
    assert rollout.tokens.tolist() == [[0, 2, 3, 2, 3, 5, 1, 9], [0, 2, 3, 5, 5, 5, 5, 5], [4, 4, 4, 5, 4, 2, 1, 9],
                                       [4, 4, 4, 5, 5, 2, 1, 9]]
    assert rollout.mask[0].tolist() == [False, True, True, True, True, True, True, False]
    assert rollout.response_mask.sum(axis=1).tolist() == [4, 5, 4, 4] and not rollout.response_mask[:, :3].any()
    assert rollout.tokens.dtype == np.int32 and rollout.mask.dtype == rollout.finished.dtype == bool
    assert rollout.logprobs.dtype == np.float32 and not rollout.logprobs[~rollout.response_mask].any()


def test_kept_ids_become_the_support():
    more = {"kept_counts": np.array([2, 1, 1, 2, 1], np.int32), "kept": np.array([3, 2, 3, 5, 5, 2, 1], np.int32),
            "full_logprobs": np.array([-5, -4, -3, -2, -1], np.float32)}
    found = read([[2, 3, 5], [5, 1]], limit=3, most=2, **more)
    assert found.support.tolist() == [[[3, 2], [3, -1], [5, -1]], [[5, 2], [1, -1], [-1, -1]]]
    assert found.full.tolist() == [[-5, -4, -3], [-2, -1, 0]]
    cut = cut_at_stops(found, stop_table(["a"], PIECES))
    assert cut.support[0].tolist() == [[3, 2], [-1, -1], [-1, -1]] and cut.full[0].tolist() == [-5, 0, 0]
    for name, value, says in (
        ("kept", [3, 3, 3, 5, 5, 2, 1], "a token that is not among"),
        ("kept_counts", [3, 0, 1, 2, 1], "kept 0 to 3 ids"), ("kept", [3, 2], "kept ids of 5 tokens"),
        ("kept", [6, 2, 3, 5, 5, 2, 1], "kept ids are from 1 to 6"),
        ("kept", None, "lacks 'kept'"),
    ):
        with pytest.raises(EngineError, match=says):
            read([[2, 3, 5], [5, 1]], limit=3, most=2,
                 **more | {name: None if value is None else np.array(value, np.int32)})


@pytest.mark.parametrize("changes, says", [
    ({"tokens": None}, "lacks 'tokens'"), ({"logprobs": np.zeros(22, np.float64)}, "are of float64; allowed: float32"),
    ({"lengths": np.zeros(0, np.int32)}, "gave 0 responses; 5 were asked for"),
    ({"lengths": np.array([0, 9, 4, 4, 5], np.int32)}, "responses of 0 to 9 tokens; allowed: 1 to 5"),
    ({"lengths": np.array([5, 5, 4, 4, 5], np.int32)}, "22 tokens and 22 log-probs of 23"),
    ({"finished": np.zeros(5, np.int32)}, "ended neither"),
    ({"logprobs": np.full(22, -np.inf, np.float32)}, "22 of 22 log-probs of the engine are not finite"),
])
def test_what_is_no_answer_is_refused(changes, says):
    with pytest.raises(EngineError, match=says) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


def test_nothing_follows_an_end():
    with pytest.raises(EngineError, match="goes on after its end"):
        read([[2, 1, 2, 1]])
