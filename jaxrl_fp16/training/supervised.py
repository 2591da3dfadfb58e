"""Supervised steps over a task's solutions: the warm start of `train`, and the whole of `sft`."""

from __future__ import annotations

import numpy as np

from jaxrl_fp16.parallel import shard_batch
from jaxrl_fp16.tasks import render
from jaxrl_fp16.tokenizer import encode_pairs
from jaxrl_fp16.training.collect import data_order
from jaxrl_fp16.training.sft import Pairs


class NoPairFits(ValueError):
    """No problem has a solution that fits with it into the limit."""


def next_pairs(task, tokenizer, position, count, length, seed):
    """`(Pairs on the host, position after them)`: problems with their solutions, in the order of `data_order`.

    Problems without a solution, and pairs longer than `length` tokens, are passed over.
    Raises NoPairFits when a whole epoch holds none.
    """
    size, chosen, looked = len(task.train), [], 0
    while len(chosen) < count:
        if not chosen and looked > size:
            raise NoPairFits(
                f"none of the {size} problems has a solution that fits into sft.max_length = {length} tokens; "
                "allowed: data with task.solution_field, or a larger limit"
            )
        places = range(position, position + count - len(chosen))
        examples = [task.train[index] for index in data_order(seed, size, places)]
        examples = [example for example in examples if example.solution]
        prompts = [render(task.template, example, tokenizer) for example in examples]
        tokens, mask, loss_mask, kept = encode_pairs(tokenizer, prompts, [e.solution for e in examples], length)
        chosen += [row for row, keep in zip(zip(tokens, mask, loss_mask), kept) if keep]
        position, looked = places.stop, looked + len(places)
    return Pairs(*map(np.stack, zip(*chosen))), position


def supervised_steps(config, setup, task, update, state, *, first=0, position=0):
    """The steps of section `sft` from `first` on; yields `(step, state, metrics, position)` after each."""
    section = config.sft
    for step in range(first + 1, section.steps + 1):
        pairs, position = next_pairs(
            task, setup.tokenizer, position, section.batch_size, section.max_length, config.run.seed
        )
        state, metrics = update(state, shard_batch(pairs, setup.mesh))
        yield step, state, metrics, position


__all__ = ["NoPairFits", "next_pairs", "supervised_steps"]
