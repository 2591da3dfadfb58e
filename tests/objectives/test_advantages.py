"""Advantages against float64 NumPy, and what must hold for any rewards."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import objectives

KINDS = tuple(objectives.BASELINES)
group_advantages = jax.jit(objectives.group_advantages, static_argnums=(1, 2))
# Multiples of 1/8, so that equal and unequal are the same in float32 and float64.
group_rewards = st.lists(st.lists(st.integers(-40, 40), min_size=4, max_size=4), min_size=3, max_size=3)
few = settings(max_examples=25, deadline=None, derandomize=True)


def reference(rewards, group_size, kind, valid=None):
    """The definitions, row by row."""
    rewards = np.asarray(rewards, np.float64)
    valid = np.ones(len(rewards), bool) if valid is None else valid
    centred, spread, others = (np.zeros(len(rewards)) for _ in range(3))
    for start in range(0, len(rewards), group_size):
        rows = [i for i in range(start, start + group_size) if valid[i]]
        if len(rows) < 2 or np.ptp(rewards[rows]) == 0:
            continue
        for i in rows:
            centred[i] = rewards[i] - rewards[rows].mean()
            others[i] = rewards[i] - rewards[[j for j in rows if j != i]].mean()
            spread[i] = rewards[rows].std(ddof=1)
    if kind == "leave_one_out":
        return others
    if kind == "group_std":
        return centred / (spread + 1e-6)
    return centred if kind == "group_mean" else centred / (centred[valid].std(ddof=1) + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_definition(kind):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=24).astype(np.float32)
    rewards[6:12] = 0.1
    np.testing.assert_allclose(
        group_advantages(rewards, 6, kind), reference(rewards, 6, kind), rtol=1e-5, atol=1e-6
    )


@pytest.mark.fault(14)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_reward_leave_their_group(kind):
    rewards = np.array([1, np.nan, 3, 7, np.nan, np.nan, 5, np.nan, 0, 2, 2, 0], np.float32)
    valid = ~np.isnan(rewards)
    expected = reference(np.nan_to_num(rewards), 4, kind, valid)
    advantages = group_advantages(rewards, 4, kind, valid)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(advantages[4:8]), "one valid row has no baseline"


def test_fixed_numbers():
    rewards = jnp.asarray([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(objectives.group_advantages(rewards, 4, "group_mean"), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(objectives.group_advantages(rewards, 4), [1.5, -0.5, -0.5, -0.5], rtol=1e-5)
    alone = objectives.group_advantages(rewards, 4, "leave_one_out")
    np.testing.assert_allclose(alone, [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e4 / 7, 0.0])
def test_equal_rewards_give_exactly_zero(kind, value):
    assert not np.any(group_advantages(np.full(16, value, np.float32), 8, kind))


@few
@given(group_rewards)
def test_a_group_sums_to_zero(groups):
    rewards = np.asarray(groups, np.float32).reshape(-1) / 8
    for kind in KINDS:
        sums = np.asarray(group_advantages(rewards, 4, kind)).reshape(-1, 4).sum(1)
        np.testing.assert_allclose(sums, 0, atol=1e-5)


@few
@given(group_rewards, st.permutations(range(3)))
def test_the_order_of_groups_changes_nothing(groups, order):
    rewards = np.asarray(groups, np.float32) / 8
    for kind in KINDS:
        advantages = np.asarray(group_advantages(rewards.reshape(-1), 4, kind)).reshape(-1, 4)
        shuffled = group_advantages(rewards[list(order)].reshape(-1), 4, kind)
        np.testing.assert_allclose(np.asarray(shuffled).reshape(-1, 4), advantages[list(order)], rtol=1e-6)


def test_a_common_offset_changes_little():
    rewards = np.array([0.25, 0.5, 1, 0], np.float32)
    np.testing.assert_allclose(group_advantages(rewards + 4096, 4), group_advantages(rewards, 4), rtol=1e-6)


@pytest.mark.parametrize(
    "rewards, group_size, kind, named",
    [
        (np.zeros(4), 1, "group_mean", "group_size is 1"),
        (np.zeros(5), 2, "group_mean", r"\(5,\)"),
        (np.zeros((2, 2)), 2, "group_mean", r"\(2, 2\)"),
        (np.zeros(4), 2, "gae", "'gae'.*group_std"),
    ],
)
def test_refusals_name_the_value(rewards, group_size, kind, named):
    with pytest.raises(ValueError, match=named):
        objectives.group_advantages(rewards, group_size, kind)


def gae_reference(rewards, values, mask, discount, gae_lambda):
    """GAE over each row's real columns, listed first."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        next_value = next_advantage = 0.0
        for t in np.flatnonzero(row)[::-1]:
            delta = float(rewards[b, t]) + discount * next_value - float(values[b, t])
            next_advantage = delta + discount * gae_lambda * next_advantage
            next_value = float(values[b, t])
            advantages[b, t], returns[b, t] = next_advantage, next_advantage + next_value
    return advantages, returns


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae_jumps_holes(discount, gae_lambda):
    rng = np.random.default_rng(1)
    mask = rng.random((5, 9)) < 0.6
    mask[2] = False
    rewards, values = (np.where(mask, rng.normal(size=mask.shape), np.nan).astype(np.float32) for _ in "rv")
    computed = jax.jit(objectives.gae)(rewards, values, jnp.asarray(mask, jnp.int32), discount, gae_lambda)
    for ours, expected in zip(computed, gae_reference(rewards, values, mask, discount, gae_lambda)):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_gae_without_discount_is_outcome_less_value():
    mask = jnp.asarray([[0, 1, 1, 1, 0]])
    rewards = objectives.rewards_on_last_token(jnp.asarray([2.0]), mask)
    values = jnp.asarray([[9.0, 0.5, 1.0, 1.5, 9.0]])
    advantages, returns = objectives.gae(rewards, values, mask)
    np.testing.assert_allclose(advantages, [[0, 1.5, 1, 0.5, 0]])
    np.testing.assert_allclose(returns, [[0, 2, 2, 2, 0]])


def test_rewards_on_last_token():
    mask = jnp.asarray([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    placed = objectives.rewards_on_last_token(np.array([3.0, np.nan, 5.0], np.float32), mask)
    np.testing.assert_array_equal(placed, [[0, 0, 0, 3, 0], [0] * 5, [0, 0, 0, 0, 5]])


def test_overlong_penalty_falls_linearly_over_its_zone():
    lengths = np.array([1, 80, 85, 90, 100])
    for zone in (20, 0.2):
        penalty = jax.jit(functools.partial(objectives.overlong_penalty, max_new_tokens=100, zone=zone))(lengths)
        np.testing.assert_allclose(penalty, [0, 0, -0.25, -0.5, -1], atol=1e-6)
    with pytest.raises(ValueError, match="120.*100"):
        objectives.overlong_penalty(lengths, 100, 120)
