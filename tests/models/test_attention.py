"""Attention against float64 NumPy, and what padding, lengths and a cache change in it.

B: rows.  T: columns.  H: query heads.  K: key-value heads.  E: head dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.models import attention
from jaxrl_fp16.models.attention import BLOCK, attend, attend_cache, store, stored

B, H, K, E = 2, 4, 2, 8


def arrays(columns, dtype=jnp.float32, rows=B, heads=H, kv_heads=K, seed=0):
    """q [B,T,H,E], k and v [B,K,T,E], and a cotangent for the result [B,T,H,E]."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((rows, columns, heads, E), *[(rows, kv_heads, columns, E)] * 2, (rows, columns, heads, E))
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes))


def reference(q, k, v, cotangent):
    """The result and the gradients of q, k and v, in float64."""
    q, k, v, given = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    shared = q.shape[2] // k.shape[1]
    q, given = q.transpose(0, 2, 1, 3), given.transpose(0, 2, 1, 3)
    wide_k, wide_v = np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1)
    scale, columns = E**-0.5, q.shape[2]
    scores = np.where(np.tri(columns, dtype=bool), q @ wide_k.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    grad_weights = given @ wide_v.swapaxes(-1, -2)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdims=True)) * scale
    group = lambda x: x.reshape(*k.shape[:2], shared, columns, E).sum(2)
    back = lambda x: x.transpose(0, 2, 1, 3)
    return (back(weights @ wide_v), back(grad_scores @ wide_k), group(grad_scores.swapaxes(-1, -2) @ q),
            group(weights.swapaxes(-1, -2) @ given))


@partial(jax.jit, static_argnums=0)
def value_and_gradients(kind, q, k, v, cotangent):
    out, pull = jax.vjp(lambda *args: attend(kind, *args), q, k, v)
    return out, *pull(cotangent)


@pytest.mark.parametrize("kind", ["blockwise", "plain"])
@pytest.mark.parametrize("columns", [1, BLOCK, 3 * BLOCK - 7])
def test_values_and_gradients_are_those_of_the_definition(kind, columns):
    given = arrays(columns)
    for found, expected in zip(value_and_gradients(kind, *given), reference(*given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (6, 2)])
def test_each_group_of_query_heads_shares_its_key_value_head(heads, kv_heads):
    given = arrays(70, heads=heads, kv_heads=kv_heads)
    for found, expected in zip(value_and_gradients("blockwise", *given), reference(*given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float16, 2e-3), (jnp.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("kind", ["blockwise", "plain"])
def test_half_precision_rounds_inputs_and_results_alone(kind, dtype, tolerance):
    """Within a few units in the last place of the largest entry, so nothing was accumulated in half."""
    given = arrays(3 * BLOCK, dtype)
    for found, expected in zip(value_and_gradients(kind, *given), reference(*given), strict=True):
        assert found.dtype == dtype
        assert np.abs(np.asarray(found, np.float64) - expected).max() < tolerance * np.abs(expected).max()


def test_scores_beyond_float16s_range_stay_finite():
    q, k, v, cotangent = arrays(BLOCK + 5, jnp.float16)
    q, k = q * 150, k * 150
    given = q, k, v, cotangent * 0.01  # the gradient itself stays in range
    scores = np.asarray(q[:, :, 0], np.float64) @ np.asarray(k[:, 0], np.float64).swapaxes(1, 2)
    assert np.abs(scores).max() > 65504
    for found in value_and_gradients("blockwise", *given):
        assert np.isfinite(np.asarray(found, np.float32)).all()


# -- padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_blocks_of_padding_change_no_bit(dtype):
    """Right padding of finite junk, from 64 columns to 128 to 192; the loss does not look at it."""
    real = BLOCK - 3
    given = arrays(real, dtype)

    def run(columns):
        junk = arrays(columns, dtype, seed=1)
        wide = [x.at[:, :real].set(y) if axis == 1 else x.at[:, :, :real].set(y)
                for x, y, axis in zip(junk, given, (1, 2, 2, 1))]
        wide[3] = wide[3].at[:, real:].set(0)
        out, grad_q, grad_k, grad_v = value_and_gradients("blockwise", *wide)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, grad_q, grad_k, grad_v))
        assert not np.asarray(grad_q[:, real:], np.float32).any()
        return [np.asarray(x, np.float32) for x in (out[:, :real], grad_q[:, :real], grad_k[:, :, :real],
                                                    grad_v[:, :, :real])]

    first = run(BLOCK)
    for columns in (2 * BLOCK, 3 * BLOCK):
        for x, y in zip(first, run(columns), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_masked_block_changes_no_bit_of_the_carry():
    q, k, v, _ = arrays(BLOCK)
    grouped = attention._group(q, K)
    carry = attention._absorb(attention._start(grouped), grouped, k, v, np.tri(BLOCK, dtype=bool))
    again = attention._absorb(carry, grouped, 3 * k, 5 * v, np.zeros((BLOCK, BLOCK), bool))
    jax.tree.map(np.testing.assert_array_equal, again, carry)
    untouched = attention._absorb(attention._start(grouped), grouped, k, v, np.zeros((BLOCK, BLOCK), bool))
    assert all(np.isfinite(x).all() for x in untouched)


# -- packed rows ----------------------------------------------------------------------------------

# Columns of each row's segments; what is left of 200 columns is padding, segment 0.
LENGTHS = [[70, 3, 1, 101], [1, 63, 64, 72]]


def packed_segments(columns=200):
    segments = np.zeros((len(LENGTHS), columns), np.int32)
    for row, lengths in enumerate(LENGTHS):
        segments[row, :sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return segments


@partial(jax.jit, static_argnums=0)
def packed_value_and_gradients(kind, q, k, v, cotangent, segments):
    out, pull = jax.vjp(lambda *args: attend(kind, *args, segments), q, k, v)
    return out, *pull(cotangent)


@pytest.mark.parametrize("kind", ["blockwise", "plain"])
def test_each_segment_is_attended_as_if_it_stood_alone(kind):
    """Against float64 on each segment's own columns, values and gradients, padding's segment 0 too."""
    segments = packed_segments()
    given = arrays(200)
    found = packed_value_and_gradients(kind, *given, segments)
    for row in range(B):
        for segment in np.unique(segments[row]):
            at = np.flatnonzero(segments[row] == segment)
            pick = lambda x, axis, row=row, at=at: np.take(np.asarray(x)[row : row + 1], at, axis=axis)
            alone = reference(*(pick(x, axis) for x, axis in zip(given, (1, 2, 2, 1))))
            for x, y, axis in zip(found, alone, (1, 1, 2, 2), strict=True):
                np.testing.assert_allclose(pick(x, axis), y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float16, 2e-3), (jnp.bfloat16, 1.6e-2)])
def test_packed_rows_in_half_precision_are_as_close_as_its_rounding(dtype, tolerance):
    segments, given = packed_segments(), arrays(200, dtype)
    half = packed_value_and_gradients("blockwise", *given, segments)
    exact = packed_value_and_gradients("plain", *(x.astype(jnp.float32) for x in given), segments)
    for x, y in zip(half, exact, strict=True):
        assert x.dtype == dtype
        assert np.abs(np.asarray(x, np.float32) - y).max() < tolerance * np.abs(y).max()


def test_blocks_of_other_segments_are_passed_over_without_a_change_of_a_bit(monkeypatch):
    segments, given = packed_segments(), arrays(200)
    found = packed_value_and_gradients("blockwise", *given, segments)
    columns = jnp.asarray(attention._pad_to_blocks(segments[:, None, None, :, None]))
    np.testing.assert_array_equal(attention._first_blocks(columns), [0, 0, 1, 2])
    monkeypatch.setattr(attention, "_first_blocks", lambda segments: jnp.zeros(4, jnp.int32))
    jax.clear_caches()
    jax.tree.map(np.testing.assert_array_equal, found, packed_value_and_gradients("blockwise", *given, segments))
    jax.clear_caches()


def test_one_segment_over_the_whole_row_is_the_row():
    given = arrays(BLOCK + 7)
    whole = packed_value_and_gradients("blockwise", *given, np.ones((B, BLOCK + 7), np.int32))
    for x, y in zip(whole, value_and_gradients("blockwise", *given), strict=True):
        np.testing.assert_array_equal(x, y)


def test_cudnn_refuses_packed_rows():
    with pytest.raises(ValueError, match="attention 'cudnn' takes no packed rows; allowed: blockwise, plain"):
        attend("cudnn", *[jnp.zeros((1, 1, 1, 8), jnp.float16)] * 3, jnp.ones((1, 1), jnp.int32))


# -- memory -----------------------------------------------------------------------------------------


def temporary_bytes(kind, columns):
    shapes = jax.eval_shape(lambda: arrays(columns, jnp.float16))
    return value_and_gradients.lower(kind, *shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
    short, long = (temporary_bytes("blockwise", columns) for columns in (1024, 4096))
    assert long < 4.2 * short
    assert long < temporary_bytes("plain", 4096) / 20


# -- the cache ----------------------------------------------------------------------------------------


def decode(kind, q, k, v, slots):
    """Each query on its own, over a cache of all keys: [B,T,H,E]."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)), constant_values=7)
    (k, v), rows = stored(kind, pad(k), pad(v)), q.shape[0]
    step = jax.jit(partial(attend_cache, kind))
    return np.concatenate([step(q[:, t : t + 1], k, v, jnp.full(rows, t)) for t in range(q.shape[1])], axis=1)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.float16, 2e-3), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["blockwise", "plain"])
def test_decoding_over_a_cache_gives_what_full_rows_give(kind, dtype, tolerance):
    q, k, v, _ = arrays(BLOCK + 3, dtype)
    full = np.asarray(attend(kind, q, k, v), np.float32)
    cached = np.asarray(decode(kind, q, k, v, 2 * BLOCK), np.float32)
    np.testing.assert_allclose(cached, full, rtol=tolerance, atol=tolerance)


def test_rows_stand_at_their_own_positions():
    q, k, v, _ = arrays(2 * BLOCK)
    positions = jnp.array([3, BLOCK + 9])
    full = attend("plain", q, k, v)
    picked = q[jnp.arange(B), positions][:, None]
    found = attend_cache("blockwise", picked, *stored("blockwise", k, v), positions)[:, 0]
    np.testing.assert_allclose(found, full[jnp.arange(B), positions], rtol=1e-5, atol=1e-6)


def test_empty_slots_of_a_cache_change_no_bit():
    q, k, v, _ = arrays(20, jnp.float16)
    results = [np.asarray(decode("blockwise", q, k, v, slots)) for slots in (BLOCK, 2 * BLOCK, 4 * BLOCK)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("dtype, kept", [(jnp.float16, jnp.float16), (jnp.bfloat16, jnp.uint16),
                                         (jnp.float32, jnp.float32)])
def test_a_cache_keeps_every_bit(dtype, kept):
    bits = np.arange(2**16, dtype=np.uint16)  # every half-precision number, NaNs of all kinds too
    x = jnp.asarray(bits.view(dtype) if dtype != jnp.float32 else bits.astype(np.float32))
    stored = store(x)
    assert stored.dtype == kept
    restored = attention._restore(stored, dtype)
    assert restored.dtype == dtype
    np.testing.assert_array_equal(np.asarray(restored).view(np.uint8), np.asarray(x).view(np.uint8))


# -- NVIDIA's kernel ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float16, 2e-3), (jnp.bfloat16, 1.6e-2)])
def test_cudnn_gives_values_and_gradients_of_the_definition(dtype, tolerance):
    given = arrays(3 * BLOCK - 7, dtype)
    for found, expected in zip(value_and_gradients("cudnn", *given), reference(*given), strict=True):
        assert np.abs(np.asarray(found, np.float64) - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.gpu
def test_cudnn_decodes_over_a_cache():
    q, k, v, _ = arrays(BLOCK + 3, jnp.float16)
    full = np.asarray(attend("plain", q, k, v), np.float32)
    np.testing.assert_allclose(np.asarray(decode("cudnn", q, k, v, 2 * BLOCK), np.float32), full, atol=4e-3)


def test_a_vendors_kernel_is_replaced_where_it_cannot_compute():
    assert attention.kind_for("cudnn", jnp.float32) == "blockwise"
    assert [attention.kind_for(kind, jnp.float16) for kind in attention.KINDS] == list(attention.KINDS)
    assert attention.kind_for("plain", jnp.float32) == "plain"
