"""Run by test_mesh_update.py in a process that has 4 virtual devices."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxrl_fp16.models import (
    Critic, Decoder, DecoderConfig, init_params, load_reward_model, param_shardings, save_reward_model,
)
from jaxrl_fp16.models.attention import BLOCK
from jaxrl_fp16.objectives import PRESETS, PreferenceConfig, get_algorithm
from jaxrl_fp16.packing import pack
from jaxrl_fp16.parallel import MeshConfig, make_mesh, shard_batch
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler
from jaxrl_fp16.training.rollouts.reward_model import score_rows
from jaxrl_fp16.training.updates.dpo_update import PreferencePairs, make_dpo_update
from jaxrl_fp16.training.updates.policy_update import make_update
from jaxrl_fp16.training.updates.scorer import make_scorer
from jaxrl_fp16.training.updates.sft_update import SFTRows, make_sft_update
from jaxrl_fp16.training.updates.state import create_train_state, shardings_of
from jaxrl_fp16.types import Batch

MESHES = [(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1)]
ROWS, COLUMNS, VOCAB = 8, 24, 64
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=4, head_dim=4))
PRECISION = get_precision("fp32")


def make_batch():
    generator = np.random.default_rng(0)
    ends = generator.integers(COLUMNS // 2, COLUMNS + 1, ROWS)[:, None]
    at = np.arange(COLUMNS)
    logprobs = -np.abs(generator.normal(size=(ROWS, COLUMNS))).astype(np.float32)
    return Batch(
        tokens=generator.integers(0, VOCAB, (ROWS, COLUMNS)).astype(np.int32), mask=at < ends,
        response_mask=(at >= 6) & (at < ends), rollout_logprobs=logprobs, old_logprobs=logprobs,
        advantages=generator.normal(size=ROWS).astype(np.float32),
    )


def steps_on(mesh):
    """Metrics of two updates, and how many programs the two took."""
    shardings = param_shardings(MODEL, mesh)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params = init_params(MODEL, jax.random.key(0), mesh)
    state = create_train_state(params, optimizer, PRECISION.loss_scale, jax.random.key(1), shardings)
    update = make_update(
        MODEL, PRECISION.policy, get_algorithm("grpo_token_tis"), optimizer, microbatch_size=4,
        state_shardings=shardings_of(state))
    metrics = []
    for _ in range(2):
        state, found = update(state, shard_batch(make_batch(), mesh))
        metrics.append({name: float(value) for name, value in found.items()})
    for leaf, sharding in zip(jax.tree.leaves(state.params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return metrics, update._cache_size()


def ragged_batch(columns=96):
    """Rows of all lengths, in three widths."""
    generator, at = np.random.default_rng(5), np.arange(columns)
    mask = at < np.array([96, 20, 9, 40, 96, 60, 30, 12])[:, None]
    logprobs = -np.abs(generator.normal(size=(ROWS, columns))).astype(np.float32)
    return Batch(
        tokens=generator.integers(0, VOCAB, (ROWS, columns)).astype(np.int32), mask=mask,
        response_mask=mask & (at >= 6), rollout_logprobs=logprobs, old_logprobs=logprobs,
        advantages=generator.normal(size=ROWS).astype(np.float32),
    )


def ragged_steps_on(mesh, size=4):
    """Metrics of two updates on rows of all lengths, the scorer's log-probs, and how many programs each took."""
    shardings = param_shardings(MODEL, mesh)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    params = init_params(MODEL, jax.random.key(0), mesh)
    scorer = make_scorer(MODEL, PRECISION.policy, microbatch_size=size)
    batch = shard_batch(ragged_batch(), mesh)
    logprobs = np.asarray(scorer(params, batch.tokens, batch.mask)[0])
    state = create_train_state(params, optimizer, PRECISION.loss_scale, jax.random.key(1), shardings)
    update = make_update(
        MODEL, PRECISION.policy, get_algorithm("grpo_token_tis"), optimizer, microbatch_size=size,
        keep_logprobs=True, state_shardings=shardings_of(state))
    metrics = []
    for _ in range(2):
        state, found = update(state, batch)
        assert found["logprobs"].sharding.is_equivalent_to(batch.tokens.sharding, 2)
        metrics.append({name: float(np.sum(value)) for name, value in found.items()})
    for leaf, sharding in zip(jax.tree.leaves(state.params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return metrics, logprobs, (scorer._cache_size(), update._cache_size())


def packed_step_on(mesh):
    """Loss and gradient norm of a supervised step on packed rows of three blocks of attention."""
    generator, at = np.random.default_rng(3), np.arange(3 * BLOCK)
    sizes = generator.integers(10, 3 * BLOCK // 2, 24)
    mask = at < sizes[:, None]
    packed, count = pack(generator.integers(0, VOCAB, mask.shape), mask, mask & (at >= 2), ROWS)
    assert count > ROWS
    optimizer, shardings = optax.sgd(1e-3), param_shardings(MODEL, mesh)
    params = init_params(MODEL, jax.random.key(0), mesh)
    state = create_train_state(params, optimizer, PRECISION.loss_scale, jax.random.key(1), shardings)
    update = make_sft_update(
        MODEL, PRECISION.policy, optimizer, microbatch_size=4, state_shardings=shardings_of(state))
    _, metrics = update(state, shard_batch(SFTRows(*packed), mesh))
    return float(metrics["loss"]), float(metrics["grad_norm"])


def rollout_on(mesh):
    config = SamplingConfig(max_new_tokens=8, group_size=2)
    sample = make_sampler(MODEL, PRECISION.policy, config, eos_id=1, pad_id=0)
    prompts = np.random.default_rng(1).integers(2, VOCAB, (4, 5)).astype(np.int32)
    params = init_params(MODEL, jax.random.key(0), mesh)
    tokens, mask = shard_batch((prompts, np.ones((4, 5), bool)), mesh)
    return jax.tree.map(np.asarray, sample(params, tokens, mask, jax.random.key(2)))


def single():
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def expected():
    return steps_on(single())[0]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_loss_and_gradient_norm_are_those_of_one_device(shape, expected):
    metrics, programs = steps_on(make_mesh(MeshConfig(*shape)))
    for step in range(2):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(metrics[step][name], expected[step][name], rtol=1e-5)
    assert programs == 1


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1), (1, 2, 2)], ids=str)
def test_rows_of_all_lengths_give_what_they_give_on_one_device(shape):
    expected, exact, _ = ragged_steps_on(single())
    metrics, logprobs, programs = ragged_steps_on(make_mesh(MeshConfig(*shape)))
    np.testing.assert_allclose(logprobs, exact, atol=1e-5)
    for step in range(2):
        for name in ("loss", "grad_norm", "logprobs"):
            np.testing.assert_allclose(metrics[step][name], expected[step][name], rtol=1e-5)
    assert programs == (3, 4)   # two widths and a start, for the update an end


@pytest.mark.usefixtures("quick_compile")
def test_every_presets_step_is_that_of_one_device(bigrams):
    """Two microbatches over four devices, against all rows at once on one."""
    names = [*PRESETS, "critic"]
    found, expected = bigrams.steps(names, [4], make_mesh(MeshConfig(4, 1, 1))), bigrams.steps(names, [8], single())
    for name in names:
        bigrams.assert_same(found[name, 4], expected[name, 8])


def dpo_step_on(mesh):
    """Metrics of a DPO step on 8 pairs whose reference is another one than the policy."""
    batch, shardings = make_batch(), param_shardings(MODEL, mesh)
    pairs = PreferencePairs(*(
        np.stack([x, np.roll(x, 1, axis=0)], axis=1)
        for x in (batch.tokens, batch.mask, batch.response_mask, batch.rollout_logprobs)
    ))
    optimizer = optax.adamw(1e-3)
    params = init_params(MODEL, jax.random.key(0), mesh)
    state = create_train_state(params, optimizer, PRECISION.loss_scale, jax.random.key(1), shardings)
    update = make_dpo_update(MODEL, PRECISION.policy, PreferenceConfig(), optimizer, microbatch_size=4,
                             state_shardings=shardings_of(state))
    return {name: float(value) for name, value in update(state, shard_batch(pairs, mesh))[1].items()}


def test_a_dpo_step_is_that_of_one_device():
    found, expected = dpo_step_on(make_mesh(MeshConfig(2, 2, 1))), dpo_step_on(single())
    assert found.keys() == expected.keys() and found["grad_norm"] > 0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_rollout_is_that_of_one_device():
    found, expected = rollout_on(make_mesh(MeshConfig(1, 2, 2))), rollout_on(single())
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_the_mesh_divides_what_each_device_holds():
    mesh = make_mesh(MeshConfig(1, 4, 1))
    params = init_params(MODEL, jax.random.key(0), mesh)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params))
    assert held < 0.3 * sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.usefixtures("quick_compile")
def test_a_supervised_step_on_packed_rows_is_that_of_one_device():
    found, expected = packed_step_on(make_mesh(MeshConfig(2, 1, 2))), packed_step_on(single())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 2)], ids=str)
def test_scores_of_a_reward_model_are_those_of_one_device(shape, tmp_path):
    model = Critic(MODEL.clone(config=dataclasses.replace(MODEL.config, tie_embeddings=True)), bias=False)
    save_reward_model(tmp_path / "reward", model, init_params(model, jax.random.key(0)))
    generator = np.random.default_rng(3)
    ids = [generator.integers(0, VOCAB, size).tolist() for size in (3, 20, 7, 1, 12)]

    def scores(mesh):
        loaded, params = load_reward_model(tmp_path / "reward", mesh=mesh)
        found = score_rows(loaded, params, ids, policy=PRECISION.policy, columns=20, rows=4, mesh=mesh)
        return found, params

    expected, whole = scores(single())
    found, params = scores(make_mesh(MeshConfig(*shape)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params))
    assert held < 0.6 * sum(leaf.size for leaf in jax.tree.leaves(whole))
