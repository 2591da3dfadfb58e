"""The math task on real problems, with real grading, and on hostile answers."""

import os
from pathlib import Path
import random
import re
import time

import numpy as np
import pytest

import jaxrl_fp16 as rl
from jaxrl_fp16.tasks import Example, TaskConfig, load_examples, open_task
from jaxrl_fp16.tasks.grading.answers import gold_answers

DATA = Path(os.environ.get("JAXRL_FP16_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data folder {DATA}; JAXRL_FP16_DATA names one")
DEADLINE = 2.0


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("math") / "problems.jsonl"
    path.write_text("".join(f'{{"problem": "{n}?", "answer": "{n}"}}\n' for n in range(5)))
    config = TaskConfig(name="math", path=str(path), template="qwen3", heldout_size=2, train_size=2,
                        deadline_seconds=DEADLINE, workers=2)
    with open_task(config) as task:
        yield task


def grade(task, *pairs):
    """Rewards of one response `\\boxed{answer}` for each (gold, answer)."""
    return task.rewards([""] * len(pairs), [[f"So \\boxed{{{answer}}}."] for _, answer in pairs],
                        [Example("", gold) for gold, _ in pairs])


def test_the_file_is_split(task):
    assert [example.problem for example in task.train] == ["0?", "1?"]
    assert [example.problem for example in task.heldout] == ["3?", "4?"]


@needs_data
@pytest.mark.parametrize("name, count", [("math_sanity_1460", 100), ("math500", 100), ("aime24", 30),
                                         ("amc23", 83), ("minerva", 272), ("gsm8k_test", 100)])
def test_gold_answers_score_1(task, name, count):
    examples = random.Random(0).sample(load_examples(DATA / f"{name}.jsonl"), count)
    for pick in (0, -1):
        rewards = grade(task, *((example.answer, gold_answers(example.answer)[pick]) for example in examples))
        wrong = [examples[index].answer for index in np.flatnonzero(rewards.values[:, 0] != 1)]
        assert not wrong and rewards.valid.all() and rewards.timeouts == 0


WRITINGS = {
    "dollars": lambda gold: f"${gold}$", "boxed": lambda gold: f"\\boxed{{{gold}}}", "dot": lambda gold: f"{gold}.",
    "text": lambda gold: f"\\text{{{gold}}}", "spaces": lambda gold: f"  {gold} ", "x": lambda gold: f"x={gold}",
    "dfrac": lambda gold: gold.replace("\\frac", "\\dfrac"), "tfrac": lambda gold: gold.replace("\\frac", "\\tfrac"),
    "thousands": lambda gold: re.sub(r"(?<![\d.,])[1-9]\d{3,}(?!\d)", lambda run: f"{int(run[0]):,}", gold),
    "display": lambda gold: f"\\[{gold}\\]", "sentence": lambda gold: f"The answer is **{gold}**.",
}


@needs_data
@pytest.mark.parametrize("writing", WRITINGS)
def test_gold_answers_score_1_however_they_are_written(task, writing):
    golds = sorted({example.answer for name in ("math_sanity_1460", "math500", "minerva", "amc23")
                    for example in load_examples(DATA / f"{name}.jsonl")})
    pairs = [(gold, WRITINGS[writing](gold_answers(gold)[0])) for gold in random.Random(0).sample(golds, 300)]
    values = grade(task, *pairs).values[:, 0]
    assert not [pair for pair, value in zip(pairs, values) if value != 1]


@needs_data
def test_wrong_answers_score_0_and_grading_is_quick(task):
    examples = load_examples(DATA / "math500.jsonl")[:150]
    responses = [[f"\\boxed{{1 + ({gold})}}", f"It is {gold}.", f"\\boxed{{{gold}}} no, \\boxed{{-77.77}}",
                  f"\\boxed{{{gold}}}"] for gold in (example.answer for example in examples)]
    start = time.perf_counter()
    rewards = task.rewards([""] * len(examples), responses, examples)
    seconds = time.perf_counter() - start
    np.testing.assert_array_equal(rewards.values, np.tile(np.float32([0, 0, 0, 1]), (150, 1)))
    assert seconds < 600 / 100  # half of the rate that is aimed at: the machine may be busy


def test_algebra_decides_where_text_does_not(task):
    right = [("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"), ("5", "x=5"), ("x^2-1", "(x-1)(x+1)")]
    wrong = [("(1,2)", "[1,2]"), ("\\sqrt{2}", "1.4"), ("p - q", "q - p"),
             ("\\left( \\frac{1}{3}, \\frac{4}{3} \\right)", "9+(\\frac{1}{3}, \\frac{4}{3})")]
    np.testing.assert_array_equal(grade(task, *right, *wrong).values[:, 0], [1, 1, 1, 0, 0, 0, 0])


@pytest.mark.fault(17)
def test_hostile_answers_score_0_in_time_and_run_nothing(task, tmp_path):
    mark = tmp_path / "mark"
    code = f"__import__('os').mkdir('{mark}')"
    hostile = ["9^{387420489}", "9^{9^{9^{9}}}", "{" * 3000 + "}" * 3000, "{" * 400 + "5" + "}" * 400,
               "7" * 10**6, "1" * 999, code, f"\\text{{{code}}}", f"5; {code}", "(" * 900,
               "\\frac{1}{" * 100 + "}" * 100, "\\" * 999, "100000!!!!", "1e999999999", "\0"]
    start = time.perf_counter()
    rewards = grade(task, *(("5", answer) for answer in hostile))
    # Two workers share what hangs, and replacing one takes a moment.
    assert time.perf_counter() - start < (rewards.timeouts + 1) // 2 * (DEADLINE + 1) + 4
    assert rewards.valid.all() and not rewards.values.any() and 1 <= rewards.timeouts <= 6
    assert rewards.first_error == f"no answer within {DEADLINE:g} s" and not mark.exists()
    assert grade(task, ("5", "5"), ("\\sqrt{4}", "2")).values.sum() == 2


@pytest.mark.fault(17)
def test_one_hostile_answer_is_cut_off_at_the_deadline(task):
    grade(task, ("\\sqrt{4}", "2"))  # a worker is ready
    start = time.perf_counter()
    assert grade(task, ("5", "9^{387420489}")).timeouts == 1
    assert time.perf_counter() - start < DEADLINE + 1


def test_a_plain_call():
    responses = ["so \\boxed{\\frac{1}{2}}", "\\boxed{0.6}", "\\boxed{(x-1)(x+1)}", "none"]
    answers = ["0.5", "1/2", "x^2-1", "3"]
    assert rl.math_reward(responses, answers) == [1.0, 0.0, 1.0, 0.0]
    assert rl.math_reward(["it is 3-7", "1/2 or 3/4."], ["7", "0.75"], reader="last_number") == [1.0, 1.0]
    assert rl.math_reward([], []) == []


def test_a_plain_call_with_workers_that_stay():
    with rl.open_grader(workers=1, deadline_seconds=DEADLINE) as grader:
        for answer in ("2", "4"):
            given = [f"\\boxed{{{answer}}}", "\\boxed{9^{387420489}}"]
            assert rl.math_reward(given, ["\\sqrt{4}", "5"], grader=grader) == [float(answer == "2"), 0.0]


@pytest.mark.parametrize("arguments, message", [
    ((["a"], ["b"], "box"), "reader is 'box'; allowed: boxed, boxed_after_think, answer_tag, last_number, text"),
    ((["a", "b"], ["c"]), "2 responses and 1 answers; allowed: an answer for each response"),
    (("a", ["c"]), "responses holds 'a', a str; allowed: a list of texts"),
    ((["a"], [5]), "answers holds 5, a int; allowed: a list of texts"),
])
def test_a_plain_call_that_cannot_be_graded_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rl.math_reward(*arguments)


def test_long_responses_score_0(task):
    responses = [["\\boxed{5}", "\\boxed{5}" + " " * 200_000]]
    assert task.rewards([""], responses, [Example("", "5")]).values.tolist() == [[1, 0]]
