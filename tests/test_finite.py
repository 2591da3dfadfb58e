"""A NaN is seen at every width, by itself, in a row and in a whole array; other extremes are NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.finite import largest, peak, smallest
from jaxrl_fp16.objectives import mismatch_metrics
from jaxrl_fp16.objectives.metrics import RULES

WIDTHS = [1, 7, 32, 64, 1000, 4096, 5000]


def with_nan(width, place):
    x = np.linspace(-3, 2, 3 * width, dtype=np.float32).reshape(3, width)
    x[{"entry": (1, width // 2), "row": 1, "array": ...}[place]] = np.nan
    return x


@pytest.mark.parametrize("place", ["entry", "row", "array"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_nan_is_seen(width, dtype, place):
    x = jnp.asarray(with_nan(width, place), dtype)
    found = jax.jit(lambda x: (peak(x), largest(x), smallest(x), peak(x, 1)))(x)
    assert all(np.isnan(each) for each in found[:3])
    np.testing.assert_array_equal(np.isnan(found[3]), np.isnan(np.asarray(x, np.float32)).any(axis=1))


@pytest.mark.parametrize("width", WIDTHS)
def test_else_they_are_numpys(width):
    x = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    mask = np.random.default_rng(1).random(x.shape) < 0.5
    mask[0, 0] = True
    hidden = np.where(mask, x, np.nan)
    assert peak(x) == np.abs(x).max() and largest(x) == x.max() and smallest(x) == x.min()
    assert largest(hidden, mask) == x[mask].max() and smallest(hidden, mask) == x[mask].min()
    assert peak(np.full(width, -np.inf, np.float32)) == np.inf
    assert peak(np.zeros((0, 3), np.float32)) == 0 and largest(x, mask & False) == -np.inf


def test_extremes_of_metrics_keep_a_nan():
    """Of one call, of microbatches and of steps, wherever it stands."""
    ours = np.zeros((2, 4096), np.float32)
    ours[1, 77] = np.nan
    found = mismatch_metrics(ours, np.zeros_like(ours), np.ones_like(ours))
    assert all(np.isnan(found[f"mismatch/{name}"]) for name in ("kl_k3", "logprob_abs_diff_max", "seq_log_ratio_max"))
    for name in ("_max", "_min"):
        for place in (0, 1):
            values = [1.0, 1.0]
            values[place] = np.nan
            rule = RULES[name]
            assert np.isnan(rule.microbatches(jnp.asarray(values), axis=0)) and np.isnan(rule.steps(values))
