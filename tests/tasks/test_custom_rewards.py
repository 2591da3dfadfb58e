"""A reward function of a user's own: its values, its faults, and what they cost."""

import time

import numpy as np
import pytest

from jaxrl_fp16.tasks import Example, RewardShapeError, TaskConfig, open_task
from jaxrl_fp16.tasks.rewards import as_reward, gather

REWARDS = '''
import math, os, time
import numpy as np
from neighbour import BONUS

def reward(prompts, responses, examples):
    assert len(prompts) == len(responses) == len(examples)
    what = examples[0]["what"]
    if what == "length":
        return [len(response) + BONUS for response in responses]
    if what == "array":
        return np.array([1.5, -2.0], np.float32)
    if what == "odd":
        return [float("nan"), 2.0]
    if what == "none":
        return [None, True]
    if what == "text":
        return [1.0, "1.0"]
    if what == "infinite":
        return [math.inf, 1e300]
    if what == "raise":
        raise ValueError("bad day")
    if what == "hang":
        time.sleep(60)
    if what == "eat":
        held = []
        while True:
            held.append(bytearray(10 ** 8))
    if what == "crash":
        os._exit(1)
    if what == "few":
        return [1.0]
    if what == "single":
        return 1.0
    if what == "generator":
        return (1.0 for _ in responses)

broken = 3
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "neighbour.py").write_text("BONUS = 0.5\n")
    return folder


@pytest.fixture(scope="module")
def task(folder):
    config = TaskConfig(reward_file=str(folder / "rewards.py"), deadline_seconds=1.0, workers=2,
                        memory_mb=1024)
    with open_task(config) as task:
        yield task


def grade(task, *kinds):
    examples = [Example("p", "a", {"what": kind}) for kind in kinds]
    return task.rewards(["p"] * len(kinds), [["abc", "defgh"]] * len(kinds), examples)


def test_values(task):
    rewards = grade(task, "length", "array")
    np.testing.assert_array_equal(rewards.values, np.array([[3.5, 5.5], [1.5, -2.0]], np.float32))
    assert rewards.values.dtype == np.float32 and rewards.valid.dtype == bool and rewards.valid.all()
    assert (rewards.timeouts, rewards.failures, rewards.first_error) == (0, 0, None)


@pytest.mark.fault(14)
def test_a_value_that_is_no_number_costs_its_entry(task):
    rewards = grade(task, "odd", "none", "text", "infinite")
    np.testing.assert_array_equal(rewards.valid, [[0, 1], [0, 1], [1, 0], [0, 0]])
    np.testing.assert_array_equal(rewards.values, [[0, 2], [0, 1], [1, 0], [0, 0]])
    assert rewards.failures == 5 and rewards.timeouts == 0 and "'nan'" in rewards.first_error


@pytest.mark.fault(15)
def test_what_goes_wrong_costs_its_group_within_its_deadline(task):
    start = time.perf_counter()
    rewards = grade(task, "length", "hang", "raise", "eat", "crash", "length")
    assert time.perf_counter() - start < 6  # one deadline, and new workers
    np.testing.assert_array_equal(rewards.valid[:, 0], [True, False, False, False, False, True])
    assert rewards.failures == 8 and rewards.first_error == "no answer within 1 s"
    assert rewards.timeouts in (4, 6)  # eating may end in a MemoryError, or take until the deadline
    assert grade(task, "raise").first_error == "ValueError: bad day"
    assert grade(task, "length").valid.all()


@pytest.mark.parametrize("kind, message", [
    ("few", "reward returned 1 rewards for a group of 2"), ("single", "reward returned float"),
    ("generator", "reward returned generator"),
])
def test_a_wrong_number_of_rewards_stops_the_run(task, kind, message):
    with pytest.raises(RewardShapeError, match=message):
        grade(task, "length", kind)


SIGNATURES = '''
def by_name(completions, gold, **kwargs):
    return [float(text == answer and sorted(kwargs) == [
        "answer", "examples", "level", "problem", "prompts", "responses", "solution", "unit"])
        for text, answer in zip(completions, gold)]

def turned(examples, responses, level=0, *, prompts, weight=2.0):
    return [weight * (prompts[0] == "1?" and level == [3, 3] and example["answer"] == text)
            for text, example in zip(responses, examples)]

def three_others(questions, answers, rows):
    return [float(text == row["answer"] and questions == ["1?"] * 2) for text, row in zip(answers, rows)]

def two(responses, unit):
    return [float(text + word == "1cm") for text, word in zip(responses, unit)]

def anything(*args):
    return [float(text == row["answer"]) for _, text, row in zip(*args)]

class Callable:
    def __call__(self, completions, answer):
        return [float(text == gold) for text, gold in zip(completions, answer)]

an_object = Callable()

def unknown(responses, wishes):
    return [0.0 for _ in responses]

def swapped(responses, prompts, rows):
    return [0.0 for _ in responses]
'''


@pytest.fixture(scope="module")
def signatures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signatures")
    (folder / "rewards.py").write_text(SIGNATURES)
    (folder / "rows.jsonl").write_text('{"problem": "1?", "gold": "1", "level": 3, "unit": "cm"}\n')

    def opened(function):
        return open_task(TaskConfig(name="math", path=str(folder / "rows.jsonl"), answer_field="gold", workers=1,
                                    reward_file=str(folder / "rewards.py"), reward_function=function))

    return opened


@pytest.mark.parametrize("function, earned", [
    ("by_name", [1, 0]), ("turned", [2, 0]), ("three_others", [1, 0]), ("two", [1, 0]), ("anything", [1, 0]),
    ("an_object", [1, 0]),
])
def test_arguments_are_filled_by_name(signatures, function, earned):
    with signatures(function) as task:
        rewards = task.rewards(["1?"], [["1", "2"]], task.train)
        assert rewards.values.tolist() == [earned] and rewards.valid.all(), rewards.first_error
        said = ("task.reward_file: the parameters of three_others, questions, answers, rows, are filled in this order: "
                "prompts, responses, examples")
        assert task.note == (said if function == "three_others" else "")


@pytest.mark.parametrize("function, name", [("unknown", "wishes"), ("swapped", "rows")])
def test_a_parameter_that_nothing_fills_is_refused(signatures, function, name):
    with pytest.raises(ValueError, match=f"TypeError: {function} has the parameter '{name}'; allowed: prompts, respons"
                                         r".*answer, gold, level, problem, solution, unit\), \*\*kwargs"):
        with signatures(function):
            pass


def test_a_column_that_a_row_lacks_costs_its_group(signatures):
    with signatures("two") as task:
        rewards = task.rewards(["1?", "2?"], [["1", "2"]] * 2, [*task.train, Example("2?", "2")])
        assert rewards.valid.tolist() == [[True, True], [False, False]]
        assert rewards.first_error == "ValueError: two asks for the column 'unit', which a row lacks"


def test_a_file_that_cannot_be_loaded_is_refused(folder):
    def refused(file, function, message):
        with pytest.raises(ValueError, match=message):
            with open_task(TaskConfig(reward_file=str(folder / file), reward_function=function)):
                pass

    (folder / "syntax.py").write_text("def reward(:")
    refused("absent.py", "reward", "task.reward_file: .*absent.py is no file")
    refused("syntax.py", "reward", "syntax.py cannot be loaded: SyntaxError")
    refused("rewards.py", "broken", "it defines no function 'broken'")


def test_gather():
    empty = gather([])
    assert empty.values.shape == (0, 0) and empty.failures == 0
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        gather([[1.0], [1.0, 2.0]])
    assert [as_reward(value) for value in (1, np.float32(2), b"1", [], 1e39)] == [1.0, 2.0, None, None, None]
