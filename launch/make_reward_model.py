#!/usr/bin/env python3
"""RLHF's first two steps (2203.02155): a supervised policy, and a reward model of its right and wrong responses.

It takes the config of the third step, the RL run. Section `sft` makes the policy. That answers many training
problems several times, and what the task says of the answers makes pairs, as a person's choice would. The reward
model starts as the policy's body, learns from the pairs, and is written to `task.reward_model.path`. Its accuracy
on pairs from held-out problems is printed.

    python launch/make_reward_model.py configs/rlhf_tiny.yaml --train

With `--train` the run starts from the same policy afterwards. Other `--key VALUE` pairs override the config.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
import random
import sys

import jax
import numpy as np

from jaxrl_fp16 import cli
from jaxrl_fp16.config import ConfigError, load_config, parse_overrides
from jaxrl_fp16.models import Critic, critic_params, param_shardings, save_reward_model
from jaxrl_fp16.parallel import shard_batch
from jaxrl_fp16.tasks import render
from jaxrl_fp16.tasks.reward_text import make_writer
from jaxrl_fp16.training.loops.supervised import check_solutions
from jaxrl_fp16.training.loops.warm_start import drop_warm_start, warm_start
from jaxrl_fp16.training.rollouts.evaluate import grade_chunks, make_evaluator
from jaxrl_fp16.training.rollouts.reward_model import encode_texts, score_rows
from jaxrl_fp16.training.runs.run import Guard, open_run
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.setup import opened, set_up
from jaxrl_fp16.training.updates.optimizer import OptimizerConfig, make_optimizer
from jaxrl_fp16.training.updates.reward_update import RewardPairs, make_reward_update
from jaxrl_fp16.training.updates.state import create_train_state, shardings_of


def make_policy(config, name):
    """The folder of a policy as `train` would warm-start it; None after a signal."""
    run = dataclasses.replace(config.run, name=f"{config.run.name or name}_policy")
    with open_run(dataclasses.replace(config, run=run), "warmup", check=check_solutions) as (run, params):
        params, _, code = warm_start(run, params)
        if code:
            return None
        run.export(params)
        drop_warm_start(run)
        return run.folder / "model"


# -- pairs -----------------------------------------------------------------------------------------


def sample_pairs(bench, params, examples, samples, key):
    """`(texts preferred, texts not)`: what the policy answered to `examples`, right against wrong."""
    setup, task, config = bench.setup, bench.task, bench.setup.config
    sampling = dataclasses.replace(config.sampling, group_size=samples)
    write, draw = make_writer(config.task.reward_model.template, setup.tokenizer), random.Random(config.run.seed)
    asked = dataclasses.replace(task, heldout=examples)
    chunks = grade_chunks(
        make_evaluator(bench, "pairs", asked, sampling), params, setup, config.training.max_prompt_tokens, key,
    )
    groups = [group for kept, graded in chunks
              for group in zip(kept, graded.responses, graded.rewards.values)]   # but those that fill the last chunk
    pairs = []
    for example, (kept, responses, rewards) in zip(examples, groups, strict=True):
        prompt = render(task.template, example, setup.tokenizer)
        for pair in pairs_of(responses, rewards, example.solution, draw) if kept else ():
            pairs.append([write(prompt, response, example) for response in pair])
    if not pairs:
        raise ConfigError("the policy's answers are all right; allowed: fewer sft.steps, more --problems or --samples")
    draw.shuffle(pairs)
    return [list(side) for side in zip(*pairs)]


def pairs_of(responses, rewards, solution, draw):
    """Each different wrong response of a group, with a right one, or the solution where none is right."""
    right = [response for response, reward in zip(responses, rewards) if reward > 0.5] or [solution]
    wrong = {response for response, reward in zip(responses, rewards) if reward <= 0.5}
    return [(draw.choice(right), response) for response in sorted(wrong)]


def padded(ids, columns):
    """int32 and bool [n,T]: tokens and mask."""
    tokens, mask = np.zeros((len(ids), columns), np.int32), np.zeros((len(ids), columns), bool)
    for index, row in enumerate(ids):
        tokens[index, :len(row)], mask[index, :len(row)] = row, True
    return tokens, mask


# -- the reward model ------------------------------------------------------------------------------


def reward_model_of(decoder, params):
    """`(model, parameters)`: the policy's body, with a head that scores 0."""
    tied = dataclasses.replace(decoder.config, tie_embeddings=True)   # a classifier stores no other head
    body = {name: leaf for name, leaf in params.items() if name != "head"}
    return Critic(decoder.clone(config=tied), bias=False), critic_params(body, bias=False)


def learn(setup, model, params, sides, steps, learning_rate):
    """The parameters after `steps` batches of the pairs `sides`, ids of preferred and of other texts."""
    config, size = setup.config, setup.config.sft.batch_size
    section = OptimizerConfig(learning_rate, "linear", warmup_steps=min(20, steps - 1), decay_steps=steps)
    optimizer = make_optimizer(section)
    state = create_train_state(
        params, optimizer, setup.precision.loss_scale, jax.random.key(0), param_shardings(model, setup.mesh)
    )
    update = make_reward_update(
        model, setup.precision.policy, optimizer, microbatch_size=config.sft.microbatch_size,
        state_shardings=shardings_of(state),
    )
    for step in range(steps):
        places = [place % len(sides[0]) for place in range(step * size, (step + 1) * size)]
        texts = [padded([side[place] for place in places], config.task.reward_model.max_length) for side in sides]
        state, metrics = update(state, shard_batch(RewardPairs(*texts[0], *texts[1]), setup.mesh))
        if (step + 1) % max(1, steps // 5) == 0:
            loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
            print(f"reward model {step + 1}/{steps}  loss {loss:.3f}  accuracy {accuracy:.3f}", flush=True)
    return state.params


def accuracy_of(setup, model, params, sides):
    """The share of pairs in order, a tie being half in order."""
    section = setup.config.task.reward_model
    preferred, other = (
        score_rows(model, params, side, policy=setup.precision.policy, columns=section.max_length, rows=section.rows,
                   mesh=setup.mesh)
        for side in sides
    )
    return float(np.mean(0.5 * (1 + np.sign(preferred - other))))


def make_reward_model(setup, options):
    """Samples pairs, trains on them, and writes the folder; prints the accuracy on held-out ones."""
    section, keys = setup.config.task.reward_model, jax.random.split(jax.random.key(setup.config.run.seed), 2)
    with opened(setup) as bench:
        policy = bench.load_params()
        examples = bench.task.train[: options.problems], bench.task.heldout
        pairs, held_out = (
            [encode_texts(setup.tokenizer, side, setup.pad_id) for side in
             sample_pairs(bench, policy, each, options.samples, key)]
            for each, key in zip(examples, keys)
        )
    print(f"{len(pairs[0])} pairs of {options.problems} problems", flush=True)
    model, params = reward_model_of(bench.model, policy)
    params = learn(setup, model, params, pairs, options.steps, options.learning_rate)
    accuracy, count = accuracy_of(setup, model, params, held_out), len(held_out[0])
    save_reward_model(section.path, model, params, tokenizer=setup.tokenizer, overwrite=True)
    print(f"{section.path}: {accuracy:.3f} of {count} held-out pairs in order", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="the run that it is for, such as configs/rlhf_tiny.yaml")
    parser.add_argument("--policy", metavar="FOLDER", help="of the supervised policy; by default it is made first")
    parser.add_argument("--problems", type=int, default=4096, metavar="N", help="that are answered")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="answers to each")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="on pairs")
    parser.add_argument("--learning-rate", type=float, default=1e-3, metavar="X")
    parser.add_argument("--train", action="store_true", help="start the run afterwards")
    options, overrides = parser.parse_known_args(arguments)
    try:
        config = load_config(Config, options.config, parse_overrides(overrides))
        if config.task.reward_model.path is None or options.steps < 1:
            raise ConfigError("a task.reward_model.path and --steps of 1 or more are needed")
        folder = options.policy or make_policy(config, Path(options.config).stem)
        if folder is None:
            return 1
        overrides += ["--model.path", str(folder), "--sft.steps", "0"]
        make_reward_model(set_up(load_config(Config, options.config, parse_overrides(overrides))), options)
    except (ValueError, Guard) as error:
        print(f"make_reward_model: {error}", file=sys.stderr)
        return 2
    return cli.main(["train", options.config, *overrides]) if options.train else 0


if __name__ == "__main__":
    sys.exit(main())
