"""Learning rates by step, and one step of AdamW by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.training.updates.optimizer import OptimizerConfig, make_optimizer, make_schedule

PARAMS = {"layers": {"q": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}, "norm": {"scale": jnp.ones(3)}},
          "embedding": jnp.full((4, 3), -2.0), "head": jnp.full((4, 3), 2.0)}


def rates(steps, **fields):
    schedule = make_schedule(OptimizerConfig(**fields))
    return [float(schedule(step)) for step in steps]


def step(grads, **fields):
    """The parameters after one step, as a change."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, **fields))
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)
    return updates


@pytest.mark.parametrize("fields, expected", [
    (dict(), [1, 1, 1, 1, 1]),
    (dict(schedule="linear", decay_steps=10), [1, 0.9, 0.8, 0, 0]),
    (dict(schedule="cosine", decay_steps=10),
     [1, 0.5 + 0.5 * np.cos(np.pi / 10), 0.5 + 0.5 * np.cos(np.pi / 5), 0, 0]),
    (dict(warmup_steps=1), [1, 1, 1, 1, 1]),
])
def test_rates_without_a_warm_up(fields, expected):
    np.testing.assert_allclose(rates((0, 1, 2, 10, 50), learning_rate=1.0, **fields), expected, atol=1e-6)


@pytest.mark.parametrize("schedule, after", [
    ("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("cosine", [1, 0.5, 0]),
])
def test_a_warm_up_rises_from_its_first_share_to_the_peak(schedule, after):
    """The first step moves the parameters; at a rate of 0 it would not."""
    found = rates((0, 1, 2, 3, 4, 8, 12), learning_rate=1.0, schedule=schedule, warmup_steps=4, decay_steps=12)
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1, *after], atol=1e-6)


@pytest.mark.parametrize("schedule, middle", [("linear", 0.55), ("cosine", 0.55)])
def test_a_schedule_may_end_above_zero(schedule, middle):
    found = rates((0, 5, 10, 50), learning_rate=1.0, schedule=schedule, decay_steps=10, final_fraction=0.1)
    np.testing.assert_allclose(found, [1, middle, 0.1, 0.1], atol=1e-6)


def test_a_schedule_without_room_to_fall_is_refused():
    with pytest.raises(ValueError, match="'cosine' with decay_steps 3; allowed: more than warmup_steps, here 3"):
        OptimizerConfig(schedule="cosine", warmup_steps=3, decay_steps=3)


def test_the_first_step_is_the_rate_against_the_gradients_sign():
    grads = jax.tree.map(lambda x: 0.01 * jnp.sign(x), PARAMS)
    for found, grad in zip(jax.tree.leaves(step(grads)), jax.tree.leaves(grads)):
        np.testing.assert_allclose(found, -0.1 * np.sign(grad), rtol=1e-5)


def test_weight_decay_pulls_at_matrices_alone():
    change = step(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.5)
    for matrix, value in ((change["layers"]["q"]["kernel"], 2), (change["embedding"], -2), (change["head"], 2)):
        np.testing.assert_allclose(matrix, np.full(matrix.shape, -0.1 * 0.5 * value), rtol=1e-6)
    assert not change["layers"]["q"]["bias"].any() and not change["layers"]["norm"]["scale"].any()


def test_weight_decay_pulls_at_what_is_named():
    change = step(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.5, decayed=("bias", "scale"))
    np.testing.assert_allclose(change["layers"]["q"]["bias"], np.full(3, -0.1), rtol=1e-6)
    np.testing.assert_allclose(change["layers"]["norm"]["scale"], np.full(3, -0.05), rtol=1e-6)
    assert not change["layers"]["q"]["kernel"].any() and not change["embedding"].any() and not change["head"].any()


def test_gradients_are_clipped_by_their_global_norm():
    """With eps large, Adam's first step is nearly linear in the gradient: its direction stays, its norm is cut."""
    grads = jax.tree.map(lambda x: x * 10, PARAMS)
    norm = float(optax.tree.norm(grads))
    small = jax.tree.map(lambda x: x / norm, grads)
    clipped = step(grads, eps=1e6, max_grad_norm=1.0)
    for found, expected in zip(jax.tree.leaves(clipped), jax.tree.leaves(step(small, eps=1e6, max_grad_norm=5.0))):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(clipped), 0.1 / 1e6, rtol=1e-3)


def test_moments_are_float32():
    state = make_optimizer(OptimizerConfig()).init(PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
