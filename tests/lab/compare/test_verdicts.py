"""Statistics over seeds, on numbers whose answer is known."""

import math

import numpy as np
import pytest

from jaxrl_fp16.lab.compare.verdicts import (
    find_collapse, hold_together, pair, paired_t, sentence, size, standing, turned,
)

SEEDS = range(5)


def with_t(t, n):
    """`n` differences whose mean is `t` standard errors."""
    noise = np.random.default_rng(0).normal(size=n)
    noise -= noise.mean()
    return noise / noise.std(ddof=1) + t / math.sqrt(n)


@pytest.mark.parametrize("degrees, quantile", [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (29, 2.04523)])
def test_quantiles_of_the_printed_table(degrees, quantile):
    for t in (quantile, -quantile):
        _, error, half, p = paired_t(with_t(t, degrees + 1))
        assert half / error == pytest.approx(quantile, abs=1e-4) and p == pytest.approx(0.05, abs=1e-5)


def test_closed_forms_of_the_tail():
    """One degree: 1 - 2 atan(t) / pi; two: 1 - t / sqrt(2 + t²)."""
    for t in (0.0, 0.3, 2.0, 50.0):
        assert paired_t(with_t(t, 2))[3] == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-12)
        assert paired_t(with_t(t, 3))[3] == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


def test_a_paired_t_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 3.4641 with two degrees."""
    mean, error, half, p = paired_t([1.0, 2.0, 3.0])
    assert (mean, error) == pytest.approx((2, 1 / math.sqrt(3)))
    assert half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    assert p == pytest.approx(1 - math.sqrt(12) / math.sqrt(14), abs=1e-12)


def test_a_level_of_five_percent_is_one():
    """Of 2,000 pairs of three seeds that differ by noise alone, about one in twenty is called different."""
    generator = np.random.default_rng(0)
    found = sum(paired_t(generator.normal(size=3))[3] < 0.05 for _ in range(2000))
    assert 70 < found < 130


def values(mean, noise, seed=0):
    return dict(zip(SEEDS, mean + noise * np.random.default_rng(seed).normal(size=len(SEEDS))))


def verdict(pairing, held=True, tests=12):
    return sentence(pairing, "token KL", "fp16", "bf16", held, tests)


def test_a_known_difference_is_found():
    logs, more = values(math.log(1e-6), 0.2), values(0, 0.02, seed=1)
    small = {seed: math.exp(logs[seed]) for seed in SEEDS}
    large = {seed: 12 * small[seed] * math.exp(more[seed]) for seed in SEEDS}
    pairing = pair(small, large, ratio=True)
    assert pairing.ratio and pairing.p < 1e-4 and pairing.interval[0] < 1 / 12 < pairing.interval[1]
    assert verdict(pairing).startswith("fp16's token KL is 1") and "times smaller than bf16's" in verdict(pairing)
    assert "times larger than" in sentence(pair(large, small, ratio=True), "token KL", "bf16", "fp16", True, 1)
    assert verdict(pairing, held=False).endswith("taken alone; not beyond chance among 12 comparisons")


def test_seeds_are_paired():
    """Seeds that differ by far more than the sides do."""
    first = {seed: 10.0 * seed for seed in SEEDS}
    noise = values(0.03, 0.002)
    pairing = pair({seed: first[seed] + noise[seed] for seed in SEEDS}, first)
    assert pairing.p < 1e-3 and verdict(pairing).startswith("fp16's token KL is 0.0") and "higher" in verdict(pairing)


def test_noise_gives_no_difference():
    assert verdict(pair(values(0.5, 0.1), values(0.5, 0.1, seed=1))) == "no difference beyond seed noise"


@pytest.mark.parametrize("first, second, said", [
    ({0: 0.9}, {0: 0.1}, "one seed: no spread is known"),
    ({0: 0.9}, {0: 0.9}, "the same; one seed: no spread is known"),
    ({0: 0.9, 1: math.nan}, {0: 0.1, 1: 0.1}, "one seed: no spread is known"),
    ({0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}, "the same in every seed"),
    ({0: 0.9}, {1: 0.1}, "no seed ran on both sides"),
])
def test_what_no_verdict_can_be_given_on(first, second, said):
    assert verdict(pair(first, second, ratio=True)) == said


@pytest.mark.parametrize("first, second, held, how", [
    ({0: 0.9}, {0: 0.1}, False, "one seed"),
    ({0: 0.9}, {0: 0.9}, False, "same"),
    ({0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}, False, "same"),
    ({0: 0.9}, {1: 0.1}, False, "absent"),
    (values(0.5, 0.1), values(0.5, 0.1, seed=1), False, "noise"),
    (values(0.9, 0.01), values(0.1, 0.01, seed=1), False, "alone"),
    (values(0.9, 0.01), values(0.1, 0.01, seed=1), True, "held"),
])
def test_what_the_seeds_carry(first, second, held, how):
    assert standing(pair(first, second), held) == how


@pytest.mark.parametrize("ratio", [False, True])
def test_sides_can_be_exchanged(ratio):
    first, second = values(2.0, 0.1), values(1.0, 0.1, seed=1)
    one, other = turned(pair(first, second, ratio)), pair(second, first, ratio)
    assert (one.first, one.second) == (other.first, other.second) and size(one) == size(other)
    assert one.difference == pytest.approx(other.difference) and one.interval == pytest.approx(other.interval)
    assert turned(None) is None


def test_a_zero_has_no_logarithm():
    pairing = pair({0: 0.0, 1: 1e-9}, {0: 1e-6, 1: 2e-6}, ratio=True)
    assert not pairing.ratio and pairing.difference == pytest.approx(-1.4995e-6)


def test_equal_differences_carry_nothing():
    """Two sums of 128 in both of two seeds, as real runs had it: no noise is known, not none there."""
    assert paired_t([2 / 128, 2 / 128])[1:] == (0.0, None, None) and paired_t([0.0, 0.0])[1:] == (0.0, 0.0, 1.0)
    pairing = pair({0: 79 / 128, 1: 77 / 128}, {0: 77 / 128, 1: 75 / 128})
    assert standing(pairing, False) == "alike" and pairing.interval is None
    assert sentence(pairing, "accuracy", "a", "b", False, 3) == "by as much in every seed: no spread is known"


def test_several_tests_are_counted():
    """Holm: 0.004 is held against 0.05 / 4, 0.014 against 0.05 / 3, 0.03 against 0.05 / 2: the last fails."""
    assert hold_together([0.03, 0.004, None, 0.9, 0.014]) == [False, True, False, False, True]
    assert hold_together([]) == []


# -- collapse ------------------------------------------------------------------------------------


def course(*parts, rows=512):
    """Mean rewards of `rows` answers, right with a chance that goes through `parts`, (from, to, steps)."""
    chances = np.concatenate([np.linspace(*part) for part in parts])
    return np.random.default_rng(0).binomial(rows, chances) / rows


@pytest.mark.parametrize("parts, earliest, latest", [
    ([(0.5, 0.8, 200), (0.8, 0.2, 50), (0.2, 0.2, 100)], 201, 250),
    ([(0.5, 0.7, 60), (0.0, 0.0, 60)], 60, 75),
    ([(0.5, 0.9, 100), (0.9, 0.5, 300)], 150, 330),
], ids=["down and flat", "at once", "slowly"])
def test_a_collapse_is_found(parts, earliest, latest):
    assert earliest <= find_collapse(course(*parts)) <= latest


@pytest.mark.parametrize("parts", [
    [(0.5, 0.9, 300)], [(0.5, 0.5, 300)], [(0.05, 0.05, 60)], [(0.8, 0.7, 300)],
    [(0.5, 0.8, 200), (0.8, 0.2, 50), (0.2, 0.8, 50), (0.8, 0.8, 50)],
    [(0.5, 0.9, 8)],
], ids=["learns", "flat", "rarely right", "a little worse", "came back", "short"])
def test_what_is_no_collapse(parts):
    assert all(find_collapse(course(*parts, rows=rows)) is None for rows in (64, 512))


def test_rewards_that_are_not_finite_are_the_worst():
    rewards = course((0.5, 0.9, 100), (0.9, 0.9, 60))
    rewards[100:] = math.nan
    rewards[0] = 0.1
    assert 100 <= find_collapse(rewards) <= 106
    assert find_collapse([]) is None
