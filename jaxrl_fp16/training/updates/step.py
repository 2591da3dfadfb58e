"""One scaled and guarded optimizer step for any loss: policy, critic, supervised.

Cast, forward, loss and scale are in the loss function and `_accumulate`; then
unscale in float32, finite check, optimizer (which clips), select the old or the
new state, adjust the scale.
"""

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp
import optax

from jaxrl_fp16.forward import numerics_of
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.parallel import copies_of


def guarded_step(loss_fn, optimizer, state, batch, microbatch_size, *, empty=False, frozen=False):
    """One optimizer step on `batch`, or none where a gradient is not finite or the batch is `empty` (bool []).

    A skipped step changes the loss scale and its counters alone; an empty one changes nothing.

    Args:
      loss_fn: `(params, microbatch) -> (share, aux)`, the shares adding up to the loss of the whole batch;
        aux is any tree of arrays.
      optimizer: an `optax.GradientTransformation`.
      state: a `TrainState`.
      batch: a tree of arrays [B,...].
      microbatch_size: rows that `loss_fn` gets at once, a divisor of B.
      empty: bool [], whether the batch has nothing to learn from.
      frozen: the parameters stay, to the bit, and all else runs: adding an update of 0 would turn a -0.0 into 0.0.

    Returns:
      `(state, metrics, aux)`. metrics, scalars: `loss`, `grad_norm` (unscaled, before clipping), `loss_scale`
      (of this step), `skipped` and `empty` (1 or 0). aux is stacked over microbatches.

    Raises:
      ValueError: where `microbatch_size` does not divide B.
    """
    loss, grads, aux = _accumulate(loss_fn, state, split_rows(batch, microbatch_size))
    return *take_step(optimizer, state, loss, grads, empty, frozen), aux


def take_step(optimizer, state, loss, grads, empty=False, frozen=False):
    """`(state, metrics)`: the rest of `guarded_step`, from a batch's loss and its scaled float32 gradients."""
    grads = state.loss_scale.unscale(grads)
    norm = optax.tree.norm(grads)
    finite, empty = jnp.isfinite(norm), jnp.asarray(empty)
    taken = finite & ~empty
    trained = state.trained_params
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    moved = trained if frozen else optax.apply_updates(trained, updates)
    stepped = state.with_trained(moved).replace(opt_state=opt_state, step=state.step + 1)
    kept = _select(taken, stepped, state)
    scale = _select(empty, state.loss_scale, state.loss_scale.adjust(finite))
    metrics = dict(
        loss=loss, grad_norm=norm, loss_scale=state.loss_scale.loss_scale,
        skipped=(~finite & ~empty).astype(jnp.float32), empty=empty.astype(jnp.float32),
    )
    return kept.replace(loss_scale=scale), metrics


def _select(condition, new, old):
    """Leaf by leaf, fused into what makes `new`; neither branch's NaN reaches the other."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)


def _accumulate(loss_fn, state, microbatches):
    """(loss, scaled float32 gradients, aux stacked) over microbatches, arrays [n,...], one after another."""

    def body(sums, microbatch):
        return add_gradient(loss_fn, state, sums, microbatch)

    sums = no_gradient(state, jax.tree.map(lambda x: x[0], microbatches))
    sums, aux = lax.scan(body, sums, microbatches)
    return *whole_gradient(sums), aux


def no_gradient(state, rows=None):
    """The sums that `add_gradient` begins with, of `(loss, scaled float32 gradients)`; `rows`: a tree of arrays that
    are spread as a microbatch is, None: it is not.

    Where a mesh has copies of the model each has sums of its own, along an axis in front: their gradients cross the
    wires once, in `whole_gradient`, and not for each microbatch.
    """
    mesh, copies = (None, 1) if rows is None else copies_of(_first_of(rows))
    if copies == 1:
        return jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trained_params)

    def zeros(x):
        spec = PartitionSpec("data", *[PartitionSpec.UNCONSTRAINED] * x.ndim)
        return lax.with_sharding_constraint(jnp.zeros((copies, *x.shape), x.dtype), NamedSharding(mesh, spec))

    return zeros(jnp.zeros(())), jax.tree.map(zeros, state.trained_params)


def add_gradient(loss_fn, state, sums, microbatch):
    """`(sums, aux)`: `sums`, of the microbatches before, with this one; where there are copies, each scalar of aux is
    an array with one value of each."""
    if not sums[0].ndim:
        return _add_gradient(loss_fn, state, sums, microbatch)

    def of_copy(state, sums, microbatch):
        sums, aux = _add_gradient(loss_fn, state, jax.tree.map(lambda x: x[0], sums), microbatch)
        return jax.tree.map(lambda x: x[None], sums), jax.tree.map(lambda x: x[None] if x.ndim == 0 else x, aux)

    (mesh, _), own = copies_of(_first_of(microbatch)), PartitionSpec("data")
    rows = jax.tree.map(lambda x: own if x.ndim else PartitionSpec(), microbatch)
    return jax.shard_map(
        of_copy, mesh=mesh, axis_names={"data"}, in_specs=(PartitionSpec(), own, rows), out_specs=own, check_vma=False,
    )(state, sums, microbatch)


def whole_gradient(sums):
    """`(loss, scaled float32 gradients)` of all copies of the model."""
    return sums if not sums[0].ndim else jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def _first_of(microbatch):
    return next(x for x in jax.tree.leaves(microbatch) if x.ndim)


def _add_gradient(loss_fn, state, sums, microbatch):
    def scaled_loss(params):
        share, aux = loss_fn(state.with_trained(params).learning_params, microbatch)
        return state.loss_scale.scale(share), (share, aux)

    new, (share, aux) = jax.grad(scaled_loss, has_aux=True)(state.trained_params)
    total, grads = sums
    return (total + share, jax.tree.map(jnp.add, grads, new)), aux


def jit_update(update, model, state_shardings=None, **settings):
    """`update(state, batch) -> (state, metrics)` jitted as `model` asks for, the state donated.

    A frozen part of the parameters goes in beside the rest, is not donated and does not come out: whoever else holds
    it, as a reference or a critic, keeps it.

    On a mesh `state_shardings`, a tree like the state, keeps it where it lies:
    XLA would choose anew, and the next call compile again. settings: others of `jax.jit`.
    """
    shardings = None if state_shardings is None else (state_shardings.frozen_apart()[0], None)

    def apart(state, frozen, *args, **kwargs):
        state, metrics = update(state.frozen_back(frozen), *args, **kwargs)
        return state.frozen_apart()[0], metrics

    apart.__name__ = update.__name__    # that of the compiled program
    program = jit(apart, numerics_of(model), donate_argnums=0, out_shardings=shardings, **settings)

    def call(state, *args, **kwargs):
        state, frozen = state.frozen_apart()
        state, metrics = program(state, frozen, *args, **kwargs)
        return state.frozen_back(frozen), metrics

    call.lower = lambda state, *args, **kwargs: program.lower(*state.frozen_apart(), *args, **kwargs)
    call._cache_size = program._cache_size
    return call


def split_rows(batch, size):
    """Arrays [B,...] as [B/size,size,...]. A microbatch takes every (B/size)-th row: where a mesh has
    spread the rows, each microbatch then spans all devices. Raises ValueError where size does not divide B."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if size < 1 or rows % size:
        raise ValueError(f"microbatch_size is {size}; allowed: a divisor of the batch's {rows} rows")
    return jax.tree.map(lambda x: x.reshape(size, rows // size, *x.shape[1:]).swapaxes(0, 1), batch)


def join_rows(x):
    """The inverse of `split_rows` on one array [B/size,size,...]."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
