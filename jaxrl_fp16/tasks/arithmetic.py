"""Generated arithmetic, with answers of several steps.

A problem is a short text such as `37+48-19=`. Its answer is the last of a list of numbers, `85,66`: the steps
that lead there, then the result. A list with a wrong step, `86,67`, comes with it, as the rejected response of a
preference.
"""

import dataclasses
import functools
import random
import re
from typing import Annotated, Callable, Literal

import annotated_types

from jaxrl_fp16.config import Doc
from jaxrl_fp16.tasks.examples import Example
from jaxrl_fp16.tasks.generated import Generator

ALPHABET = "0123456789+-*%(),="
ERRORS = (-10, -2, -1, 1, 2, 10)  # of a wrong step: miscounted, or a ten forgotten


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Which problems are drawn; kinds are mixed in equal parts."""

    kinds: Annotated[
        tuple[Literal["add", "subtract", "chain", "multiply", "modular", "repeat"], ...],
        annotated_types.MinLen(1),
        Doc("kinds of problems, in equal parts. add: two numbers; subtract: two, result not negative; chain: `terms` "
            "numbers added and subtracted, with the running totals; multiply: partial products, then their sum; "
            "modular: a sum, then its remainder; repeat: one number added up to `terms` times, with the count of "
            "what is left before each total"),
    ] = ("chain",)
    digits: Annotated[int, annotated_types.Interval(ge=1, le=6), Doc("most digits of a number drawn for a problem")] = 2
    terms: Annotated[
        int, annotated_types.Interval(ge=2, le=512), Doc("numbers of a chain, or most additions of a repeat")
    ] = 3
    max_total: Annotated[
        int | None, annotated_types.Ge(1),
        Doc("running total that a chain exceeds only where it cannot subtract; null: no bound"),
    ] = None


def add(draw: random.Random, config: ArithmeticConfig) -> tuple[str, list[int]]:
    a, b = _number(draw, config), _number(draw, config)
    return f"{a}+{b}=", [a + b]


def subtract(draw: random.Random, config: ArithmeticConfig) -> tuple[str, list[int]]:
    b, a = sorted((_number(draw, config), _number(draw, config)))
    return f"{a}-{b}=", [a - b]


def chain(draw: random.Random, config: ArithmeticConfig) -> tuple[str, list[int]]:
    total = _number(draw, config)
    text, totals = str(total), []
    for _ in range(config.terms - 1):
        term = _number(draw, config)
        beyond = config.max_total is not None and total + term > config.max_total
        sign = "-" if term <= total and (draw.random() < 0.5 or beyond) else "+"  # totals stay at 0 or above
        total += term if sign == "+" else -term
        text, totals = f"{text}{sign}{term}", [*totals, total]
    return text + "=", totals


def multiply(draw: random.Random, config: ArithmeticConfig) -> tuple[str, list[int]]:
    a, b = _number(draw, config), _number(draw, config)
    places = [int(digit) * 10**place for place, digit in enumerate(reversed(str(b)))]
    partial = [a * value for value in reversed(places) if value]
    return f"{a}*{b}=", [*partial, a * b] if len(partial) > 1 else [a * b]


def modular(draw: random.Random, config: ArithmeticConfig) -> tuple[str, list[int]]:
    a, b, modulus = _number(draw, config), _number(draw, config), draw.randint(2, 9)
    return f"({a}+{b})%{modulus}=", [a + b, (a + b) % modulus]


def repeat(draw: random.Random, config: ArithmeticConfig) -> tuple[str, list[int]]:
    """Answers of any length, each step of which needs the one before and the problem's short text alone."""
    a, b, count = _number(draw, config), _number(draw, config), draw.randint(-(-config.terms // 2), config.terms)
    steps = [number for done in range(1, count + 1) for number in (count - done, a + b * done)]
    return f"{a}+{b}*{count}=", steps


def _number(draw: random.Random, config: ArithmeticConfig) -> int:
    return draw.randrange(10**config.digits)


KINDS: dict[str, Callable[[random.Random, ArithmeticConfig], tuple[str, list[int]]]] = {
    kind.__name__: kind for kind in (add, subtract, chain, multiply, modular, repeat)
}


def generator(config: ArithmeticConfig) -> Generator:
    """The task's `Generator`."""
    few = f"too few problems with kinds {config.kinds} and digits {config.digits}: raise task.arithmetic.digits"
    return Generator(functools.partial(_draw, config), few, _rejected)


def _draw(config: ArithmeticConfig, draw: random.Random) -> Example:
    kind = config.kinds[draw.randrange(len(config.kinds))]
    problem, steps = KINDS[kind](draw, config)
    return Example(problem, str(steps[-1]), {"kind": kind}, _written(steps))


def _rejected(draw: random.Random, example: Example) -> str:
    return _written(with_error(draw, [int(step) for step in example.solution.split(",")]))


def with_error(draw: random.Random, steps: list[int]) -> list[int]:
    """The steps with one that is wrong, and its error in all that follow; no number is negative."""
    first = draw.randrange(len(steps))
    error = draw.choice([error for error in ERRORS if min(steps[first:]) + error >= 0])
    return steps[:first] + [step + error for step in steps[first:]]


def _written(steps: list[int]) -> str:
    return ",".join(map(str, steps))


def reward(prompts, responses, examples) -> list[float]:
    """1 for each response that is a list of numbers `85,66` and ends in the right one, else 0."""
    return [float(_is_right(response, example["answer"])) for response, example in zip(responses, examples)]


def _is_right(response: str, answer: str) -> bool:
    numbers = r"-?\d+(?:,-?\d+)*"
    return bool(re.fullmatch(numbers, response, re.ASCII)) and response.rpartition(",")[2] == answer
