"""The loss on preference pairs: against a float64 NumPy reference, against numbers of TRL, and its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import objectives
from jaxrl_fp16.objectives import merge_metrics, pair_normalizer

CONFIGS = [
    objectives.PreferenceConfig(), objectives.PreferenceConfig(beta=0.5, label_smoothing=0.2),
    objectives.PreferenceConfig(loss="ipo"), objectives.PreferenceConfig(loss="ipo", beta=0.7),
]
NAMES = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
MASKS = ("chosen_mask", "rejected_mask")


def pairs(seed=0, rows=6, columns=(9, 7)):
    """Arrays of `dpo_loss`; chosen and rejected need not have as many columns."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for side, width in zip(("chosen", "rejected"), columns):
        for head in ("", "ref_"):
            arrays[f"{head}{side}_logprobs"] = -2 * np.abs(generator.normal(size=(rows, width))).astype(np.float32)
        arrays[f"{side}_mask"] = generator.random((rows, width)) < 0.7
        arrays[f"{side}_mask"][:, 0] = True
    return arrays


def differences(arrays):
    """float64 `h` of each pair, as the definition reads."""
    total = 0.0
    for side, sign in (("chosen", 1), ("rejected", -1)):
        ratio = arrays[f"{side}_logprobs"].astype(np.float64) - arrays[f"ref_{side}_logprobs"]
        total = total + sign * (ratio * arrays[f"{side}_mask"]).sum(1)
    return total


def reference(config, h):
    """(loss, its derivative) of each pair in float64."""
    if config.loss == "ipo":
        return (h - 1 / (2 * config.beta)) ** 2, 2 * (h - 1 / (2 * config.beta))
    right, wrong = 1 / (1 + np.exp(-config.beta * h)), 1 / (1 + np.exp(config.beta * h))
    e = config.label_smoothing
    return -(1 - e) * np.log(right) - e * np.log(wrong), config.beta * (e * right - (1 - e) * wrong)


@functools.cache
def compiled(config):
    def loss(carriers, rest):
        return objectives.dpo_loss(config, **carriers, **rest)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def evaluate(config, arrays, **more):
    carriers = {name: arrays[name] for name in NAMES[:2]}
    rest = {name: value for name, value in arrays.items() if name not in carriers}
    (loss, metrics), grads = compiled(config)(carriers, rest | more)
    return loss, metrics, grads


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loss_and_gradient_are_the_definition(config):
    arrays = pairs()
    loss, metrics, grads = evaluate(config, arrays)
    h = differences(arrays)
    expected, slope = reference(config, h)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    for name, mask, sign in zip(NAMES, MASKS, (1, -1)):
        np.testing.assert_allclose(grads[name], sign * slope[:, None] / len(h) * arrays[mask], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["reward_margin"], config.beta * h.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (h > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["chosen_reward"] - metrics["rejected_reward"], metrics["reward_margin"],
                               rtol=1e-5)
    sums = [(arrays[name] * arrays[mask]).sum(1) for name, mask in zip(NAMES, MASKS)]
    np.testing.assert_allclose(metrics["chosen_logprob"], sums[0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rejected_logprob"], sums[1].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["chosen_likelier"], (sums[0] > sums[1]).mean(), rtol=1e-6)


# What `DPOTrainer.dpo_loss` of TRL 0.15.2 returns in float64 for these sums; it averages nothing itself.
SUMS = {
    "chosen_logprobs": [-12.5, -30.25, -4.0, -61.0], "rejected_logprobs": [-14.0, -28.0, -4.5, -9.0],
    "ref_chosen_logprobs": [-13.0, -29.5, -4.0, -58.0], "ref_rejected_logprobs": [-12.0, -29.75, -3.25, -12.0],
}


@pytest.mark.parametrize("config, expected", [
    (objectives.PreferenceConfig(), [0.5759394199, 0.8259394199, 0.6325990353, 1.0374879505]),
    (objectives.PreferenceConfig(label_smoothing=0.2), [0.6259394199, 0.7759394199, 0.6575990353, 0.9174879505]),
    (objectives.PreferenceConfig(beta=0.5), [0.2519290813, 1.5019290813, 0.4287006783, 3.0485873516]),
    (objectives.PreferenceConfig(loss="ipo"), [6.25, 56.25, 14.0625, 121.0]),
    (objectives.PreferenceConfig(loss="ipo", beta=0.5), [2.25, 12.25, 0.0625, 49.0]),
], ids=str)
def test_numbers_of_trl(config, expected):
    rewards = []
    for row, value in enumerate(expected):
        arrays = {name: np.array([[values[row]]], np.float32) for name, values in SUMS.items()}
        loss, metrics, _ = evaluate(config, arrays | {name: np.ones((1, 1), bool) for name in MASKS})
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        rewards.append(float(metrics["chosen_reward"]))
    np.testing.assert_allclose(rewards, config.beta * np.array([0.5, -0.75, 0.0, -3.0]), atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS[1:3], ids=str)
def test_what_stands_behind_a_mask_reaches_nothing(config):
    arrays = pairs()
    loss, metrics, grads = evaluate(config, arrays)
    dirty = {}
    for name, mask in zip(NAMES, MASKS * 2):
        anything = np.where(np.arange(arrays[name].shape[1]) % 2, np.nan, np.inf)
        dirty[name] = np.where(arrays[mask], arrays[name], anything)
    found = evaluate(config, arrays | dirty)
    jax.tree.map(np.testing.assert_array_equal, found, (loss, metrics, grads))


def test_a_pair_without_a_response_counts_nowhere():
    arrays = pairs()
    for name, row in (("chosen_mask", 1), ("rejected_mask", 4)):
        arrays[name][row] = False
    kept = {name: np.delete(value, (1, 4), axis=0) for name, value in arrays.items()}
    for config in CONFIGS[1:3]:
        loss, metrics, grads = evaluate(config, arrays)
        expected, means, _ = evaluate(config, kept)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), metrics, means)
        assert not np.asarray(grads["chosen_logprobs"])[[1, 4]].any()
        assert not np.asarray(grads["rejected_logprobs"])[[1, 4]].any()


def test_a_batch_without_a_pair_is_zero():
    arrays = pairs()
    arrays["chosen_mask"][:] = False
    for config in CONFIGS[1:3]:
        loss, metrics, grads = evaluate(config, arrays)
        assert loss == 0 and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((metrics, grads)))


def test_shares_of_microbatches_add_up():
    arrays = pairs()
    arrays["rejected_mask"][2] = False
    config = CONFIGS[1]
    loss, metrics, _ = evaluate(config, arrays)
    normalizer = pair_normalizer(*(jnp.asarray(arrays[name]) for name in MASKS))
    shares = [evaluate(config, {name: value[rows] for name, value in arrays.items()}, normalizer=normalizer)
              for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    np.testing.assert_allclose(sum(share[0] for share in shares), loss, rtol=1e-6)
    merged = merge_metrics(jax.tree.map(lambda *x: jnp.stack(x), *[share[1] for share in shares]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), merged, metrics)


def test_at_the_start_nothing_is_preferred():
    """Policy and reference are one: every margin is 0, which is half right."""
    arrays = pairs()
    same = {f"ref_{name}": arrays[name] for name in NAMES[:2]}
    loss, metrics, _ = evaluate(CONFIGS[0], arrays | same)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics["accuracy"] == 0.5 and metrics["reward_margin"] == 0


def test_extreme_pairs_are_finite():
    arrays = pairs()
    arrays["chosen_logprobs"] = arrays["chosen_logprobs"] - 1e6
    for config in CONFIGS:
        loss, _, grads = evaluate(config, arrays)
        assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_smoothing_goes_with_sigmoid_alone():
    with pytest.raises(ValueError, match="label_smoothing is 0.1 with loss 'ipo'; allowed: 0"):
        objectives.PreferenceConfig(loss="ipo", label_smoothing=0.1)
