"""Generated arithmetic, with answers of several steps.

A problem is a short text such as `37+48-19=`. Its answer is the last of a list of numbers, `85,66`: the steps
that lead there, then the result. Beside it stands one with a wrong step, `86,67`, as the rejected response of a
preference. A problem is a pure function of seed and index, and the hash of its text says whether it is held out, so
train and held-out problems are disjoint whatever their number.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import random
import re
from typing import Annotated, Callable, Literal

import annotated_types

from jaxrl_fp16.config import Doc
from jaxrl_fp16.tasks.examples import Example

ALPHABET = "0123456789+-*%(),="
HELD_OUT_SHARE = 1 / 8       # of all texts
ERRORS = (-10, -2, -1, 1, 2, 10)  # of a wrong step: miscounted, or a ten forgotten
MAX_DRAWS = 2000             # in a row without a fitting text, before the settings are refused


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Which problems are drawn; kinds are mixed in equal parts."""

    kinds: Annotated[
        tuple[Literal["add", "subtract", "chain", "multiply", "modular", "repeat"], ...],
        annotated_types.MinLen(1),
        Doc("add: two numbers; subtract: two, result not negative; chain: `terms` numbers added and subtracted, with "
            "the running totals; multiply: partial products, then their sum; modular: a sum, then its remainder; "
            "repeat: one number added up to `terms` times, with the count of what is left before each total"),
    ] = ("chain",)
    digits: Annotated[int, annotated_types.Interval(ge=1, le=6), Doc("of the largest number")] = 2
    terms: Annotated[int, annotated_types.Interval(ge=2, le=512), Doc("of a chain, or additions of a repeat")] = 3
    max_total: Annotated[
        int | None, annotated_types.Ge(1), Doc("a chain subtracts, where it can, what would lead beyond it; null: none")
    ] = None

    @property
    def max_prompt_chars(self) -> int:
        """Length of the longest problem."""
        terms = max({"chain": self.terms}.get(kind, 2) for kind in self.kinds)
        more = {"modular": 4, "repeat": len(str(self.terms)) + 1}
        return terms * (self.digits + 1) + max(more.get(kind, 0) for kind in self.kinds)


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
    """Answers as long as one likes, each step of which needs the one before and the problem's short text alone."""
    a, b, count = _number(draw, config), _number(draw, config), draw.randint(-(-config.terms // 2), config.terms)
    steps = [number for done in range(1, count + 1) for number in (count - done, a + b * done)]
    return f"{a}+{b}*{count}=", steps


def _number(draw: random.Random, config: ArithmeticConfig) -> int:
    return draw.randrange(10**config.digits)


KINDS: dict[str, Callable[[random.Random, ArithmeticConfig], tuple[str, list[int]]]] = {
    kind.__name__: kind for kind in (add, subtract, chain, multiply, modular, repeat)
}


@dataclasses.dataclass(frozen=True)
class Problems(collections.abc.Sequence):
    """`size` examples of one side, made when they are looked at."""

    config: ArithmeticConfig
    seed: int
    size: int
    held_out: bool = False

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(f"problem {index} of {self.size}")
        draw = random.Random(f"{self.seed}:{self.held_out}:{index % self.size}")
        for _ in range(MAX_DRAWS):
            kind = self.config.kinds[draw.randrange(len(self.config.kinds))]
            problem, steps = KINDS[kind](draw, self.config)
            if is_held_out(problem) == self.held_out:
                return Example(problem, str(steps[-1]), {"kind": kind}, _written(steps),
                               rejected=_written(with_error(draw, steps)))
        raise ValueError(f"too few problems with kinds {self.config.kinds} and digits {self.config.digits}: "
                         "raise task.arithmetic.digits")


def with_error(draw: random.Random, steps: list[int]) -> list[int]:
    """The steps with one that is wrong, and its error in all that follow; no number is negative."""
    first = draw.randrange(len(steps))
    error = draw.choice([error for error in ERRORS if min(steps[first:]) + error >= 0])
    return steps[:first] + [step + error for step in steps[first:]]


def _written(steps: list[int]) -> str:
    return ",".join(map(str, steps))


def is_held_out(problem: str) -> bool:
    """Whether a problem's text is on the held-out side; the same for every seed."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def train_problems(config: ArithmeticConfig, seed: int, size: int) -> Problems:
    """`size` examples to train on; some repeat where there are few different ones."""
    problems = Problems(config, seed, size)
    problems[0]  # settings without any problem are refused here, not in the loop
    return problems


def held_out_problems(config: ArithmeticConfig, seed: int, size: int) -> tuple[Example, ...]:
    """`size` different held-out examples, fewer where there are not so many."""
    found: dict[str, Example] = {}
    endless = Problems(config, seed, 2**31, held_out=True)
    since_new = 0
    for index in range(2**31):
        if len(found) == size or since_new == MAX_DRAWS:
            break
        example = endless[index]
        since_new = since_new + 1 if example.problem in found else 0
        found.setdefault(example.problem, example)
    return tuple(found.values())


def reward(prompts, responses, examples) -> list[float]:
    """1 for each response that is a list of numbers `85,66` and ends in the right one, else 0."""
    return [float(_is_right(response, example["answer"])) for response, example in zip(responses, examples)]


def _is_right(response: str, answer: str) -> bool:
    numbers = r"-?\d+(?:,-?\d+)*"
    return bool(re.fullmatch(numbers, response, re.ASCII)) and response.rpartition(",")[2] == answer
