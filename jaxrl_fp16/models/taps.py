"""The decoder with every module's output read, and changed on its way where asked.

B: rows.  T: columns.  S: cache slots.  D: hidden size.  L: layers.  K: key-value heads.  E: head dim.
For looking inside, not for training: nothing is computed again, and what a program returns changes its fusions, hence
its last bits. The layers are scanned, so that no program grows with the depth.
"""

from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.masking import segment_positions
from jaxrl_fp16.models.decoder import angles_of, block_of, embed, layers_of
from jaxrl_fp16.models.layers import RMSNorm

IN_A_LAYER = ("attention_norm", "attention", "mlp_norm", "mlp")


class Taps(NamedTuple):
    """What modules give: each as it is, and as the rest of the program uses it.

    Attention, MLP and the norms inside a layer give float32, which is rounded after the tap; the others are in the
    dtype of the residual stream, and the last norm in that of the hidden state.
    """

    outside: dict[str, jax.Array]   # "embedding" and "final_norm": [B,T,D]
    inside: dict[str, jax.Array]    # of IN_A_LAYER, and "", the residual stream after a layer: [L,B,T,D]


def tap_names(num_layers):
    """The names of all taps, in the order in which a forward comes to them (jit gives dicts back sorted by name).

    "embedding", then for each layer "layers.0.attention_norm", "layers.0.attention",
    "layers.0.mlp_norm", "layers.0.mlp" and "layers.0", the residual stream after the
    layer, then "final_norm".
    """
    layers = [[*(f"layers.{i}.{module}" for module in IN_A_LAYER), f"layers.{i}"] for i in range(num_layers)]
    return ["embedding", *sum(layers, []), "final_norm"]


def by_name(outside, inside):
    """A dict name -> array of `Taps`' two dicts, or of others with such keys: names as `tap_names` has them."""
    layers = {
        f"layers.{index}" + (name and f".{name}"): value
        for name, values in inside.items() for index, value in enumerate(values)
    }
    return outside | layers


def tapped_forward(model, params, tokens, change=None, segments=None, keep_cache=False):
    """The decoder on left-aligned `tokens` int32 [B,T] -> (hidden [B,T,D], Taps).

    Args:
      model: a Decoder in the policy's compute dtype (`forward.in_compute_dtype`); of a Critic, its body.
      params: as `forward.cast_to_compute` gives them.
      change: `(module, layer, value) -> value`, what stands in for that which the module gives: a name as in `Taps`,
        an int32 [] (None outside of layers), [B,T,D].
      segments: int32 [B,T], of packed rows.

    Returns hidden, the decoder's own result, and the `Taps`. With `keep_cache` also a `Cache` [L,B,K,T,E].
    """
    positions = jnp.arange(tokens.shape[1])[None] if segments is None else segment_positions(segments)
    hidden, taps, caches = _run(model, params, tokens, positions, None, None, segments, keep_cache, change)
    return (hidden, taps, caches) if keep_cache else (hidden, taps)


def tapped_decode_step(model, params, token, caches, positions, change=None):
    """`decode_step` with taps, arrays [B,1,D], and caches a `Cache` [L,B,K,S,E] -> (hidden [B,1,D], caches, Taps).

    See `tapped_forward`.
    """
    hidden, taps, written = _run(
        model, params, token[:, None], positions[:, None], caches, positions, None, True, change
    )
    return hidden, written, taps


def tapped_layer(model, variables, x, angles, cache=None, positions=None, segments=None, keep=False, change=None):
    """One layer, for its variables without the leading axis -> (x [B,T,D], what its modules give by name, cache).

    change: `(module, value) -> value`; also of "", what the layer gives.
    """
    found = {}

    def see(module, value):
        found[module] = value if change is None else change(module, value)
        return found[module]

    with nn.intercept_methods(at_modules(see)):
        x, cache = block_of(model, keep).apply(variables, x, angles, cache, positions, segments)
    return see("", x), found, cache


def at_modules(see):
    """A flax interceptor: `see(name, output)` stands in for what each module of a layer gives."""

    def intercept(call, args, kwargs, context):
        result, name = call(*args, **kwargs), context.module.name
        if context.method_name != "__call__" or name not in IN_A_LAYER:
            return result
        if isinstance(result, tuple):  # attention, with its cache
            return see(name, result[0]), *result[1:]
        return see(name, result)

    return intercept


def _run(model, params, tokens, angles_at, caches, positions, segments, keep, change):
    """Embedding, one layer after the other, last norm: hidden, taps and the written caches."""
    c, change = model.config, change or _as_it_is

    def up(x, given):
        index, layer, cache = given
        x, found, cache = tapped_layer(
            model, layer, x, angles, cache, positions, segments, keep,
            lambda module, value: change(module, index, value),
        )
        return x, (found, cache)

    first = change("embedding", None, embed(params["embedding"], tokens, model.residual_dtype))
    angles = angles_of(c, angles_at)
    last, (inside, caches) = lax.scan(up, first, (jnp.arange(c.num_layers), layers_of(params), caches))
    normed = RMSNorm(c.norm_eps).apply({"params": params["final_norm"]}, last).astype(model.hidden_dtype)
    hidden = change("final_norm", None, normed)
    return hidden, Taps({"embedding": first, "final_norm": hidden}, inside), caches


def _as_it_is(module, layer, value):
    return value
