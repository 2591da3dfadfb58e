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
    align_rows, cast_to_compute, in_compute_dtype, logits_of, logprob_of, tempered, token_logprobs,
)
from jaxrl_fp16.lab.mismatch.carried import make_shares, scored
from jaxrl_fp16.masking import align
from jaxrl_fp16.models.attention import BLOCK, PACKABLE
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.models.taps import Taps, by_name, tap_names, tapped_decode_step, tapped_forward
from jaxrl_fp16.objectives import mismatch_metrics
from jaxrl_fp16.precision import get_precision

TAP_BYTES = 2**30  # float32 activations of one program, of which two exist at once; a row takes what it takes
KINDS = {"attention_norm": "norm", "mlp_norm": "norm", "final_norm": "norm"}


def attribute(model, params, rollout, policy, *, temperature=1.0, rows=None, literal=False, progress=None):
    """Differences and shares of every module, for a small batch of rollouts.

    Args:
      model, params, policy: of sampler and scorer; params float32.
      rollout: a `Rollout` that the sampler drew with these weights, of whole
        distributions (no top-k, no top-p).
      rows: how many the run's scorer takes at once, None: all. A product's rounding hangs on it: on a CPU one of
        SmolLM2's shape in BF16 rounded otherwise for 8 rows of 256 columns than for 4.
      literal: also the shares carried on in the compute dtype, for comparison.
      progress: `(modules, of all, part of the work from 0 to 1)`, called as errors are carried on; what it raises ends
        it.

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
    batch, names = _aligned(rollout), tap_names(model.config.num_layers)
    cast, half = cast_to_compute(params, policy, model.numerics), in_compute_dtype(model, policy)
    exact, (parts, group) = _in_float32(model), _in_parts(batch, model.config)
    decode = partial(_decode, columns=_prompt_columns(rollout), group=group)
    programs = {
        "reference": _program(_full, exact, cast_to_compute(params, get_precision("fp32").policy), temperature),
        "full": partial(_in_slices, _program(_full, half, cast, temperature), rows),
        "decode": _program(decode, half, cast, temperature),
    }
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), cast)
    carriers = {"shares": (exact, upcast)} | ({"literal": (half, cast)} if literal else {})
    shares_of = make_shares(exact, upcast, carriers, half.dtype, _extent(batch), temperature)
    count = len(batch["tokens"])
    tell = _teller(progress, len(parts), model.config.num_layers)
    parts = [_measure(programs, shares_of, part, tell) for part in parts]
    join = lambda key: {name: np.concatenate([part[key][name] for part in parts])[:count] for name in parts[0][key]}
    logprobs, shares = join("logprobs"), join("shares")
    seen = np.asarray(batch["response"])
    rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)[seen]))))
    whole = logprobs["decode"] - logprobs["full"]
    shares = {name: shares.get(name, np.zeros_like(whole)) for name in (*names, "head")}
    score = partial(token_logprobs, model, params, policy=policy, temperature=temperature)
    slices = [slice(at, at + (rows or count)) for at in range(0, count, rows or count)]
    trained = np.concatenate([score(rollout.tokens[at], rollout.mask[at]) for at in slices])
    response = np.asarray(rollout.response_mask).astype(bool)
    untapped = np.asarray(rollout.logprobs - trained, np.float64)[response]
    squares = lambda parts: sum(rms(x) ** 2 for x in parts.values()) / max(rms(whole) ** 2, 1e-300)
    kl = lambda *given: float(mismatch_metrics(*given)["mismatch/kl_k3"])
    found = {
        "modules": _rows(names, parts, {name: rms(x) for name, x in shares.items()}),
        "end_to_end": rms(whole),
        "untapped": float(np.sqrt(np.mean(untapped**2))),
        "unexplained": rms(whole - sum(shares.values())),
        "squares": squares(shares),
        "token_kl": {"tapped": kl(logprobs["decode"], logprobs["full"], seen),
                     "untapped": kl(rollout.logprobs, trained, rollout.response_mask)},
    }
    if literal:
        found["literal_squares"] = squares(join("literal"))
    return found


def _program(function, model, params, temperature):
    """A jitted function of a batch."""
    return partial(jit(partial(function, model, temperature=temperature), model.numerics), params)


def _in_float32(model):
    """The model that computes in float32, which a vendor's kernel does not."""
    return model.clone(dtype=jnp.float32, attention=model.attention if model.attention in PACKABLE else "blockwise")


def _extent(batch):
    """(columns up to the last token of all, tokens of the longest response)."""
    return tuple(int(np.asarray(batch[name]).sum(axis=1).max()) for name in ("mask", "response"))


def _teller(progress, parts, depth):
    """`tell(modules, layers)`, which adds up and calls `progress`."""
    modules, layers = parts * (4 * depth + 2), parts * depth * (depth + 3) // 2
    done = np.zeros(2, int)

    def tell(*more):
        done[:] += more
        if progress is not None:
            progress(int(done[0]), modules, done[1] / layers)

    return tell


def _in_slices(function, size, batch):
    """`function` of arrays [B,...], which gives log-probs [B,T] and Taps, `size` rows at a time (None: all)."""
    rows = len(batch["tokens"])
    size = size or rows
    slices = [{name: x[at:at + size] for name, x in batch.items()} for at in range(0, rows, size)]
    logprobs, taps = zip(*(function(rows) for rows in slices))
    join = lambda axis, trees: jax.tree.map(lambda *x: jnp.concatenate(x, axis), *trees)
    return join(0, logprobs), Taps(join(0, [x.outside for x in taps]), join(1, [x.inside for x in taps]))


def _in_parts(batch, config):
    """`(parts, group)`: parts of the batch's rows, all of one size, whose taps take at most TAP_BYTES a program, and
    how many rows next to each other share a prompt in them. The last part is filled with the first rows."""
    rows, columns = batch["tokens"].shape
    fit = int(np.clip(TAP_BYTES // (4 * columns * config.hidden_size * len(tap_names(config.num_layers))), 1, rows))
    group = _group(batch)
    group = group if group <= fit else 1
    size = -(-rows // -(-rows // (fit - fit % group)))
    size = -(-size // group) * group
    at = np.arange(-(-rows // size) * size).reshape(-1, size)
    return [{name: x[index % rows] for name, x in batch.items()} | {"own": index < rows} for index in at], group


def _group(batch):
    """The largest number of rows next to each other that share a prompt, all over."""
    tokens, lengths = np.asarray(batch["tokens"]), np.asarray(batch["lengths"])[:, None]
    prompts = np.where(np.arange(tokens.shape[1]) < lengths, tokens, -1)
    first = np.flatnonzero([True, *(prompts[1:] != prompts[:-1]).any(axis=1)])
    return int(np.gcd.reduce(np.diff([*first, len(prompts)])))


def _measure(programs, shares_of, batch, tell):
    """Of one part: log-probs of the programs and shares by name [B,T], and sums of squares by tap."""
    own_rows = batch.pop("own")
    predicts, response = (np.asarray(batch[name]) & own_rows[:, None] for name in ("predicts", "response"))

    def run(name):
        """(log-probs, Taps), and by tap what of them predicts a response token."""
        logprobs, taps = programs[name](batch)
        seen = {tap: x[predicts] for tap, x in by_name(*jax.tree.map(np.asarray, taps)).items()}
        tell(0, 0)
        return (logprobs, taps), seen | {"head": np.asarray(logprobs)[response]}

    _, exact = run("reference")
    (full, seen_full), (decode, seen_decode) = run("full"), run("decode")
    squares = {tap: _apart(*(np.asarray(seen[tap], np.float64) for seen in (seen_decode, seen_full, exact)))
               for tap in exact}
    logprobs = {"decode": np.asarray(decode[0]), "full": np.asarray(full[0])}
    del exact, seen_full, seen_decode
    return {"logprobs": logprobs, "squares": squares, **shares_of(batch, decode, full, tell)}


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


def _full(model, params, batch, temperature):
    """(log-probs [B,T], Taps) of the full-sequence program; 0 where there is no earlier token."""
    hidden, taps = tapped_forward(model, params, batch["tokens"])
    return scored(hidden, params["head"], batch, temperature), taps


def _decode(model, params, batch, columns, temperature, group=1):
    """The same as the sampler comes to them: the prompts at once, one for each `group` of rows, then a stored token at
    a time through the cache."""
    tokens, lengths = batch["tokens"], batch["lengths"]
    rows, width = jnp.arange(len(tokens)), tokens.shape[1]
    slots = -(-width // BLOCK) * BLOCK
    prompt = jnp.where(jnp.arange(columns) < lengths[:, None], tokens[:, :columns], 0)
    _, taps, caches = tapped_forward(model, params, prompt[::group], keep_cache=True)

    def spread(x, axis):
        """`x`, its rows along `axis` as often as they are shared."""
        return jnp.repeat(x, group, axis=axis)

    caches = jax.tree.map(lambda x: spread(x, 1), caches.widened(model.attention, slots))
    longer = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, width - columns), (0, 0)))
    taps = jax.tree.map(lambda x: spread(longer(x), -3), taps)

    def predict(hidden, at):
        """Log-prob [B] of the token after position `at`."""
        target = tokens[rows, at + 1]
        return logprob_of(tempered(logits_of(hidden, params["head"])[:, 0], temperature or 1.0), target)

    def step(carry, number):
        caches, taps, logprobs = carry
        at = lengths + number
        hidden, caches, new = tapped_decode_step(model, params, tokens[rows, at], caches, at)
        taps = jax.tree.map(lambda x, new: x.at[..., rows, at, :].set(new[..., 0, :]), taps, new)
        logprobs = logprobs.at[rows, at + 1].set(predict(hidden, at))
        return (caches, taps, logprobs), None

    last = jnp.maximum(lengths - 1, 0)
    first = predict(taps.outside["final_norm"][rows, last][:, None], last)
    logprobs = jnp.zeros(tokens.shape).at[rows, last + 1].set(first)
    # The last token predicts none.
    (_, taps, logprobs), _ = lax.scan(step, (caches, taps, logprobs), jnp.arange(width - columns - 1))
    return jnp.where(batch["response"], logprobs, 0.0), taps


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
