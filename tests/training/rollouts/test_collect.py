"""Prompts in the order of the data, graded rollouts, and what becomes of cut responses."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrl_fp16.parallel import make_mesh
from jaxrl_fp16.tasks import ALPHABET, Example, Rewards, Task, get_template
from jaxrl_fp16.tokenizer import character_tokenizer
from jaxrl_fp16.training.rollouts.collect import (
    Graded, data_order, in_groups, next_prompts, prompt_encoder, sample_and_grade, set_aside, truncation_rule,
)
from jaxrl_fp16.types import Rollout

TOKENIZER = character_tokenizer(ALPHABET)


def task_of(*problems, grade=None):
    return Task("sums", [Example(text, "1") for text in problems], (), get_template("none"), grade)


def walk(task, count, steps, seed=0, length=4):
    """Batches of prompts, one after another."""
    position, batches = 0, []
    for _ in range(steps):
        batches.append(next_prompts(task, TOKENIZER, position, count, length, seed))
        position = batches[-1].position
    return batches


# -- the order of the data ----------------------------------------------------------------------------


def test_each_epoch_is_a_permutation_of_its_own():
    epochs = [data_order(3, 50, range(50 * epoch, 50 * epoch + 50)) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_hangs_on_seed_and_epoch_alone():
    whole = data_order(3, 50, range(150))
    pieces = [data_order(3, 50, range(start, start + 7)) for start in range(0, 147, 7)]
    assert sum(pieces, []) == whole[:147]
    assert data_order(4, 50, range(50)) != whole[:50]


def test_batches_go_through_the_data_in_that_order():
    task = task_of(*(f"{n}=" for n in range(12)))
    batches = walk(task, count=5, steps=4)
    texts = sum((batch.texts for batch in batches), [])
    assert texts == [f"{n}=" for n in data_order(0, 12, range(20))]
    assert [batch.position for batch in batches] == [5, 10, 15, 20]
    first = batches[0]
    assert [example.problem for example in first.examples] == first.texts and first.set_aside == 0
    assert first.tokens.shape == first.mask.shape == (5, 4) and first.tokens.dtype == np.int32
    for text, tokens, mask in zip(first.texts, first.tokens, first.mask):
        assert mask.tolist() == [False] * (4 - len(text)) + [True] * len(text)
        assert TOKENIZER.decode(tokens[mask]) == text


# -- prompts that do not fit ---------------------------------------------------------------------------


@pytest.mark.fault(13)
def test_long_prompts_are_set_aside_and_counted():
    short, long = [f"{n}=" for n in range(9)], ["1+1+1=", "22+22="]
    batches = walk(task_of(*short, *long), count=3, steps=3)
    assert sorted(sum((batch.texts for batch in batches), [])) == sorted(short)
    # What comes at an epoch's end is met by the next batch.
    assert sum(batch.set_aside for batch in batches) == batches[-1].position - 9 <= 2
    again = next_prompts(task_of(*short, *long), TOKENIZER, batches[-1].position, 9, 4, 0)
    assert again.set_aside + sum(batch.set_aside for batch in batches) == again.position - 18


@pytest.mark.parametrize("position", [0, 1, 17, 40])
def test_data_without_a_prompt_that_fits_is_refused(position):
    task = task_of(*(f"{n}+{n}+1=" for n in range(20)))
    with pytest.raises(ValueError, match="none of the 20 prompts fits into training.max_prompt_tokens = 4; allowed"):
        next_prompts(task, TOKENIZER, position, 3, 4, 0)


def test_a_prompt_without_its_problem_is_set_aside():
    lost = Example("2=", "1", messages=({"role": "user", "content": "3="},))
    TOKENIZER.chat_template = "{% for m in messages %}1={% endfor %}"
    try:
        task = dataclasses.replace(task_of("1=", "2=", " "), template=get_template("chat"))
        assert next_prompts(task, TOKENIZER, 0, 1, 4, 0).texts == ["1="]
        encode = prompt_encoder(task, TOKENIZER, 4)
        assert set_aside(task, encode, "prompts") == [
            "2 of 3 prompts are set aside: 2 without the problem's text"]
        task = dataclasses.replace(task, train=[lost, Example("1+1+1=", "3")])
        with pytest.raises(ValueError, match="none of the 2 problems makes a prompt: 2 without the problem.s text"):
            next_prompts(task, TOKENIZER, 0, 1, 4, 0)
    finally:
        TOKENIZER.chat_template = None


def test_what_is_set_aside_is_said_by_reason():
    task = task_of("1=", "1+1+1=", "", "2+2+2=")
    assert set_aside(task, prompt_encoder(task, TOKENIZER, 4), "prompts") == [
        "3 of 4 prompts are set aside: 2 longer than training.max_prompt_tokens = 4, 1 without a token"]
    assert set_aside(task, prompt_encoder(task_of("1="), TOKENIZER, 9), "prompts") == [
        "1 of 4 prompts are set aside: 1 without a token"]
    with pytest.raises(ValueError, match="none of the 2 problems makes a prompt: 2 without a token; allowed: problems"):
        next_prompts(task_of("", ""), TOKENIZER, 0, 1, 4, 0)


def test_a_single_prompt_that_fits_is_found_from_anywhere():
    task = task_of("1=", *(f"{n}+{n}+1=" for n in range(19)))
    for position in range(41):
        assert next_prompts(task, TOKENIZER, position, 1, 4, 0).texts == ["1="]


# -- rollouts -------------------------------------------------------------------------------------------


def rollout_of(prompts, *texts):
    """What a sampler would return for these responses, the end token after each of fewer than 3 characters."""
    columns = np.zeros((len(texts), 3), np.int32)
    mask = np.zeros((len(texts), 3), bool)
    for row, text in enumerate(texts):
        ids = (TOKENIZER.convert_tokens_to_ids(list(text)) + [TOKENIZER.eos_token_id])[:3]
        columns[row, :len(ids)], mask[row, :len(ids)] = ids, True
    spread = np.repeat(prompts, len(texts) // len(prompts), axis=0)
    off = np.zeros(spread.shape, bool)
    return Rollout(
        tokens=np.concatenate([spread, columns], 1), mask=np.concatenate([spread > 0, mask], 1),
        response_mask=np.concatenate([off, mask], 1), logprobs=np.zeros((len(texts), spread.shape[1] + 3)),
        finished=np.array([len(text) < 3 for text in texts]),
    )


def test_responses_are_decoded_and_graded_in_their_groups():
    seen = []

    def grade(template, prompts, responses, examples):
        seen.append((prompts, responses, [example.problem for example in examples]))
        values = np.array([[float(len(text)) for text in group] for group in responses], np.float32)
        return Rewards(values, np.ones(values.shape, bool))

    task = task_of("1=", "2=", grade=grade)
    prompts = next_prompts(task, TOKENIZER, 0, 2, 4, 0)
    setup = SimpleNamespace(mesh=make_mesh(), tokenizer=TOKENIZER, eos_ids=(TOKENIZER.eos_token_id,))
    sample = lambda params, tokens, mask, key, watch: rollout_of(np.asarray(tokens), "12", "", "345", "6")
    graded = sample_and_grade(sample, None, prompts, task, setup, None)
    assert seen == [(prompts.texts, [["12", ""], ["345", "6"]], prompts.texts)]
    assert graded.rewards.values.tolist() == [[2, 0], [3, 1]]
    assert graded.lengths.tolist() == [3, 1, 3, 2] and graded.finished.tolist() == [True, True, False, True]
    assert graded.unknown_tokens == 0


def test_sampled_ids_that_no_token_has_are_counted():
    beyond = max(TOKENIZER.get_vocab().values()) + 5
    task = task_of("1=", grade=lambda *_: Rewards(np.zeros((1, 2), np.float32), np.ones((1, 2), bool)))
    prompts = next_prompts(task, TOKENIZER, 0, 1, 4, 0)
    setup = SimpleNamespace(mesh=make_mesh(), tokenizer=TOKENIZER, eos_ids=(TOKENIZER.eos_token_id,))

    def sample(params, tokens, mask, key, watch=None):
        rollout = rollout_of(np.asarray(tokens), "12", "345")
        ids = rollout.tokens.copy()
        ids[0, -3], ids[1, -3:], ids[:, 0] = beyond, (beyond, beyond + 1, beyond), beyond
        return rollout.replace(tokens=ids)

    assert sample_and_grade(sample, None, prompts, task, setup, None).unknown_tokens == 4


def test_rows_in_groups():
    assert in_groups(range(6), 2) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("rule, rewards, counts", [
    ("keep", [1, 1, 0.5, 0], [True, True, True, True]),
    ("zero", [1, 0, 0, 0], [True, True, True, True]),
    ("mask", [1, 1, 0.5, 0], [True, False, False, True]),
])
def test_responses_cut_by_the_limit(rule, rewards, counts):
    given = Rewards(np.array([[1, 1], [0.5, 0]], np.float32), np.ones((2, 2), bool))
    finished = np.array([True, False, False, True])
    found, counted = truncation_rule(rule, Graded(None, [], given, finished, np.full(4, 3)))
    assert found.dtype == np.float32 and found.tolist() == rewards and counted.tolist() == counts
    assert given.values.tolist() == [[1, 1], [0.5, 0]]


@pytest.mark.parametrize("values, valid, cut", [
    ([[1, 0.5], [0.25, 2]], [[1, 1], [1, 1]], 0), ([[1, -1], [-0.5, 2]], [[1, 1], [1, 1]], -1),
    ([[1, -1], [-3, 2]], [[1, 1], [1, 1]], -3), ([[1, 0], [0, 2]], [[1, 0], [0, 1]], 0),
    ([[-1, 0], [0, -2]], [[1, 0], [0, 1]], -2), ([[0, 0], [0, 0]], [[0, 0], [0, 0]], 0),
])
def test_a_cut_response_earns_no_more_than_any_other(values, valid, cut):
    given = Rewards(np.array(values, np.float32), np.array(valid, bool))
    finished = np.array([True, True, False, True])
    found, _ = truncation_rule("zero", Graded(None, [], given, finished, np.full(4, 3)))
    assert found.tolist() == [values[0][0], values[0][1], cut, values[1][1]]
