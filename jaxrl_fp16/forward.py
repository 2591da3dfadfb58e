"""Parameters and tokens to log-probs and values: the one forward of sampler, scorer and update.

B: rows.  T: columns.  C: columns of a chunk.  D: hidden size.  V: vocabulary.
N: max_new_tokens.  K: kept ids of a truncated distribution.
The only cast of parameters to the compute dtype is here.
"""

from functools import lru_cache, partial

import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.lengths import by_parts, cut, row_lengths, row_sharding, traced
from jaxrl_fp16.masking import align, left_align, segment_positions, zero_where_masked
from jaxrl_fp16.models.critic import Critic, decoder_of
from jaxrl_fp16.models.frozen import BASE, DROPOUT, LORA, is_adapted, variables_of
from jaxrl_fp16.models.layers import matmul
from jaxrl_fp16.models.numerics import DEFAULT, jit, jit_by_model
from jaxrl_fp16.parallel import constrain, mesh_size, rows_spread
from jaxrl_fp16.types import Decisions

NONE = Decisions()
PARTS, PART_ROWS = 8, 8  # parts that `token_logprobs` cuts its rows into at most, of so many rows at least
COLD = 1e-4  # below this temperature a quotient's rounding, of a logit of 20 and more, exceeds 0.01
LOGIT_BYTES = 2**26  # float32 logits that exist at once; larger gained no speed, smaller starves the matmul


def cast_to_compute(params, policy, numerics=DEFAULT):
    """Kernels and head in the policy's compute dtype; embedding, norms and biases stay float32.

    numerics: the model's; with `float32_head` the head, a critic's too, stays float32.

    A tied model gets its head here too, the embedding cast: the embedding itself
    is gathered in float32, because its gradient is a scatter-add.

    Of parameters with a frozen part it gives one tree too: that part's, all in the compute dtype, and "lora", the
    adapters in it.
    """
    if is_adapted(params):
        return _cast_adapted(params, policy, numerics)
    if "body" in params:
        value = params["value"] if numerics.float32_head else cast_kernels(params["value"], policy)
        return {"value": value, "body": cast_to_compute(params["body"], policy, numerics)}
    head = params.get("head", params["embedding"])
    head = head.astype(jnp.float32 if numerics.float32_head else policy.compute_dtype)
    return {**cast_kernels(params, policy), "head": head}


def _cast_adapted(params, policy, numerics):
    base, trained = params[BASE], params.get(LORA)
    half = lambda tree: jax.tree.map(lambda x: x.astype(policy.compute_dtype), tree)
    if "body" in base:
        body = {BASE: base["body"], LORA: trained["body"]}
        return cast_to_compute({"value": trained["value"], "body": body}, policy, numerics)
    # With its norms and biases: what was rounded once is the same to every program.
    found = cast_to_compute(half(base), policy, numerics)
    return found if trained is None else {**found, LORA: half(trained)}


def cast_kernels(params, policy):
    """A tree like `params`, or a part of them, with its kernels in the policy's compute dtype."""
    def cast(path, leaf):
        return leaf.astype(policy.compute_dtype) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def cast_variables(variables, policy):
    """The variables of a part of a Decoder, such as a layer, with kernels and adapters in the policy's compute dtype;
    of a model with adapters all is."""
    if LORA not in variables:
        return {"params": cast_kernels(variables["params"], policy)}
    return jax.tree.map(lambda x: x.astype(policy.compute_dtype), variables)


def in_compute_dtype(model, policy):
    """The module that computes in the policy's compute dtype."""
    if isinstance(model, Critic):
        return model.clone(body=in_compute_dtype(model.body, policy))
    return model.clone(dtype=policy.compute_dtype)


def hidden_states(model, params, tokens, mask, policy, segments=None):
    """Final hidden states [B,T,D] in the compute dtype, left-aligned, and the alignment's `(order, inverse)`.

    Column `c` of the result is the row's `c`-th real token. `segments` as `token_logprobs` takes them.
    """
    tokens, segments, alignment = align_rows(tokens, mask, segments)
    cast = cast_to_compute(params, policy, numerics_of(model))
    keys = _dropout_keys(model, params, tokens)
    return in_compute_dtype(model, policy).apply(variables_of(cast), tokens, segments=segments, rngs=keys), alignment


def _dropout_keys(model, params, tokens):
    """Linen's keys of a gradient program whose adapters drop, by the step's key and what the rows hold; else None."""
    if DROPOUT not in params or not dropout_of(model):
        return None
    places = jnp.arange(1, tokens.size + 1, dtype=jnp.uint32).reshape(tokens.shape)
    return {"dropout": jax.random.fold_in(params[DROPOUT], jnp.sum(tokens.astype(jnp.uint32) * places))}


def align_rows(tokens, mask, segments=None):
    """`(tokens, segments)` [B,T] as the model takes them, left-aligned with 0 at padding, and `(order, inverse)`."""
    order, inverse = left_align(mask)
    tokens = jnp.where(align(mask, order).astype(bool), align(tokens, order), 0)
    if segments is not None:
        segments = _aligned_segments(segments, mask, order)
    return tokens, segments, (order, inverse)


def dropout_of(model):
    """The share that the adapters of a Decoder or Critic drop; 0 of a module without."""
    lora = getattr(decoder_of(model), "lora", None)
    return 0.0 if lora is None else lora.dropout


def numerics_of(model):
    """The `NumericsConfig` of a Decoder or Critic; the default for a module of a user's own that has none."""
    return getattr(decoder_of(model), "numerics", DEFAULT)


def _aligned_segments(segments, mask, order):
    """int32 [B,T], left-aligned; 0 at padding."""
    return align(jnp.where(mask.astype(bool), segments, 0), order)


def logits_of(hidden, head):
    """float32 [B,T,V] from hidden states [B,T,D] and head [V,D], both of one dtype."""
    return constrain(matmul("btd,vd->btv", hidden, head), "rows", None, "vocab")


@jit_by_model(numerics_of, static_argnames=("model", "policy"))
def logits(model, params, tokens, mask, policy):
    """float32 [B,T,V]: what each real token predicts for its successor. All at once: for small batches."""
    hidden, (_, inverse) = hidden_states(model, params, tokens, mask, policy)
    return align(logits_of(hidden, cast_to_compute(params, policy, numerics_of(model))["head"]), inverse)


def tempered(logits, temperature):
    """float32 [...,V]: `logits` of the distribution at a temperature above 0, a Python number. All are finite if the
    given ones are."""
    if temperature >= COLD:
        return logits / temperature
    # Quotients would lose the difference of two logits, or be infinite; distances from the largest logit do not.
    distance = logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.maximum(distance / max(temperature, float(jnp.finfo(logits.dtype).tiny)), -1e30)


def logprob_of(logits, token, support=None):
    """float32 [...]: log-prob of `token` int32 [...] under float32 `logits` [...,V].

    With `support` int32 [...,K] (kept ids, filled with -1) the distribution is
    renormalised over the kept ids; a position that keeps none uses them all. The
    sampler and the scorer both call this.
    """
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    if support is None:
        return chosen - normaliser
    kept = jnp.take_along_axis(logits, jnp.maximum(support, 0), axis=-1)
    any_kept = support[..., :1] >= 0
    # A row that keeps nothing is given finite scores, so that its unused logsumexp has a finite gradient.
    kept = jnp.where(support >= 0, kept, jnp.where(any_kept, -jnp.inf, 0.0))
    return chosen - jnp.where(any_kept[..., 0], jax.nn.logsumexp(kept, axis=-1), normaliser)


def entropy_of(logits):
    """float32 [...]: entropy in nats of float32 `logits` [...,V]."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def token_logprobs(model, params, tokens, mask, *, policy, temperature=1.0, support=None, segments=None):
    """Log-prob of `tokens[:, t]` given the row's earlier real tokens, float32 [B,T].

    tokens int32 [B,T], mask bool or 0/1 [B,T] of real tokens (padding may be
    anywhere), support int32 [B,N,K] for the last N columns as the sampler returned
    it. 0 at each row's first real token and where mask is 0. Temperature 0 scores
    at temperature 1, as the greedy sampler reports.

    segments int32 [B,T], for packed rows: 0 at padding, else which of the row's
    examples a token is of; an example's tokens are adjacent. Each example is then
    scored as if it were alone, with 0 at its first token.

    It looks at the mask, on the host, and works on rows of like length together, as wide as the longest of them, in
    one jitted program for each of at most eight widths. Inside a function that is traced all T columns are worked on.
    """
    arrays = tokens, mask, Decisions(support), segments
    parts = None
    if not traced(params, arrays) and mask.shape[0]:
        sharding, shards = row_sharding(mask)
        rows = max(PART_ROWS, -(-mask.shape[0] // PARTS))
        parts = cut(row_lengths(mask), mask.shape[1], min(-(-rows // shards) * shards, mask.shape[0]), shards=shards)
    if parts is None:
        return _all_logprobs(model, params, arrays, policy=policy, temperature=temperature)
    return _logprobs_by_parts(model, policy, temperature)(params, arrays, parts, sharding)


def _logprobs(model, params, arrays, policy, temperature):
    tokens, mask, decisions, segments = arrays
    return score(model, params, tokens, mask, policy, temperature, decisions, segments=segments)[0]


_all_logprobs = jit_by_model(numerics_of, static_argnames=("model", "policy", "temperature"))(_logprobs)


@lru_cache(maxsize=64)
def _logprobs_by_parts(model, policy, temperature):
    function = partial(_logprobs, model, policy=policy, temperature=temperature)
    return by_parts(function, partial(jit, numerics=numerics_of(model)))[0]


def score(
    model, params, tokens, mask, policy, temperature=1.0, decisions=NONE, with_entropy=False, segments=None
):
    """`token_logprobs` and, if asked, each token's entropy, both float32 [B,T]; zeros where not asked.

    decisions: what the sampler decided beside the tokens, as `Rollout.decisions`.
    Logits are made in chunks of columns, forward and backward, and never exist at once.
    """
    hidden, alignment = hidden_states(model, params, tokens, mask, policy, segments)
    head = cast_to_compute(params, policy, numerics_of(model))["head"]
    return score_hidden(
        hidden, alignment, head, tokens, mask, temperature, decisions, with_entropy, segments, is_adapted(params)
    )


def score_hidden(
    hidden, alignment, head, tokens, mask, temperature=1.0, decisions=NONE, with_entropy=False, segments=None,
    frozen=False,
):
    """The rest of `score`, from what `hidden_states` gives and the head [V,D] of the same dtype; frozen: the head is,
    and gets no gradient."""
    order, inverse = alignment
    present = align(mask, order).astype(bool)
    targets = _next(jnp.where(present, align(tokens, order), 0))
    support = decisions.support
    if support is not None:
        unkept = jnp.full((tokens.shape[0], tokens.shape[1] - support.shape[1], support.shape[2]), -1)
        support = _next(align(jnp.concatenate([unkept, support], axis=1), order))
    results = _chunked(temperature or 1.0, with_entropy, frozen, hidden, head, targets, support)
    # The first real token, of a row or a segment, has no earlier one: at its place the shifted array
    # has what the last column, or the segment before, predicts.
    at = jnp.arange(tokens.shape[1])
    if segments is not None:
        at = segment_positions(_aligned_segments(segments, mask, order))
    scored = present & (at > 0)
    return tuple(align(zero_where_masked(jnp.roll(x, 1, axis=1), scored), inverse) for x in results)


def _next(x):
    return jnp.roll(x, -1, axis=1)


@jit_by_model(numerics_of, static_argnames=("critic", "policy"))
def token_values(critic, params, tokens, mask, *, policy):
    """float32 [B,T]: the critic's value of the state in which `tokens[:, t]` was chosen.

    That is its output at the row's previous real token; 0 at the first one and where mask is 0.
    """
    outputs, (order, inverse) = hidden_states(critic, params, tokens, mask, policy)
    scored = align(mask, order).astype(bool) & (jnp.arange(tokens.shape[1]) > 0)
    return align(zero_where_masked(jnp.roll(outputs, 1, axis=1), scored), inverse)


@jit_by_model(numerics_of, static_argnames=("model", "policy"))
def sequence_scores(model, params, tokens, mask, *, policy):
    """float32 [B]: a reward model's output at each row's last real token; 0 for a row without one.

    model: a Critic. tokens int32 [B,T], mask bool or 0/1 [B,T]; padding may be anywhere.
    """
    outputs, _ = hidden_states(model, params, tokens, mask, policy)
    last = jnp.sum(mask.astype(bool), axis=1) - 1
    scores = jnp.take_along_axis(outputs, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return jnp.where(last >= 0, scores, 0.0)


# -- log-probs in chunks -------------------------------------------------------------------------


def _read(temperature, with_entropy, logits, targets, support):
    logits = tempered(logits, temperature)
    logprobs = logprob_of(logits, targets, support)
    return logprobs, entropy_of(logits) if with_entropy else jnp.zeros_like(logprobs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(temperature, with_entropy, frozen, hidden, head, targets, support):
    """(logprobs, entropies) float32 [B,T] of `targets` int32 [B,T], from hidden [B,T,D] and head [V,D]; frozen: the
    head gets no gradient."""
    return _read_chunks(temperature, with_entropy, hidden, _gathered(head), targets, support)[0]


def _read_chunks(temperature, with_entropy, hidden, head, targets, support, keep=False):
    """What `_chunked` returns of a gathered head, and with `keep` the logits [B,T,V]."""

    def read_chunk(chunk):
        hidden, targets, support = chunk
        logits = logits_of(hidden, head)
        return _read(temperature, with_entropy, logits, targets, support), logits if keep else None

    chunks, join = _split(hidden, head, targets, support)
    return join(lax.map(read_chunk, chunks))


def _chunked_forward(temperature, with_entropy, frozen, hidden, head, targets, support):
    # The backward pass follows at once: it finds the head gathered, and the logits of a single chunk.
    arrays = hidden, _gathered(head), targets, support
    results, logits = _read_chunks(temperature, with_entropy, *arrays, keep=_chunk_count(hidden, head) == 1)
    return results, (*arrays, logits)


def _chunked_backward(temperature, with_entropy, frozen, saved, cotangents):
    hidden, head, targets, support, logits = saved
    spread = _spread(hidden)

    def apart(x):
        return x if spread == 1 else x.reshape(spread, -1, *x.shape[1:])

    def chunk_gradient(grad_head, chunk):
        hidden, targets, support, logits, *given = chunk
        logits = logits_of(hidden, head) if logits is None else logits
        _, pull = jax.vjp(lambda logits: _read(temperature, with_entropy, logits, targets, support), logits)
        (grad_logits,) = pull(tuple(given))
        grad_logits = grad_logits.astype(head.dtype)
        grad_hidden = matmul("btv,vd->btd", grad_logits, head).astype(hidden.dtype)
        if frozen:
            return None, grad_hidden
        # Summed over chunks in float32 and rounded once, after the last. On a mesh each device adds up its own rows'.
        spec = "btv,btd->vd" if spread == 1 else "sbtv,sbtd->svd"
        grad_head = grad_head + by_rows(matmul(spec, apart(grad_logits), apart(hidden)))
        return grad_head, grad_hidden

    def by_rows(x):
        return x if spread == 1 else constrain(x, "rows", "vocab", None)

    chunks, join = _split(hidden, head, targets, support, logits, *cotangents)
    if frozen:
        return join(lax.scan(chunk_gradient, None, chunks)[1]), None, None, None
    shape = head.shape if spread == 1 else (spread, *head.shape)
    grad_head, grad_hidden = lax.scan(chunk_gradient, by_rows(jnp.zeros(shape, jnp.float32)), chunks)
    grad_head = grad_head if spread == 1 else jnp.sum(grad_head, axis=0)
    return join(grad_hidden), constrain(grad_head, "vocab", "embed").astype(head.dtype), None, None


def _spread(hidden):
    """Over how many devices the rows of hidden [B,T,D] are divided; 1 where they do not divide."""
    shards = rows_spread(hidden)
    return shards if hidden.shape[0] % shards == 0 else 1


def _gathered(head):
    """The head [V,D] as every chunk takes it: moved between devices once, in its own dtype."""
    return constrain(constrain(head, "vocab", "embed"), "vocab", None)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _chunk_count(hidden, head):
    """How many chunks the logits of hidden [B,T,D] and head [V,D] are made in."""
    rows, columns = hidden.shape[:2]
    return -(-columns // max(1, mesh_size(hidden) * LOGIT_BYTES // (4 * rows * head.shape[0])))


def _split(hidden, head, *arrays):
    """Arrays [B,T,...] as chunks [T/C,B,C,...], and the function that joins such chunks again.

    Cut along columns, so that rows stay where a mesh has put them.
    """
    rows, columns = hidden.shape[:2]
    count = _chunk_count(hidden, head)
    width = -(-columns // count)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, count * width - columns)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    def join(chunks):
        def one(x):
            return jnp.moveaxis(x, 0, 1).reshape(rows, count * width, *x.shape[3:])[:, :columns]

        return jax.tree.map(one, chunks)

    return jax.tree.map(cut, (hidden, *arrays)), join
