"""The sampler as several programs, called from the host: a long batch says how far it is, and can be ended.

n: prompts.  P: prompt columns.  B: rows.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.forward import cast_to_compute
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.parallel import replicated
from jaxrl_fp16.sampling.sampler import as_rollout, decode_weights, make_recipe, row_keys, start
from jaxrl_fp16.sampling.slots import enter_cache, enter_slots, fill, goes_on, run_stage, stages_of

FIRST = 8       # decode steps of the first call; those that follow take about PACE
PACE = 2.0      # seconds
GROWTH = 4      # a call has at most so many times the steps of the one before


@dataclasses.dataclass(frozen=True)
class Sampled:
    """How far a batch is."""

    rows: int           # that have ended
    of: int             # B
    tokens: int         # drawn so far, of all rows
    seconds: float      # since the start, compiling included

    def __str__(self):
        return (f"{self.rows:,} of {self.of:,} responses, {self.tokens:,} tokens, "
                f"{self.tokens / max(self.seconds, 1e-6):,.0f} a second")


def make_stepwise_sampler(model, policy, config, *, eos_id, pad_id, tokenizer=None):
    """`sample(params, prompt_tokens, prompt_mask, key, watch=None) -> Rollout`: the bits of `make_sampler`'s.

    The decode loop is the same; a call of its program takes some steps of it, about `PACE` seconds, and is given the
    carry to keep. Which steps go together changes nothing. For one device.

    Args:
      model, policy, config, eos_id, pad_id, tokenizer: as for `make_sampler`; it raises the same.
      watch: called with a `Sampled` after each call. What it raises ends the batch.
    """
    recipe = make_recipe(model, policy, config, eos_id, pad_id, tokenizer, False)
    program = lambda function, **settings: jit(function, model.numerics, **settings)

    def begin(params, tokens, mask, key):
        compute = cast_to_compute(params, policy, model.numerics)
        rows, columns, finished = start(recipe, compute, tokens, mask, row_keys(key, len(tokens), config))
        first = stages_of(recipe, len(rows.token), tokens.shape[1])[0]
        return decode_weights(recipe, compute), rows, fill(recipe, first, rows, columns, finished)

    def advance(stage, weights, rows, state, steps):
        state = run_stage(recipe, weights, rows, stage, state, steps)
        ended = len(rows.token) - rows.count + state.queued - jnp.sum(~state.done)
        return state, jnp.stack([goes_on(rows, stage, state), ended, jnp.sum(state.columns["response_mask"])])

    begin = program(begin)
    advance = program(advance, static_argnums=0, donate_argnums=3)
    move_slots = program(enter_slots, static_argnums=0)
    move_cache = program(partial(enter_cache, recipe), static_argnums=0)
    end = program(lambda tokens, mask, state: as_rollout(
        tokens, mask, config.group_size, state.columns, state.finished))

    def move(stage, state):
        caches, state = state.caches, state.replace(caches=[])
        kept, state = move_slots(stage, state)
        # Layer by layer in the list that holds them, so that each is gone before the next grows: all at once would
        # take half as much again.
        for place in range(len(caches)):
            caches[place] = move_cache(stage, caches[place], kept)
        return state.replace(caches=caches)

    def sample(params, prompt_tokens, prompt_mask, key, watch: Callable[[Sampled], Any] | None = None):
        began, steps = time.monotonic(), FIRST
        weights, rows, state = begin(params, prompt_tokens, prompt_mask, key)
        ended, total = 0, len(rows.token)
        for number, stage in enumerate(stages_of(recipe, total, prompt_tokens.shape[1])):
            state, more = state if number == 0 else move(stage, state), ended < total
            while more:
                called = time.monotonic()
                state, found = advance(stage, weights, rows, state, np.int32(steps))
                more, ended, tokens = np.asarray(found).tolist()
                steps = _next_steps(steps, time.monotonic() - called)
                if watch is not None:
                    watch(Sampled(ended, total, tokens, time.monotonic() - began))
        return end(prompt_tokens, prompt_mask, state)

    def lower(params, prompt_tokens, prompt_mask, key):
        weights, rows, state = jax.eval_shape(begin, params, prompt_tokens, prompt_mask, key)
        stages = stages_of(recipe, len(rows.token), prompt_tokens.shape[1])
        widest = max(stages, key=lambda each: each.slots * each.width)
        state = state.replace(caches=[jax.eval_shape(partial(enter_cache, recipe, widest, kept=None), cache)
                                      for cache in state.caches])
        here = replicated(jax.tree.leaves(params)[0].sharding.mesh)
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (weights, rows, state))
        return advance.lower(widest, *placed, jax.ShapeDtypeStruct((), jnp.int32))

    # Of shapes that lie on one device: the call that needs most, some steps of the widest stage.
    sample.lower = lower
    return sample


def _next_steps(steps, seconds):
    """How many steps take about PACE, after a call of `steps` that took `seconds`, compiling included."""
    return int(np.clip(steps * PACE / max(seconds, 1e-6), 1, GROWTH * steps))
