"""Forward and backward one layer at a time, each read as it passes: a look costs what a gradient costs.

B: rows.  T: columns.  D: hidden size.  L: layers.
The layers are scanned in both directions. Of the forward only each layer's input is kept, and the layer is computed
again in the backward pass, as `remat` does; no gradient outlives its layer. So programs in half precision and in
float32 walk down side by side and are compared on the way.
"""

import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.forward import NONE, align_rows, cast_to_compute, cast_variables, in_compute_dtype, score_hidden
from jaxrl_fp16.masking import align, segment_positions
from jaxrl_fp16.models.attention import kind_for
from jaxrl_fp16.models.decoder import angles_of, block_of, embed, layers_of
from jaxrl_fp16.models.frozen import LORA, in_one, is_adapted
from jaxrl_fp16.models.layers import Projection, RMSNorm
from jaxrl_fp16.models.taps import IN_A_LAYER, at_modules

# A projection's name -> what is called after it. The MLP's product, which goes into `down`, is the largest of most.
INSIDE = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "down": "mlp.product"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A model in one precision, with the loss that is differentiated."""

    model: Any     # a Decoder in the policy's compute dtype
    policy: Any
    loss_of: Any   # (logprobs, entropy, rows, total) -> float32 []
    temperature: float = 1.0
    with_entropy: bool = False

    def layer(self, variables, x, angles, segments, add):
        """One layer on `x` [B,T,D] -> what follows, and what its modules give by name; `add` by name is added to it."""
        found = {}

        def see(name, value):
            found[name] = value + add[name] if name in add else value
            return found[name]

        with nn.intercept_methods(at_modules(see)), nn.intercept_methods(_inside(found)):
            x, _ = block_of(self.model).apply(
                cast_variables(variables, self.policy), x, angles, None, None, segments)
        return x, found

    def tail(self, outer, x, add, alignment, rows, total, frozen=False):
        """`(loss, final hidden [B,T,D])` from the stream after the last layer; `add` is added to the hidden state.
        frozen: all of `outer` is."""
        head = cast_to_compute(outer, self.policy, self.model.numerics)["head"]
        hidden = RMSNorm(self.model.config.norm_eps).apply({"params": outer["final_norm"]}, x)
        hidden = hidden.astype(self.model.hidden_dtype) + add
        logprobs, entropy = score_hidden(
            hidden, alignment, head, rows.tokens, rows.mask, self.temperature, getattr(rows, "decisions", NONE),
            self.with_entropy, getattr(rows, "segments", None), frozen,
        )
        return self.loss_of(logprobs, entropy, rows, total), hidden


def make_program(model, policy, *options):
    """`Program` of a Decoder under a policy; the options are its other fields."""
    model = in_compute_dtype(model, policy)
    model = model.clone(attention=kind_for(model.attention, policy.compute_dtype))
    return Program(model, policy, *options)


class Found(NamedTuple):
    """What one program's walk has read; in layers each array has an axis [L] first, and "" is the stream after one."""

    loss: jax.Array                     # float32 []
    outside: dict[str, jax.Array]       # "embedding" and "final_norm": what `see` makes of an activation
    inside: dict[str, jax.Array]        # likewise, in layers
    pulled_outside: dict[str, jax.Array]   # the same of cotangents; empty unless asked for
    pulled_inside: dict[str, jax.Array]


def walk(programs, params, scale, rows, total, *, see, compare, cotangents=False):
    """One forward and backward of each program on the same rows.

    Args:
      programs: of `make_program`.
      params: of a Decoder; gradients are those of the part that is trained.
      scale: float32 [], the loss scale; gradients and cotangents are those of the scaled loss.
      rows: with at least tokens and mask [B,T].
      see: `(array [B,T,...], real tokens bool [B,T]) -> array`.
      compare: `(a tree of float32 gradients for each program) -> tree`, of one layer's trained parameters and of all
        others.
      cotangents: whether the gradients with respect to what modules give are seen too.

    Returns `([Found of each program], a tree like the trained parameters of what compare gives)`; in layers with an
    axis [L] first.
    """
    tokens, segments, alignment = align_rows(rows.tokens, rows.mask, getattr(rows, "segments", None))
    real = align(rows.mask, alignment[0]).astype(bool)
    positions = jnp.arange(tokens.shape[1])[None] if segments is None else segment_positions(segments)
    angles = angles_of(programs[0].model.config, positions)
    whole, adapted = in_one(params), is_adapted(params)
    stacked, outer = layers_of(whole), {name: whole[name] for name in whole if name not in ("layers", LORA)}
    learns = LORA if adapted else "params"   # of a layer's variables
    look = lambda arrays: {name: see(x, real) for name, x in arrays.items()}

    def forward(program):
        def up(x, layer):
            after, inside = program.layer(layer, x, angles, segments, {})
            return after, (x, look(inside | {"": after}))

        first, to_table = jax.vjp(lambda table: embed(table, tokens, program.model.residual_dtype), outer["embedding"])
        last, (inputs, inside) = lax.scan(up, first, stacked)

        def scaled(outer, x, add):
            loss, hidden = program.tail(outer, x, add, alignment, rows, total, adapted)
            return loss * scale, (loss, hidden)

        _, pull, (loss, hidden) = jax.vjp(
            scaled, outer, last, jnp.zeros(last.shape, program.model.hidden_dtype), has_aux=True
        )
        gradients, cotangent, at_norm = pull(jnp.ones((), jnp.float32))
        outside = look({"embedding": first, "final_norm": hidden})
        return inputs, cotangent, gradients, to_table, at_norm, Found(loss, outside, inside, {}, {})

    def backward(program, layer, x, cotangent):
        run = lambda own, x, add: program.layer({**layer, learns: own}, x, angles, segments, add)[0]
        zeros = {}
        if cotangents:
            shapes = jax.eval_shape(lambda: program.layer(layer, x, angles, segments, {})[1])
            zeros = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in IN_A_LAYER}
        gradients, before, pulled = jax.vjp(run, layer[learns], x, zeros)[1](cotangent)
        return before, gradients, look(pulled | {"": cotangent}) if cotangents else {}

    def down(arriving, given):
        layer, inputs = given
        found = [backward(program, layer, *own) for program, *own in zip(programs, inputs, arriving, strict=True)]
        before, gradients, pulled = zip(*found)
        return before, (compare(*gradients), pulled)

    inputs, arriving, gradients, to_table, at_norm, found = zip(*map(forward, programs))
    first, (layers, pulled) = lax.scan(down, arriving, (stacked, inputs), reverse=True)
    if cotangents:
        found = [
            own._replace(pulled_outside=look({"embedding": x, "final_norm": norm}), pulled_inside=inside)
            for own, x, norm, inside in zip(found, first, at_norm, pulled)
        ]
    if adapted:
        return list(found), {LORA: {"layers": layers}}
    gradients = [
        own | {"embedding": own["embedding"] + pull(cotangent)[0]}
        for own, pull, cotangent in zip(gradients, to_table, first)
    ]
    return list(found), compare(*gradients) | {"layers": layers}


def _inside(found):
    """A flax interceptor that notes in `found` what is rounded to the compute dtype inside attention and MLP.

    Queries and keys are those before their rotation, which keeps the length of each pair.
    """

    def intercept(call, args, kwargs, context):
        result, name = call(*args, **kwargs), context.module.name
        if isinstance(context.module, Projection) and name in INSIDE:
            found[INSIDE[name]] = args[0] if name == "down" else result
        return result

    return intercept
