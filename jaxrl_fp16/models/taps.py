"""The decoder with its layers unrolled, so that every module's output can be read, replaced or added to.

B: rows.  T: columns.  D: hidden size.  L: layers.
For looking inside, not for training: every layer is compiled by itself, nothing is
computed again, and what a program returns changes its fusions, hence its last bits.
"""

from flax import linen as nn
import jax.numpy as jnp

from jaxrl_fp16.masking import segment_positions
from jaxrl_fp16.models.decoder import angles_of, block_of, embed, unstack_layers
from jaxrl_fp16.models.layers import RMSNorm

IN_A_LAYER = ("attention_norm", "attention", "mlp_norm", "mlp")


def tap_names(num_layers):
    """The names of all taps, in the order in which a forward comes to them (jit gives dicts back sorted by name).

    "embedding", then for each layer "layers.0.attention_norm", "layers.0.attention",
    "layers.0.mlp_norm", "layers.0.mlp" and "layers.0", the residual stream after the
    layer, then "final_norm".
    """
    layers = [[*(f"layers.{i}.{module}" for module in IN_A_LAYER), f"layers.{i}"] for i in range(num_layers)]
    return ["embedding", *sum(layers, []), "final_norm"]


def tapped_forward(model, params, tokens, replace=None, add=None, segments=None, keep_cache=False):
    """The decoder on left-aligned `tokens` int32 [B,T] -> (hidden [B,T,D], taps).

    Args:
      model: a Decoder in the policy's compute dtype (`forward.in_compute_dtype`); of a Critic, its body.
      params: as `forward.cast_to_compute` gives them.
      replace: arrays [B,T,D] by tap name that stand in for what the module gives.
      add: likewise, added to what the module gives; zeros, to differentiate by.
      segments: int32 [B,T], of packed rows.

    Returns:
      hidden, the decoder's own result; and taps, a dict name -> [B,T,D] of every
      name in `tap_names`, each as the module gives it and as the rest of the program
      uses it. Attention, MLP and the norms inside a layer give float32, which
      is rounded after the tap; the others are in the dtype of the residual stream, and
      the last norm in that of the hidden state. With `keep_cache` also the caches, a
      list of one `Cache` [B,K,T,E] a layer.

    Raises:
      ValueError: a name that is no tap.
    """
    see = _Taps(model, replace, add)
    positions = jnp.arange(tokens.shape[1])[None] if segments is None else segment_positions(segments)
    layers = unstack_layers(params["layers"], model.config.num_layers)
    nothing = [None] * len(layers)
    hidden, caches = _run(see, model, params, layers, tokens, positions, nothing, None, segments, keep_cache)
    return (hidden, see.taps, caches) if keep_cache else (hidden, see.taps)


def tapped_decode_step(model, params, layers, token, caches, positions, replace=None, add=None):
    """`decode_step` with taps, arrays [B,1,D] -> (hidden [B,1,D], caches, taps). See `tapped_forward`."""
    see = _Taps(model, replace, add)
    tokens, at = token[:, None], positions[:, None]
    hidden, written = _run(see, model, params, layers, tokens, at, caches, positions, None, True)
    return hidden, written, see.taps


class _Taps:
    """Reads, replaces and adds to values by name while a program is traced."""

    def __init__(self, model, replace, add):
        self.replace, self.add, self.taps = replace or {}, add or {}, {}
        allowed = tap_names(model.config.num_layers)
        for name in [*self.replace, *self.add]:
            if name not in allowed:
                raise ValueError(f"tap {name!r} is unknown; allowed: {', '.join(allowed)}")

    def __call__(self, name, value):
        dtype, shape = value.dtype, value.shape
        if name in self.replace:
            value = jnp.broadcast_to(self.replace[name], shape).astype(dtype)
        if name in self.add:
            value = value + jnp.broadcast_to(self.add[name], shape).astype(dtype)
        self.taps[name] = value
        return value

    def inside(self, layer):
        """A flax interceptor for the modules of one layer."""

        def intercept(call, args, kwargs, context):
            result = call(*args, **kwargs)
            if context.method_name != "__call__" or context.module.name not in IN_A_LAYER:
                return result
            name = f"{layer}.{context.module.name}"
            if isinstance(result, tuple):  # attention, with its cache
                return self(name, result[0]), *result[1:]
            return self(name, result)

        return intercept


def _run(see, model, params, layers, tokens, angles_at, caches, positions, segments, keep):
    """Embedding, one block after the other, last norm: hidden and the written caches."""
    c = model.config
    x = see("embedding", embed(params["embedding"], tokens, model.residual_dtype))
    angles = angles_of(c, angles_at)
    block, written = block_of(model, keep), []
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        with nn.intercept_methods(see.inside(f"layers.{index}")):
            x, cache = block.apply({"params": layer}, x, angles, cache, positions, segments)
        x = see(f"layers.{index}", x)
        written.append(cache)
    normed = RMSNorm(c.norm_eps).apply({"params": params["final_norm"]}, x)
    return see("final_norm", normed.astype(model.hidden_dtype)), written
