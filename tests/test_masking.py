"""Masked sums, means and alignment against NumPy, with NaN behind every mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import masking

MASK = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
VALUES = np.where(MASK, np.arange(12.0).reshape(3, 4), np.nan).astype(np.float32)


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_sums_and_means_ignore_what_is_masked(dtype):
    mask = jnp.asarray(MASK, dtype)
    np.testing.assert_array_equal(masking.zero_where_masked(VALUES, mask), np.nan_to_num(VALUES))
    np.testing.assert_array_equal(masking.masked_sum(VALUES, mask, axis=1), [3, 0, 28])
    np.testing.assert_allclose(masking.masked_mean(VALUES, mask, axis=1), [1.5, 0, 28 / 3], rtol=1e-6)
    np.testing.assert_allclose(masking.masked_mean(VALUES, mask), 31 / 5, rtol=1e-6)


def test_half_precision_is_summed_in_float32():
    ones = jnp.ones(5000, jnp.float16)
    total = masking.masked_sum(ones, jnp.ones(5000, bool))
    assert total.dtype == jnp.float32 and total == 5000


def test_no_nan_reaches_the_gradient():
    gradient = jax.grad(lambda x: masking.masked_mean(x, jnp.asarray(MASK)))(jnp.asarray(VALUES))
    np.testing.assert_allclose(gradient, MASK / 5, rtol=1e-6)


def test_segment_positions_begin_anew_with_each_segment():
    segments = jnp.asarray([[1, 1, 2, 3, 3, 3, 0, 0], [2, 1, 1, 1, 1, 0, 0, 0], [0] * 8])
    expected = [[0, 1, 0, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 0, 1, 2], range(8)]
    np.testing.assert_array_equal(masking.segment_positions(segments), np.array([list(row) for row in expected]))


def test_left_align_moves_real_tokens_first_and_back():
    order, inverse = masking.left_align(jnp.asarray(MASK))
    tokens = jnp.arange(12).reshape(3, 4)
    aligned = masking.align(tokens, order)
    np.testing.assert_array_equal(aligned[:, :3], [[1, 2, 0], [4, 5, 6], [8, 9, 11]])
    np.testing.assert_array_equal(masking.align(aligned, inverse), tokens)
    wide = jnp.stack([tokens, -tokens], axis=-1)
    np.testing.assert_array_equal(masking.align(wide, order)[..., 1], -aligned)
