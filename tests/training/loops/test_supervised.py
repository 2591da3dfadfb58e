"""What a supervised step reads: nothing lost, nothing twice, and a function of the position alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxrl_fp16.tasks import Example
from jaxrl_fp16.tasks.templates import get_template
from jaxrl_fp16.tokenizer import character_tokenizer
from jaxrl_fp16.training.loops.supervised import next_solutions, solution_encoder
from jaxrl_fp16.training.rollouts.collect import data_order, set_aside

ROWS, LENGTH, SEED = 3, 16, 5
TOKENIZER = character_tokenizer("0123456789abcdefghijklmnopqrstuvwxyz=")


def problem(index):
    """Every problem is another text; each fifth has no solution, each seventh one that is too long."""
    solution = "" if index % 5 == 0 else "x" * (LENGTH if index % 7 == 0 else 1 + index % 6)
    return Example(f"{index:02d}=", "", solution=solution)


TASK = SimpleNamespace(train=[problem(index) for index in range(40)], template=get_template("{problem}"))


def read(position, packing):
    return next_solutions(TASK, TOKENIZER, position, ROWS, LENGTH, SEED, packing)


def texts(pairs):
    """Each example's text, with what is learnt of it behind a bar."""
    found = []
    for row in range(len(pairs.tokens)):
        segments = pairs.mask[row].astype(int) if pairs.segments is None else pairs.segments[row]
        for segment in range(1, segments.max() + 1):
            pick = [pairs.tokens[row][(segments == segment) & (pairs.loss_mask[row] == learnt)] for learnt in (0, 1)]
            found.append("|".join(TOKENIZER.decode(part) for part in pick))
    return found


def in_order(places):
    """The texts that are due at these places of the data."""
    examples = [TASK.train[index] for index in data_order(SEED, len(TASK.train), places)]
    return [f"{e.problem}|{e.solution}<eos>" for e in examples if e.solution and len(e.solution) < LENGTH - 3]


@pytest.mark.parametrize("packing", [False, True])
def test_steps_read_the_data_in_order_each_example_once(packing):
    position, together = 0, []
    while position < 2 * len(TASK.train):
        pairs, count, after = read(position, packing)
        found = texts(pairs)
        assert sorted(found) == sorted(in_order(range(position, after))) and count == len(found)
        assert pairs.tokens.shape == (ROWS, LENGTH) and (packing or count == ROWS)
        for x, y in zip(pairs.__dict__.values(), read(position, packing)[0].__dict__.values()):
            np.testing.assert_array_equal(x, y)
        position, together = after, together + found
    assert sorted(together) == sorted(in_order(range(position)))


def test_what_is_set_aside_is_said():
    assert set_aside(TASK, solution_encoder(TASK, TOKENIZER, LENGTH), "problems with solutions") == [
        "12 of 40 problems with solutions are set aside: 8 without a solution, 4 longer than sft.max_length = 16"]


def test_packed_rows_hold_more():
    (_, single, _), (pairs, packed, _) = read(0, False), read(0, True)
    assert packed > single == ROWS and pairs.mask.mean() > 0.8


@pytest.mark.parametrize("packing", [False, True])
def test_data_without_a_pair_that_fits_is_refused(packing):
    with pytest.raises(ValueError, match="none of the 40 problems has a solution that fits into max_length = 4 tokens"):
        next_solutions(TASK, TOKENIZER, 7, ROWS, 4, SEED, packing)


def test_data_without_a_solution_is_told_so():
    task = SimpleNamespace(train=[Example("1+1=", "2")] * 3, template=TASK.template)
    with pytest.raises(ValueError, match="none of the 3 problems has a solution; allowed: .* task.solution_field"):
        next_solutions(task, TOKENIZER, 0, ROWS, LENGTH, SEED)
