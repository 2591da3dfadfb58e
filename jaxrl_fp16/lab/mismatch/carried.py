"""Each module's own rounding error, decode's less the full sequence's, carried on to the log-probs.

B: rows.  T: columns, left-aligned.  C: columns up to the last token of all.  D: hidden size.  L: layers.
One layer's modules at a time, through the layers above alone: what is below them has no part in it. One program climbs
from any layer to any other, so that what it gives for no error is the base to the last bit.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.forward import align_rows, score_hidden
from jaxrl_fp16.models.decoder import angles_of, attention_of, embed, layers_of, mlp_of
from jaxrl_fp16.models.layers import RMSNorm
from jaxrl_fp16.models.taps import IN_A_LAYER, tapped_layer


def make_shares(exact, params, carriers, dtype, extent, temperature):
    """`(batch, decode, full, tell) -> {key: {name: change of the log-probs, float32 [B,T]}}`.

    The names are "embedding", "layers.0.attention_norm", ..., "layers.0.mlp", ..., "final_norm", "head".

    Args:
      exact, params: the model in float32 and the weights as cast, by which a module's own error is measured.
      carriers: `(model, params)` by key, which carry the errors on.
      dtype: the compute dtype of the two programs.
      extent: (C, tokens of the longest response).
      temperature: of the log-probs.

    The function's arguments are arrays [B,T] as `attribution` aligns them; `(log-probs, Taps)` of each of the two
    programs; and `tell(modules, layers)`, called when so many more modules were carried on, through so many layers.
    """
    columns, responses = extent
    outside = jax.jit(lambda *given: _errors_outside(exact, *given, temperature))
    inside = jax.jit(lambda *given: _errors_inside(exact, *given, dtype))
    programs = {
        key: (jax.jit(lambda *given, model=model: _climb(model, *given)),
              jax.jit(lambda *given, model=model: _read(model, *given, responses, temperature)))
        for key, (model, _) in carriers.items()
    }

    def shares(batch, decode, full, tell):
        own = jax.tree.map(jnp.subtract, outside(params, batch, *decode), outside(params, batch, *full))
        depth, nothing = exact.config.num_layers, jnp.zeros_like(own["final_norm"][:, :columns])
        quiet, logprobs, streams = dict.fromkeys(IN_A_LAYER, nothing), {key: {} for key in carriers}, {}

        def read(key, name, x, error=nothing):
            logprobs[key][name] = programs[key][1](carriers[key][1], batch, x, error)

        def climb(key, x, errors, start, stop):
            return programs[key][0](carriers[key][1], x, errors, start, stop)

        for key, (model, weights) in carriers.items():
            streams[key] = x = embed(weights["embedding"], batch["tokens"][:, :columns], model.residual_dtype)
            moved = x + own["embedding"][:, :columns].astype(x.dtype)
            read(key, "embedding", climb(key, moved, quiet, 0, depth)[0])
        tell(1, depth)
        for layer in range(depth):
            errors = jax.tree.map(jnp.subtract, inside(params, layer, decode[1]), inside(params, layer, full[1]))
            errors = {name: error[:, :columns] for name, error in errors.items()}
            for key, x in streams.items():
                for name, above in zip(IN_A_LAYER, climb(key, x, errors, layer, depth), strict=True):
                    read(key, f"layers.{layer}.{name}", above)
                streams[key] = climb(key, x, quiet, layer, layer + 1)[0]
            tell(len(IN_A_LAYER), depth - layer)
        for key, x in streams.items():
            read(key, "base", x)
            read(key, "final_norm", x, own["final_norm"][:, :columns])
        tell(1, 0)
        return {key: _less_base(found) | {"head": np.asarray(own["head"])} for key, found in logprobs.items()}

    return shares


def _less_base(found):
    base = found.pop("base")
    return {name: np.asarray(value - base) for name, value in found.items()}


def scored(hidden, head, batch, temperature):
    """Log-probs [B,T] of final hidden states [B,T,D]."""
    return score_hidden(hidden, align_rows(batch["tokens"], batch["mask"])[2], head, batch["tokens"], batch["mask"],
                        temperature)[0]


def _climb(model, params, x, errors, start, stop):
    """[4,B,C,D]: the stream below layer `stop` from that below `start`, x [B,C,D], with the error of one of IN_A_LAYER
    of layer `start` added to each; `errors` [B,C,D] by name."""
    angles, shape = angles_of(model.config, jnp.arange(x.shape[1])[None]), x.shape
    put = {name: jnp.concatenate([jnp.where(name == other, error, 0.0) for other in IN_A_LAYER])
           for name, error in errors.items()}

    def up(index, x):
        def change(module, value):
            return value + jnp.where(index == start, put[module], 0.0).astype(value.dtype) if module in put else value

        return tapped_layer(model, _layer(params, index), x, angles, change=change)[0]

    x = lax.fori_loop(start, stop, up, jnp.tile(x, (len(IN_A_LAYER), 1, 1)))
    return x.reshape(len(IN_A_LAYER), *shape)


def _read(model, params, batch, x, error, responses, temperature):
    """Log-probs [B,T] of the response tokens, 0 elsewhere, from the last stream [B,C,D] and what is added to its norm.

    The head is applied where a response token is predicted alone.
    """
    hidden = RMSNorm(model.config.norm_eps).apply({"params": params["final_norm"]}, x).astype(model.hidden_dtype)
    hidden, first = hidden + error.astype(hidden.dtype), jnp.maximum(batch["lengths"] - 1, 0)[:, None]
    at = jnp.minimum(first + jnp.arange(responses + 1), x.shape[1] - 1)
    there = {name: jnp.take_along_axis(batch[name], at, axis=1) for name in ("tokens", "mask")}
    logprobs = scored(jnp.take_along_axis(hidden, at[..., None], axis=1), params["head"], there, temperature)
    back = jnp.clip(jnp.arange(batch["tokens"].shape[1]) - first, 0, responses)
    return jnp.where(batch["response"], jnp.take_along_axis(logprobs, back, axis=1), 0.0)


# -- own errors: a program's output less the float32 module's on the same input ------------------


def _errors_outside(model, params, batch, logprobs, taps, temperature):
    """By name [B,T,D], of the modules outside of layers; the head's [B,T] is of the log-probs.

    model, params: in float32, the weights as cast.
    """
    table = jnp.take(params["embedding"], batch["tokens"], axis=0)
    final = _wide(taps.outside["final_norm"])
    return {
        "embedding": jnp.where(batch["mask"][..., None], _wide(taps.outside["embedding"]) - table, 0.0),
        "final_norm": final - _norm(model, params["final_norm"], taps.inside[""][-1]),
        "head": jnp.where(batch["response"], logprobs - scored(final, params["head"], batch, temperature), 0.0),
    }


def _errors_inside(model, params, index, taps, dtype):
    """The same of one layer's modules; dtype: the program's compute dtype."""
    c, layer = model.config, _layer(params, index)
    within = lambda name: {kind: tree[name] for kind, tree in layer.items() if name in tree}
    norm = lambda name, x: _norm(model, layer["params"][name], x)
    found = {name: x[index] for name, x in taps.inside.items()}
    before = jnp.where(index > 0, taps.inside[""][jnp.maximum(index - 1, 0)], taps.outside["embedding"])
    angles = angles_of(c, jnp.arange(before.shape[1])[None])
    seen, looked = (_wide(found[norm].astype(dtype)) for norm in ("attention_norm", "mlp_norm"))
    middle = (before + found["attention"]).astype(before.dtype)
    attend = attention_of(c, model.attention, lora=model.lora)
    mixed, _ = attend.apply(within("attention"), seen, angles, None, None, None)
    made = mlp_of(c, model.lora).apply(within("mlp"), looked)
    return {
        "attention_norm": seen - norm("attention_norm", before),
        "attention": _wide(middle) - _wide(before) - mixed,
        "mlp_norm": looked - norm("mlp_norm", middle),
        "mlp": _wide(found[""]) - _wide(middle) - made,
    }


def _layer(params, index):
    """The variables of layer `index` int32 []."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), layers_of(params))


def _wide(x):
    return x.astype(jnp.float32)


def _norm(model, weights, x):
    return RMSNorm(model.config.norm_eps).apply({"params": weights}, _wide(x))
