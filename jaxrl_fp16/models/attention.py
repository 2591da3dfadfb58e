"""One causal attention for sampler, scorer and gradient program.

B: rows.  T: queries.  S: key slots.  H: query heads.  K: key-value heads.
G = H / K: query heads that share one.  E: head dim.  C: keys in a block.  J: blocks.
A key's slot is its position in its row, whatever the padding of the caller's
arrays, so that every program reduces over the same blocks in the same order.
Packed rows are the exception: there a key's slot is its column, wherever its segment begins.
Scores and softmax are float32; queries, keys, values and weights enter a matmul
in the dtype of the queries, keys and values, or the weights in `weights_dtype`, where it is given.
"""

from functools import partial
from typing import Literal

import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.masking import segment_positions
from jaxrl_fp16.models.layers import kept, matmul
from jaxrl_fp16.parallel import platform_of

BLOCK = 64

AttentionKind = Literal["blockwise", "plain", "cudnn"]
PACKABLE = ("blockwise", "plain")  # JAX gives cuDNN's kernel one length a row, no segments


def kind_for(kind, dtype):
    """`kind`, but "blockwise" where it is a vendor's kernel and `dtype` is float32, which that does not compute in."""
    return "blockwise" if kind not in PACKABLE and dtype == jnp.float32 else kind


def attend(kind, q, k, v, segments=None, weights_dtype=None):
    """Causal attention within full rows: query `t` sees keys `0..t`, of its own segment where rows are packed.

    q [B,T,H,E], k and v [B,K,T,E], all of one dtype, segments int32 [B,T] -> [B,T,H,E].
    weights_dtype: of the softmax's weights as they meet the values; None: the values' own.
    The columns of a segment are adjacent. Columns after a row's last token may hold
    anything: no earlier query sees them. Raises ValueError for segments
    or a weights_dtype with a kind that is not in PACKABLE.
    """
    if kind in PACKABLE:
        return KINDS[kind][0](q, k, v, segments, weights_dtype)
    if segments is not None:
        raise ValueError(f"attention {kind!r} takes no packed rows; allowed: {', '.join(PACKABLE)}")
    _check_fused(kind, q, weights_dtype)
    return KINDS[kind][0](q, k, v)


def attend_cache(kind, q, k, v, positions, weights_dtype=None):
    """One query a row against its cache: the query at `positions` int32 [B] sees slots `0..position`.

    q [B,1,H,E], k and v as `stored` keeps [B,K,S,E], S a multiple of BLOCK -> [B,1,H,E].
    """
    if kind in PACKABLE:
        return KINDS[kind][1](q, k, v, positions, weights_dtype)
    _check_fused(kind, q, weights_dtype)
    return KINDS[kind][1](q, k, v, positions)


def _check_fused(kind, q, weights_dtype):
    if weights_dtype is not None or q.dtype == jnp.float32:
        what = "float32 queries" if weights_dtype is None else f"weights in {jnp.dtype(weights_dtype)}"
        raise ValueError(f"attention {kind!r} takes no {what}; allowed: {', '.join(PACKABLE)}")


def store(x):
    """How a cache keeps `x`: as it is, and on a CPU bfloat16 as its bits (uint16).

    XLA's CPU backend would convert a whole bfloat16 cache to float32 and back at each write; a TPU's would make the
    whole cache anew at each step out of its bits.
    """
    bits = x.dtype == jnp.bfloat16 and platform_of(x) == "cpu"
    return lax.bitcast_convert_type(x, jnp.uint16) if bits else x


def stored(kind, k, v):
    """How a cache keeps keys and values [...,S,E]: for cuDNN as they are; else keys by blocks, [...,J,E,C].

    A CPU multiplies a query with a row-major matrix [E,C] up to seven times as fast as with its transpose, and what it
    reads then lies in one piece: out of [E,S] it came at half of the speed.
    """
    if kind in PACKABLE:
        k = _pad_to_blocks(k)
        k = k.reshape(*k.shape[:-2], -1, BLOCK, k.shape[-1]).swapaxes(-1, -2)
    return store(k), store(v)


def widen(kind, k, v, slots):
    """Stored keys and values, with zeros after what is there, up to `slots` slots, a multiple of BLOCK."""
    return _widen(k, -3, slots // BLOCK) if kind in PACKABLE else _widen(k, -2, slots), _widen(v, -2, slots)


def _widen(x, axis, size):
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis % x.ndim else 0) for i in range(x.ndim)])


def write(kind, k, v, positions, new_k, new_v):
    """Stored keys and values with those of one token a row, [B,K,1,E], in the slots `positions` int32 [B].

    Scatters that XLA does in place.
    """
    rows = jnp.arange(len(positions))
    values = v.at[rows, :, positions]
    keys = k.at[rows, :, positions // BLOCK, :, positions % BLOCK] if kind in PACKABLE else k.at[rows, :, positions]
    return tuple(at.set(store(new[:, :, 0]), mode="promise_in_bounds", unique_indices=True)
                 for at, new in ((keys, new_k), (values, new_v)))


def _restore(x, dtype):
    return x if x.dtype != jnp.uint16 else lax.bitcast_convert_type(x, dtype)


# -- blockwise: the online softmax of FlashAttention (2205.14135) ------------------------------


def _group(q, num_kv_heads):
    """[B,T,H,E] -> [B,K,G,T,E]"""
    rows, queries, heads, width = q.shape
    q = q.reshape(rows, queries, num_kv_heads, heads // num_kv_heads, width)
    return q.transpose(0, 2, 3, 1, 4)


def _ungroup(x):
    """[B,K,G,T,E] -> [B,T,H,E]"""
    rows, kv_heads, shared, queries, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, queries, kv_heads * shared, width)


def _scores(q, k, visible):
    """float32 [B,K,G,T,C] of q [B,K,G,T,E] and k [B,K,C,E]; -inf where `visible` is false."""
    scores = matmul("bkgte,bkce->bkgtc", q, k) * q.shape[-1] ** -0.5
    return jnp.where(visible, scores, -jnp.inf)


def _mix(spec, weights, values, dtype):
    """Weights float32 and values, both as `dtype` or the values' own."""
    dtype = dtype or values.dtype
    return matmul(spec, weights.astype(dtype), values.astype(dtype))


def _start(q):
    """The carry before any key: running maximum, sum of exponentials, weighted values."""
    # Finite, so that a block with nothing visible gives exp(-inf) and not exp(nan).
    floor = jnp.full(q.shape[:-1], jnp.finfo(jnp.float32).min)
    return floor, jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape, jnp.float32)


def _absorb(carry, q, k, v, visible, weights_dtype=None):
    """One block of keys into the carry. A block with nothing visible changes no bit of it."""
    peak, total, mixed = carry
    scores = _scores(q, k, visible)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_peak[..., None])
    fade = jnp.exp(peak - new_peak)
    total = total * fade + jnp.sum(weights, axis=-1)
    mixed = mixed * fade[..., None] + _mix("bkgtc,bkce->bkgte", weights, v, weights_dtype)
    return new_peak, total, mixed


def _block_of(x, j):
    """Columns of block `j`; they are the last axis but one in every array here."""
    return lax.dynamic_slice_in_dim(x, j * BLOCK, BLOCK, axis=x.ndim - 2)


def _pad_to_blocks(x):
    return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, -x.shape[-2] % BLOCK), (0, 0)))


def _visible(queries, j):
    """bool [...,C]: which keys of block `j` the positions `queries` int32 [...] may see."""
    return j * BLOCK + jnp.arange(BLOCK) <= queries[..., None]


def _within(segments, i, j, visible):
    """`visible` [C,C], queries of block `i` and keys of block `j`, cut down to pairs of one segment: [B,1,1,C,C]."""
    if segments is None:
        return visible
    return visible & (_block_of(segments, i) == _block_of(segments, j).swapaxes(-1, -2))


def _first_blocks(segments):
    """int32 [T/C]: the first block of keys that any row's queries of each block see; it never falls."""
    if segments is None:
        return None
    segments = segments[:, 0, 0, :, 0]
    starts = jnp.arange(segments.shape[1]) - segment_positions(segments)
    return jnp.min(starts[:, ::BLOCK], axis=0) // BLOCK


def _blockwise_cache(q, k, v, positions, weights_dtype=None):
    """All blocks side by side, then absorbed in order: what `_absorb` does, without a slice of the cache per block."""
    scores, values = _cache_scores(q, k, positions), _restore(v, q.dtype)
    peaks, blocks = lax.cummax(jnp.max(scores, axis=-1), axis=2), scores.shape[2]
    weights = jnp.exp(scores - peaks[..., None])
    totals = jnp.sum(weights, axis=-1)
    values = values.reshape(*v.shape[:2], blocks, BLOCK, v.shape[-1])
    mixes = _mix("bkjgc,bkjce->bkjge", weights, values, weights_dtype)
    fades = jnp.exp(peaks[:, :, :-1] - peaks[:, :, 1:])

    def absorb(carry, block):
        (total, mixed), (fade, more, mix) = carry, block
        return (total * fade + more, mixed * fade[..., None] + mix), None

    rest = tuple(jnp.moveaxis(x, 2, 0) for x in (fades, totals[:, :, 1:], mixes[:, :, 1:]))
    # Unrolled, or a GPU would launch a kernel for each of these small steps.
    (total, mixed), _ = lax.scan(absorb, (totals[:, :, 0], mixes[:, :, 0]), rest, unroll=min(max(blocks - 1, 1), 16))
    return _ungroup((mixed / total[..., None])[..., None, :]).astype(q.dtype)


def _cache_scores(q, k, positions):
    """float32 [B,K,J,G,C] of one query a row, q [B,1,H,E], and stored keys [B,K,J,E,C]; -inf beyond `positions`."""
    k, (rows, kv_heads, blocks, width, _) = _restore(k, q.dtype), k.shape
    q = _group(q, kv_heads)[:, :, None, :, 0]
    # For each block anew: several small products, each with a matrix in one piece.
    q = jnp.broadcast_to(q, (rows, kv_heads, blocks, *q.shape[3:]))
    visible = jnp.arange(blocks * BLOCK).reshape(blocks, 1, BLOCK) <= positions[:, None, None, None, None]
    return jnp.where(visible, matmul("bkjge,bkjec->bkjgc", q, k) * width ** -0.5, -jnp.inf)


def _blockwise(q, k, v, segments=None, weights_dtype=None):
    length = q.shape[1]
    grouped, keys, values = (_pad_to_blocks(x) for x in (_group(q, k.shape[1]), k, v))
    if segments is not None:
        segments = _pad_to_blocks(segments[:, None, None, :, None])
    return _ungroup(_blocks(weights_dtype, grouped, keys, values, segments))[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(weights_dtype, q, k, v, segments):
    """q [B,K,G,T,E], k and v [B,K,T,E], segments int32 [B,1,1,T,1] or None, T a multiple of BLOCK -> [B,K,G,T,E]."""
    return _blocks_forward(weights_dtype, q, k, v, segments)[0]


def _blocks_forward(weights_dtype, q, k, v, segments):
    first = _first_blocks(segments)

    def queries_of_block(i):
        chunk, at = _block_of(q, i), i * BLOCK + jnp.arange(BLOCK)

        def body(j, carry):
            key, value = _block_of(k, j), _block_of(v, j)
            return _absorb(carry, chunk, key, value, _within(segments, i, j, _visible(at, j)), weights_dtype)

        # Blocks of earlier segments alone would change no bit: they are passed over.
        peak, total, mixed = lax.fori_loop(0 if first is None else first[i], i + 1, body, _start(chunk))
        return (mixed / total[..., None]).astype(q.dtype), (peak + jnp.log(total))[..., None]

    out, log_total = (kept(_join(x)) for x in lax.map(queries_of_block, jnp.arange(q.shape[-2] // BLOCK)))
    return out, (q, k, v, segments, out, log_total)


def _blocks_backward(weights_dtype, saved, cotangent):
    q, k, v, segments, out, log_total = saved
    # FlashAttention's D: what the softmax's normaliser takes back from each query.
    shared = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    scale, blocks = q.shape[-1] ** -0.5, q.shape[-2] // BLOCK
    first = _first_blocks(segments)

    def keys_of_block(grad_q, j):
        key, value = _block_of(k, j), _block_of(v, j)

        def body(i, carry):
            grad_q, grad_k, grad_v = carry
            chunk, given = _block_of(q, i), _block_of(cotangent, i)
            visible = _within(segments, i, j, _visible(i * BLOCK + jnp.arange(BLOCK), j))
            weights = jnp.exp(_scores(chunk, key, visible) - _block_of(log_total, i))
            grad_weights = matmul("bkgte,bkce->bkgtc", given, value)
            grad_scores = weights * (grad_weights - _block_of(shared, i)) * scale
            grad_scores = grad_scores.astype(q.dtype)
            grad_v = grad_v + _mix("bkgtc,bkgte->bkce", weights, given, weights_dtype)
            grad_k = grad_k + matmul("bkgtc,bkgte->bkce", grad_scores, chunk)
            change = _block_of(grad_q, i) + matmul("bkgtc,bkce->bkgte", grad_scores, key)
            return lax.dynamic_update_slice_in_dim(grad_q, change, i * BLOCK, axis=3), grad_k, grad_v

        zero = jnp.zeros(key.shape, jnp.float32)
        end = blocks if first is None else jnp.sum(first <= j)
        grad_q, grad_k, grad_v = lax.fori_loop(j, end, body, (grad_q, zero, zero))
        return grad_q, (grad_k.astype(k.dtype), grad_v.astype(v.dtype))

    grad_q, grads = lax.scan(keys_of_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(blocks))
    return grad_q.astype(q.dtype), *(_join(x) for x in grads), None


def _join(x):
    """Blocks stacked in front, [T/C,...,C,E], as one array [...,T,E]."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


_blocks.defvjp(_blocks_forward, _blocks_backward)


# -- plain: one softmax over all keys, kept for comparison ---------------------------------------


def _plain_over(scores, v, weights_dtype):
    """[B,T,H,E] of scores float32 [B,K,G,T,S] and v [B,K,S,E]."""
    weights = jax.nn.softmax(scores, axis=-1)
    return _ungroup(_mix("bkgtc,bkce->bkgte", weights, v, weights_dtype)).astype(v.dtype)


def _plain(q, k, v, segments=None, weights_dtype=None):
    at = jnp.arange(q.shape[1])
    visible = at <= at[:, None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None])[:, None, None]
    return _plain_over(_scores(_group(q, k.shape[1]), k, visible), v, weights_dtype)


def _plain_cache(q, k, v, positions, weights_dtype=None):
    scores = _cache_scores(q, k, positions).swapaxes(2, 3)
    return _plain_over(scores.reshape(*scores.shape[:3], 1, -1), _restore(v, q.dtype), weights_dtype)


# -- cudnn: NVIDIA's fused kernel, half precision only -------------------------------------------


def _cudnn(q, k, v):
    # Its backward takes even lengths alone. No query sees the columns after its own.
    length = q.shape[1]
    q = jnp.pad(q, ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
    k, v = (_pad_to_blocks(x).swapaxes(1, 2) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")[:, :length]


def _cudnn_cache(q, k, v, positions):
    # `is_causal` would align the one query with key 0: the keys' length bounds what it sees.
    k, v = (_restore(x, q.dtype).swapaxes(1, 2) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=positions + 1, implementation="cudnn")


KINDS = {
    "blockwise": (_blockwise, _blockwise_cache),
    "plain": (_plain, _plain_cache),
    "cudnn": (_cudnn, _cudnn_cache),
}
