"""Groups of equal reward, and how fresh ones take their places."""

import numpy as np
import pytest

from jaxrl_fp16.parallel import make_mesh
from jaxrl_fp16.tasks import Example, Rewards
from jaxrl_fp16.training.rollouts.collect import Graded, PromptBatch
from jaxrl_fp16.training.rollouts.dynamic import equal_groups, sample_unequal
from jaxrl_fp16.types import Rollout

PROMPTS, GROUP, COLUMNS = 4, 2, 3


def graded(rewards, valid=None, finished=None, first_row=0):
    """A rollout whose every array says which row of which draw it was."""
    rewards = np.asarray(rewards, np.float32)
    count = rewards.size
    rows = np.arange(first_row, first_row + count)
    wide = np.repeat(rows[:, None], COLUMNS, axis=1)
    rollout = Rollout(tokens=wide, mask=wide >= 0, response_mask=wide >= 0, logprobs=-wide.astype(np.float32),
                      finished=rows >= 0)
    valid = np.ones(rewards.shape, bool) if valid is None else np.asarray(valid, bool)
    finished = np.ones(count, bool) if finished is None else np.asarray(finished, bool)
    texts = [[f"row {row}" for row in group] for group in rows.reshape(rewards.shape)]
    return Graded(rollout, texts, Rewards(rewards, valid), finished, rows + 1)


def source(*rounds):
    """draw(position, round), and the list of what it was asked for."""
    asked = []

    def draw(position, number):
        asked.append((position, number))
        names = [f"{number}.{place}" for place in range(PROMPTS)]
        tokens = np.arange(PROMPTS)[:, None] + 10 * number
        prompts = PromptBatch([Example(name, "1") for name in names], names, tokens, tokens >= 0, position + 5, 1)
        return prompts, graded(rounds[number], first_row=100 * number)

    return draw, asked


def draws(*rounds, budget):
    draw, asked = source(*rounds)
    prompts, result, counts = sample_unequal(draw, 7, budget, "keep", make_mesh())
    return prompts, result, counts, asked


UNEQUAL, EQUAL = [0, 1], [1, 1]


@pytest.mark.parametrize("rule, rewards, valid, finished, expected", [
    ("keep", [[0, 0], [1, 1], [0, 1], [0.25, 0.5]], None, None, [True, True, False, False]),
    ("keep", [[0, 1], [0, 1]], [[True, False], [False, False]], None, [True, True]),
    ("keep", [[np.nan, 1, 0]], [[False, True, True]], None, [False]),
    # A cut response earns 0 under `zero`, and what it was graded under `mask`.
    ("zero", [[1, 1], [0, 1]], None, [True, False, True, False], [False, True]),
    ("mask", [[1, 1], [0, 1]], None, [True, False, True, False], [True, False]),
])
def test_which_groups_are_equal(rule, rewards, valid, finished, expected):
    assert equal_groups(rule, graded(rewards, valid, finished)).tolist() == expected


def test_a_batch_of_unequal_groups_is_left_as_it_is():
    prompts, result, counts, asked = draws([UNEQUAL] * PROMPTS, budget=5)
    assert asked == [(7, 0)] and prompts.texts == ["0.0", "0.1", "0.2", "0.3"]
    assert (counts.rounds, counts.groups, counts.equal_groups, counts.equal_groups_used) == (1, 4, 0, 0)
    assert counts.tokens == result.lengths.sum()


def test_fresh_unequal_groups_take_the_places_of_equal_ones():
    first, second = [EQUAL, UNEQUAL, EQUAL, UNEQUAL], [EQUAL, EQUAL, UNEQUAL, EQUAL]
    third = [UNEQUAL, UNEQUAL, UNEQUAL, EQUAL]
    prompts, result, counts, asked = draws(first, second, third, budget=5)
    assert asked == [(7, 0), (12, 1), (17, 2)] and prompts.position == 22 and prompts.set_aside == 3
    # 1.2 for place 0; 1.0, which is equal, for place 2 until 2.0 takes it; 2.1 and 2.2 are dropped.
    assert prompts.texts == ["1.2", "0.1", "2.0", "0.3"]
    assert (counts.rounds, counts.groups, counts.equal_groups, counts.equal_groups_used) == (3, 12, 6, 0)
    rows = [104, 105, 2, 3, 200, 201, 6, 7]
    assert np.asarray(result.rollout.tokens)[:, 0].tolist() == rows
    assert np.asarray(result.rollout.logprobs)[:, 1].tolist() == [-row for row in rows]
    assert result.lengths.tolist() == [row + 1 for row in rows]
    assert sum(result.responses, []) == [f"row {row}" for row in rows]
    assert result.rewards.values.tolist() == [UNEQUAL] * PROMPTS
    assert prompts.tokens[:, 0].tolist() == [12, 1, 20, 3]
    assert [example.problem for example in prompts.examples] == prompts.texts


def test_a_spent_budget_leaves_equal_groups():
    prompts, result, counts, asked = draws([EQUAL] * 4, [UNEQUAL, EQUAL, EQUAL, EQUAL], budget=2)
    assert len(asked) == 2 and counts.equal_groups_used == 3
    assert prompts.texts == ["1.0", "1.1", "1.2", "1.3"]
    assert result.rewards.values.tolist() == [UNEQUAL, EQUAL, EQUAL, EQUAL]


def test_rewards_that_failed_are_counted_over_all_draws():
    draw, _ = source([EQUAL] * 4, [UNEQUAL] * 4)

    def failing(position, number):
        prompts, result = draw(position, number)
        rewards = Rewards(result.rewards.values, result.rewards.valid, number, 2, f"error {number}")
        return prompts, Graded(result.rollout, result.responses, rewards, result.finished, result.lengths)

    _, result, _ = sample_unequal(failing, 0, 3, "keep", make_mesh())
    assert (result.rewards.failures, result.rewards.timeouts, result.rewards.first_error) == (4, 1, "error 0")
