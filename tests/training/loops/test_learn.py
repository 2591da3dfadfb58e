"""What an iteration's advantages are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.objectives import gae, get_algorithm, group_advantages, rewards_on_last_token
from jaxrl_fp16.training.loops.learn import _advantages as advantages_of

LIMIT = 10
REWARDS = jnp.asarray([1.0, 0.0, 1.0, 1.0])
LENGTHS = jnp.asarray([4, 8, 9, 10])
MASK = jnp.arange(LIMIT) < LENGTHS[:, None]
VALID = jnp.ones(4, bool)
# Zone of 4 tokens: 0 up to length 6, then a quarter a token.
PENALISED = REWARDS + jnp.asarray([0.0, -0.5, -0.75, -1.0])


def of(algorithm, values=None, reference=None, old=None):
    old = jnp.zeros(MASK.shape) if old is None else old
    return jax.jit(advantages_of, static_argnums=(0, 1, 2))(
        algorithm, 2, LIMIT, REWARDS, LENGTHS, VALID, MASK, old, reference, values)


def test_the_overlong_penalty_is_part_of_the_reward():
    found, returns = of(get_algorithm("dr_grpo", overlong_penalty=4.0))
    np.testing.assert_allclose(found, group_advantages(PENALISED, 2, "group_mean"), rtol=1e-6)
    assert returns is None and not np.allclose(found, of(get_algorithm("dr_grpo"))[0])
    off, _ = of(get_algorithm("dr_grpo", overlong_penalty=0.0))
    np.testing.assert_array_equal(off, of(get_algorithm("dr_grpo"))[0])
    share, _ = of(get_algorithm("dr_grpo", overlong_penalty=0.4))
    np.testing.assert_allclose(share, found, rtol=1e-5)


def test_the_overlong_penalty_with_a_critic():
    values = jnp.full(MASK.shape, 0.25)
    found = of(get_algorithm("ppo", overlong_penalty=4.0), values)
    expected = gae(rewards_on_last_token(PENALISED, MASK), values, MASK, 1.0, 1.0)
    jax.tree.map(np.testing.assert_allclose, found, expected)


@pytest.mark.parametrize("name", ["dr_grpo", "ppo"])
def test_the_kl_in_the_reward_is_of_the_sampling_weights(name):
    """0.1 * (old - ref) a token: 0.05 for each, summed over the row where there is one reward a row."""
    old, reference = jnp.full(MASK.shape, -1.0), jnp.full(MASK.shape, -1.5)
    values = jnp.zeros(MASK.shape) if name == "ppo" else None
    found, _ = of(get_algorithm(name, kl_coef=0.1, kl_in="reward"), values, reference, old)
    if name == "ppo":
        expected, _ = gae(rewards_on_last_token(REWARDS, MASK) - 0.05 * MASK, values, MASK, 1.0, 1.0)
    else:
        expected = group_advantages(REWARDS - 0.05 * LENGTHS, 2, "group_mean")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
