"""A train state owns its arrays and holds everything in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.updates import init_train_state


def pointers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.fixture
def given(toy):
    return toy.params, get_precision("fp16").loss_scale, jnp.array([1, 2], jnp.uint32)


def test_a_state_shares_no_buffer_with_what_it_was_made_of(toy, given):
    params, loss_scale, key = given
    state = init_train_state(params, toy.optimizer, loss_scale, key)
    assert not pointers(state) & pointers(given)
    assert len(pointers(state)) == len(jax.tree.leaves(state))  # donated whole, so nothing is held twice
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.loss_scale, state.key), given)
    assert int(state.step) == 0


def test_a_typed_key_is_taken(toy):
    state = init_train_state(toy.params, toy.optimizer, get_precision("fp16").loss_scale, jax.random.key(3))
    assert jax.random.key_data(state.key).tolist() == [0, 3]


def test_without_copy_the_parameters_are_handed_over(toy, given):
    params, loss_scale, key = given
    state = init_train_state(params, toy.optimizer, loss_scale, key, copy=False)
    assert pointers(state.params) == pointers(params)
    assert not pointers(state.loss_scale) & pointers(loss_scale)


def test_two_states_of_one_precision_are_donated_one_by_one(toy):
    """Policy and critic start from the same loss scale and key."""
    scale, key = get_precision("fp16").loss_scale, jax.random.key(0)
    both = toy.params, toy.critic_params
    states = [init_train_state(params, toy.optimizer, scale, key) for params in both]
    step = jax.jit(lambda state: state.replace(step=state.step + 1), donate_argnums=0)
    assert [int(step(state).step) for state in states] == [1, 1]
    assert not scale.loss_scale.is_deleted()


def test_masters_and_moments_are_float32(toy):
    for name in ("fp16", "bf16", "fp32"):
        state = toy.start(name)
        floating = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert len(floating) == 3 * len(jax.tree.leaves(toy.params)) + 1  # and the loss scale
        assert set(floating) == {jnp.dtype("float32")}
