"""Rewards of groups of responses, and reward functions of a user's own.

A reward function is `reward(prompts, responses, examples) -> list of floats`. It is called for one group, the
responses to one prompt; the three lists have one entry a response, and an example is a plain dict of its
row's fields with `problem`, `answer` and `solution`. Its parameters are filled by name: `grading/arguments.py`.

n: prompts.  G: responses of each prompt's group.
"""

import contextlib
import dataclasses
import importlib.util
import os
import sys
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxrl_fp16.tasks.examples import Example
from jaxrl_fp16.tasks.grading.arguments import fill_by_name
from jaxrl_fp16.tasks.grading.pool import Outcome, PoolConfig, WorkerStartError, open_pool
from jaxrl_fp16.tasks.templates import Template, read_answer

FLOAT32_MAX = float(np.finfo(np.float32).max)
RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
# (template, prompts [n], responses [n][G], examples [n]) -> Rewards
Grade = Callable[[Template, Sequence[str], Sequence[Sequence[str]], Sequence[Example]], "Rewards"]


@dataclasses.dataclass(frozen=True)
class Rewards:
    """What a batch of responses earned."""

    values: np.ndarray              # float32 [n,G]; 0 where not valid
    valid: np.ndarray               # bool [n,G]: False where no reward could be had
    timeouts: int = 0               # entries whose grading its deadline or a crash cut off; a built-in
                                    # grader scores them 0, with a user's function they are not valid
    failures: int = 0               # entries that are not valid
    first_error: str | None = None  # of the two, on one line


class RewardShapeError(RuntimeError):
    """A reward function returned something else than one reward a response. The run stops: it is a bug."""


def gather(groups: Sequence[Sequence[float | None]], timeouts: int = 0,
           first_error: str | None = None) -> Rewards:
    """`Rewards` of lists of rewards, with None for each that could not be had."""
    if len({len(group) for group in groups}) > 1:
        raise ValueError(f"groups of one size are needed, not of {sorted({len(group) for group in groups})}")
    values = np.array(groups, np.float64).reshape(len(groups), len(groups[0]) if groups else 0)  # None: NaN
    valid = np.isfinite(values)
    return Rewards(values=np.where(valid, values, 0.0).astype(np.float32), valid=valid, timeouts=timeouts,
                   failures=int((~valid).sum()), first_error=first_error)


def inline_grader(reward: RewardFunction) -> Grade:
    """A grader that calls a quick, trusted function in this process, on the answers of the responses."""

    def grade(template, prompts, responses, examples) -> Rewards:
        answers = [[read_answer(template, response) for response in group] for group in responses]
        groups = zip(prompts, answers, examples, strict=True)
        return gather([list(reward(*group_arguments(*group))) for group in groups])

    return grade


def group_arguments(prompt: str, responses: Sequence[str], example: Example) -> tuple[list, list, list]:
    """The three parallel lists that a reward function gets for one group."""
    return [prompt] * len(responses), list(responses), [example.for_reward()] * len(responses)


@contextlib.contextmanager
def open_custom_grader(file: str, function: str, columns: Mapping[str, str],
                       limits: Mapping[str, Any]) -> Iterator[tuple[Grade, str]]:
    """A grader that calls `function` of a local Python file, in worker processes; a job is one group. With it comes
    a line to say of how the function is called, or "".

    columns: what else its parameters may name, as in `fill_by_name`.  limits: fields of `PoolConfig`.

    What raises, hangs, eats memory or crashes costs its own group alone. A `ValueError` says why a file
    cannot be loaded; `grade` raises `RewardShapeError` on a wrong number of rewards.
    """
    if not os.path.isfile(file):
        raise ValueError(f"task.reward_file: {file} is no file")
    arguments = (os.path.abspath(file), function, dict(columns))
    config = PoolConfig("jaxrl_fp16.tasks.rewards:load_reward", arguments, **limits)
    with contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(open_pool(config))
        except WorkerStartError as error:
            raise ValueError(f"task.reward_file: {file} cannot be loaded: {error}") from None
        (described,) = run([([], [], [])])

        def grade(template, prompts, responses, examples) -> Rewards:
            groups = list(zip(prompts, responses, examples, strict=True))
            outcomes = run([group_arguments(*group) for group in groups])
            return _custom_rewards(outcomes, [len(group[1]) for group in groups], function)

        yield grade, described.value[2] if described.status == "done" else ""


def _custom_rewards(outcomes: Sequence[Outcome], sizes: Sequence[int], function: str) -> Rewards:
    groups, errors, timeouts = [], [], 0
    for outcome, size in zip(outcomes, sizes):
        rewards, error = [None] * size, outcome.error
        if outcome.status == "done":
            count, rewards, error = outcome.value
            if count != size:
                raise RewardShapeError(f"{function} returned {count} for a group of {size} responses; "
                                       "one number a response is needed")
        elif outcome.status != "failed":
            timeouts += size
        groups.append(rewards)
        errors += [error] if error else []
    return gather(groups, timeouts, errors[0] if errors else None)


# ---- in the worker


def load_reward(file: str, name: str, columns: Mapping[str, str]) -> Callable[..., tuple]:
    """The worker's job function for `name` out of `file`: `(count, rewards or None each, first error)`.

    Of no response it says how the function is called, in the error's place.
    """
    sys.path.append(os.path.dirname(file))  # it may import its neighbours; last, so that none hides a library
    spec = importlib.util.spec_from_file_location("reward_file", file)
    if spec is None:
        raise ImportError("a Python file ending in .py is needed")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = getattr(module, name, None)
    if not callable(reward):
        raise ImportError(f"it defines no function {name!r}")
    fill, line = fill_by_name(name, reward, columns)

    def job(prompts, responses, examples) -> tuple:
        if not responses:
            return 0, [], line
        in_order, by_name = fill(prompts, responses, examples)
        rewards = reward(*in_order, **by_name)
        if not hasattr(rewards, "__len__") or isinstance(rewards, (str, bytes, dict)):
            return type(rewards).__name__, [], ""
        if len(rewards) != len(responses):
            return f"{len(rewards)} rewards", [], ""
        numbers = [as_reward(value) for value in rewards]
        wrong = [value for value, number in zip(rewards, numbers) if number is None]
        return len(numbers), numbers, f"{name} returned {str(wrong[0])[:50]!r} for a reward" if wrong else ""

    return job


def as_reward(value: Any) -> float | None:
    """A number that float32 holds, or None: for NaN, infinities, None, text. Arrays of one number count."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= FLOAT32_MAX else None  # NaN is not
