"""The critic's update: what it regresses on, microbatches, precisions, and a state of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import token_values
from jaxrl_fp16.objectives import get_algorithm, value_loss
from jaxrl_fp16.precision import get_precision

pytestmark = pytest.mark.usefixtures("quick_compile")

PPO = get_algorithm("ppo")


def test_the_loss_is_that_of_value_loss(toy):
    batch = toy.batch()
    policy = get_precision("fp32").policy
    values = token_values(toy.critic, toy.critic_params, batch.tokens, batch.mask, policy=policy)
    expected, _ = value_loss(PPO, values, batch.values, batch.returns, batch.response_mask, max_new_tokens=19)
    _, metrics = toy.value_update()(toy.start(params=toy.critic_params), batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert {"value_loss", "value_error", "value_clip_fraction", "grad_norm", "loss_scale"} <= set(metrics)


def test_every_microbatch_size_gives_the_step_of_the_whole_batch(toy):
    step = lambda size: toy.value_update(microbatch_size=size)(toy.start(params=toy.critic_params), toy.batch())
    (_, found), (_, expected) = step(4), step(8)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_values_approach_their_returns(toy):
    returns = jnp.where(jnp.arange(8) < 4, 1.0, -1.0)[:, None] * jnp.ones((8, 20))
    update, state, errors = toy.value_update("fp16"), toy.start("fp16", toy.critic_params), []
    for _ in range(40):
        # Old values far from what is learnt would let `value_clip` hide the error.
        state, metrics = update(state, toy.batch(returns=returns, values=returns))
        errors.append(float(metrics["value_error"]))
    assert errors[0] == 1.0 and errors[-1] < 0.3
    assert update._cache_size() == 1


def test_no_token_changes_nothing(toy):
    batch = toy.batch(response_mask=jnp.zeros((8, 20), bool))
    state, metrics = toy.value_update("fp16")(toy.start("fp16", toy.critic_params), batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, toy.critic_params)
    assert float(metrics["empty"]) == 1 and int(state.loss_scale.good) == 0


def test_a_return_that_is_not_finite_skips_the_step(toy):
    batch = toy.batch()
    returns = batch.returns.at[0, 12].set(jnp.inf)
    update = toy.value_update("fp16")
    state, metrics = update(toy.start("fp16", toy.critic_params), batch.replace(returns=returns))
    jax.tree.map(np.testing.assert_array_equal, state.params, toy.critic_params)
    assert float(metrics["skipped"]) == 1 and float(state.loss_scale.loss_scale) == 2.0**14


@pytest.mark.parametrize("missing", ["values", "returns"])
def test_a_batch_without_targets_is_refused(toy, missing):
    with pytest.raises(ValueError, match="lacks values or returns"):
        toy.value_update()(toy.start(params=toy.critic_params), toy.batch(**{missing: None}))
