"""Generated problems: right, repeatable, disjoint, short; and their reward."""

import ast
import hashlib
import operator
import re

import pytest

from jaxrl_fp16.tasks import generated
from jaxrl_fp16.tasks.arithmetic import ALPHABET, KINDS, ArithmeticConfig, generator, reward

ALL = ArithmeticConfig(kinds=tuple(KINDS), digits=2, terms=3)


def train_problems(config, seed, size):
    return generated.train_problems(generator(config), seed, size)


def held_out_problems(config, seed, size):
    return generated.held_out_problems(generator(config), seed, size)


def value_of(text):
    """The value of digits, operators and brackets, by Python's own parser and none of the task's code."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod}

    def walk(node):
        if isinstance(node, ast.BinOp):
            return operators[type(node.op)](walk(node.left), walk(node.right))
        return node.value

    return walk(ast.parse(text, mode="eval").body)


def test_answers_and_steps_are_right():
    kinds = set()
    for example in train_problems(ALL, seed=1, size=300):
        text = example.problem.removesuffix("=")
        assert re.fullmatch(r"[0-9+\-*%()]+", text) and set(example.solution) <= set(ALPHABET)
        assert value_of(text) == int(example.answer) >= 0
        steps = example.solution.split(",")
        assert steps[-1] == example.answer
        kinds.add(example.fields["kind"])
        if example.fields["kind"] == "chain":
            numbers = re.findall(r"[+-]?\d+", text)
            totals = [sum(map(int, numbers[:count])) for count in range(2, len(numbers) + 1)]
            assert [int(step) for step in steps] == totals
        if example.fields["kind"] == "multiply" and len(steps) > 1:
            assert sum(map(int, steps[:-1])) == int(steps[-1])
        if example.fields["kind"] == "repeat":
            first, added, count = map(int, re.split(r"[+*]", text))
            assert list(map(int, steps[::2])) == list(reversed(range(count))) and ALL.terms / 2 <= count <= ALL.terms
            assert list(map(int, steps[1::2])) == [first + added * done for done in range(1, count + 1)]
    assert kinds == set(KINDS)


def test_problems_are_a_pure_function_of_seed_and_index():
    problems = train_problems(ALL, seed=7, size=50)
    assert problems[13] == train_problems(ALL, seed=7, size=50)[13]
    assert problems[-1] == problems[49] and problems[2:4] == [problems[2], problems[3]]
    assert len(problems) == 50 and len(list(problems)) == 50
    assert problems[:] != train_problems(ALL, seed=8, size=50)[:]
    with pytest.raises(IndexError):
        problems[50]


def test_the_stream_is_pinned():
    """A change of these would change every published run on this task."""
    problems = train_problems(ArithmeticConfig(), seed=0, size=3)
    assert [(example.problem, example.solution) for example in problems] == [
        ("87+79-3=", "166,163"), ("45+74-49=", "119,70"), ("11-2+96=", "9,105")]
    assert digest(train_problems(ALL, seed=1, size=300)) == "0d991f935a08e1f0"
    assert digest(held_out_problems(ALL, seed=1, size=100)) == "e53763e08b75f60b"


def digest(examples):
    """Of every text, also of those that come after draws on the other side."""
    texts = "\n".join(f"{example.problem} {example.solution} {example.rejected}" for example in examples)
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def test_held_out_problems_are_new_and_different():
    small = ArithmeticConfig(kinds=("add",), digits=1)
    train = {example.problem for example in train_problems(small, seed=0, size=2000)}
    held_out = [example.problem for example in held_out_problems(small, seed=3, size=1000)]
    assert train.isdisjoint(held_out) and len(set(held_out)) == len(held_out)
    assert len(train) + len(held_out) == 100  # both sides are found whole
    assert len(held_out_problems(ArithmeticConfig(), seed=0, size=256)) == 256
    assert held_out_problems(ArithmeticConfig(), seed=0, size=0) == ()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_short(kind):
    config = ArithmeticConfig(kinds=(kind,))
    problems = train_problems(config, seed=0, size=500)
    assert max(len(example.problem) for example in problems) <= 12
    assert max(len(example.solution) for example in problems) <= (17 if kind == "repeat" else 14)


def test_answers_are_as_long_as_one_likes():
    config = ArithmeticConfig(kinds=("repeat",), digits=3, terms=160)
    lengths = [len(example.solution) for example in train_problems(config, seed=0, size=40)]
    assert min(lengths) > 500 and 1200 < max(lengths) < 2000
    assert all(len(example.problem) <= 12 for example in train_problems(config, 0, 40))


def test_reward_needs_the_result_and_the_format():
    responses = ["85,66", "66", "85,67", "85,66,", "85, 66", "",
                 "85,066", "66\n", "x66", "1,2,3,66", "-66", "٦٦"]
    rewards = reward(["37+48-19="] * 12, responses, [{"answer": "66"}] * 12)
    assert rewards == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_a_chain_stays_at_or_below_its_largest_total():
    bounded = ArithmeticConfig(kinds=("chain",), digits=1, terms=5, max_total=19)
    totals = [int(step) for example in train_problems(bounded, 0, 300)[:] for step in example.solution.split(",")]
    assert max(totals) <= 19 and max(totals) > 15
    free = train_problems(ArithmeticConfig(kinds=("chain",), digits=1, terms=5), 0, 300)[:]
    assert max(int(step) for example in free for step in example.solution.split(",")) > 19
