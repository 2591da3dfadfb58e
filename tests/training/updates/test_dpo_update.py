"""DPO's update: the loss falls, microbatches add up, pairs stay together, every precision runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.objectives import PreferenceConfig, dpo_loss
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.updates import PreferencePairs, init_train_state, make_dpo_update, make_pair_scorer

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG, IPO = PreferenceConfig(label_smoothing=0.1), PreferenceConfig(loss="ipo")
# A step follows the gradient's own size; Adam would divide one that is all rounding by itself.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


@functools.cache
def program(toy, name="fp32", size=2, config=CONFIG):
    return make_dpo_update(toy.model, get_precision(name).policy, config, OPTIMIZER, microbatch_size=size)


def start(toy, name="fp32"):
    return init_train_state(toy.params, OPTIMIZER, get_precision(name).loss_scale, jax.random.key(0))


@functools.cache
def scorer(toy, name="fp32"):
    return make_pair_scorer(toy.model, get_precision(name).policy, microbatch_size=2)


def pairs_of(toy, name="fp32", **fields):
    """4 pairs with their reference log-probs under the toy's parameters."""
    batch = toy.batch()
    shaped = [x.reshape(4, 2, -1) for x in (batch.tokens, batch.mask, batch.response_mask)]
    pairs = PreferencePairs(*shaped).replace(**fields)
    return pairs.replace(ref_logprobs=scorer(toy, name)(toy.params, pairs))


def parameters(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])


@pytest.mark.parametrize("name, config", [("fp16", CONFIG), ("bf16", IPO), ("fp32", CONFIG)],
                         ids=["fp16", "bf16 ipo", "fp32"])
def test_every_precision_learns_to_prefer(toy, name, config):
    pairs, state = pairs_of(toy, name), start(toy, name)
    steps = []
    for _ in range(6):
        state, metrics = program(toy, name, config=config)(state, pairs)
        steps.append({key: float(value) for key, value in metrics.items()})
        assert steps[-1]["skipped"] == steps[-1]["empty"] == 0
    # Policy and reference are one at first, but for what separates two programs in a half type.
    first = 25 if config is IPO else np.log(2)
    assert steps[0]["loss"] == pytest.approx(first, rel=1e-5 if name == "fp32" else 1e-2)
    assert steps[1]["loss"] < 0.99 * first  # one step
    assert steps[-1]["loss"] < 0.9 * first and steps[-1]["accuracy"] == 1 and steps[-1]["reward_margin"] > 0.2
    assert steps[0]["loss_scale"] == (2**15 if name == "fp16" else 1) and int(state.step) == 6


def test_every_microbatch_size_gives_the_step_of_the_whole_batch(toy):
    pairs = pairs_of(toy)
    # Another reference than the policy, so that the pairs differ in their gradients; and a pair that counts nowhere.
    noise = 0.3 * np.random.default_rng(5).normal(size=pairs.tokens.shape).astype(np.float32)
    pairs = pairs.replace(ref_logprobs=pairs.ref_logprobs + noise,
                          response_mask=pairs.response_mask.at[1, 0].set(False))
    results = {}
    for size in (1, 2, 4):
        state, metrics = program(toy, size=size)(start(toy), pairs)
        results[size] = parameters(state), metrics
    whole, expected = results.pop(4)
    assert np.abs(whole - parameters(start(toy))).max() > 1e-2
    for found, metrics in results.values():
        assert metrics.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def test_the_loss_is_that_of_the_scored_rows(toy):
    pairs = pairs_of(toy)
    pairs = pairs.replace(ref_logprobs=pairs.ref_logprobs - 0.1 * jnp.arange(20))
    lp = scorer(toy)(toy.params, pairs)
    sides = {}
    for at, side in enumerate(("chosen", "rejected")):
        sides |= {f"{side}_logprobs": lp[:, at], f"ref_{side}_logprobs": pairs.ref_logprobs[:, at],
                  f"{side}_mask": pairs.response_mask[:, at]}
    expected, means = jax.jit(functools.partial(dpo_loss, CONFIG))(**sides)
    _, metrics = program(toy)(start(toy), pairs)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    for name in means:
        np.testing.assert_allclose(metrics[name], means[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_nan_off_the_responses_changes_nothing(toy):
    pairs = pairs_of(toy)
    dirty = pairs.replace(ref_logprobs=jnp.where(pairs.response_mask, pairs.ref_logprobs, jnp.nan))
    (one, first), (two, second) = (program(toy)(start(toy), each) for each in (pairs, dirty))
    np.testing.assert_array_equal(parameters(one), parameters(two))
    assert {key: float(value) for key, value in first.items()} == {key: float(value) for key, value in second.items()}


def test_a_batch_without_a_pair_changes_nothing(toy):
    state, _ = program(toy)(start(toy), pairs_of(toy))  # momentum that would move the weights
    before = parameters(state)
    empty = pairs_of(toy)
    empty = empty.replace(response_mask=empty.response_mask.at[:, 1].set(False))
    state, metrics = program(toy)(state, empty)
    np.testing.assert_array_equal(parameters(state), before)
    assert float(metrics["empty"]) == 1 and float(metrics["loss"]) == 0 and int(state.step) == 1


def test_pairs_without_a_reference_are_refused(toy):
    pairs = pairs_of(toy).replace(ref_logprobs=None)
    with pytest.raises(ValueError, match="the pairs lack ref_logprobs"):
        program(toy)(start(toy), pairs)
