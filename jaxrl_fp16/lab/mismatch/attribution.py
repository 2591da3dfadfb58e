"""Where sampler and scorer come to differ, module by module.

B: rows.  T: columns, left-aligned.  P: prompt columns.  D: hidden size.  V: vocabulary.

A module's share, to first order: let `f` be the module in float32 on the weights as cast. Its own error in a program
is `e = output - f(input)`, on that program's input. The share is the change of the log-probs of a float32 forward when
`e_decode - e_full` is added to that module's output alone. The rounding of the sum after attention, and after the MLP,
counts with the module that is summed. Carried on in the compute dtype instead (`literal`), each share would flip
roundings on its way and end nearly as large as the whole difference.
"""

from functools import partial

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.forward import (
    align_rows, cast_to_compute, in_compute_dtype, logits_of, logprob_of, score_hidden, tempered, token_logprobs,
)
from jaxrl_fp16.masking import align
from jaxrl_fp16.models.attention import BLOCK, PACKABLE
from jaxrl_fp16.models.decoder import angles_of, attention_of, mlp_of, unstack_layers
from jaxrl_fp16.models.layers import RMSNorm
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.models.taps import IN_A_LAYER, tap_names, tapped_decode_step, tapped_forward
from jaxrl_fp16.objectives import mismatch_metrics
from jaxrl_fp16.precision import get_precision

TAP_BYTES = 2**27  # float32 activations of one program that exist at once; a row's take what they take
KINDS = {"attention_norm": "norm", "mlp_norm": "norm", "final_norm": "norm"}


def attribute(model, params, rollout, policy, *, temperature=1.0, literal=False):
    """Differences and shares of every module, for a small batch of rollouts.

    Args:
      model, params, policy: of sampler and scorer; params float32.
      rollout: a `Rollout` that the sampler drew with these weights, of whole
        distributions (no top-k, no top-p).
      literal: also the shares carried on in the compute dtype, for comparison.

    Returns a dict of plain numbers:
      modules: a list of dicts, in the forward's order: name, kind (embedding, norm, attention,
        mlp, head; residual: the stream after a layer, which has no share), layer (None outside
        of layers), `decode_full`, `decode_float32` and `full_float32`, the norms of the differences over the norm of
        the second, where the module predicts a response token; and `share`, root mean
        square over response tokens, in nats. The head's differences are of log-probs.
      end_to_end: root mean square difference of the two tapped programs' log-probs.
      untapped: the same of `rollout.logprobs` and the scorer: taps change fusions.
      unexplained: root mean square of the difference less all shares.
      squares: sum of the squared shares over end_to_end's square; with `literal` also `literal_squares`.
      token_kl: of both, `tapped` and `untapped`.

    Raises ValueError for a rollout of a truncated distribution.
    """
    if rollout.support is not None:
        raise ValueError("the rollout has a support, of top-k or top-p; allowed: top_k 0 and top_p 1")
    programs = _programs(model, params, policy, _prompt_columns(rollout), temperature, literal)
    batch, names = _aligned(rollout), tap_names(model.config.num_layers)
    parts = [_measure(*programs, part) for part in _in_parts(batch, model.config)]
    rows = len(batch["tokens"])
    join = lambda key: {name: np.concatenate([part[key][name] for part in parts])[:rows] for name in parts[0][key]}
    logprobs, shares = join("logprobs"), join("shares")
    seen = np.asarray(batch["response"])
    rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)[seen]))))
    whole = logprobs["decode"] - logprobs["full"]
    shares = {name: shares.get(name, np.zeros_like(whole)) for name in (*names, "head")}
    scored = token_logprobs(model, params, rollout.tokens, rollout.mask, policy=policy, temperature=temperature)
    response = np.asarray(rollout.response_mask).astype(bool)
    untapped = np.asarray(rollout.logprobs - scored, np.float64)[response]
    squares = lambda parts: sum(rms(x) ** 2 for x in parts.values()) / max(rms(whole) ** 2, 1e-300)
    kl = lambda *given: float(mismatch_metrics(*given)["mismatch/kl_k3"])
    found = {
        "modules": _rows(names, parts, {name: rms(x) for name, x in shares.items()}),
        "end_to_end": rms(whole),
        "untapped": float(np.sqrt(np.mean(untapped**2))),
        "unexplained": rms(whole - sum(shares.values())),
        "squares": squares(shares),
        "token_kl": {"tapped": kl(logprobs["decode"], logprobs["full"], seen),
                     "untapped": kl(rollout.logprobs, scored, rollout.response_mask)},
    }
    if literal:
        found["literal_squares"] = squares(join("literal"))
    return found


def _programs(model, params, policy, columns, temperature, literal):
    """`(programs by name, how errors are carried on by key)`: jitted functions of a batch, compiled once."""
    cast = cast_to_compute(params, policy, model.numerics)
    half = in_compute_dtype(model, policy)
    # A vendor's kernel computes in half precision alone.
    exact = model.clone(dtype=jnp.float32, attention=model.attention if model.attention in PACKABLE else "blockwise")
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), cast)

    def program(function, *given):
        run = jit(partial(function, temperature=temperature), model.numerics)
        return lambda *batch: run(*given, *batch)

    programs = {
        "reference": program(partial(_full, exact), cast_to_compute(params, get_precision("fp32").policy)),
        "full": program(partial(_full, half), cast),
        "decode": program(partial(_decode, half, columns=columns), cast),
    }
    errors = jax.jit(partial(_own_errors, exact, dtype=half.dtype, temperature=temperature))
    carried = {"shares": (exact, upcast)} | ({"literal": (half, cast)} if literal else {})
    runs = {
        key: jax.jit(lambda params, batch, add, model=model: _full(model, params, batch, temperature, add)[0])
        for key, (model, _) in carried.items()
    }
    return programs, partial(errors, upcast), {key: partial(run, carried[key][1]) for key, run in runs.items()}


def _in_parts(batch, config):
    """Parts of the batch's rows, all of one size, whose taps take at most TAP_BYTES a program; the last one is filled
    with the first row."""
    rows, columns = batch["tokens"].shape
    a_row = 4 * columns * config.hidden_size * len(tap_names(config.num_layers))
    size = int(np.clip(TAP_BYTES // a_row, 1, rows))
    at = np.arange(-(-rows // size) * size)
    at = np.where(at < rows, at, 0).reshape(-1, size)
    return [{name: x[index] for name, x in batch.items()} | {"own": np.arange(size) + start < rows}
            for start, index in zip(range(0, rows, size), at)]


def _measure(programs, errors, carried, batch):
    """Of one part: log-probs of the programs and shares by name [B,T], and sums of squares by tap."""
    own_rows = batch.pop("own")
    found = {name: program(batch) for name, program in programs.items()}
    squares = _squares(found, np.asarray(batch["predicts"]) & own_rows[:, None])
    squares["head"] = _apart(*(np.asarray(found[name][0], np.float64)[np.asarray(batch["response"]) & own_rows[:, None]]
                               for name in PROGRAMS))
    logprobs = {name: np.asarray(value) for name, (value, _) in found.items()}
    own = errors(batch, *found.pop("full"))
    own = jax.tree.map(jnp.subtract, errors(batch, *found.pop("decode")), own)
    return {"logprobs": logprobs, "squares": squares} | {
        key: _carried(partial(run, batch), own) | {"head": np.asarray(own["head"])} for key, run in carried.items()
    }


PROGRAMS = ("decode", "full", "reference")


def _squares(found, seen):
    """By tap, `_apart` where it predicts a response token."""
    names = found["full"][1]
    return {name: _apart(*(np.asarray(found[program][1][name], np.float64)[seen] for program in PROGRAMS))
            for name in names}


def _apart(decode, full, reference):
    """Sums of squares: decode - full, full, decode - reference, reference, full - reference."""
    return np.array([np.sum(x**2) for x in (decode - full, full, decode - reference, reference, full - reference)])


def _aligned(rollout):
    """tokens and masks [B,T] left-aligned; `response`: where a response token is, `predicts`: where its
    predecessor is; `lengths` int32 [B] of the prompts."""
    tokens, _, (order, _) = align_rows(rollout.tokens, rollout.mask)
    response = align(rollout.response_mask.astype(bool), order)
    mask = align(rollout.mask.astype(bool), order)
    lengths = jnp.sum(mask & ~response, axis=1, dtype=jnp.int32)
    return {"tokens": tokens, "mask": mask, "response": response, "lengths": lengths,
            "predicts": jnp.roll(response, -1, axis=1).at[:, -1].set(False)}


def _prompt_columns(rollout):
    """How many columns come before the first response column."""
    columns = np.flatnonzero(np.asarray(rollout.response_mask).any(axis=0))
    return int(columns[0]) if len(columns) else rollout.tokens.shape[1]


def _scored(hidden, head, batch, temperature):
    return score_hidden(hidden, align_rows(batch["tokens"], batch["mask"])[2], head, batch["tokens"], batch["mask"],
                        temperature)[0]


def _full(model, params, batch, temperature, add=None):
    """(log-probs [B,T], taps) of the full-sequence program; 0 where there is no earlier token."""
    hidden, taps = tapped_forward(model, params, batch["tokens"], add=add)
    return _scored(hidden, params["head"], batch, temperature), taps


def _decode(model, params, batch, columns, temperature):
    """The same as the sampler comes to them: the prompts at once, then a stored token at a time through the cache."""
    tokens, lengths = batch["tokens"], batch["lengths"]
    rows, width = jnp.arange(len(tokens)), tokens.shape[1]
    slots = -(-width // BLOCK) * BLOCK
    prompt = jnp.where(jnp.arange(columns) < lengths[:, None], tokens[:, :columns], 0)
    _, taps, caches = tapped_forward(model, params, prompt, keep_cache=True)
    caches = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), caches)
    taps = {name: jnp.pad(x, ((0, 0), (0, width - columns), (0, 0))) for name, x in taps.items()}
    layers = unstack_layers(params["layers"], model.config.num_layers)

    def predict(hidden, at):
        """Log-prob [B] of the token after position `at`."""
        target = tokens[rows, jnp.minimum(at + 1, width - 1)]
        return logprob_of(tempered(logits_of(hidden, params["head"])[:, 0], temperature or 1.0), target)

    def step(carry, number):
        caches, taps, logprobs = carry
        at = jnp.minimum(lengths + number, width - 1)
        hidden, caches, new = tapped_decode_step(model, params, layers, tokens[rows, at], caches, at)
        taps = {name: x.at[rows, at].set(new[name][:, 0]) for name, x in taps.items()}
        logprobs = logprobs.at[rows, jnp.minimum(at + 1, width - 1)].set(predict(hidden, at))
        return (caches, taps, logprobs), None

    last = jnp.maximum(lengths - 1, 0)
    first = predict(taps["final_norm"][rows, last][:, None], last)
    logprobs = jnp.zeros(tokens.shape).at[rows, jnp.minimum(last + 1, width - 1)].set(first)
    (_, taps, logprobs), _ = lax.scan(step, (caches, taps, logprobs), jnp.arange(width - columns))
    return jnp.where(batch["response"], logprobs, 0.0), taps


def _own_errors(model, params, batch, logprobs, taps, *, dtype, temperature):
    """A program's output less the float32 module's on the same input, by name of the tap that it is added to.

    model, params: in float32, the weights as cast; dtype: the program's compute dtype. The head's is of the log-probs.
    """
    layers = unstack_layers(params["layers"], model.config.num_layers)
    stream, table = taps["embedding"], jnp.take(params["embedding"], batch["tokens"], axis=0)
    errors = {"embedding": jnp.where(batch["mask"][..., None], _wide(stream) - table, 0.0)}
    for index, layer in enumerate(layers):
        inside = {module: taps[f"layers.{index}.{module}"] for module in IN_A_LAYER}
        after = taps[f"layers.{index}"]
        found = _errors_of_layer(model, layer, dtype, stream, inside, after)
        errors.update({f"layers.{index}.{module}": error for module, error in found.items()})
        stream = after
    errors["final_norm"] = _wide(taps["final_norm"]) - _norm(model, params["final_norm"], stream)
    exact = _scored(_wide(taps["final_norm"]), params["head"], batch, temperature)
    return {**errors, "head": jnp.where(batch["response"], logprobs - exact, 0.0)}


def _errors_of_layer(model, layer, dtype, before, taps, after):
    """The same of one layer, from the residual stream before and after it."""
    c = model.config
    angles = angles_of(c, jnp.arange(before.shape[1])[None])
    seen, looked = (_wide(taps[norm].astype(dtype)) for norm in ("attention_norm", "mlp_norm"))
    middle = (before + taps["attention"]).astype(before.dtype)
    mixed, _ = attention_of(c, model.attention).apply({"params": layer["attention"]}, seen, angles, None, None, None)
    made = mlp_of(c).apply({"params": layer["mlp"]}, looked)
    return {
        "attention_norm": seen - _norm(model, layer["attention_norm"], before),
        "attention": _wide(middle) - _wide(before) - mixed,
        "mlp_norm": looked - _norm(model, layer["mlp_norm"], middle),
        "mlp": _wide(after) - _wide(middle) - made,
    }


def _wide(x):
    return x.astype(jnp.float32)


def _norm(model, weights, x):
    return RMSNorm(model.config.norm_eps).apply({"params": weights}, _wide(x))


def _carried(run, own):
    """By name, the change of the log-probs [B,T] when that error alone is added to the module's output."""
    nothing = {name: jnp.zeros_like(x) for name, x in own.items() if name != "head"}
    base = run(nothing)
    return {name: np.asarray(run({**nothing, name: own[name]}) - base) for name in nothing}


def _rows(names, parts, shares):
    """The rows of `modules`."""
    rows = []
    for name in (*names, "head"):
        decode_full, full, decode_exact, exact, full_exact = np.sqrt(sum(part["squares"][name] for part in parts))
        module = name.rpartition(".")[2]
        rows.append({
            "name": name, "kind": "residual" if module.isdigit() else KINDS.get(module, module),
            "layer": int(name.split(".")[1]) if name.startswith("layers.") else None,
            "decode_full": float(decode_full / max(full, 1e-300)),
            "decode_float32": float(decode_exact / max(exact, 1e-300)),
            "full_float32": float(full_exact / max(exact, 1e-300)), "share": shares[name],
        })
    return rows


def shares_by(found, key):
    """Part of the squared shares of `attribute`'s result that falls to each `key`: "kind" or "layer"."""
    total = sum(row["share"] ** 2 for row in found["modules"]) or 1.0
    groups = dict.fromkeys(row[key] for row in found["modules"])
    return {group: sum(row["share"] ** 2 for row in found["modules"] if row[key] == group) / total for group in groups}
