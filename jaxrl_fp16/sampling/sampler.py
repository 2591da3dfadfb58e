"""The sampler: prefill and decode in one jitted function, over the trainer's forward.

Prompts are prefilled once for their group; `slots.py` has the loop that decodes.

n: prompts.  P: prompt columns.  N: max_new_tokens.  T = P + N.  G: group size.
B = n * G: rows, prompt-major.  S: cache slots.  V: vocabulary.  K: kept ids.
"""

import dataclasses
from typing import Annotated

from annotated_types import Ge, Gt, Le
import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.config import Doc
from jaxrl_fp16.forward import cast_to_compute, in_compute_dtype, logits_of
from jaxrl_fp16.masking import align, left_align
from jaxrl_fp16.models.decoder import layers_of, unstack_layers
from jaxrl_fp16.models.frozen import variables_of
from jaxrl_fp16.models.init import laid_out_for_decoding
from jaxrl_fp16.models.numerics import jit
from jaxrl_fp16.sampling.slots import Recipe, Rows, columns_of, ends_of, enter, fill, run_stage, stages_of
from jaxrl_fp16.sampling.stopping import stop_table
from jaxrl_fp16.sampling.support import draw
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
    max_rows: Annotated[
        int, Ge(0), Doc("responses decoded at once: where one has ended the next begins; 0: all, group_size or more")
    ] = 0
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


def make_sampler(model, policy, config, *, eos_id, pad_id, tokenizer=None, lockstep=False):
    """A jitted `sample(params, prompt_tokens, prompt_mask, key) -> Rollout`.

    Args:
      model: a Decoder.
      policy: a `jmp.Policy`, the sampler's precision.
      config: a `SamplingConfig`.
      eos_id: an int or a tuple of ints; each ends a response. `config.end_tokens` take their place.
      pad_id: the int that fills what follows a response's end.
      tokenizer: needed for stop strings and `config.end_tokens` alone.
      lockstep: rows keep their places, part after part, and each part goes on to its longest row: for prompts whose
        rows are divided over devices. Without it slots are refilled, which would move rows between those.

    Returns:
      The sampler, of float32 parameters and left-padded prompts: tokens int32 [n,P] and their mask bool [n,P], with
      one real token or more in each row. The same key gives the same rollout, whatever `max_rows`: each row has a
      key of its own.

    Raises:
      ValueError: for stop strings or end tokens without a tokenizer, an end token that it lacks, or too many stop
        strings (`stop_table`).
    """
    recipe = make_recipe(model, policy, config, eos_id, pad_id, tokenizer, lockstep)
    at_once = config.max_rows // config.group_size if lockstep else 0

    def sample(params, prompt_tokens, prompt_mask, key):
        keys = row_keys(key, len(prompt_tokens), config)
        compute = laid_out_for_decoding(model, cast_to_compute(params, policy, model.numerics))

        def decode(part):
            return _sample_part(recipe, compute, *part)

        drawn = _in_parts(decode, (prompt_tokens, prompt_mask, keys), at_once)
        columns, finished = jax.tree.map(lambda x: x[: keys.size], drawn)
        return as_rollout(prompt_tokens, prompt_mask, config.group_size, columns, finished)

    return jit(sample, model.numerics)


def make_recipe(model, policy, config, eos_id, pad_id, tokenizer, lockstep):
    """The Recipe of what `make_sampler` takes, which also says what it raises."""
    if config.end_tokens:
        if tokenizer is None:
            raise ValueError(f"end_tokens {config.end_tokens!r} need a tokenizer: make_sampler(..., tokenizer=...)")
        eos_id = end_ids(tokenizer, names=config.end_tokens)
    eos_ids = jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))
    stops = _stop_automaton(config, tokenizer, model.config.vocab_size)
    return Recipe(in_compute_dtype(model, policy), config, eos_ids, pad_id, stops, lockstep)


def row_keys(key, prompts, config):
    """A key of its own for each row, [n,G]."""
    return jax.random.split(key, (prompts, config.group_size))


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


def _sample_part(recipe, compute, prompt_tokens, prompt_mask, keys):
    """Of prompts [n,P] with `keys` [n,G]: the columns drawn, arrays [B,N,...], and which rows ended themselves, [B]."""
    rows, columns, finished = start(recipe, compute, prompt_tokens, prompt_mask, keys)
    weights = decode_weights(recipe, compute)
    first, *later = stages_of(recipe, len(rows.token), prompt_tokens.shape[1])
    state = run_stage(recipe, weights, rows, first, fill(recipe, first, rows, columns, finished))
    for stage in later:
        state = run_stage(recipe, weights, rows, stage, enter(recipe, stage, state))
    return state.columns, state.finished


def decode_weights(recipe, compute):
    """What `run_stage` takes of parameters in the compute dtype."""
    others = {name: compute[name] for name in ("embedding", "final_norm", "head")}
    return others, unstack_layers(layers_of(compute), recipe.model.config.num_layers)


def start(recipe, compute, prompt_tokens, prompt_mask, keys):
    """`(Rows, columns, finished)` of prompts [n,P] with `keys` [n,G], each row's first token drawn."""
    config = recipe.config

    def prefill(part):
        return _prefill(recipe, compute, *part)

    size = 0 if recipe.lockstep else config.max_rows // config.group_size
    drawn, prompts, lengths = _in_parts(prefill, (prompt_tokens, prompt_mask, keys), size)
    total = keys.size
    drawn = jax.tree.map(lambda x: x[:total], drawn)
    prompts, lengths = jax.tree.map(lambda x: x[: len(prompt_tokens)], (prompts, lengths))
    ends, stop_state = ends_of(recipe, drawn[0], jnp.zeros(total, jnp.int32))
    over = ends | (config.max_new_tokens == 1)
    rows = Rows(
        keys=keys.reshape(total), token=drawn[0], stop_state=stop_state,
        length=jnp.repeat(lengths, config.group_size), order=jnp.argsort(over, stable=True).astype(jnp.int32),
        count=jnp.sum(~over), prompts=prompts,
    )
    blank = dict(tokens=recipe.pad_id, support=-1)
    columns = {name: _first_of(x, config.max_new_tokens, blank.get(name, 0)) for name, x in columns_of(drawn).items()}
    return rows, columns, ends


def _first_of(x, columns, blank):
    """`x` [B,...] as the first column of [B,N,...], the others `blank`."""
    rest = jnp.full((len(x), columns - 1, *x.shape[1:]), blank, x.dtype)
    return jnp.concatenate([x[:, None], rest], axis=1)


def _prefill(recipe, compute, prompt_tokens, prompt_mask, keys):
    """Each prompt once: what `draw` gives for its rows' first tokens, `Cache` [n,L,...], lengths int32 [n]."""
    order, _ = left_align(prompt_mask)
    lengths = jnp.sum(prompt_mask.astype(bool), axis=1, dtype=jnp.int32)
    tokens = jnp.where(align(prompt_mask, order).astype(bool), align(prompt_tokens, order), 0)
    hidden, cache = recipe.model.apply(variables_of(compute), tokens, keep_cache=True)
    last = jnp.maximum(lengths - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    logits = jnp.repeat(logits_of(hidden, compute["head"])[:, 0], keys.shape[1], axis=0)
    first_keys = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(keys.size), 0)
    return draw(recipe.config, logits, first_keys), jax.tree.map(lambda x: x.swapaxes(0, 1), cache), lengths


def as_rollout(prompt_tokens, prompt_mask, group, columns, finished):
    """The Rollout of prompts [n,P] and what their rows drew, arrays [B,N,...] by name; finished bool [B]."""
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
