"""pass@k by brute force, and a set's metrics with a sampler whose responses are known."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrl_fp16.config import parse_config
from jaxrl_fp16.parallel import make_mesh
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.tasks import ALPHABET, Example, Task, get_template, open_task
from jaxrl_fp16.tasks.arithmetic import reward
from jaxrl_fp16.tasks.rewards import gather, inline_grader
from jaxrl_fp16.tokenizer import character_tokenizer
from jaxrl_fp16.training.rollouts.evaluate import Evaluator, evaluate, make_evaluators, pass_at_k
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.types import Rollout

TOKENIZER = character_tokenizer(ALPHABET)
SETUP = SimpleNamespace(
    mesh=make_mesh(devices=jax.devices()[:1]), tokenizer=TOKENIZER, eos_ids=(1,), pad_id=0,
    rollout_precision=get_precision("fp32"),
)
COLUMNS = 4
ANSWERS = {  # three samples of each problem
    "1+1=": ("2", "2", "2"), "1+2=": ("3", "4", "3"), "1+3=": ("4", "", "5"), "1+4=": ("9", "9", "9"),
    "1+5=": ("6", "66", "6"),
}


@pytest.mark.parametrize("samples, right", [(1, 0), (1, 1), (4, 0), (4, 1), (5, 3), (6, 6), (7, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples, right):
    outcomes = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(outcomes, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def ids_of(text):
    return TOKENIZER.convert_tokens_to_ids(list(text))


def evaluator_of(problems, at_once=2, grade=None):
    """An evaluator with a sampler that looks its responses up, and the list of the batches that it is given."""
    batches = []

    def sample(params, tokens, mask, key, watch=None):
        prompts = [TOKENIZER.decode(row[kept]) for row, kept in zip(np.asarray(tokens), np.asarray(mask))]
        batches.append((tokens.shape, prompts, jax.random.key_data(key).tolist()))
        rows = [ids_of(text) + [1] for prompt in prompts for text in ANSWERS.get(prompt, ("", "", ""))]
        columns = np.array([row + [0] * (COLUMNS - len(row)) for row in rows], np.int32)
        lengths = np.array([[len(row)] for row in rows])
        before = np.repeat(np.asarray(tokens), 3, axis=0)
        response = np.concatenate([np.zeros(before.shape, bool), np.arange(COLUMNS) < lengths], 1)
        return Rollout(np.concatenate([before, columns], 1), response, response, response * 0.0, lengths[:, 0] < 3)

    examples = [Example(text, str(sum(map(int, text[:-1].split("+"))))) for text in problems]
    task = Task("sums", [], examples, get_template("none", reads="text"), grade or inline_grader(reward))
    return Evaluator("sums", task, sample, at_once, 3), batches


def test_the_metrics_of_a_set_and_its_short_last_batch():
    evaluator, batches = evaluator_of(ANSWERS)
    metrics = evaluate(evaluator, None, SETUP, 6, jax.random.key(0))
    shares = np.array([3, 2, 1, 0, 2]) / 3
    expected = {
        "accuracy": shares.mean(), "stderr": shares.std(ddof=1) / np.sqrt(5), "problems": 5,
        "response_length": 30 / 15, "finished": 14 / 15,
        "pass@1": shares.mean(), "pass@2": np.mean([1, 1, 2 / 3, 0, 1]), "pass@3": 4 / 5,
    }
    assert metrics == pytest.approx({f"eval/sums/{name}": value for name, value in expected.items()})
    # One shape, so one compile; the short batch is filled, and each batch draws from a key of its own.
    assert [(shape, prompts) for shape, prompts, _ in batches] == [
        ((2, 6), ["1+1=", "1+2="]), ((2, 6), ["1+3=", "1+4="]), ((2, 6), ["1+5=", "1+5="])]
    assert len({tuple(key) for _, _, key in batches}) == 3


def test_a_prompt_that_does_not_fit_counts_as_unsolved():
    evaluator, batches = evaluator_of(["1+1=", "1+00001="], at_once=4)
    metrics = evaluate(evaluator, None, SETUP, 6, jax.random.key(0))
    assert metrics["eval/sums/accuracy"] == 0.5 and metrics["eval/sums/problems"] == 2
    assert batches[0][0] == (4, 6)


def test_a_reward_that_failed_counts_as_unsolved():
    evaluator, _ = evaluator_of(["1+1="], at_once=1, grade=lambda *_: gather([[1.0, None, 1.0]]))
    metrics = evaluate(evaluator, None, SETUP, 6, jax.random.key(0))
    assert metrics["eval/sums/accuracy"] == pytest.approx(2 / 3) and metrics["eval/sums/stderr"] == 0


# -- sets of a config ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    with open_task(parse_config(Config, {"task": {"heldout_size": 5}}).task) as task:
        yield task


def evaluators(toy, task, *sets, **section):
    config = parse_config(Config, {"evaluation": {"sets": list(sets), **section}})
    setup = SimpleNamespace(**vars(SETUP), config=config)
    return make_evaluators(SimpleNamespace(setup=setup, task=task, model=toy.model))


def test_sets_of_a_config(toy, task, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n' * 3)
    own, other = evaluators(
        toy, task, {"name": "own", "limit": 4, "samples": 2},
        {"name": "other", "path": str(path), "template": "{problem}="}, rows=5,
    )
    assert list(own.task.heldout) == list(task.heldout[:4]) and own.task.template == task.template
    assert [example.problem for example in other.task.heldout] == ["1+1"] * 3
    assert other.task.template.text == "{problem}=" and other.task.grade is task.grade
    assert (own.prompts_at_once, own.samples) == (2, 2) and (other.prompts_at_once, other.samples) == (3, 1)


@pytest.mark.parametrize("section, message", [
    ({"name": "a", "path": "absent.jsonl"}, "absent.jsonl: no such data file"),
    ({"name": "a", "template": "nonsense"}, "template 'nonsense' is neither"),
])
def test_sets_at_fault(toy, task, section, message):
    with pytest.raises(ValueError, match=message):
        evaluators(toy, task, section)


def test_a_later_row_that_its_template_cannot_show_is_refused_at_the_start(toy, task, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2", "hint": "it is even"}\n{"problem": "1+2", "answer": "3"}\n')
    with pytest.raises(ValueError, match="template names the field 'hint'; known: problem"):
        evaluators(toy, task, {"name": "a", "path": str(path), "template": "{problem} {hint}"})


def test_a_set_without_problems(toy, task):
    with pytest.raises(ValueError, match="set 'a' has no problems; allowed: a path, or task.heldout_size above 0"):
        evaluators(toy, dataclasses.replace(task, heldout=()), {"name": "a"})


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b/c")])
def test_names_that_would_hide_metrics_are_refused(names):
    with pytest.raises(ValueError, match="evaluation: sets are named .*; allowed: different names without a slash"):
        parse_config(Config, {"evaluation": {"sets": [{"name": name} for name in names]}})
