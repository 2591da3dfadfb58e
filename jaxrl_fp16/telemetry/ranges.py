"""Programs that measure how near a model's weights, activations and gradients come to the ends of float16.

B: rows.  T: columns.  D: hidden size.  L: layers.
Programs of their own, over a few rows: what a program returns changes its fusions,
hence its last bits, so nothing here may be part of the sampler, the scorer or the update.
"""

import dataclasses
from functools import partial
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.finite import peak
from jaxrl_fp16.forward import in_compute_dtype
from jaxrl_fp16.models.taps import by_name, tap_names
from jaxrl_fp16.telemetry.by_layer import INSIDE, make_program, walk

LARGEST = float(jnp.finfo(jnp.float16).max)  # 65,504
NORMAL = 2.0**-14                            # below it float16 has fewer and fewer digits
LOST = 2.0**-25                              # up to it float16 rounds to 0: half its smallest number


@struct.dataclass
class WeightRange:
    """Of one parameter array; each field is [L] where layers are stacked, else []."""

    entries: jax.Array     # int32
    peak: jax.Array        # float32: largest magnitude; NaN where there is one
    beyond: jax.Array      # int32: entries that float16 makes infinite, or that are not finite themselves
    lost: jax.Array        # int32: entries that are not 0 and that float16 makes 0
    subnormal: jax.Array   # int32: entries that float16 keeps with fewer digits


@struct.dataclass
class GradientRange:
    """Of one parameter's gradient; fields as above."""

    peak: jax.Array        # float32: largest magnitude, unscaled
    nonzero: jax.Array     # int32: entries that are not 0 in float32
    underflow: jax.Array   # int32: those of them that are 0 in the policy's compute dtype


@struct.dataclass
class Ranges:
    """What one look at a few rows finds. Peaks are float32 [], over the rows' real tokens."""

    loss: jax.Array
    activations: dict[str, jax.Array]  # by module, in the policy's compute dtype
    exact: dict[str, jax.Array]        # likewise, computed in float32
    gradients: Any                     # a tree like the parameters, of GradientRange


@struct.dataclass
class Peaks:
    """Largest magnitudes of one program on whole rows; what is not finite is NaN or infinite here."""

    loss: jax.Array
    activations: dict[str, jax.Array]
    cotangents: dict[str, jax.Array]   # gradients with respect to what each module gives, of the scaled loss
    gradients: Any                     # a tree like the parameters: [L] or [], of the scaled loss
    weights: Any                       # likewise, of the parameters themselves


# -- programs ------------------------------------------------------------------------------------


@jax.jit
def weight_ranges(params):
    """A tree like `params`, of WeightRange: what float16 would make of float32 weights."""

    def look(path, leaf):
        size, over = jnp.abs(leaf), _axes_within_layer(path, leaf)
        count = partial(jnp.sum, axis=over, dtype=jnp.int32)
        return WeightRange(
            entries=count(jnp.ones(leaf.shape, bool)), peak=peak(leaf, over), beyond=count(~(size <= LARGEST)),
            lost=count((size > 0) & (size <= LOST)), subnormal=count((size > LOST) & (size < NORMAL)),
        )

    return jax.tree_util.tree_map_with_path(look, params)


def make_ranges(model, policy, loss_of, *, temperature=1.0, with_entropy=False):
    """A jitted `(params, scale, rows, total) -> Ranges` at loss scale `scale`, float32 [].

    loss_of: `(logprobs, entropy, rows, total) -> float32 []` of float32 [B,T]; `rows` has at least
    tokens and mask [B,T], `total` is whatever the loss is divided by. The gradients are
    those of the update's formula through a program of their own, in the policy's compute
    dtype and once more in float32.
    """
    exact = dataclasses.replace(policy, compute_dtype=jnp.dtype("float32"))
    policies = [policy, exact] if policy.compute_dtype != jnp.float32 else [policy]
    programs = [make_program(model, each, loss_of, temperature, with_entropy) for each in policies]

    def ranges(params, scale, rows, total):
        def compare(given, true=None):
            return jax.tree.map(partial(_gradient_range, scale), given, given if true is None else true)

        found, gradients = walk(programs, params, scale, rows, total, see=_peak_of_real, compare=compare)
        activations, *others = [by_name(each.outside, each.inside) for each in found]
        return Ranges(found[0].loss, activations, *(others or [activations]), gradients)

    return jax.jit(ranges)


def _gradient_range(scale, given, true):
    nonzero = true != 0
    return GradientRange(
        peak=peak(given) / scale, nonzero=jnp.sum(nonzero, dtype=jnp.int32),
        underflow=jnp.sum(nonzero & (given == 0), dtype=jnp.int32),
    )


def make_peaks(model, policy, loss_of, *, temperature=1.0, with_entropy=False):
    """A jitted `(params, scale, rows, total) -> Peaks`, in the policy's compute dtype; arguments as `make_ranges`'s."""
    program = make_program(model, policy, loss_of, temperature, with_entropy)

    def peaks(params, scale, rows, total):
        (found,), gradients = walk(
            [program], params, scale, rows, total, see=lambda x, real: peak(x), compare=partial(jax.tree.map, peak),
            cotangents=True,
        )
        activations = by_name(found.outside, found.inside)
        cotangents = by_name(found.pulled_outside, found.pulled_inside)
        return Peaks(found.loss, activations, cotangents, gradients, _peaks_of_params(params))

    return jax.jit(peaks)


def _peak_of_real(x, real):
    """`peak` of an activation [B,T,...] over real tokens."""
    return peak(jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0))


def _peaks_of_params(tree):
    """float32 [L] or [] each: the largest magnitude of a tree like the parameters, by layer where they are stacked."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: peak(leaf, _axes_within_layer(path, leaf)), tree
    )


def _axes_within_layer(path, leaf):
    """All axes, but the first where layers are stacked along it."""
    stacked = any(getattr(key, "key", None) == "layers" for key in path)
    return tuple(range(1 if stacked else 0, leaf.ndim))


def module_names(num_layers):
    """The names of all activations in the order of the forward: the taps, and what `INSIDE` adds to them."""
    names = []
    for name in tap_names(num_layers):
        layer, _, module = name.rpartition(".")
        names += [f"{layer}.{inner}" for inner in INSIDE.values() if inner.split(".")[0] == module]
        names.append(name)
    return names


def dtype_of(model, policy, name):
    """What the activation `name` is rounded to: the compute dtype, or float32 where the model's numerics keep it so."""
    model, inside = in_compute_dtype(model, policy), name.rpartition(".")[2]
    if name == "final_norm":
        return model.hidden_dtype
    if inside in ("q", "k", "v") and model.numerics.float32_cache:
        return jnp.float32
    rounded = inside in ("attention_norm", "mlp_norm", "q", "k", "v", "product")
    return policy.compute_dtype if rounded else model.residual_dtype
