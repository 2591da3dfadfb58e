"""The model, the prompts and the lengths that every benchmark here runs on: a Qwen2 shape of 5.8 million parameters.

n: prompts.  P: prompt columns.  N: the most new tokens.  B: rows.  T = P + N.  K: kinds of prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxrl_fp16 as rl

VOCAB, PROMPT, PAD, EOS = 4096, 64, 0, 1
MODEL = rl.Decoder(rl.DecoderConfig(
    family="qwen2", vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_layers=6, num_heads=8,
    num_kv_heads=4, head_dim=32, tie_embeddings=True,
))
LOUD, QUIET = 64.0, 4.0  # entries of the embedding that name a prompt's kind; the first outweighs all others
FLAT = 0.1  # the last norm's scale of all other entries: else a row's chance to end would hang on its prompt


def make_prompts(rows, seed=0, vocab=VOCAB, shortest=16):
    """Left-padded prompts of `shortest` to 64 tokens: int32 [rows,P] and their mask."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, PROMPT + 1, rows)
    mask = np.arange(PROMPT) >= PROMPT - lengths[:, None]
    return np.where(mask, generator.integers(2, vocab, mask.shape), PAD).astype(np.int32), mask


def make_params(logit_std=None, seed=0):
    """Random parameters; the last norm is scaled so that logits have standard deviation `logit_std`."""
    params = rl.init_params(MODEL, jax.random.key(seed))
    if logit_std is None:
        return params
    tokens, mask = make_prompts(8)
    logits = rl.logits(MODEL, params, tokens, mask, rl.get_precision("fp32").policy)
    factor = logit_std / float(np.std(np.asarray(logits)[mask]))
    return {**params, "final_norm": {"scale": factor * params["final_norm"]["scale"]}}


def chances_of(lengths):
    """For each kind of prompt the chance [K] that a token ends its row.

    `geometric`: 1/48 for all. `log-normal`: 15 kinds whose mean lengths are the quantiles of a log-normal (median 32,
    sigma 1), and one that runs to the limit.
    """
    if lengths == "geometric":
        return np.array([1 / 48])
    # The quantiles 1/30, 3/30, ... 29/30 of the standard normal.
    half = np.array([0.168, 0.341, 0.524, 0.728, 0.967, 1.282, 1.834])
    return np.append(np.exp(-np.concatenate([-half[::-1], [0], half])) / 32, 0)


def make_ending_params(lengths):
    """Parameters with which rows end by themselves, as `chances_of(lengths)` says; a token's kind is its id modulo K.

    Two entries of a token's embedding name its kind, and no layer writes there. The first outweighs all others, so
    that the next token is of the same kind or the end. The second raises the end's logit to the kind's chance.
    """
    chances = chances_of(lengths)
    kinds, params = len(chances), make_params()
    layers = params["layers"]
    layers = {
        **layers,
        "attention": {**layers["attention"], "o": _silenced(layers["attention"]["o"], 2 * kinds)},
        "mlp": {**layers["mlp"], "down": _silenced(layers["mlp"]["down"], 2 * kinds)},
    }
    embedding = np.array(params["embedding"])
    kind_of = np.arange(VOCAB)[:, None] % kinds == np.arange(kinds)
    embedding[:, :kinds], embedding[:, kinds: 2 * kinds] = LOUD * kind_of, QUIET * kind_of
    embedding[PAD] = embedding[EOS] = 0
    embedding[EOS, kinds: 2 * kinds] = 1  # for now: the end's logit is then the second entry of the last hidden state
    scale = np.where(np.arange(embedding.shape[1]) < 2 * kinds, 1, FLAT).astype(np.float32)
    params = {**params, "layers": layers, "embedding": jnp.asarray(embedding),
              "final_norm": {"scale": jnp.asarray(scale)}}

    tokens, mask = make_prompts(64)
    logits = np.array(rl.logits(MODEL, params, tokens, mask, rl.get_precision("fp32").policy), np.float64)[mask]
    entry = logits[:, EOS].copy()
    logits[:, EOS] = -np.inf
    others = np.logaddexp.reduce(logits, axis=1) - LOUD * entry * LOUD / QUIET
    embedding[EOS, :kinds] = LOUD
    for kind, chance in enumerate(chances):
        of_kind = [x[tokens[mask] % kinds == kind] for x in (others, entry)]
        embedding[EOS, kinds + kind] = _solve(lambda x, rest, slope: np.mean(1 / (1 + np.exp(rest - x * slope))),
                                              chance, *of_kind)
    return {**params, "embedding": jnp.asarray(embedding)}


def _solve(function, value, *args):
    """The `x` within LOUD of 0 for which the increasing `function(x, *args)` is `value`, or an end of that range."""
    low, high = -LOUD, LOUD
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle, *args) < value else (low, middle)
    return (low + high) / 2


def _silenced(projection, entries):
    """A projection into the residual stream that leaves its first `entries` alone."""
    return {**projection, "kernel": projection["kernel"].at[..., :entries].set(0)}


def draw_lengths(lengths, rows, most, seed=0):
    """Tokens of `rows` responses, int [B] of 1 to `most`, as a model of `make_ending_params(lengths)` would give."""
    generator = np.random.default_rng(seed)
    chances = chances_of(lengths)[generator.integers(len(chances_of(lengths)), size=rows)]
    drawn = generator.geometric(np.maximum(chances, 1e-9))
    return np.minimum(drawn, most)


def make_full_batch(rows, tokens, vocab=VOCAB):
    """A `Batch` without padding: prompts of P tokens, responses of `tokens`."""
    return make_batch(*make_prompts(rows, vocab=vocab, shortest=PROMPT), np.full(rows, tokens), tokens, vocab)


def make_batch(prompts, mask, lengths, most, vocab=VOCAB, seed=0):
    """A `Batch` of NumPy arrays: left-padded prompts [B,P], and responses of `lengths` [B] random tokens, of `most`."""
    generator = np.random.default_rng(seed)
    rows, at = len(prompts), np.arange(most) < np.reshape(lengths, (-1, 1))
    response = np.concatenate([np.zeros(prompts.shape, bool), at], axis=1)
    drawn = np.where(at, generator.integers(2, vocab, (rows, most)), PAD)
    logprobs = np.where(response, -np.log(vocab), 0).astype(np.float32)
    return rl.Batch(
        tokens=np.concatenate([prompts, drawn], axis=1).astype(np.int32),
        mask=np.concatenate([mask, at], axis=1), response_mask=response,
        rollout_logprobs=logprobs, old_logprobs=logprobs, advantages=generator.normal(size=rows).astype(np.float32),
    )


__all__ = ["EOS", "MODEL", "PAD", "PROMPT", "VOCAB", "chances_of", "draw_lengths", "make_batch",
           "make_ending_params", "make_full_batch", "make_params", "make_prompts"]
