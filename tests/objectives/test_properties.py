"""What must hold of losses and advantages whatever the numbers: limits, symmetries, sums."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import objectives

pytestmark = pytest.mark.usefixtures("quick_compile")
B, T, L = 4, 7, 8
seeds = st.integers(0, 10_000)
few = settings(max_examples=8, deadline=None, derandomize=True)


def arguments(seed, spread=0.5):
    """Arguments of `policy_loss`, ragged; the last column is padding."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(B, T))
    arrays = {
        "logprobs": old + spread * rng.normal(size=(B, T)), "old_logprobs": old,
        "rollout_logprobs": old + spread * rng.normal(size=(B, T)), "advantages": rng.normal(size=B),
    }
    mask = (rng.random((B, T)) < 0.7) & (np.arange(T) < T - 1)
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()} | {"mask": jnp.asarray(mask)}


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(algorithm, given):
    def loss(logprobs):
        return objectives.policy_loss(algorithm, **given | {"logprobs": logprobs}, max_new_tokens=L)[0]

    return jax.value_and_grad(loss)(given["logprobs"])


def assert_equal(one, other, given, **tolerance):
    for found, expected in zip(value_and_gradient(one, given), value_and_gradient(other, given)):
        np.testing.assert_allclose(found, expected, **tolerance or {"rtol": 0})


# -- limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", objectives.LEVELS)
@pytest.mark.parametrize("loss", ["ppo_clip", "pg"])  # weights of the scorer's log-probs, and of the policy's
@few
@given(seeds, st.sampled_from([0.1, 3.0, 30.0]))
def test_without_a_bound_corrections_are_importance_sampling(loss, level, seed, spread):
    given = arguments(seed, spread)
    plain = objectives.get_algorithm("grpo", loss=loss, importance="is", level=level)
    infinity = float("inf")
    for importance in ("tis", "mis"):
        capped = objectives.get_algorithm("grpo", loss=loss, importance=importance, level=level, cap=infinity)
        assert_equal(capped, plain, given)
        # What a config file can write for infinity: the largest ratio is e^20.
        capped = objectives.get_algorithm("grpo", loss=loss, importance=importance, level=level, cap=1e9)
        assert_equal(capped, plain, given)
    if level == "token":
        unbounded = objectives.get_algorithm("grpo", loss=loss, importance="icepop", cap=infinity, floor=0.0)
        assert_equal(unbounded, plain, given)


@few
@given(seeds)
def test_a_distant_clip_range_and_bound_leave_the_plain_surrogate(seed):
    given = arguments(seed)
    wide = objectives.get_algorithm("grpo", clip_low=1.0, clip_high=1e9)
    assert_equal(objectives.get_algorithm("grpo", clip_low=1.0, clip_high=1e9, dual_clip=1e9), wide, given)
    ratio = jnp.exp(given["logprobs"] - given["old_logprobs"])
    per_row = jnp.sum(jnp.where(given["mask"], ratio, 0.0), axis=1) / jnp.maximum(given["mask"].sum(1), 1)
    expected = -jnp.mean(given["advantages"] * per_row)
    np.testing.assert_allclose(value_and_gradient(wide, given)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "loss, aggregation", [("ppo_clip", "sequence_mean"), ("gspo", "token_mean"), ("cispo", "fixed_length")]
)
@few
@given(seeds)
def test_on_policy_every_loss_has_the_policy_gradient(loss, aggregation, seed):
    given = arguments(seed)
    given |= {"old_logprobs": given["logprobs"]}
    _, found = value_and_gradient(objectives.get_algorithm("grpo", loss=loss, aggregation=aggregation), given)
    _, expected = value_and_gradient(objectives.get_algorithm("reinforce", aggregation=aggregation), given)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# -- symmetries and sums -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", objectives.PRESETS)
@few
@given(seeds, st.permutations(range(B)))
def test_the_order_of_rows_and_the_side_of_padding_change_nothing(name, seed, order):
    algorithm, given = objectives.get_algorithm(name), arguments(seed)
    order = np.asarray(order)

    def move(x):
        """Rows in another order, the last column first."""
        return x[order] if x.ndim == 1 else jnp.roll(x[order], 1, axis=1)

    loss, gradient = value_and_gradient(algorithm, given)
    moved_loss, moved = value_and_gradient(algorithm, jax.tree.map(move, given))
    np.testing.assert_allclose(moved_loss, loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved, move(gradient), rtol=1e-6)


@pytest.mark.parametrize("kind", objectives.BASELINES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=12, max_size=12),
    st.sampled_from([1e-3, 1.0, 1e4]), st.sampled_from([2, 4, 6]),
)
def test_a_groups_advantages_sum_to_zero(kind, unit, scale, size):
    """Within float32's rounding of sums of that size, whatever the unit of the rewards."""
    rewards = np.asarray(unit, np.float32) * np.float32(scale)
    advantages = np.asarray(objectives.group_advantages(rewards, size, kind), np.float64).reshape(-1, size)
    bound = 4 * size * np.finfo(np.float32).eps * np.abs(advantages).max(axis=1)
    # Rounding happens at the size of the rewards: after a division it counts as often as they were scaled up.
    spread = np.abs(advantages).max(axis=1) / np.maximum(np.ptp(rewards.reshape(-1, size), axis=1), 1e-30)
    bound += 4 * size * np.finfo(np.float32).eps * np.abs(rewards.reshape(-1, size)).max(axis=1) * spread
    assert np.all(np.abs(advantages.sum(axis=1)) <= bound + 1e-30)


@pytest.mark.parametrize("kind", objectives.BASELINES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1), min_size=12, max_size=12), st.permutations(range(3)), st.permutations(range(4)))
def test_the_order_of_groups_and_of_a_groups_rows_changes_nothing(kind, rewards, groups, rows):
    rewards = np.asarray(rewards, np.float32).reshape(3, 4)
    advantages = np.asarray(objectives.group_advantages(rewards.ravel(), 4, kind)).reshape(3, 4)
    moved = rewards[list(groups)][:, list(rows)]
    found = np.asarray(objectives.group_advantages(moved.ravel(), 4, kind)).reshape(3, 4)
    np.testing.assert_allclose(found, advantages[list(groups)][:, list(rows)], rtol=1e-6)
