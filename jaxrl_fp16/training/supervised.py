"""Supervised steps over a task's solutions: the warm start of `train`, and the whole of `sft`."""

from __future__ import annotations

import numpy as np

from jaxrl_fp16.models import param_shardings
from jaxrl_fp16.parallel import shard_batch
from jaxrl_fp16.tasks import render
from jaxrl_fp16.tokenizer import encode_pairs
from jaxrl_fp16.training.collect import data_order, holds_epoch
from jaxrl_fp16.training.optimizer import make_optimizer
from jaxrl_fp16.training.run import announced
from jaxrl_fp16.training.setup import naming
from jaxrl_fp16.training.sft import Pairs, make_sft_update
from jaxrl_fp16.training.state import create_train_state, shardings_of


def next_pairs(task, tokenizer, position, count, length, seed):
    """`(Pairs on the host, position after them)`: problems with their solutions, in the order of `data_order`.

    Problems without a solution, and pairs longer than `length` tokens, are passed over.
    Raises ValueError when a whole epoch holds none that fits.
    """
    size, chosen, start = len(task.train), [], position
    while len(chosen) < count:
        if not chosen and holds_epoch(start, position, size):
            raise ValueError(
                f"none of the {size} problems has a solution that fits into max_length = {length} tokens; "
                "allowed: data with task.solution_field, or a larger limit"
            )
        places = range(position, position + count - len(chosen))
        examples = [task.train[index] for index in data_order(seed, size, places)]
        examples = [example for example in examples if example.solution]
        prompts = [render(task.template, example, tokenizer) for example in examples]
        tokens, mask, loss_mask, kept = encode_pairs(tokenizer, prompts, [e.solution for e in examples], length)
        chosen += [row for row, keep in zip(zip(tokens, mask, loss_mask), kept) if keep]
        position = places.stop
    return Pairs(*map(np.stack, zip(*chosen))), position


def check_pairs(setup, task):
    """Refuses data without a solution that fits."""
    config = setup.config
    with naming("sft"):
        next_pairs(task, setup.tokenizer, 0, config.sft.batch_size, config.sft.max_length, config.run.seed)


def fresh_state(run, params):
    """A train state for section `sft`'s optimizer. Takes `params` over."""
    scale, shardings = run.setup.precision.loss_scale, param_shardings(run.model, run.setup.mesh)
    return create_train_state(params, make_optimizer(run.config.sft.optimizer), scale, run.keys[1], shardings)


def supervise(run, state, position=0, start=0):
    """The steps of section `sft` after step `start`, from `state` and a position in the data.

    Yields `(step, state, metrics, position)` after each; a yielded state is donated to the next step.
    """
    section, setup = run.config.sft, run.setup
    update = make_sft_update(
        run.model, setup.precision.policy, make_optimizer(section.optimizer),
        microbatch_size=section.microbatch_size, state_shardings=shardings_of(state),
    )
    for step in range(start + 1, section.steps + 1):
        pairs, position = next_pairs(
            run.task, setup.tokenizer, position, section.batch_size, section.max_length, run.config.run.seed
        )
        with announced(run.log, step == start + 1, "compiling the supervised step"):
            state, metrics = update(state, shard_batch(pairs, setup.mesh))
        yield step, state, metrics, position


__all__ = ["check_pairs", "fresh_state", "next_pairs", "supervise"]
