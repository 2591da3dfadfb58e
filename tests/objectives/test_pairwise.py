"""The Bradley-Terry loss against numbers, its gradient, and its shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.objectives import pairwise_reward_loss

CHOSEN, REJECTED = jnp.array([1.0, 0.0, -2.0, 90.0]), jnp.array([0.0, 0.0, 1.0, -90.0])


def test_loss_and_metrics_are_those_of_the_equation():
    loss, metrics = pairwise_reward_loss(CHOSEN, REJECTED)
    # -log sigmoid of 1, 0, -3 and 180
    np.testing.assert_allclose(loss, (0.31326169 + 0.69314718 + 3.04858735 + 0.0) / 4, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (1 + 0.5 + 0 + 1) / 4)
    np.testing.assert_allclose(metrics["margin"], (1 + 0 - 3 + 180) / 4)
    np.testing.assert_allclose(metrics["score"], (1 + 0 - 2 + 90 + 0 + 0 + 1 - 90) / 8)


def test_the_gradient_is_the_chance_of_the_wrong_order_and_stays_finite():
    grads = jax.grad(lambda *scores: pairwise_reward_loss(*scores)[0], argnums=(0, 1))(CHOSEN, -3 * REJECTED)
    expected = -1 / (1 + np.exp(np.minimum(CHOSEN + 3 * REJECTED, 80))) / 4
    np.testing.assert_allclose(grads[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(grads[1], -grads[0])


def test_shares_of_microbatches_add_up():
    whole = pairwise_reward_loss(CHOSEN, REJECTED)
    parts = [pairwise_reward_loss(CHOSEN[at], REJECTED[at], pairs=4) for at in (slice(0, 1), slice(1, 4))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-6), whole, *parts)


def test_half_precision_scores_are_summed_in_float32():
    loss, _ = pairwise_reward_loss(CHOSEN.astype(jnp.float16), REJECTED.astype(jnp.float16))
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("shapes", [((4,), (3,)), ((4, 1), (4, 1))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"chosen has shape .*; allowed: \[B\] and \[B\]"):
        pairwise_reward_loss(*(jnp.zeros(shape) for shape in shapes))
