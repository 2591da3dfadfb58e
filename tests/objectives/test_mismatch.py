"""Every mismatch metric against float64 NumPy on the same float32 inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import objectives

KEYS = (
    "kl_k1", "kl_k3", "logprob_abs_diff_mean", "logprob_abs_diff_max", "prob_abs_diff_mean", "prob_diff_max",
    "prob_diff_min", "seq_log_ratio_mean", "seq_log_ratio_std", "seq_log_ratio_min", "seq_log_ratio_max",
    "seq_kl", "chi2_token", "chi2_seq", "ess_seq", "exact_fraction",
)  # fmt: skip
metrics_of = jax.jit(objectives.mismatch_metrics, static_argnames="prefix")


def reference(rollout, train, mask):
    """The definitions, in float64."""
    log_mu, log_pi = (np.where(mask, x, 0).astype(np.float64) for x in (rollout, train))
    d = (log_mu - log_pi)[mask]
    mu, pi = np.exp(log_mu[mask]), np.exp(log_pi[mask])
    near = np.where(np.abs(d) < 0.01, -d, 0)
    series = near**2 / 2 * (1 + near / 3 * (1 + near / 4 * (1 + near / 5)))
    k3 = np.where(np.abs(d) < 0.01, series, np.expm1(-d) + d)
    rows = (log_pi - log_mu).sum(1)[mask.any(1)]
    clamped = np.clip(rows, -20, 20)
    weights = np.exp(clamped)
    change = np.where(np.abs(d) < 1, mu * np.expm1(-d), pi - mu)
    values = (
        d.mean(), k3.mean(), np.abs(d).mean(), np.abs(d).max(), np.abs(change).mean(), change.max(),
        change.min(), rows.mean(), rows.std(), rows.min(), rows.max(),
        -rows.mean(), np.expm1(2 * np.clip(-d, -20, 20)).mean(), np.expm1(2 * clamped).mean(),
        weights.sum() ** 2 / (len(weights) * (weights**2).sum()), np.mean(d == 0),
    )  # fmt: skip
    return dict(zip(KEYS, values, strict=True))


def ragged(rows, columns, scale, seed=0):
    """Log-probs that differ by `scale`, with holes, an empty row, exact ties, and NaN where masked."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.7
    mask[1] = False
    rollout = -rng.exponential(size=mask.shape).astype(np.float32)
    train = (rollout + scale * rng.normal(size=mask.shape)).astype(np.float32)
    train[:, ::5] = rollout[:, ::5]
    return np.where(mask, rollout, np.nan), np.where(mask, train, np.nan), mask


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 1.0, 4.0])
def test_matches_the_definitions(scale):
    rollout, train, mask = ragged(7, 23, scale)
    computed, expected = metrics_of(rollout, train, mask), reference(rollout, train, mask)
    assert set(computed) == {f"mismatch/{key}" for key in KEYS}
    for key, value in expected.items():
        # A mean of both signs is as good as its terms, not as its own size.
        floor = 1e-6 * scale * (23 if key.startswith("seq") else 1)
        np.testing.assert_allclose(computed[f"mismatch/{key}"], value, rtol=2e-5, atol=floor, err_msg=key)


def test_the_prefix_and_integer_masks():
    rollout, train, mask = ragged(4, 5, 0.1)
    named = metrics_of(rollout, train, mask.astype(np.int32), prefix="mismatch_grad")
    plain = metrics_of(rollout, train, mask)
    assert {key.replace("mismatch_grad/", "mismatch/"): float(x) for key, x in named.items()} == {
        key: float(x) for key, x in plain.items()
    }


def test_no_mismatch_and_no_token():
    rollout, _, mask = ragged(4, 5, 0.0)
    same = {key.split("/")[1]: float(x) for key, x in metrics_of(rollout, rollout, mask).items()}
    assert same.pop("exact_fraction") == 1 and same.pop("ess_seq") == pytest.approx(1)
    assert not any(same.values())
    nothing = metrics_of(rollout, rollout, np.zeros_like(mask))
    assert len(nothing) == len(KEYS) and not any(float(x) for x in nothing.values())


def test_a_mean_of_many_tiny_values_is_accurate():
    rng = np.random.default_rng(3)
    rollout = np.full((4, 100_000), -0.5, np.float32)
    train = (rollout - rng.integers(1, 8, rollout.shape) * np.float32(2**-24)).astype(np.float32)
    mask = np.ones(rollout.shape, bool)
    computed, expected = metrics_of(rollout, train, mask), reference(rollout, train, mask)
    for key in ("kl_k1", "kl_k3", "prob_abs_diff_mean", "seq_kl"):
        np.testing.assert_allclose(computed[f"mismatch/{key}"], expected[key], rtol=1e-5, err_msg=key)


def test_impossible_tokens_stay_finite():
    rollout, train = jnp.asarray([[-1e4, -0.1]]), jnp.asarray([[-0.1, -1e4]])
    assert all(np.isfinite(float(x)) for x in metrics_of(rollout, train, jnp.ones((1, 2), bool)).values())
