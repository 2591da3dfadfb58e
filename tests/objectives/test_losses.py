"""Policy and value losses against an independent float64 NumPy reference.

Gradients are central differences of that reference, token by token, in which
whatever is under `stop_gradient` is computed from a second copy of the log-probs.
"""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import objectives

pytestmark = pytest.mark.usefixtures("quick_compile")

L = 12
ARRAYS = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy")


def clamp(d):
    return np.clip(d, -20, 20)


def aggregate(algorithm, x, mask):
    """Row by row, as the definitions read."""
    if algorithm.aggregation == "token_mean":
        return (x * mask).sum() / max(mask.sum(), 1)
    lengths = np.maximum(mask.sum(1), 1) if algorithm.aggregation == "sequence_mean" else L
    return ((x * mask).sum(1) / lengths).mean()


def surrogate(algorithm, ratio, advantages):
    clipped = np.clip(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = -np.minimum(ratio * advantages, clipped * advantages)
    if algorithm.dual_clip:
        loss = np.where(advantages < 0, np.minimum(loss, -algorithm.dual_clip * advantages), loss)
    return loss


def token_loss(algorithm, lp, fixed, old, advantages, mask):
    if algorithm.loss == "ppo_clip":
        return surrogate(algorithm, np.exp(clamp(lp - old)), advantages)
    if algorithm.loss == "gspo":
        mean = ((fixed - old) * mask).sum(1) / np.maximum(mask.sum(1), 1)
        return surrogate(algorithm, np.exp(clamp(mean))[:, None] * np.exp(lp - fixed), advantages)
    if algorithm.loss == "cispo":
        weight = np.clip(np.exp(clamp(fixed - old)), 1 - algorithm.clip_low, 1 + algorithm.clip_high)
        return -weight * advantages * lp
    assert algorithm.loss == "pg", f"no reference for the loss {algorithm.loss}"
    return -advantages * lp


def raw_ratio(algorithm, fixed, old, mu, mask):
    d = ((fixed if algorithm.loss == "pg" else old) - mu) * mask
    return np.exp(clamp(d if algorithm.level == "token" else d.sum(1, keepdims=True)))


def weights(algorithm, w):
    return {
        "none": lambda: np.ones_like(w),
        "is": lambda: w,
        "tis": lambda: np.minimum(w, algorithm.cap),
        "mis": lambda: w * (w <= algorithm.cap),
        "icepop": lambda: w * ((algorithm.floor <= w) & (w <= algorithm.cap)),
    }[algorithm.importance]()


def estimate(kl, d):
    series = d**2 / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5)))
    k3 = np.where(np.abs(d) < 0.01, series, np.exp(clamp(d)) - 1 - clamp(d))
    return {"k1": -d, "k2": d**2 / 2, "k3": k3}[kl]


def terms(algorithm, lp, fixed, old, mu, ref, entropy, advantages, mask):
    """float64 [B,T]: what is aggregated into the loss at `lp`, with `fixed` under every stop_gradient."""
    w = weights(algorithm, raw_ratio(algorithm, fixed, old, mu, mask))
    total = w * token_loss(algorithm, lp, fixed, old, advantages, mask) - algorithm.entropy_coef * entropy
    if algorithm.kl_in == "loss":
        total += algorithm.kl_coef * estimate(algorithm.kl, ref - lp)
    return total


def shares(algorithm, mask):
    """[B,T]: what one token adds to the aggregate."""
    ones = np.eye(mask.size).reshape(-1, *mask.shape)
    return np.array([aggregate(algorithm, one, mask) for one in ones]).reshape(mask.shape)


def slopes(f, x, step=1e-6):
    """Central differences of `f`, elementwise at `x`: a token's loss moves with its own log-prob alone,
    and beside a large token the digits of a small one are kept."""
    return (f(x + step) - f(x - step)) / (2 * step)


def ragged(scale, seed=0, rows=6, columns=8, per_token=False):
    """Arguments of `policy_loss`: holes, an empty row, and NaN wherever the mask is 0."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.7
    mask[2] = False
    old = -rng.exponential(size=mask.shape)
    arrays = {
        "logprobs": old + scale * rng.normal(size=mask.shape),
        "old_logprobs": old,
        "rollout_logprobs": old + scale * rng.normal(size=mask.shape),
        "ref_logprobs": old + scale * rng.normal(size=mask.shape),
        "entropy": rng.exponential(size=mask.shape),
    }
    arrays = {name: np.where(mask, x, np.nan).astype(np.float32) for name, x in arrays.items()}
    advantages = rng.normal(size=mask.shape if per_token else rows)
    advantages = np.where(mask if per_token else mask.any(1), advantages, np.nan).astype(np.float32)
    return {**arrays, "advantages": advantages, "mask": mask}


def reference_of(algorithm, batch):
    """`(loss, gradient of lp, gradient of the entropy)` by the reference."""
    mask = batch["mask"]
    lp, old, mu, ref, entropy = (np.where(mask, batch[name], 0).astype(np.float64) for name in ARRAYS)
    advantages = batch["advantages"] if batch["advantages"].ndim == 2 else batch["advantages"][:, None]
    advantages = np.where(mask, advantages, 0).astype(np.float64)
    of = functools.partial(terms, algorithm, old=old, mu=mu, ref=ref, advantages=advantages, mask=mask)
    share = shares(algorithm, mask)
    return (
        aggregate(algorithm, of(lp=lp, fixed=lp, entropy=entropy), mask),
        share * slopes(lambda x: of(lp=x, fixed=lp, entropy=entropy), lp),
        share * slopes(lambda x: of(lp=lp, fixed=lp, entropy=x), entropy),
    )


def evaluate(algorithm, batch, **more):
    """`((loss, metrics), (gradient of lp, gradient of the entropy))` by the library."""
    batch = {name: jnp.asarray(x) for name, x in batch.items()}

    def loss(logprobs, entropy):
        changed = {**batch, "logprobs": logprobs, "entropy": entropy}
        return objectives.policy_loss(algorithm, **changed, max_new_tokens=L, **more)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(batch["logprobs"], batch["entropy"])


def assert_matches(algorithm, batch):
    (loss, metrics), gradients = evaluate(algorithm, batch)
    expected, *exact = reference_of(algorithm, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-7)
    for gradient, slope in zip(gradients, exact):
        # Central differences are good to 1e-9; nothing else is forgiven where a slope is 0.
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-9)
    assert all(np.isfinite(x) for x in metrics.values())
    return metrics


@pytest.mark.parametrize("scale", [1e-4, 0.3, 4.0])
@pytest.mark.parametrize("name", objectives.PRESETS)
def test_presets(name, scale):
    """Log ratios near 0 and far from it; an advantage for a row, and for a token."""
    for per_token in (False, True):
        assert_matches(objectives.get_algorithm(name), ragged(scale, per_token=per_token))


@pytest.mark.parametrize("kl", objectives.KL_ESTIMATORS)
@pytest.mark.parametrize("name", objectives.PRESETS)
def test_every_estimator_in_every_presets_loss(name, kl):
    assert_matches(objectives.get_algorithm(name, kl=kl, kl_coef=0.3), ragged(0.3, seed=7))


VARIANTS = [
    ("grpo", {"dual_clip": 1.5}),
    ("grpo", {"kl_coef": 0.1}),
    ("grpo", {"kl_coef": 0.1, "kl": "k1", "aggregation": "token_mean"}),
    ("grpo", {"kl_coef": 0.1, "kl": "k2", "aggregation": "fixed_length"}),
    ("grpo", {"kl_coef": 0.1, "kl_in": "reward"}),
    ("grpo", {"entropy_coef": 0.01, "kl_coef": 1e-3}),
    ("grpo", {"entropy_coef": -0.01}),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.2, "importance": "is", "level": "sequence"}),
    ("gspo", {"importance": "icepop", "cap": 2.0, "floor": 0.5}),
    ("cispo", {"clip_low": 0.3, "clip_high": 0.3, "importance": "tis", "cap": 1.1}),
    ("reinforce", {"importance": "icepop", "cap": 1.5, "floor": 0.7, "aggregation": "sequence_mean"}),
    ("reinforce", {"importance": "mis", "cap": 1.0, "aggregation": "token_mean"}),
]


@pytest.mark.parametrize("scale", [1e-4, 0.3, 4.0])
@pytest.mark.parametrize("name, overrides", VARIANTS)
def test_variants(name, overrides, scale):
    assert_matches(objectives.get_algorithm(name, **overrides), ragged(scale, seed=1))


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_beyond_the_clamp_the_ratio_is_constant(name):
    batch = ragged(0.1)
    _, (unmoved, _) = evaluate(objectives.get_algorithm(name), batch)
    batch["old_logprobs"][0] -= 30
    batch["old_logprobs"][1] += 30
    batch["advantages"][:2] = -1, 1  # signs that clip neither row
    (loss, metrics), (gradient, _) = evaluate(objectives.get_algorithm(name), batch)
    np.testing.assert_allclose(loss, np.exp(20) / 6, rtol=1e-4)
    assert metrics["ratio_clamp_count"] == (2 if name == "gspo" else batch["mask"][:2].sum())
    assert not np.any(gradient[:2])
    np.testing.assert_array_equal(gradient[2:], unmoved[2:])


@pytest.mark.parametrize("name", ["grpo", "gspo", "dapo"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_unclipped_ratio_has_the_whole_gradient(name, advantage):
    """At log ratio 0 exactly: the `min` ties, and jnp.minimum would halve the gradient."""
    lp = jnp.asarray([[-1.0, -2.0]])
    batch = {"logprobs": lp, "old_logprobs": lp, "rollout_logprobs": lp, "entropy": lp}
    batch |= {"advantages": jnp.asarray([advantage]), "mask": jnp.ones((1, 2), bool)}
    (loss, _), (gradient, _) = evaluate(objectives.get_algorithm(name), batch)
    np.testing.assert_allclose(loss, -advantage)
    np.testing.assert_allclose(gradient, np.full((1, 2), -advantage / 2))


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_microbatches_sum_to_the_minibatch(name):
    algorithm = objectives.get_algorithm(name, kl_coef=0.1, entropy_coef=0.01)
    batch = ragged(0.5, seed=2)
    (loss, metrics), (gradient, _) = evaluate(algorithm, batch)
    normalizer = objectives.normalizer_of(batch["mask"])
    # The second microbatch is the empty row alone.
    parts = [{key: x[rows] for key, x in batch.items()} for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
    evaluated = [evaluate(algorithm, part, normalizer=normalizer) for part in parts]
    np.testing.assert_allclose(sum(part[0][0] for part in evaluated), loss, rtol=1e-5)
    joined = np.concatenate([part[1][0] for part in evaluated])
    np.testing.assert_allclose(joined, gradient, rtol=1e-5, atol=1e-8)
    merged = objectives.merge_metrics(jax.tree.map(lambda *x: jnp.stack(x), *(part[0][1] for part in evaluated)))
    assert set(merged) == set(metrics)
    for key, value in metrics.items():
        np.testing.assert_allclose(merged[key], value, rtol=1e-5, atol=1e-7, err_msg=key)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.sampled_from(["grpo", "gspo", "cispo", "pg_seq_tis", "grpo_icepop", "ppo"]))
def test_what_is_masked_changes_nothing(seed, name):
    algorithm = objectives.get_algorithm(name, kl_coef=0.1)
    batch = ragged(0.5, seed=seed, per_token=True)
    rng = np.random.default_rng(seed)

    def fill(x):
        return np.where(batch["mask"], x, 10 * rng.normal(size=x.shape)).astype(np.float32)

    filled = {key: x if key == "mask" else fill(x) for key, x in batch.items()}
    computed, expected = evaluate(algorithm, filled), evaluate(algorithm, batch)
    jax.tree.map(np.testing.assert_array_equal, computed, expected)


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_no_token_at_all_gives_zero(name):
    batch = ragged(0.5) | {"mask": np.zeros((6, 8), np.int32)}
    (loss, metrics), gradients = evaluate(objectives.get_algorithm(name, kl_coef=0.1), batch)
    assert loss == 0 and not any(np.any(x) for x in gradients)
    assert not any(float(x) for x in metrics.values())


def test_metrics_against_the_reference():
    algorithm = objectives.get_algorithm("grpo_token_tis", cap=1.2, kl_coef=0.1)
    batch = ragged(0.5, seed=3)
    metrics, mask = assert_matches(algorithm, batch), batch["mask"]
    lp, old, mu, ref, entropy = (batch[name].astype(np.float64)[mask] for name in ARRAYS)
    advantages = np.broadcast_to(batch["advantages"][:, None], mask.shape)[mask]
    w, ratio = np.exp(old - mu), np.exp(lp - old)
    clipped = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    expected = {
        "importance_mean": w.mean(), "importance_min": w.min(), "importance_max": w.max(),
        "importance_cut_fraction": (w > 1.2).mean(), "importance_clamp_count": 0,
        "importance_ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "ratio_mean": ratio.mean(), "ratio_min": ratio.min(), "ratio_max": ratio.max(),
        "ratio_clamp_count": 0, "clip_fraction": clipped.mean(), "approx_kl": estimate("k3", lp - old).mean(),
        "kl": estimate("k3", ref - lp).mean(), "kl_clamp_count": 0, "entropy": entropy.mean(),
        "policy_loss": evaluate(objectives.get_algorithm("grpo_token_tis", cap=1.2), batch)[0][0],
    }  # fmt: skip
    assert set(metrics) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, err_msg=key)


def test_sequence_ratios_are_counted_by_rows():
    batch = ragged(0.5, seed=4)
    metrics = assert_matches(objectives.get_algorithm("pg_seq_mis", cap=1.0), batch)
    d = np.where(batch["mask"], batch["logprobs"] - batch["rollout_logprobs"], 0).astype(np.float64)
    w = np.exp(d.sum(1))[batch["mask"].any(1)]
    np.testing.assert_allclose(metrics["importance_mean"], w.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["importance_cut_fraction"], (w > 1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["importance_ess"], w.sum() ** 2 / (len(w) * (w**2).sum()), rtol=1e-4)


def test_jits_with_a_static_algorithm_and_integer_masks():
    batch = ragged(0.3)
    compiled = jax.jit(objectives.policy_loss, static_argnums=0, static_argnames="max_new_tokens")
    integers = batch | {"mask": batch["mask"].astype(np.int32)}
    loss, _ = compiled(objectives.get_algorithm("gspo"), **integers, max_new_tokens=L)
    np.testing.assert_allclose(loss, evaluate(objectives.get_algorithm("gspo"), batch)[0][0], rtol=1e-5)


@pytest.mark.parametrize(
    "overrides, changes, named",
    [
        ({"kl_coef": 0.1}, {"ref_logprobs": None}, "ref_logprobs is None; kl_coef 0.1"),
        ({"entropy_coef": 0.1}, {"entropy": None}, "entropy is None; entropy_coef 0.1"),
        ({}, {"advantages": np.zeros(())}, r"advantages of shape \(\)"),
    ],
)
def test_missing_inputs_are_named(overrides, changes, named):
    with pytest.raises(ValueError, match=named):
        objectives.policy_loss(objectives.get_algorithm("grpo", **overrides), **ragged(0.1) | changes, max_new_tokens=L)


def test_only_what_clamps_counts_clamps():
    batch = ragged(0.1)
    batch["ref_logprobs"][0] -= 30
    for kl, counts in (("k1", None), ("k2", None), ("k3", batch["mask"][0].sum())):
        (_, metrics), _ = evaluate(objectives.get_algorithm("grpo", kl=kl, kl_coef=0.1), batch)
        assert metrics.get("kl_clamp_count") == counts


@pytest.mark.parametrize("aggregation", objectives.AGGREGATIONS)
def test_value_loss(aggregation):
    algorithm = objectives.get_algorithm("ppo", aggregation=aggregation)
    rng = np.random.default_rng(5)
    mask = ragged(0.1)["mask"]
    old, values, returns = (
        np.where(mask, size * rng.normal(size=mask.shape), np.nan).astype(np.float32) for size in (1, 0.3, 1)
    )
    values += old
    v_old, v, target = (np.where(mask, x, 0).astype(np.float64) for x in (old, values, returns))

    def per_token(v):
        clipped = np.clip(v, v_old - 0.2, v_old + 0.2)
        return 0.5 * np.maximum((v - target) ** 2, (clipped - target) ** 2)

    def loss(v, rows=slice(None), normalizer=None):
        constants = old[rows], returns[rows], jnp.asarray(mask[rows])
        return objectives.value_loss(algorithm, v[rows], *constants, max_new_tokens=L, normalizer=normalizer)

    (computed, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(values))
    np.testing.assert_allclose(computed, aggregate(algorithm, per_token(v), mask), rtol=1e-5)
    np.testing.assert_allclose(gradient, shares(algorithm, mask) * slopes(per_token, v), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(metrics["value_error"], ((v - target)[mask] ** 2).mean(), rtol=1e-5)
    halves = [loss(values, rows, objectives.normalizer_of(mask))[0] for rows in (slice(0, 3), slice(3, 6))]
    np.testing.assert_allclose(sum(halves), computed, rtol=1e-5)


def test_an_unmoved_value_has_the_whole_gradient():
    ones = jnp.ones((1, 2))
    gradient = jax.grad(
        lambda v: objectives.value_loss(objectives.get_algorithm("ppo"), v, ones, 3 * ones, ones, max_new_tokens=L)[0]
    )(ones)
    np.testing.assert_allclose(gradient, -ones)
