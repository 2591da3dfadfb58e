"""The sampler: prefill and decode in one jitted function, over the trainer's forward.

n: prompts.  P: prompt columns.  N: max_new_tokens.  T = P + N.  G: group size.
B = n * G: rows, prompt-major.  S: cache slots.  V: vocabulary.  K: kept ids.
"""

import dataclasses
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.config import Doc
from jaxrl_fp16.forward import cast_to_compute, in_compute_dtype, logits_of
from jaxrl_fp16.masking import align, left_align
from jaxrl_fp16.models.attention import BLOCK
from jaxrl_fp16.models.decoder import Cache, decode_step, unstack_layers
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.sampling.stopping import stop_table
from jaxrl_fp16.sampling.support import draw, support_size
from jaxrl_fp16.tokenizer import end_ids, token_bytes
from jaxrl_fp16.types import Rollout


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What is sampled, and how much at once."""

    max_new_tokens: Annotated[int, Ge(1), Doc("longest response, in tokens")] = 256
    temperature: Annotated[float, Ge(0), Doc("sampling temperature, which divides the logits; 0: greedy")] = 1.0
    top_k: Annotated[int, Ge(0), Doc("likeliest tokens that sampling keeps; 0: all")] = 0
    top_p: Annotated[float, Gt(0), Le(1), Doc("probability mass of likeliest tokens that sampling keeps; 1: all")] = 1.0
    group_size: Annotated[int, Ge(1), Doc("responses sampled for each prompt")] = 8
    stop: Annotated[tuple[str, ...], Doc("stop strings: the token that completes one ends a response; []: none")] = ()
    end_tokens: Annotated[
        tuple[str, ...],
        Doc("names of the tokens that end a response, and of which the first ends a row of sft and dpo; []: those of "
            "the tokenizer and the model folder's generation_config.json and config.json"),
    ] = ()
    max_rows: Annotated[int, Ge(0), Doc("responses decoded at once; 0: all")] = 0
    max_support: Annotated[int, Ge(1), Doc("most tokens that top_p keeps, and the largest top_k")] = 256

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.group_size < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, group_size is {self.group_size}; allowed: >= 1"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}; "
                "allowed: temperature >= 0, top_k >= 0, 0 < top_p <= 1"
            )
        if self.top_k > self.max_support:
            raise ValueError(f"top_k is {self.top_k}; allowed: up to max_support, {self.max_support}, or a larger "
                             "max_support")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string; allowed: strings of one character or more")
        if 0 < self.max_rows < self.group_size:
            raise ValueError(
                f"max_rows is {self.max_rows}, less than group_size {self.group_size}; "
                "allowed: 0 (all), or group_size and more: a group shares its prompt's prefill"
            )


@struct.dataclass
class Decoding:
    """The carry of the decode loop."""

    step: jax.Array        # int32 []: response columns written
    caches: list[Cache]    # one a layer, arrays [B,K,S,E]
    token: jax.Array       # int32 [B]: the last one drawn
    done: jax.Array        # bool [B]: ended by itself
    stop_state: jax.Array  # int32 [B]: of the stop-string automaton
    columns: Any           # what has been drawn: arrays [B,N,...]


def make_sampler(model, policy, config, *, eos_id, pad_id, tokenizer=None):
    """A jitted `sample(params, prompt_tokens, prompt_mask, key) -> Rollout`.

    Args:
      model: a Decoder.
      policy: a `jmp.Policy`, the sampler's precision.
      config: a `SamplingConfig`.
      eos_id: an int or a tuple of ints; each ends a response. `config.end_tokens` take their place.
      pad_id: the int that fills what follows a response's end.
      tokenizer: needed for stop strings and `config.end_tokens` alone.

    Returns:
      The sampler, of float32 parameters and left-padded prompts: tokens int32 [n,P] and their mask bool [n,P], with
      one real token or more in each row. The same key gives the same rollout, whatever `max_rows`: each row has a
      key of its own.

    Raises:
      ValueError: for stop strings or end tokens without a tokenizer, an end token that it lacks, or too many stop
        strings (`stop_table`).
    """
    if config.end_tokens:
        if tokenizer is None:
            raise ValueError(f"end_tokens {config.end_tokens!r} need a tokenizer: make_sampler(..., tokenizer=...)")
        eos_id = end_ids(tokenizer, names=config.end_tokens)
    eos_ids = jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))
    stops = _stop_automaton(config, tokenizer, model.config.vocab_size)

    def sample(params, prompt_tokens, prompt_mask, key):
        prompts, group = prompt_tokens.shape[0], config.group_size
        keys = jax.random.split(key, (prompts, group))
        compute = cast_to_compute(params, policy, model.numerics)

        def decode(part):
            return _decode(in_compute_dtype(model, policy), compute, config, eos_ids, pad_id, stops, *part)

        columns, finished = _in_parts(decode, (prompt_tokens, prompt_mask, keys), config.max_rows // group)
        columns, finished = jax.tree.map(lambda x: x[: prompts * group], (columns, finished))
        return _rollout(prompt_tokens, prompt_mask, group, columns, finished)

    return jit(sample, model.numerics)


def _stop_automaton(config, tokenizer, vocab_size):
    if not config.stop:
        return None
    if tokenizer is None:
        raise ValueError(f"stop strings {config.stop!r} need a tokenizer: make_sampler(..., tokenizer=...)")
    table, accept = stop_table(config.stop, token_bytes(tokenizer, vocab_size)[:vocab_size])
    return jnp.asarray(table), accept


def _in_parts(function, arrays, size):
    """`function` over arrays [n,...] in parts of at most `size` prompts (0: all at once), one after another.

    A part takes every k-th prompt of k parts, so that it spans all devices that the
    prompts are spread over. What is missing to a whole number of parts is filled
    with the first prompts again; the caller drops the surplus at the end.
    """
    count = jax.tree.leaves(arrays)[0].shape[0]
    parts = -(-count // size) if size else 1
    if parts == 1:
        return function(arrays)
    size = -(-count // parts)

    def cut(x):
        whole = jnp.concatenate([x, x[: parts * size - count]])
        return whole.reshape(size, parts, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        x = x.reshape(parts, size, -1, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(parts * size * x.shape[2], *x.shape[3:])

    return jax.tree.map(join, lax.map(function, jax.tree.map(cut, arrays)))


def _decode(model, params, config, eos_ids, pad_id, stops, prompt_tokens, prompt_mask, keys):
    """Columns drawn for one part, arrays [B,N,...], and which rows ended by themselves, bool [B]."""
    group = config.group_size
    keys = keys.reshape(-1, *keys.shape[2:])
    hidden, caches, lengths = _prefill(model, params, config, prompt_tokens, prompt_mask)
    hidden, lengths = jnp.repeat(hidden, group, axis=0), jnp.repeat(lengths, group)
    layers, rows = unstack_layers(params["layers"], model.config.num_layers), len(keys)
    keys, hidden, caches, lengths = _at_least(model.numerics.decode_rows, (keys, hidden, caches, lengths))

    def draw_column(state, hidden):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        drawn = draw(config, logits_of(hidden, params["head"])[:, 0], step_keys)
        return _write(state, drawn, eos_ids, pad_id, stops)

    def advance(state):
        hidden, caches = decode_step(model, params, layers, state.token, state.caches, lengths + state.step - 1)
        return draw_column(state.replace(caches=caches), hidden)

    def goes_on(state):
        return (state.step < config.max_new_tokens) & ~jnp.all(state.done)

    empty = _empty_columns(config, pad_id, len(keys), params["head"].shape[0])
    no_token = jnp.zeros(len(keys), jnp.int32)
    start = Decoding(
        step=jnp.zeros((), jnp.int32), caches=caches, token=no_token, done=jnp.arange(len(keys)) >= rows,
        stop_state=no_token, columns=empty,
    )
    end = lax.while_loop(goes_on, advance, draw_column(start, hidden))
    return jax.tree.map(lambda x: x[:rows], (end.columns, end.done))


def _at_least(count, arrays):
    """Arrays [B,...] with their last row again, up to `count` rows."""
    rows = jax.tree.leaves(arrays)[0].shape[0]
    if rows >= count:
        return arrays
    at = jnp.minimum(jnp.arange(count), rows - 1)
    return jax.tree.map(lambda x: x[at], arrays)


def _prefill(model, params, config, prompt_tokens, prompt_mask):
    """Each prompt once: last hidden state [n,1,D], caches for its whole group, lengths int32 [n]."""
    order, _ = left_align(prompt_mask)
    lengths = jnp.sum(prompt_mask.astype(bool), axis=1, dtype=jnp.int32)
    tokens = jnp.where(align(prompt_mask, order).astype(bool), align(prompt_tokens, order), 0)
    hidden, stacked = model.apply({"params": params}, tokens, keep_cache=True)
    last = jnp.maximum(lengths - 1, 0)
    slots = -(-(tokens.shape[1] + config.max_new_tokens) // BLOCK) * BLOCK

    def widen(x):
        x = jnp.repeat(x, config.group_size, axis=0)
        return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))

    caches = [jax.tree.map(widen, cache) for cache in unstack_layers(stacked, model.config.num_layers)]
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1), caches, lengths


def _empty_columns(config, pad_id, rows, vocab_size):
    shape = (rows, config.max_new_tokens)
    columns = dict(
        tokens=jnp.full(shape, pad_id, jnp.int32), response_mask=jnp.zeros(shape, bool), logprobs=jnp.zeros(shape),
    )
    size = support_size(config, vocab_size)
    if size:
        columns.update(support=jnp.full((*shape, size), -1), full_logprobs=jnp.zeros(shape))
    return columns


def _write(state, drawn, eos_ids, pad_id, stops):
    """The state with one more column; rows that are done keep their padding."""
    token, logprob, support, full_logprob = drawn
    going = ~state.done
    column = dict(
        tokens=jnp.where(going, token, pad_id), response_mask=going, logprobs=jnp.where(going, logprob, 0.0),
    )
    if support is not None:
        column.update(
            support=jnp.where(going[:, None], support, -1), full_logprobs=jnp.where(going, full_logprob, 0.0)
        )
    columns = {
        name: lax.dynamic_update_slice_in_dim(state.columns[name], value[:, None], state.step, axis=1)
        for name, value in column.items()
    }
    ends, stop_state = jnp.isin(token, eos_ids), state.stop_state
    if stops is not None:
        table, accept = stops
        stop_state = table[stop_state, token].astype(jnp.int32)
        ends |= stop_state == accept
    return state.replace(
        step=state.step + 1, token=column["tokens"], done=state.done | ends, stop_state=stop_state, columns=columns,
    )


def _rollout(prompt_tokens, prompt_mask, group, columns, finished):
    spread = lambda x: jnp.repeat(x, group, axis=0)
    before = lambda x, response: jnp.concatenate([spread(x).astype(response.dtype), response], axis=1)
    nothing = jnp.zeros(prompt_tokens.shape, bool)
    full = columns.get("full_logprobs")
    return Rollout(
        tokens=before(prompt_tokens, columns["tokens"]),
        mask=before(prompt_mask, columns["response_mask"]),
        response_mask=before(nothing, columns["response_mask"]),
        logprobs=before(nothing, columns["logprobs"]),
        finished=finished,
        support=columns.get("support"),
        full_logprobs=None if full is None else before(nothing, full),
    )
