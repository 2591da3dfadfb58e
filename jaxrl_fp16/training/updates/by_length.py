"""An optimizer step whose gradient is summed over parts of the batch, each as wide as its longest row.

B: rows of a batch.  T: columns.  R, W: those that are worked on at once.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_fp16.forward import numerics_of
from jaxrl_fp16.lengths import Told, batch_shape, cut, pinned, places, row_lengths, traced
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.objectives import merge_metrics
from jaxrl_fp16.objectives.metrics import add_shares, finish_metrics, no_shares, stacked_shares
from jaxrl_fp16.training.updates.step import (
    add_gradient, guarded_step, jit_update, join_rows, no_gradient, take_step, whole_gradient,
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an update minimises, as functions of its batch, a tree of arrays [B,...]."""

    loss: Callable  # batch -> `(params, rows) -> (share, (metrics' shares, float32 [R,W] to be kept or None))`
    empty: Callable = lambda batch: False           # batch -> bool []: there is nothing to learn from
    masks: Callable = lambda batch: (batch.mask,)   # batch -> its masks of real tokens, [B,T] or [B,2,T]
    # (batch, `mask -> Places`) -> its rows of those places
    rows: Callable = lambda batch, place: place(batch.mask).take(batch)


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """How an update cuts its batch, and who hears of it."""

    rows: int                             # most rows in memory at once, a divisor of B
    tokens: int | None = None             # most positions in memory at once; None: those of `rows` rows of T columns
    announce: Callable | None = None      # as `Console.announce`: takes what compiles
    name: str = "the update"


@struct.dataclass
class Sums:
    """What the parts of a batch add up to."""

    loss: jax.Array         # float32 [], or of each copy of the model that a mesh has, [copies]
    grads: Any              # float32 tree like the trained parameters, scaled; likewise
    shares: dict            # of the metrics
    kept: jax.Array | None  # float32 [B,T]


def make_step(model, optimizer, objective, microbatches, *, keep=None, state_shardings=None, frozen=False):
    """`update(state, batch, lengths=None) -> (state, metrics)`: one optimizer step by `guarded_step`, `state` donated.

    It looks at the batch's mask, orders the rows by length and adds up the gradients of a few rows at a time, as wide
    as the longest of them, float32, in one jitted program for each of at most eight widths. Where all are as wide as
    the batch, or the mask cannot be looked at because the update itself is traced, one program does it all.

    Args:
      model: a Decoder or Critic.
      optimizer: an `optax.GradientTransformation`.
      objective: an `Objective`.
      microbatches: a `Microbatches`.
      keep: the metric's name under which what the loss keeps, [B,T], is returned; None: it keeps nothing.
      state_shardings, frozen: as for `make_update`.

    `lengths` int [B] on the host, the mask's sums (of a pair the larger), spares the look.
    """
    size, budget = microbatches.rows, microbatches.tokens
    numerics, told = numerics_of(model), Told(microbatches.name, microbatches.announce)

    def whole(state, batch, size):
        state, metrics, (shares, kept) = guarded_step(
            objective.loss(batch), optimizer, state, batch, size, empty=objective.empty(batch), frozen=frozen
        )
        return state, {**merge_metrics(shares), **metrics, **({keep: join_rows(kept)} if keep else {})}

    def alone(state, batch, index, width, sharding):
        def place(mask):
            return places(mask, index, width, sharding)

        state, metrics, (shares, kept) = guarded_step(
            objective.loss(batch), optimizer, state, objective.rows(batch, place), len(index),
            empty=objective.empty(batch), frozen=frozen,
        )
        metrics = {**merge_metrics(shares), **metrics}
        if keep:
            mask, = objective.masks(batch)
            metrics[keep] = place(mask).put(jnp.zeros(mask.shape, kept.dtype), join_rows(kept))
        return state, metrics

    def begin(state, batch, sharding):
        _, (shares, kept) = jax.eval_shape(objective.loss(batch), state.sampling_params, batch)
        shape = objective.masks(batch)[0].shape
        sums = Sums(
            *no_gradient(state, None if sharding is None else batch), no_shares(shares),
            None if kept is None else jnp.zeros(shape, kept.dtype),
        )
        return _pinned(sums, state_shardings, sharding)

    def add(sums, state, batch, index, count, width, sharding):
        def body(i, sums):
            def place(mask):
                return places(mask, index[i], width, sharding)

            rows, given = objective.rows(batch, place), (sums.loss, sums.grads)
            (loss, grads), (shares, kept) = add_gradient(objective.loss(batch), state, given, rows)
            kept = None if kept is None else place(*objective.masks(batch)).put(sums.kept, kept)
            shares = {name: stacked_shares(name, x) for name, x in shares.items()}
            return _pinned(Sums(loss, grads, add_shares(sums.shares, shares), kept), state_shardings, sharding)

        return lax.fori_loop(0, count, body, sums)

    def finish(state, sums, batch):
        loss, grads = whole_gradient((sums.loss, sums.grads))
        state, metrics = take_step(optimizer, state, loss, grads, objective.empty(batch), frozen)
        return state, {**finish_metrics(sums.shares), **metrics, **({keep: sums.kept} if keep else {})}

    whole = jit_update(whole, model, state_shardings, static_argnames="size")
    alone = jit_update(alone, model, state_shardings, static_argnames=("width", "sharding"))
    begin = jit(begin, numerics, static_argnames="sharding")
    add = jit(add, numerics, donate_argnums=0, static_argnames=("width", "sharding"))
    finish = jit_update(finish, model, state_shardings)

    def shape_of(batch):
        return batch_shape(objective.masks(batch)[0], size, budget)

    def update(state, batch, lengths=None):
        count, columns, at_once, sharding, shards = shape_of(batch)
        if traced(state, batch) or count % size:    # which `split_rows` refuses
            return whole(state, batch, size=at_once if count % size == 0 else size)
        lengths = row_lengths(*objective.masks(batch)) if lengths is None else lengths
        parts = cut(lengths, columns, size, budget, shards)
        if parts is None:
            return whole(state, batch, size=at_once)
        if count == size and budget is None:    # always all rows at once: no sums beside their gradient
            with told.of(parts[0]):
                return alone(state, batch, *parts[0].index, width=parts[0].width, sharding=sharding)
        batch = jax.device_put(batch)   # once, and not for each part
        sums = begin(state, batch, sharding=sharding)
        for part in parts:
            with told.of(part):
                sums = add(sums, state, batch, part.index, part.count, width=part.width, sharding=sharding)
        return finish(state, sums, batch)

    programs = dict(whole=whole, alone=alone, begin=begin, add=add, finish=finish)
    update.lower = lambda state, batch: whole.lower(state, batch, size=shape_of(batch).at_once)
    update.programs = programs
    update._cache_size = lambda: sum(program._cache_size() for program in programs.values())
    return update


def _pinned(sums, state_shardings, rows):
    """On a mesh the sums stay where the state has their like: XLA would choose anew, and each call compile again."""
    if state_shardings is None:
        return sums
    shardings = state_shardings.trained_params
    everywhere = NamedSharding(jax.tree.leaves(shardings)[0].mesh, PartitionSpec())
    own = everywhere
    if sums.loss.ndim:    # of each copy of the model
        own = NamedSharding(everywhere.mesh, PartitionSpec("data"))
        shardings = jax.tree.map(lambda x: NamedSharding(x.mesh, PartitionSpec("data", *x.spec)), shardings)
    return Sums(
        pinned(sums.loss, own), jax.tree.map(pinned, sums.grads, shardings),
        {name: pinned(x, everywhere) for name, x in sums.shares.items()},
        None if sums.kept is None else pinned(sums.kept, rows or everywhere),
    )
