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
from jaxrl_fp16.telemetry.ranges import make_peaks
from jaxrl_fp16.tokenizer import encode_completions
from jaxrl_fp16.training.loops.follow import Step
from jaxrl_fp16.training.loops.nonfinite import name_in_parts
from jaxrl_fp16.training.rollouts.collect import NO_SOLUTION, fitting_rows, rendered, set_aside
from jaxrl_fp16.training.runs.learner import Learner
from jaxrl_fp16.training.runs.run import announced
from jaxrl_fp16.training.updates.optimizer import make_optimizer
from jaxrl_fp16.training.updates.sft_update import SFTRows, make_sft_update, sft_loss
from jaxrl_fp16.training.updates.state import create_train_state, shardings_of
from jaxrl_fp16.training.updates.step import split_rows


def next_solutions(task, tokenizer, position, rows, length, seed, packing=False, ends=None):
    """`(SFTRows on the host, how many, position after them)`: problems with their solutions, in `data_order`'s order.

    What is passed over on the way is the position's difference less the number.

    One a row, or with `packing` as many as fit into `rows` rows of `length` columns: what
    does not fit any more is the first of the next step. Problems without a solution or
    without their text in the prompt, and pairs longer than `length` tokens, are passed over.
    Raises ValueError when a whole epoch holds none that fits. ends: as `encode_completions` takes them.
    """
    pairs = fitting_rows(task, position, rows, seed, solution_encoder(task, tokenizer, length, ends), (
        f"none of the {len(task.train)} problems has a solution that fits into max_length = {length} tokens; "
        "allowed: a larger limit, or data with shorter ones in the field task.solution_field"
    ))
    places, chosen = zip(*(_up_to(rows * length, pairs) if packing else islice(pairs, rows)))
    arrays = map(np.stack, zip(*chosen))
    if not packing:
        return SFTRows(*arrays), rows, places[-1] + 1
    packed, count = pack(*arrays, rows)
    return SFTRows(*packed), count, places[count - 1] + 1


def solution_encoder(task, tokenizer, length, ends=None):
    """`examples -> (tokens [T], mask [T], loss_mask [T]) or why it is set aside`, of each; T is `length`."""
    def encode(examples):
        prompts, flaws = rendered(task, examples, tokenizer)
        solutions = [example.solution for example in examples]
        *arrays, kept = encode_completions(tokenizer, prompts, solutions, length, ends)
        return [_without(flaw, example, keep, length) or row
                for flaw, example, keep, row in zip(flaws, examples, kept, zip(*arrays))]

    return encode


def _without(flaw, example, fits, length):
    if not example.solution:
        return NO_SOLUTION
    return flaw or (None if fits else f"longer than sft.max_length = {length}")


def _up_to(room, pairs):
    """The first of `pairs` that hold at most `room` tokens together."""
    for place, (tokens, mask, loss_mask) in pairs:
        room -= mask.sum()
        if room < 0:
            return
        yield place, (tokens, mask, loss_mask)


def check_solutions(setup, task):
    """Refuses data without a solution that fits; gives the lines that say what is set aside."""
    section, seed = setup.config.sft, setup.config.run.seed
    with naming("sft"):
        next_solutions(
            task, setup.tokenizer, 0, section.batch_size, section.max_length, seed, ends=setup.eos_ids
        )
        encode = solution_encoder(task, setup.tokenizer, section.max_length, setup.eos_ids)
        return set_aside(task, encode, "problems with solutions")


def fresh_state(run, params):
    """A train state for section `sft`'s optimizer. Takes `params` over."""
    return create_train_state(
        params, make_optimizer(run.config.sft.optimizer), run.setup.precision.loss_scale, run.setup.keys.supervised,
        param_shardings(run.model, run.setup.mesh),
    )


def supervise(run, state, position=0, start=0):
    """The steps of section `sft` after step `start`, from `state` and a position in the data.

    Yields a Step after each. Its metrics are the update's own, `examples`, `filled`, the share of columns that hold a
    token, and `prompts_set_aside`, the problems that it passed over.
    """
    section, setup = run.config.sft, run.setup
    update = make_sft_update(
        run.model, setup.precision.policy, make_optimizer(section.optimizer),
        microbatch_size=section.microbatch_size, state_shardings=shardings_of(state), announce=run.log.announce,
    )
    peaks = make_peaks(run.model, setup.precision.policy, _loss_of)
    for step in range(start + 1, section.steps + 1):
        began = position
        pairs, examples, position = next_solutions(
            run.task, setup.tokenizer, position, section.batch_size, section.max_length, run.config.run.seed,
            section.packing, setup.eos_ids,
        )
        with announced(run.log, step == start + 1, "compiling the supervised step"):
            state, metrics = update(state, shard_batch(pairs, setup.mesh))
        cause = partial(_cause, run, peaks, state.sampling_params, metrics["loss_scale"], pairs)
        metrics = host_floats(metrics) | {"examples": float(examples), "filled": float(pairs.mask.mean()),
                                          "prompts_set_aside": float(position - began - examples)}
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
