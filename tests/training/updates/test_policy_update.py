"""The policy's update: microbatches, empty batches, learning, donation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.objectives import get_algorithm, policy_loss
from jaxrl_fp16.precision import get_precision

pytestmark = pytest.mark.usefixtures("quick_compile")

GRPO = get_algorithm("grpo")


def parameters(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


# -- what one step is ---------------------------------------------------------------------------------


def test_microbatches_give_the_step_and_the_metrics_of_the_whole_batch(toy):
    """With every term of the loss; test_presets.py has all presets and sizes."""
    algorithm, sizes = get_algorithm("grpo", kl_coef=0.1, entropy_coef=0.01), (2,)
    batch = toy.batch()
    # A row without a token and ragged lengths: a mean over a microbatch would be another number.
    batch = batch.replace(response_mask=batch.response_mask.at[3].set(False))
    results = {}
    for size in (*sizes, 8):
        state, metrics = toy.update(algorithm=algorithm, microbatch_size=size)(toy.start(), batch)
        results[size] = parameters(state), metrics
    whole, expected = results.pop(8)
    for found, metrics in results.values():
        assert metrics.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        # Adam divides a gradient by its own size: where it is all rounding, so is the step of 1e-2.
        np.testing.assert_allclose(found, whole, atol=2e-4)


def test_the_loss_and_its_gradient_are_those_of_policy_loss(toy):
    batch = toy.batch()

    def loss(params):
        policy = get_precision("fp32").policy
        logprobs = token_logprobs(toy.model, params, batch.tokens, batch.mask, policy=policy)
        return policy_loss(
            GRPO, logprobs=logprobs, old_logprobs=batch.old_logprobs, rollout_logprobs=batch.rollout_logprobs,
            advantages=batch.advantages, mask=batch.response_mask, max_new_tokens=10)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(toy.params)
    for name, tolerance in (("fp32", 1e-5), ("fp16", 1e-2)):
        _, metrics = toy.update(name)(toy.start(name), batch)
        np.testing.assert_allclose(metrics["loss"], value, rtol=tolerance)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=tolerance)


def test_metrics_hold_what_a_run_logs(toy):
    _, metrics = toy.update("fp16")(toy.start("fp16"), toy.batch())
    assert {"loss", "grad_norm", "loss_scale", "skipped", "empty", "policy_loss", "approx_kl", "ratio_mean",
            "clip_fraction"} <= set(metrics)
    assert {(leaf.dtype, leaf.shape) for leaf in metrics.values()} == {(jnp.dtype("float32"), ())}
    assert float(metrics["loss_scale"]) == 2.0**15 and float(metrics["skipped"]) == 0


def test_kept_log_probs_stand_in_the_batchs_order(toy):
    batch = toy.batch()
    policy = get_precision("fp32").policy
    score = jax.jit(lambda *args: token_logprobs(toy.model, *args, policy=policy, temperature=0.7))
    _, metrics = toy.update(microbatch_size=2, temperature=0.7, keep_logprobs=True)(toy.start(), batch)
    np.testing.assert_allclose(metrics["logprobs"], score(toy.params, batch.tokens, batch.mask), atol=1e-5)


# -- steps that are not taken ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, fields", [
    (GRPO, dict(advantages=jnp.zeros(8))),
    (GRPO, dict(response_mask=jnp.zeros((8, 20), bool))),
    (get_algorithm("grpo", kl_coef=0.1), dict(response_mask=jnp.zeros((8, 20), bool))),
], ids=["no advantage", "no token", "no token for the KL term"])
def test_a_batch_that_teaches_nothing_changes_nothing(toy, algorithm, fields):
    """Momentum and weight decay would move the weights all the same."""
    update = toy.update("fp16", algorithm)
    warm, _ = update(toy.start("fp16"), toy.batch())
    expected = jax.tree.map(np.asarray, (warm.params, warm.opt_state, warm.loss_scale, warm.step))
    state, metrics = update(warm, toy.batch(**fields))
    found = state.params, state.opt_state, state.loss_scale, state.step
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert float(metrics["empty"]) == 1 and float(metrics["skipped"]) == 0
    assert all(np.isfinite(value) for value in metrics.values())


def test_no_advantage_with_a_kl_term_is_a_step(toy):
    update = toy.update("fp16", get_algorithm("grpo", kl_coef=0.1))
    state, metrics = update(toy.start("fp16"), toy.batch(advantages=jnp.zeros(8)))
    assert float(metrics["empty"]) == 0 and int(state.step) == 1
    assert (parameters(state) != parameters(toy.start())).any()


def test_junk_off_the_response_does_not_matter(toy):
    batch = toy.batch()
    junk = {name: jnp.where(batch.response_mask, getattr(batch, name), jnp.nan)
            for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
    update = toy.update("fp16", get_algorithm("grpo", kl_coef=0.1))
    clean, _ = update(toy.start("fp16"), batch)
    found, _ = update(toy.start("fp16"), batch.replace(**junk))
    np.testing.assert_array_equal(parameters(found), parameters(clean))


def test_an_overflow_in_float16_is_skipped_and_halves_the_scale(toy):
    state, metrics = toy.update("fp16")(toy.start("fp16"), toy.batch(advantages=jnp.full(8, 1e7)))
    assert float(metrics["skipped"]) == 1 and float(state.loss_scale.loss_scale) == 2.0**14
    assert int(state.step) == 0
    np.testing.assert_array_equal(parameters(state), parameters(toy.start()))


# -- many steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_likely_tokens_become_likelier(toy, precision):
    """30 steps towards the first half of the rows and away from the second."""
    sign = jnp.where(jnp.arange(8) < 4, 1.0, -1.0)
    batch, update = toy.batch(advantages=sign), toy.update(precision, get_algorithm("reinforce"))
    state, losses = toy.start(precision, growth_interval=10), []
    for _ in range(30):
        state, metrics = update(state, batch)
        assert float(metrics["skipped"]) == 0
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1.0
    assert int(state.step) == 30
    assert float(state.loss_scale.loss_scale) == (2.0**18 if precision == "fp16" else 1.0)
    # Masters and moments are still float32.
    kept = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))}
    assert kept == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_the_state_is_donated_and_nothing_is_compiled_again(toy):
    update, state = toy.update("fp16"), toy.start("fp16")
    programs = []
    for seed in range(3):
        given = state
        state, _ = update(state, toy.batch(seed=seed))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        programs.append(update._cache_size())
    assert len(set(programs)) == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(toy.params))
