"""The decode loop: rows in slots, each slot refilled as its row ends.

n: prompts.  P: prompt columns.  N: max_new_tokens.  G: group size.  B = n * G: rows, prompt-major.
R: slots, which hold one row each.  S: cache slots.  L: layers.  K: key-value heads.  E: head dim.

Rows wait in a queue, in order. Stages of fixed shapes follow one another: caches grow to twice as many slots as a
row reaches their end, and with the queue empty the living rows move into half the slots, then an eighth.
A row's tokens hang on its own key and its own step alone, wherever and whenever it is decoded.
"""

import dataclasses
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.forward import logits_of
from jaxrl_fp16.models.attention import BLOCK
from jaxrl_fp16.models.decoder import Cache, decode_step
from jaxrl_fp16.sampling.support import draw

SHRINKS = 2, 8   # parts of the slots that are left with an empty queue: each is one more decode step to compile
LEAST_SLOTS = 4  # below that a step costs what its weights take to read
LONG = BLOCK     # tokens: shorter responses save less than the programs of further shapes take to compile


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What a sampler's programs have in common."""

    model: Any       # a Decoder in the compute dtype
    config: Any      # a SamplingConfig
    eos_ids: Any     # int32 [..]
    pad_id: int
    stops: Any       # (table, accepting state) of `stop_table`, or None
    lockstep: bool   # all rows have a slot and keep it: where devices hold rows


@struct.dataclass
class Rows:
    """What every row starts from."""

    keys: jax.Array        # [B]
    token: jax.Array       # int32 [B]: the first one drawn
    stop_state: jax.Array  # int32 [B]: after it
    length: jax.Array      # int32 [B]: of its prompt
    order: jax.Array       # int32 [B]: the rows that go on after it, then the others
    count: jax.Array       # int32 []: how many go on
    prompts: Cache         # arrays [n,L,...], of P slots


@struct.dataclass
class Slots:
    """The carry of the decode loop."""

    caches: list[Cache]    # one a layer, of R rows and S slots
    row: jax.Array         # int32 [R]: which one is in the slot; B and more: none was yet
    keys: jax.Array        # [R]: the row's
    token: jax.Array       # int32 [R]: the last one drawn
    position: jax.Array    # int32 [R]: of it
    drawn: jax.Array       # int32 [R]: tokens of the row so far
    stop_state: jax.Array  # int32 [R]: of the stop-string automaton
    done: jax.Array        # bool [R]: the row has ended, or there is none
    tainted: jax.Array     # bool [R]: keys and values in the slot may not be finite
    queued: jax.Array      # int32 []: rows that have had a slot
    columns: Any           # what has been drawn: arrays [B,N,...]
    finished: jax.Array    # bool [B]: ended by itself


@dataclasses.dataclass(frozen=True)
class Stage:
    """Shapes of a part of the loop, and when it ends."""

    slots: int   # R
    width: int   # S
    least: int   # rows left in slots, with none in the queue, at which the next stage goes on


def stages_of(recipe, rows, prompt_columns):
    """The Stages of `rows` rows, one after another."""
    config, model = recipe.config, recipe.model
    count = rows if recipe.lockstep else min(rows, config.max_rows or rows)
    count = max(count, model.numerics.decode_rows)
    floor = max(model.numerics.decode_rows, LEAST_SLOTS)
    halves = [] if recipe.lockstep else [count // part for part in SHRINKS if count // part >= floor]
    blocks, first = -(-(prompt_columns + config.max_new_tokens) // BLOCK), prompt_columns // BLOCK + 1
    if config.max_new_tokens < LONG:
        halves, first = [], blocks
    widths = sorted({max(first, blocks // 2), blocks})
    sizes = [count, *halves, 0]
    return [Stage(count, width * BLOCK, sizes[1]) for width in widths] + [
        Stage(size, blocks * BLOCK, least) for size, least in zip(halves, sizes[2:])
    ]


def fill(recipe, stage, rows, columns, finished):
    """The Slots of the first Stage, with the first rows of the queue."""
    total, count, group = len(rows.token), stage.slots, recipe.config.group_size
    slot = jnp.arange(count)
    if count < total:
        row, done = rows.order[:count], slot >= rows.count
        spread = lambda x: x[row // group]
    else:
        # No queue: a row has the slot of its number, so that on a mesh it stays where it is.
        going = jnp.zeros(total, bool).at[rows.order].set(jnp.arange(total) < rows.count)
        row, done = slot, jnp.pad(~going, (0, count - total), constant_values=True)
        spread = lambda x: jnp.pad(
            jnp.repeat(x, group, axis=0), ((0, count - total), *((0, 0) for _ in range(x.ndim - 1))))
    layers = range(recipe.model.config.num_layers)
    caches = [_widen(recipe, jax.tree.map(lambda x, i=i: spread(x[:, i]), rows.prompts), stage) for i in layers]
    at = jnp.minimum(row, total - 1)
    return Slots(
        caches=caches, row=row, keys=rows.keys[at], token=rows.token[at], position=rows.length[at],
        drawn=jnp.ones(count, jnp.int32), stop_state=rows.stop_state[at], done=done, tainted=jnp.zeros(count, bool),
        queued=jnp.minimum(rows.count, count), columns=columns, finished=finished,
    )


def _widen(recipe, cache, stage):
    return cache.widened(recipe.model.attention, stage.width)


def run_stage(recipe, weights, rows, stage, state, steps=None):
    """The Slots after a Stage, or after `steps` of it, int32 []; None: as many as it has.

    weights: parameters in the compute dtype, and their layers as `unstack_layers` gives them.
    """
    decodes = lambda carry: _decodes(rows, stage, carry[0]) & _has(carry[1])

    def decode(carry):
        state, steps = carry
        return _advance(recipe, weights, state), None if steps is None else steps - 1

    def refill(carry):
        state, steps = carry
        waits = lambda s: _waiting(rows, stage, s) & jnp.any(s.done)
        return lax.while_loop(decodes, decode, (lax.while_loop(waits, lambda s: _load(recipe, rows, s), state), steps))

    if not _refills(rows, stage):
        return lax.while_loop(decodes, decode, (state, steps))[0]
    return lax.while_loop(lambda carry: goes_on(rows, stage, carry[0]) & _has(carry[1]), refill, (state, steps))[0]


def _has(steps):
    return True if steps is None else steps > 0


def goes_on(rows, stage, state):
    """bool []: whether a Stage has more to do."""
    if not _refills(rows, stage):
        return _decodes(rows, stage, state)
    return _fits(stage, state) & (_waiting(rows, stage, state) | (jnp.sum(~state.done) > stage.least))


def _decodes(rows, stage, state):
    living = jnp.sum(~state.done)
    return _fits(stage, state) & jnp.where(_waiting(rows, stage, state), living == stage.slots, living > stage.least)


def _refills(rows, stage):
    return stage.slots < len(rows.token)


def _waiting(rows, stage, state):
    return state.queued < rows.count if _refills(rows, stage) else jnp.zeros((), bool)


def _fits(stage, state):
    """Whether the next step may be taken in these shapes."""
    return jnp.max(jnp.where(state.done, 0, state.position)) < stage.width


def enter(recipe, stage, state):
    """`state` in the shapes of a later Stage: the living rows in its slots, the caches at its width."""
    kept, state = enter_slots(stage, state)
    return state.replace(caches=[enter_cache(recipe, stage, cache, kept) for cache in state.caches])


def enter_slots(stage, state):
    """`(slots that a later Stage keeps int32 [R] or None: all, state)`, with the caches as they were."""
    if len(state.row) <= stage.slots:
        return None, state
    kept = jnp.argsort(state.done, stable=True)[: stage.slots]
    return kept, state.replace(**{name: getattr(state, name)[kept] for name in PER_SLOT})


def enter_cache(recipe, stage, cache, kept):
    """One layer's cache in the shapes of a later Stage."""
    return _widen(recipe, cache if kept is None else jax.tree.map(lambda leaf: leaf[kept], cache), stage)


PER_SLOT = ("row", "keys", "token", "position", "drawn", "stop_state", "done", "tainted")


def _load(recipe, rows, state):
    """The next row of the queue into the first slot whose row has ended."""
    slot, row = jnp.argmax(state.done), rows.order[state.queued]
    prompt = jax.tree.map(lambda x: x[row // recipe.config.group_size], rows.prompts)

    def put(stored, new):
        return lax.dynamic_update_slice_in_dim(stored, new[None], slot, axis=0)

    # What a row leaves behind has no weight, but 0 times what is not finite is NaN.
    caches = lax.fori_loop(
        0, state.tainted[slot].astype(jnp.int32),
        lambda _, caches: jax.tree.map(lambda x: put(x, jnp.zeros_like(x[0])), caches), state.caches,
    )
    caches = [jax.tree.map(lambda x, new, i=i: put(x, new[i]), cache, prompt) for i, cache in enumerate(caches)]
    new = dict(
        row=row, keys=rows.keys[row], token=rows.token[row], position=rows.length[row], drawn=1,
        stop_state=rows.stop_state[row], done=False, tainted=False,
    )
    new = {name: getattr(state, name).at[slot].set(value) for name, value in new.items()}
    return state.replace(caches=caches, queued=state.queued + 1, **new)


def _advance(recipe, weights, state):
    """The state with one more token of each row that goes on."""
    (params, layers), config = weights, recipe.config
    with jax.named_scope("decode_step"):    # by which `plan` knows the loop in what was compiled
        hidden, caches = decode_step(recipe.model, params, layers, state.token, state.caches, state.position)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.drawn)
    drawn = draw(config, logits_of(hidden, params["head"])[:, 0], keys)
    token, going = drawn[0], ~state.done
    ends, stop_state = ends_of(recipe, token, state.stop_state)
    row = jnp.arange(len(state.row)) if recipe.lockstep else state.row
    # A row that has ended writes beyond the last column, which is dropped.
    at = row, jnp.where(going, state.drawn, config.max_new_tokens)
    write = lambda stored, new: stored.at[at].set(new, mode="drop", unique_indices=True)
    columns = {name: write(state.columns[name], new) for name, new in columns_of(drawn).items()}
    return state.replace(
        caches=caches, token=jnp.where(going, token, recipe.pad_id), columns=columns, stop_state=stop_state,
        position=state.position + going, drawn=state.drawn + going,
        done=state.done | ends | (state.drawn + 1 >= config.max_new_tokens),
        tainted=state.tainted | ~jnp.isfinite(drawn[1]),
        finished=state.finished.at[row].max(going & ends, mode="drop", unique_indices=True),
    )


def ends_of(recipe, token, stop_state):
    """Whether `token` int32 [B] ends its row, bool [B], and the stop-string automaton's states after it, int32 [B]."""
    ends = jnp.isin(token, recipe.eos_ids)
    if recipe.stops is not None:
        table, accept = recipe.stops
        stop_state = table[stop_state, token].astype(jnp.int32)
        ends |= stop_state == accept
    return ends, stop_state


def columns_of(drawn):
    """What `draw` gives, as columns of the rollout: arrays [B,...] by name."""
    token, logprob, support, full_logprob = drawn
    columns = dict(tokens=token, response_mask=jnp.ones(token.shape, bool), logprobs=logprob)
    return columns if support is None else columns | dict(support=support, full_logprobs=full_logprob)
