"""The definitions where they agree with formulas that other libraries publish, in float64, to 1e-5.

TRL: huggingface/trl, trl/trainer/grpo_trainer.py at d2b69d7 (2025, `loss_type` grpo, bnpo, dr_grpo,
`importance_sampling_level`, beta's k3). verl: volcengine/verl, verl/trainer/ppo/core_algos.py at
012be9d (2025, `agg_loss`, dual clip, GSPO, GRPO, RLOO, GAE before its whitening, `compute_rewards`).

Where they differ the definitions of this project hold: TRL adds 1e-4 to a group's standard deviation
and verl whitens GAE; neither is compared here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import objectives

pytestmark = pytest.mark.usefixtures("quick_compile")
B, T, LIMIT, GROUP = 8, 7, 7, 4
CLOSE = dict(rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def batch():
    """Right-padded rows, as both libraries have them; none is empty: verl's row mean divides by 0 there."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    old = -rng.exponential(size=(B, T))
    arrays = dict(
        logprobs=old + 0.4 * rng.normal(size=(B, T)), old_logprobs=old, advantages=rng.normal(size=B),
        ref_logprobs=old + 0.4 * rng.normal(size=(B, T)), rollout_logprobs=old,
    )
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {"mask": mask}


def ours(algorithm, batch):
    """`(loss, gradient of the log-probs)`."""
    def loss(logprobs, batch):
        return objectives.policy_loss(algorithm, **batch | {"logprobs": logprobs}, max_new_tokens=LIMIT)[0]

    return jax.jit(jax.value_and_grad(loss))(batch["logprobs"], batch)


def assert_agrees(algorithm, batch, published):
    """`published(lp, still, ...)`, with `still` in place of `lp.detach()`, against ours: value and gradient."""
    wide = {name: x.astype(np.float64) for name, x in batch.items()}
    lp = wide["logprobs"]
    loss, gradient = ours(algorithm, batch)
    np.testing.assert_allclose(loss, published(lp, lp, wide), **CLOSE)
    slopes = np.zeros(lp.shape)
    for at in np.ndindex(*lp.shape):
        step = np.zeros(lp.shape)
        step[at] = 1e-5
        slopes[at] = (published(lp + step, lp, wide) - published(lp - step, lp, wide)) / 2e-5
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-8)


# -- TRL -------------------------------------------------------------------------------------------------


def trl_loss(kind, level="token", beta=0.0, low=0.2, high=0.2):
    def loss(lp, still, batch):
        m, advantages = batch["mask"], batch["advantages"][:, None]
        log_ratio = lp - batch["old_logprobs"]
        if level == "sequence":
            # One weight for a row, with the gradient of all its tokens: GSPO without the token form.
            log_ratio = ((log_ratio * m).sum(-1) / np.maximum(m.sum(-1), 1))[:, None]
        ratio = np.exp(log_ratio)
        value = -np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
        d = batch["ref_logprobs"] - lp
        value = value + beta * (np.exp(d) - d - 1)
        if kind == "grpo":
            return ((value * m).sum(-1) / np.maximum(m.sum(-1), 1)).mean()
        return (value * m).sum() / (max(m.sum(), 1) if kind == "bnpo" else B * LIMIT)

    return loss


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    "kind, aggregation", [("grpo", "sequence_mean"), ("bnpo", "token_mean"), ("dr_grpo", "fixed_length")]
)
def test_trl_loss_types(batch, kind, aggregation, beta):
    algorithm = objectives.get_algorithm("grpo", aggregation=aggregation, kl_coef=beta, clip_high=0.28)
    assert_agrees(algorithm, batch, trl_loss(kind, beta=beta, high=0.28))


@pytest.mark.parametrize("clip", [0.2, 0.01])
def test_trl_sequence_level_is_gspo(batch, clip):
    """TRL lets the row's ratio carry the gradient, we its token form: under `sequence_mean` they are the same."""
    algorithm = objectives.get_algorithm("gspo", clip_low=clip, clip_high=clip)
    assert_agrees(algorithm, batch, trl_loss("grpo", "sequence", low=clip, high=clip))


# -- verl ------------------------------------------------------------------------------------------------


def verl_aggregate(mode, x, m):
    if mode == "token-mean":
        return (x * m).sum() / m.sum()
    rows = (x * m).sum(-1)
    if mode == "seq-mean-token-mean":
        return (rows / m.sum(-1)).mean()
    return rows.sum() / m.shape[-1]


def verl_loss(mode, low=0.2, high=0.2, dual=3.0):
    def loss(lp, still, batch):
        advantages = batch["advantages"][:, None] * np.ones_like(lp)
        ratio = np.exp(np.clip(lp - batch["old_logprobs"], -20, 20))
        clipped = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - low, 1 + high))
        bounded = np.minimum(-advantages * dual, clipped)
        return verl_aggregate(mode, np.where(advantages < 0, bounded, clipped), batch["mask"])

    return loss


@pytest.mark.parametrize("dual", [3.0, 1.3])
@pytest.mark.parametrize("mode, aggregation", [("token-mean", "token_mean"), ("seq-mean-token-mean", "sequence_mean")])
def test_verl_dual_clip(batch, mode, aggregation, dual):
    algorithm = objectives.get_algorithm("grpo", aggregation=aggregation, dual_clip=dual)
    assert_agrees(algorithm, batch, verl_loss(mode, dual=dual))


def test_verl_fixed_length_sums_rows_where_ours_takes_their_mean(batch):
    algorithm = objectives.get_algorithm("dr_grpo", dual_clip=3.0)
    published = verl_loss("seq-mean-token-sum-norm")
    assert_agrees(algorithm, batch, lambda *given: published(*given) / B)


def test_verl_gspo(batch):
    def loss(lp, still, batch):
        m, advantages = batch["mask"], batch["advantages"][:, None]
        row = ((still - batch["old_logprobs"]) * m).sum(-1) / np.maximum(m.sum(-1), 1)
        ratio = np.exp(lp - still + row[:, None])
        value = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - 3e-4, 1 + 4e-4))
        return verl_aggregate("seq-mean-token-mean", value, m)

    assert_agrees(objectives.get_algorithm("gspo"), batch, loss)


def test_verl_advantages():
    rewards = np.random.default_rng(1).normal(size=B).astype(np.float32)
    grpo, centred, rloo = (np.zeros(B) for _ in range(3))
    for start in range(0, B, GROUP):
        rows = slice(start, start + GROUP)
        group = rewards[rows].astype(np.float64)
        centred[rows] = group - group.mean()
        grpo[rows] = (group - group.mean()) / (group.std(ddof=1) + 1e-6)
        rloo[rows] = group * GROUP / (GROUP - 1) - group.mean() * GROUP / (GROUP - 1)
    for kind, expected in (("group_std", grpo), ("group_mean", centred), ("leave_one_out", rloo)):
        np.testing.assert_allclose(objectives.group_advantages(rewards, GROUP, kind), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95)])
def test_verl_gae_and_rewards(batch, gamma, lam):
    """Backwards over columns, observation tokens jumped; the KL penalty in the token's reward."""
    rng = np.random.default_rng(2)
    mask, old, ref = batch["mask"], batch["old_logprobs"], batch["ref_logprobs"]
    mask = mask & (rng.random(mask.shape) < 0.8)
    scores = rng.normal(size=B).astype(np.float32)
    values = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    on_last = objectives.rewards_on_last_token(scores, jnp.asarray(mask))
    rewards = objectives.kl_penalized_rewards(on_last, old, ref, mask, 0.1)

    expected = np.zeros((B, T))
    for b in range(B):
        for t in np.flatnonzero(mask[b]):
            expected[b, t] = -0.1 * (float(old[b, t]) - float(ref[b, t]))
        if mask[b].any():
            expected[b, np.flatnonzero(mask[b])[-1]] += scores[b]
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)

    after, following, advantages = np.zeros(B), np.zeros(B), np.zeros((B, T))
    for t in reversed(range(T)):
        m = mask[:, t]
        delta = expected[:, t] + gamma * after - values[:, t]
        found = delta + gamma * lam * following
        after = values[:, t] * m + (1 - m) * after
        following = found * m + (1 - m) * following
        advantages[:, t] = following * m
    computed, returns = objectives.gae(rewards, values, jnp.asarray(mask), gamma, lam)
    np.testing.assert_allclose(computed, advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, (advantages + values) * mask, rtol=1e-5, atol=1e-6)
