"""Programs that measure how near a model's weights, activations and gradients come to the ends of float16.

B: rows.  T: columns.  D: hidden size.  L: layers.
Programs of their own, over a few rows: what a program returns changes its fusions,
hence its last bits, so nothing here may be part of the sampler, the scorer or the update.
"""

import dataclasses
from functools import partial
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.forward import NONE, align_rows, cast_to_compute, in_compute_dtype, score_hidden
from jaxrl_fp16.masking import align
from jaxrl_fp16.models.layers import Projection
from jaxrl_fp16.models.taps import tap_names, tapped_forward

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
            entries=count(jnp.ones(leaf.shape, bool)), peak=jnp.max(size, axis=over), beyond=count(~(size <= LARGEST)),
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
    half = _differentiated(model, policy, loss_of, temperature, with_entropy)
    full = _differentiated(model, dataclasses.replace(policy, compute_dtype=jnp.dtype("float32")), loss_of,
                           temperature, with_entropy)

    def ranges(params, scale, rows, total):
        loss, taps, _, gradients = half(params, scale, rows, total)
        if policy.compute_dtype == jnp.float32:
            exact_taps, exact = taps, gradients
        else:
            _, exact_taps, _, exact = full(params, scale, rows, total)
        _, _, (order, _) = align_rows(rows.tokens, rows.mask)
        seen = align(rows.mask, order).astype(bool)

        def compare(path, given, true):
            over = _axes_within_layer(path, given)
            count = partial(jnp.sum, axis=over, dtype=jnp.int32)
            return GradientRange(
                peak=jnp.max(jnp.abs(given), axis=over) / scale, nonzero=count(true != 0),
                underflow=count((true != 0) & (given == 0)),
            )

        compared = jax.tree_util.tree_map_with_path(compare, gradients, exact)
        return Ranges(loss, _peaks(taps, seen), _peaks(exact_taps, seen), compared)

    return jax.jit(ranges)


def make_peaks(model, policy, loss_of, *, temperature=1.0, with_entropy=False):
    """A jitted `(params, scale, rows, total) -> Peaks`, in the policy's compute dtype; arguments as `make_ranges`'s."""
    differentiated = _differentiated(model, policy, loss_of, temperature, with_entropy)

    def peaks(params, scale, rows, total):
        loss, taps, cotangents, gradients = differentiated(params, scale, rows, total)
        return Peaks(loss, _peaks(taps), _peaks(cotangents), _peaks_of_params(gradients), _peaks_of_params(params))

    return jax.jit(peaks)


def _differentiated(model, policy, loss_of, temperature, with_entropy):
    """`(params, scale, rows, total) -> (loss, taps, gradients by tap, gradients)`; gradients are scaled."""

    def forward(params, add, rows, total):
        packed = getattr(rows, "segments", None)
        tokens, segments, alignment = align_rows(rows.tokens, rows.mask, packed)
        cast, inside = cast_to_compute(params, policy, model.numerics), {}
        with nn.intercept_methods(_reader(inside)):
            hidden, taps = tapped_forward(in_compute_dtype(model, policy), cast, tokens, add=add, segments=segments)
        logprobs, entropy = score_hidden(
            hidden, alignment, cast["head"], rows.tokens, rows.mask, temperature,
            getattr(rows, "decisions", NONE), with_entropy, packed,
        )
        return loss_of(logprobs, entropy, rows, total), (taps, inside)

    def differentiated(params, scale, rows, total):
        _, (shapes, _) = jax.eval_shape(forward, params, None, rows, total)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def scaled(params, add):
            loss, (taps, inside) = forward(params, add, rows, total)
            return loss * scale, (loss, taps | inside)

        (gradients, cotangents), (loss, taps) = jax.grad(scaled, argnums=(0, 1), has_aux=True)(params, zeros)
        return loss, taps, cotangents, gradients

    return differentiated


def _reader(found):
    """A flax interceptor that adds what is rounded to the compute dtype inside attention and MLP to `found`.

    Queries and keys before their rotation, which keeps the length of each pair.
    """
    seen = dict.fromkeys(INSIDE, 0)

    def intercept(call, args, kwargs, context):
        result, name = call(*args, **kwargs), context.module.name
        if isinstance(context.module, Projection) and name in INSIDE:
            found[f"layers.{seen[name]}.{INSIDE[name]}"] = args[0] if name == "down" else result
            seen[name] += 1
        return result

    return intercept


# A projection's name -> what is called after it. The MLP's product, which goes into `down`, is the largest of most.
INSIDE = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "down": "mlp.product"}


def _peaks(arrays, seen=None):
    """float32 [] each: the largest magnitude of arrays [B,T,...], where `seen` bool [B,T] is given over those."""

    def peak(x):
        if seen is not None:
            x = jnp.where(seen.reshape(seen.shape + (1,) * (x.ndim - 2)), x, 0)
        return jnp.max(jnp.abs(x)).astype(jnp.float32)

    return jax.tree.map(peak, arrays)


def _peaks_of_params(tree):
    """float32 [L] or [] each: the largest magnitude of a tree like the parameters, by layer where they are stacked."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.max(jnp.abs(leaf), axis=_axes_within_layer(path, leaf)), tree
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
