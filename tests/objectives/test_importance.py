"""Importance weights: caps, levels, and statistics that add up over microbatches."""

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import objectives

MASK = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
D = np.where(MASK, np.log([[0.25, 2.0, 1, 4.0], [1, 1, 1, 1], [1, 8.0, 0.5, 1]]), np.nan).astype(np.float32)
weights_of = jax.jit(objectives.importance_weights, static_argnames=("importance", "level"))


@pytest.mark.parametrize(
    "importance, expected",
    [
        ("none", [1, 1, 1, 1, 1]),
        ("is", [0.25, 2, 4, 8, 0.5]),
        ("tis", [0.25, 2, 2, 2, 0.5]),
        ("mis", [0.25, 2, 0, 0, 0.5]),
        ("icepop", [0, 2, 0, 0, 0.5]),
    ],
)
def test_token_level(importance, expected):
    weight = weights_of(D, MASK, importance=importance, cap=2.000001, floor=0.4).weight
    np.testing.assert_allclose(weight[MASK.astype(bool)], expected, rtol=1e-5)


@pytest.mark.parametrize("importance, expected", [("is", [2, 1, 4]), ("tis", [2, 1, 3]), ("mis", [2, 1, 0])])
def test_sequence_level(importance, expected):
    weight = weights_of(D, MASK, importance=importance, level="sequence", cap=3.0).weight
    np.testing.assert_allclose(weight, np.asarray(expected)[:, None], rtol=1e-5)


@pytest.mark.parametrize("level", objectives.LEVELS)
def test_weights_carry_no_gradient(level):
    gradient = jax.grad(lambda d: jnp.sum(weights_of(d, MASK, level=level).weight))(jnp.asarray(D))
    assert not np.any(gradient)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12), st.sampled_from(list(objectives.LEVELS)))
def test_an_infinite_cap_is_plain_importance_sampling(d, level):
    d = np.asarray(d, np.float32).reshape(3, 4)
    plain = weights_of(d, MASK, importance="is", level=level).weight
    for importance in ("tis", "mis"):
        capped = weights_of(d, MASK, importance=importance, level=level, cap=jnp.inf)
        np.testing.assert_array_equal(capped.weight, plain)
        assert not np.any(capped.cut)


def test_the_clamp_has_full_gradient_inside_and_none_outside():
    slope = jax.vmap(jax.grad(lambda d: jnp.exp(objectives.clamp_log_ratio(d))))
    np.testing.assert_allclose(slope(jnp.asarray([0.0, 1.0, 19.9])), np.exp([0, 1, 19.9]), rtol=1e-5)
    assert not np.any(slope(jnp.asarray([20.5, -20.5, 1e30, -jnp.inf])))


def test_merging_takes_sums_and_extremes_and_finishes():
    stacked = {
        "w_mean": jnp.asarray([1.0, 0.5, 0.0]),
        "w_square_mean": jnp.asarray([2.0, 1.0, 0.0]),
        "w_max": jnp.asarray([3.0, 2.0, -jnp.inf]),
        "w_min": jnp.asarray([0.5, 0.25, jnp.inf]),
    }
    merged = objectives.merge_metrics(stacked)
    assert {name: float(x) for name, x in merged.items()} == {
        "w_mean": 1.5, "w_ess": 0.75, "w_max": 3, "w_min": 0.25,
    }  # fmt: skip
    assert objectives.finish_metrics(merged) == merged
    empty = objectives.finish_metrics({name: x[2] for name, x in stacked.items()})
    assert not any(float(x) for x in empty.values())
