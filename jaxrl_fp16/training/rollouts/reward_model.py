"""A reward model as the reward of training: texts in, one score each, in our own forward.

n: prompts.  G: responses of each prompt's group.  R: texts scored at once.  T: columns.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_fp16.config import naming
from jaxrl_fp16.forward import sequence_scores
from jaxrl_fp16.lengths import widths
from jaxrl_fp16.models import Critic, load_reward_model
from jaxrl_fp16.models.attention import kind_for
from jaxrl_fp16.models.families.config_json import read_json
from jaxrl_fp16.parallel import row_shards, shard_batch, to_host
from jaxrl_fp16.precision import Precision, get_precision_on
from jaxrl_fp16.tasks import Rewards
from jaxrl_fp16.tasks.reward_text import Write, make_writer
from jaxrl_fp16.tasks.rewards import gather
from jaxrl_fp16.tokenizer import check_vocabulary, encode, load_tokenizer


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """An open reward model."""

    model: Critic
    params: Any             # float32, on the mesh
    precision: Precision
    tokenizer: Any
    pad_token_id: int | None  # of its config.json: a text's score is at its last token that is not this one
    write: Write


def open_reward_model(setup, task):
    """The `RewardModel` of `task.reward_model`; None where its path is null. Raises ConfigError.

    The first training problem is written as a text, so that a template at fault is refused here.
    """
    section = setup.config.task.reward_model
    if section.path is None:
        return None
    with naming("task.reward_model"):
        _check_rows(section, setup.mesh)
        precision = _precision(setup, section)
        options = dict(
            attention=kind_for(setup.config.model.attention, precision.policy.compute_dtype), mesh=setup.mesh,
            numerics=setup.config.numerics,
        )
        model, params = load_reward_model(
            section.path, compute_dtype=precision.policy.compute_dtype.name, remat=False, **options
        )
        tokenizer = load_tokenizer(section.tokenizer or section.path)
        check_vocabulary(tokenizer, model.body.config.vocab_size)
        write = make_writer(section.template, tokenizer)
        write("", "", task.train[0])
    pad = read_json(Path(section.path) / "config.json").get("pad_token_id")
    return RewardModel(model, params, precision, tokenizer, pad, write)


def _check_rows(section, mesh):
    if section.rows % row_shards(mesh):
        raise ValueError(f"rows is {section.rows}; allowed: multiples of mesh data x fsdp = {row_shards(mesh)}")


def _precision(setup, section):
    if section.precision is None:
        return setup.precision
    return get_precision_on(setup.config.run.platform, section.precision, setup.config.loss_scale)


def make_grader(opened, section, mesh):
    """A `Grade` by a reward model: `(template, prompts [n], responses [n][G], examples [n]) -> Rewards`.

    A text that is longer than `section.max_length` tokens, or has none, is not cut:
    its reward is not valid, and neither is a score that is not finite. Programs of
    `rows` x at most eight widths up to `max_length` score them all.
    """
    def grade(template, prompts, responses, examples) -> Rewards:
        texts = [
            opened.write(prompt, response, example)
            for prompt, group, example in zip(prompts, responses, examples, strict=True)
            for response in group
        ]
        ids = encode_texts(opened.tokenizer, texts, opened.pad_token_id)
        fits = [0 < len(row) <= section.max_length for row in ids]
        scores = iter(score_rows(
            opened.model, opened.params, [row for row, good in zip(ids, fits) if good], policy=opened.precision.policy,
            columns=section.max_length, rows=section.rows, mesh=mesh,
        ))
        rewards = [float(next(scores)) if good else None for good in fits]
        group = len(responses[0]) if responses else 1
        groups = [rewards[start:start + group] for start in range(0, len(rewards), group)]
        return gather(groups, first_error=_first_error(rewards, ids, section.max_length))

    return grade


def _first_error(rewards, ids, limit):
    for reward, row in zip(rewards, ids):
        if reward is None:
            return (f"a text of {len(row)} tokens for the reward model; "
                    f"task.reward_model.max_length allows 1 to {limit}")
        if not np.isfinite(reward):
            return f"the reward model's score is {reward}; try task.reward_model.precision bf16 or fp32"
    return None


def encode_texts(tokenizer, texts, pad_token_id):
    """The ids of each text up to its last one that is not `pad_token_id`: the token that Transformers scores."""
    rows = encode(tokenizer, texts)
    for row in rows:
        while row and row[-1] == pad_token_id:
            row.pop()
    return rows


def score_rows(model, params, ids, *, policy, columns, rows, mesh):
    """float32 [len(ids)]: a reward model's scores of lists of token ids, each of `columns` at most.

    `rows` of them at once, those of like length together, in arrays [R,T] of one of the `widths` of `columns`; what
    is missing in the last is empty rows.
    """
    scores, lengths = np.zeros(len(ids), np.float32), np.array([len(row) for row in ids], int)
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(ids), rows):
        chosen = order[start:start + rows]
        width = next(width for width in widths(columns) if width >= lengths[chosen[0]])
        tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        for index, row in enumerate(chosen):
            tokens[index, :lengths[row]], mask[index, :lengths[row]] = ids[row], True
        found = sequence_scores(model, params, *shard_batch((tokens, mask), mesh), policy=policy)
        scores[chosen] = to_host(found)[: len(chosen)]
    return scores
