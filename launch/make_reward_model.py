#!/usr/bin/env python3
"""Trains a small reward model on generated arithmetic: worked answers that are right against others that are wrong.

It takes the run's config: the shape of the model, the problems, the precision, and the template, length and path of
`task.reward_model`. First the body learns to write right answers, then body and head to tell them from wrong ones.
Its accuracy on held-out pairs is printed.

    python launch/make_reward_model.py configs/rlhf_tiny.yaml --train

With `--train` the run that it is for starts afterwards. Other `--key VALUE` pairs override the config, for both.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import sys

import jax
import numpy as np

from jaxrl_fp16 import cli
from jaxrl_fp16.config import ConfigError, load_config, parse_overrides
from jaxrl_fp16.models import Critic, critic_params, param_shardings, save_reward_model
from jaxrl_fp16.parallel import shard_batch
from jaxrl_fp16.tasks import open_task, render
from jaxrl_fp16.tasks.reward_text import make_writer
from jaxrl_fp16.training.optimizer import OptimizerConfig, make_optimizer
from jaxrl_fp16.training.reward_model import encode_texts, score_rows
from jaxrl_fp16.training.reward_update import RewardPairs, make_reward_update
from jaxrl_fp16.training.run_config import Config
from jaxrl_fp16.training.setup import load_model, set_up
from jaxrl_fp16.training.sft import make_sft_update
from jaxrl_fp16.training.state import create_train_state, shardings_of
from jaxrl_fp16.training.supervised import next_pairs

ERRORS = (*range(-10, 0), *range(1, 11))   # of a wrong total; with fewer the policy finds those that are missing
EDITS = "0123456789,"


# -- pairs -----------------------------------------------------------------------------------------


def wrong_total(draw, right):
    """One or two totals are wrong, and an error goes on to the end or stays alone."""
    steps = [int(step) for step in right.split(",")]
    for _ in range(draw.randint(1, 2)):
        first, error = draw.randrange(len(steps)), draw.choice(ERRORS)
        last = draw.choice([first + 1, len(steps)])
        steps = [abs(step + error) if first <= i < last else step for i, step in enumerate(steps)]
    return ",".join(map(str, steps))


def wrong_characters(draw, right):
    """Up to two characters are lost, added or changed."""
    text = list(right)
    for _ in range(draw.randint(1, 2)):
        at, new = draw.randrange(len(text) + 1), draw.choice(EDITS)
        text[at:at + draw.randint(0, 1)] = draw.choice([[], [new]])
    return "".join(text)


def cut_short(draw, right):
    """The end is missing."""
    return right[: draw.randrange(len(right))]


SHARES = {wrong_total: 6, wrong_characters: 2, cut_short: 1}   # the first is the hardest to see


def wrong_answer(draw, example):
    """`(kind, text)` of an answer other than the example's solution."""
    while True:
        (kind,) = draw.choices([*SHARES], SHARES.values())
        text = kind(draw, example.solution)
        if text != example.solution:
            return kind.__name__, text


def make_pairs(examples, seed, write, prompts, tokenizer, pad):
    """`(kinds, ids of the right texts, ids of the wrong ones)`, one of each an example."""
    draw = random.Random(seed)
    kinds, wrong = zip(*(wrong_answer(draw, example) for example in examples))
    texts = [[write(*row) for row in zip(prompts, answers, examples)]
             for answers in ([example.solution for example in examples], wrong)]
    return kinds, *(encode_texts(tokenizer, side, pad) for side in texts)


def padded(ids, columns):
    """int32 and bool [n,T]: tokens and mask."""
    tokens, mask = np.zeros((len(ids), columns), np.int32), np.zeros((len(ids), columns), bool)
    for index, row in enumerate(ids):
        tokens[index, :len(row)], mask[index, :len(row)] = row, True
    return tokens, mask


# -- training --------------------------------------------------------------------------------------


class Trainer:
    """One model's state, its update, and a line now and then."""

    def __init__(self, setup, model, params, learning_rate, steps, make):
        section = OptimizerConfig(learning_rate, "linear", warmup_steps=min(20, steps - 1), decay_steps=steps)
        optimizer, key = make_optimizer(section), jax.random.key(0)
        self.state = create_train_state(
            params, optimizer, setup.precision.loss_scale, key, param_shardings(model, setup.mesh)
        )
        self.update = make(
            model, setup.precision.policy, optimizer, microbatch_size=setup.config.sft.microbatch_size,
            state_shardings=shardings_of(self.state),
        )
        self.mesh, self.steps = setup.mesh, steps

    def run(self, what, batches):
        """The parameters after a step on each batch."""
        for step, batch in enumerate(batches, 1):
            self.state, metrics = self.update(self.state, shard_batch(batch, self.mesh))
            if step % max(1, self.steps // 5) == 0:
                shown = {name: float(metrics[name]) for name in ("loss", "accuracy") if name in metrics}
                print(f"{what} {step}/{self.steps}  " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()), flush=True)
        return self.state.params


def train(setup, task, body_steps, steps):
    """`(model, parameters, share of held-out pairs in order by kind of error)`."""
    config, tokenizer = setup.config, setup.tokenizer
    section, size, pad = config.task.reward_model, config.sft.batch_size, tokenizer.pad_token_id
    write = make_writer(section.template, tokenizer)

    def pairs_of(examples, seed):
        prompts = [render(task.template, example, tokenizer) for example in examples]
        return make_pairs(examples, seed, write, prompts, tokenizer, pad)

    def solutions():
        position = 0
        for _ in range(body_steps):
            batch, _, position = next_pairs(task, tokenizer, position, size, config.sft.max_length, config.run.seed)
            yield batch

    def pairs():
        for step in range(steps):
            places = [index % len(task.train) for index in range(step * size, (step + 1) * size)]
            _, right, wrong = pairs_of([task.train[place] for place in places], step)
            yield RewardPairs(*padded(right, section.max_length), *padded(wrong, section.max_length))

    decoder, params = load_model(setup, jax.random.key(config.run.seed))
    if body_steps:
        params = Trainer(setup, decoder, params, 1.5e-3, body_steps, make_sft_update).run("answers", solutions())
    tied = dataclasses.replace(decoder.config, tie_embeddings=True)   # a classifier stores no head
    model = Critic(decoder.clone(config=tied), bias=False)
    params = critic_params({name: leaf for name, leaf in params.items() if name != "head"}, bias=False)
    params = Trainer(setup, model, params, 1e-3, steps, make_reward_update).run("pairs", pairs())

    kinds, *sides = pairs_of(task.heldout, "held out")
    right, wrong = (
        score_rows(model, params, side, policy=setup.precision.policy, columns=section.max_length, rows=section.rows,
                   mesh=setup.mesh)
        for side in sides
    )
    found = collections.defaultdict(list)
    for kind, order in zip(kinds, 0.5 * (1 + np.sign(right - wrong))):
        found[kind].append(order)
        found["all"].append(order)
    return model, params, {kind: (float(np.mean(orders)), len(orders)) for kind, orders in sorted(found.items())}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="the run that it is for, such as configs/rlhf_tiny.yaml")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of the reward model")
    parser.add_argument("--body-steps", type=int, default=400, metavar="N", help="on right answers alone; 0: none")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="on pairs")
    parser.add_argument("--train", action="store_true", help="start the run afterwards")
    options, overrides = parser.parse_known_args(arguments)
    try:
        config = load_config(Config, options.config, parse_overrides(overrides))
        if config.task.name != "arithmetic" or config.task.reward_model.path is None or options.steps < 1:
            raise ConfigError("task arithmetic, a task.reward_model.path and --steps of 1 or more are needed")
        # To see an error takes layers beyond those that would have made none.
        setup = set_up(dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=options.layers)))
        with open_task(config.task) as task:
            model, params, accuracy = train(setup, task, options.body_steps, options.steps)
        folder = config.task.reward_model.path
        save_reward_model(folder, model, params, tokenizer=setup.tokenizer, overwrite=True)
    except ValueError as error:
        print(f"make_reward_model: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: held-out pairs in order: " + ", ".join(f"{k} {v:.3f} of {n}" for k, (v, n) in accuracy.items()))
    return cli.main(["train", options.config, *overrides]) if options.train else 0


if __name__ == "__main__":
    sys.exit(main())
