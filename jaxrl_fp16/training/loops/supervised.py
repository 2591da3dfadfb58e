"""Supervised steps over a task's solutions: the warm start of `train`, and the whole of `sft`."""

from functools import partial
from itertools import islice

import jax
import numpy as np

from jaxrl_fp16.config import naming
from jaxrl_fp16.models import param_shardings
from jaxrl_fp16.objectives import host_floats
from jaxrl_fp16.packing import pack
from jaxrl_fp16.parallel import shard_batch
from jaxrl_fp16.tasks import render
from jaxrl_fp16.telemetry.ranges import make_peaks
from jaxrl_fp16.tokenizer import encode_completions
from jaxrl_fp16.training.loops.follow import Step
from jaxrl_fp16.training.loops.nonfinite import name_in_parts
from jaxrl_fp16.training.rollouts.collect import fitting_rows
from jaxrl_fp16.training.runs.learner import Learner
from jaxrl_fp16.training.runs.run import announced
from jaxrl_fp16.training.updates.optimizer import make_optimizer
from jaxrl_fp16.training.updates.sft_update import SFTRows, make_sft_update, sft_loss
from jaxrl_fp16.training.updates.state import create_train_state, shardings_of
from jaxrl_fp16.training.updates.step import split_rows


def next_solutions(task, tokenizer, position, rows, length, seed, packing=False, ends=None):
    """`(SFTRows on the host, how many, position after them)`: problems with their solutions, in `data_order`'s order.

    One a row, or with `packing` as many as fit into `rows` rows of `length` columns: what
    does not fit any more is the first of the next step. Problems without a solution, and
    pairs longer than `length` tokens, are passed over. Raises ValueError when a whole epoch
    holds none that fits. ends: as `encode_completions` takes them.
    """
    def encode(examples):
        prompts = [render(task.template, example, tokenizer) for example in examples]
        solutions = [example.solution for example in examples]
        *arrays, kept = encode_completions(tokenizer, prompts, solutions, length, ends)
        kept = [keep and bool(example.solution) for keep, example in zip(kept, examples)]
        return [row if keep else None for row, keep in zip(zip(*arrays), kept)]

    pairs = fitting_rows(task, position, rows, seed, encode, (
        f"none of the {len(task.train)} problems has a solution that fits into max_length = {length} tokens; "
        "allowed: data with task.solution_field, or a larger limit"
    ))
    places, chosen = zip(*(_up_to(rows * length, pairs) if packing else islice(pairs, rows)))
    arrays = map(np.stack, zip(*chosen))
    if not packing:
        return SFTRows(*arrays), rows, places[-1] + 1
    packed, count = pack(*arrays, rows)
    return SFTRows(*packed), count, places[count - 1] + 1


def _up_to(room, pairs):
    """The first of `pairs` that hold at most `room` tokens together."""
    for place, (tokens, mask, loss_mask) in pairs:
        room -= mask.sum()
        if room < 0:
            return
        yield place, (tokens, mask, loss_mask)


def check_solutions(setup, task):
    """Refuses data without a solution that fits."""
    config = setup.config
    with naming("sft"):
        next_solutions(
            task, setup.tokenizer, 0, config.sft.batch_size, config.sft.max_length, config.run.seed, ends=setup.eos_ids
        )


def fresh_state(run, params):
    """A train state for section `sft`'s optimizer. Takes `params` over."""
    return create_train_state(
        params, make_optimizer(run.config.sft.optimizer), run.setup.precision.loss_scale, run.setup.keys.supervised,
        param_shardings(run.model, run.setup.mesh),
    )


def supervise(run, state, position=0, start=0):
    """The steps of section `sft` after step `start`, from `state` and a position in the data.

    Yields a Step after each. Its metrics are the update's own, `examples`, and `filled`, the share of columns that
    hold a token.
    """
    section, setup = run.config.sft, run.setup
    update = make_sft_update(
        run.model, setup.precision.policy, make_optimizer(section.optimizer),
        microbatch_size=section.microbatch_size, state_shardings=shardings_of(state),
    )
    peaks = make_peaks(run.model, setup.precision.policy, _loss_of)
    for step in range(start + 1, section.steps + 1):
        pairs, examples, position = next_solutions(
            run.task, setup.tokenizer, position, section.batch_size, section.max_length, run.config.run.seed,
            section.packing, setup.eos_ids,
        )
        with announced(run.log, step == start + 1, "compiling the supervised step"):
            state, metrics = update(state, shard_batch(pairs, setup.mesh))
        cause = partial(_cause, run, peaks, state.sampling_params, metrics["loss_scale"], pairs)
        metrics = host_floats(metrics) | {"examples": float(examples), "filled": float(pairs.mask.mean())}
        yield Step(step, Learner(state), metrics, position, [metrics], cause=cause)


def _loss_of(logprobs, entropy, rows, tokens):
    return sft_loss(logprobs, rows, tokens)


def _cause(run, peaks, params, scale, pairs):
    parts = split_rows(pairs, run.config.sft.microbatch_size)
    microbatches = (
        shard_batch(jax.tree.map(lambda x, part=part: x[part], parts), run.setup.mesh)
        for part in range(len(parts.tokens))
    )
    return name_in_parts(run, peaks, params, scale, microbatches, np.maximum(pairs.loss_mask.sum(), 1))
