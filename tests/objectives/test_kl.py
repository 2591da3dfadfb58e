"""KL estimators against float64, where float32 as written fails."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import objectives

MAGNITUDES = np.logspace(-7, 1, 4000).astype(np.float32)
D = np.concatenate([MAGNITUDES, -MAGNITUDES])


def exact_k3(d):
    """Float64: the Taylor series where `expm1(d) - d` cancels."""
    d = np.asarray(d, np.float64)
    near = np.where(np.abs(d) < 0.5, d, 0.0)
    series = sum(near**n / math.factorial(n) for n in range(2, 16))
    return np.where(np.abs(d) < 0.5, series, np.expm1(d) - d)


def test_k3_and_its_gradient_are_accurate_at_every_scale():
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(objectives.k3)))(D)
    np.testing.assert_allclose(value, exact_k3(D), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.expm1(D.astype(np.float64)), rtol=1e-5)


def test_k3_beyond_the_clamp_is_finite_and_has_no_gradient():
    far = jnp.asarray([30.0, -30.0, 1e30, -1e30])
    value, gradient = jax.vmap(jax.value_and_grad(objectives.k3))(far)
    limit = objectives.LOG_RATIO_LIMIT
    expected = np.expm1(np.sign(far) * limit) - np.sign(far) * limit
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not np.any(gradient)


@pytest.mark.parametrize("name, value, slope", [("k1", lambda d: -d, lambda d: -1 + 0 * d),
                                                ("k2", lambda d: d**2 / 2, lambda d: d)])
def test_k1_and_k2(name, value, slope):
    computed, gradient = jax.vmap(jax.value_and_grad(objectives.KL_ESTIMATORS[name]))(D)
    np.testing.assert_allclose(computed, value(D.astype(np.float64)), rtol=1e-6)
    np.testing.assert_allclose(gradient, slope(D), rtol=1e-6)


def test_estimators_agree_with_the_divergence():
    rng = np.random.default_rng(0)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in rng.normal(size=(2, 7)).astype(np.float32))
    p, d = np.exp(log_p), log_q - log_p
    for name in ("k1", "k3"):
        np.testing.assert_allclose(np.sum(p * objectives.KL_ESTIMATORS[name](d)), np.sum(p * -d), rtol=1e-5)


def test_the_penalty_is_per_token_or_summed_over_the_row():
    mask = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    old = np.where(mask, [[0, -1, -2], [0, 0, -3], [0, 0, 0]], np.nan).astype(np.float32)
    ref = np.where(mask, [[0, -2, -2.5], [0, 0, -1], [0, 0, 0]], np.nan).astype(np.float32)
    per_row = objectives.kl_penalized_rewards(np.array([1.0, 0.0, 2.0]), old, ref, jnp.asarray(mask), 0.1)
    np.testing.assert_allclose(per_row, [0.85, 0.2, 2.0], rtol=1e-6)
    outcome = objectives.rewards_on_last_token(jnp.asarray([1.0, 0.0, 2.0]), jnp.asarray(mask))
    per_token = objectives.kl_penalized_rewards(outcome, old, ref, jnp.asarray(mask), 0.1)
    np.testing.assert_allclose(per_token, [[0, -0.1, 0.95], [0, 0, 0.2], [0, 0, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"\(1, 1, 1\)"):
        objectives.kl_penalized_rewards(np.ones((1, 1, 1)), old, ref, jnp.asarray(mask), 0.1)
