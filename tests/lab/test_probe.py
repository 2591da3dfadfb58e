"""The table of a probe against NumPy's own least squares."""

import json

import numpy as np
import pytest

from jaxrl_fp16.lab.probe import probe_table, spread_and_drift

AT = np.array([1, 2, 3, 5, 8])


def test_spread_and_drift_are_those_of_a_fitted_line():
    values = np.array([0.3, 0.1, 0.4, 0.1, 0.5])
    (slope, _), covariance = np.polyfit(AT, values, 1, cov=True)
    expected = values.mean(), values.std(ddof=1), slope, np.sqrt(covariance[0, 0])
    np.testing.assert_allclose(spread_and_drift(AT, values), expected, rtol=1e-12)


def test_a_line_has_its_slope_and_no_error():
    np.testing.assert_allclose(spread_and_drift(AT, 2.0 - 0.5 * AT)[2:], (-0.5, 0.0), atol=1e-12)


def test_the_error_is_how_far_slopes_scatter():
    """Of 2,000 series without a drift, five steps each."""
    series = np.random.default_rng(0).normal(size=(2000, len(AT)))
    fits = np.array([spread_and_drift(AT, values) for values in series])
    np.testing.assert_allclose(np.sqrt(np.mean(fits[:, 3] ** 2)), fits[:, 2].std(), rtol=0.05)


@pytest.mark.parametrize("count, known", [(0, 0), (1, 1), (2, 3), (3, 4)])
def test_too_few_steps_carry_less(count, known):
    found = spread_and_drift(AT[:count], np.arange(count) ** 2.0)
    assert list(np.isfinite(found)) == [place < known for place in range(4)]


def test_the_table(tmp_path):
    def write(*records):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return probe_table(tmp_path)

    first = {"step": 0, "eval/own/accuracy": 0.5}
    steps = [
        {"step": step, "loss": 1.0, "reward": 0.5, "mismatch/kl_k3": 0.5 * step, "terms/staleness": kl}
        for step, kl in zip((1, 2, 3), (0.0, "NaN", 0.25))
    ]
    assert write(first, *steps) == [
        ("mismatch/kl_k3", "1", "0.5", "0.5", "0"),
        ("terms/staleness (not finite in 1 of 3 steps)", "0.125", "0.177", "0.125", "-"),
        ("reward", "0.5", "0", "0", "0"),
    ]
    assert write(first) == []
