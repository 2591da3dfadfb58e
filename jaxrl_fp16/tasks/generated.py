"""Problems that are drawn, not read.

A problem is a pure function of seed and index, and the hash of its text says whether it is held out, so train and
held-out problems are disjoint whatever their number.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import random

from jaxrl_fp16.tasks.examples import Example

HELD_OUT_SHARE = 1 / 8       # of all texts
MAX_DRAWS = 2000             # in a row without a fitting text, before the settings are refused


@dataclasses.dataclass(frozen=True)
class Generator:
    """What a generated task draws."""

    make: Callable[[random.Random], Example]    # an example out of the numbers of the generator alone
    few: str                                    # why there is none, and what to change, for a refusal
    rejected: Callable[[random.Random, Example], str] | None = None  # a wrong answer to an example that is kept


@dataclasses.dataclass(frozen=True)
class Problems(Sequence):
    """`size` examples of one side, made when they are looked at."""

    generator: Generator
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
            example = self.generator.make(draw)
            if is_held_out(example.problem) != self.held_out:
                continue
            if self.generator.rejected is None:
                return example
            return dataclasses.replace(example, rejected=self.generator.rejected(draw, example))
        raise ValueError(self.generator.few)


def is_held_out(problem: str) -> bool:
    """Whether a problem's text is on the held-out side; the same for every seed."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def train_problems(generator: Generator, seed: int, size: int) -> Problems:
    """`size` examples to train on; some repeat where there are few different ones."""
    problems = Problems(generator, seed, size)
    problems[0]  # settings without any problem are refused here, not in the loop
    return problems


def held_out_problems(generator: Generator, seed: int, size: int) -> tuple[Example, ...]:
    """`size` different held-out examples, fewer where there are not so many."""
    found: dict[str, Example] = {}
    endless = Problems(generator, seed, 2**31, held_out=True)
    since_new = 0
    for index in range(2**31):
        if len(found) == size or since_new == MAX_DRAWS:
            break
        example = endless[index]
        since_new = since_new + 1 if example.problem in found else 0
        found.setdefault(example.problem, example)
    return tuple(found.values())
