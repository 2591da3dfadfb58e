"""Run by test_lora_mesh.py in a process that has 4 virtual devices."""

import jax
import numpy as np
import optax

from jaxrl_fp16.models import (
    Decoder, DecoderConfig, LoraConfig, init_lora, init_params, load_adapter, param_shardings, save_adapter,
)
from jaxrl_fp16.objectives import get_algorithm
from jaxrl_fp16.parallel import MeshConfig, make_mesh, shard_batch, to_host
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler
from jaxrl_fp16.training.checkpoints.leaves import describe_frozen, named_leaves, saved_and_frozen
from jaxrl_fp16.training.updates import make_update
from jaxrl_fp16.training.updates.state import create_train_state, shardings_of
from jaxrl_fp16.types import Batch

ROWS, COLUMNS, VOCAB = 8, 24, 64
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=4), lora=LoraConfig(rank=4, alpha=8), attention="plain", remat=False)
PRECISION = get_precision("fp32")
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def single():
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


def parameters(mesh):
    """With adapters that do something, each array where the mesh wants it."""
    params = init_lora(MODEL, init_params(MODEL, jax.random.key(0), mesh), jax.random.key(1), policy=PRECISION.policy)
    generator = np.random.default_rng(2)
    draw = lambda x: jax.device_put(generator.normal(0, 0.2, x.shape).astype(np.float32), x.sharding)
    return {**params, "lora": jax.tree.map(draw, params["lora"])}


def make_batch(columns=COLUMNS):
    """Rows of all lengths."""
    generator, at = np.random.default_rng(0), np.arange(columns)
    mask = at < generator.integers(columns // 3, columns + 1, ROWS)[:, None]
    logprobs = -np.abs(generator.normal(size=(ROWS, columns))).astype(np.float32)
    return Batch(
        tokens=generator.integers(0, VOCAB, (ROWS, columns)).astype(np.int32), mask=mask,
        response_mask=mask & (at >= 6), rollout_logprobs=logprobs, old_logprobs=logprobs,
        advantages=generator.normal(size=ROWS).astype(np.float32),
    )


def pointers(tree):
    return [part.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for part in leaf.addressable_shards]


def steps_on(mesh):
    """Loss and gradient norm of two updates."""
    params, batch = parameters(mesh), shard_batch(make_batch(), mesh)
    base, shardings = pointers(params["base"]), param_shardings(MODEL, mesh)
    state = create_train_state(params, OPTIMIZER, PRECISION.loss_scale, jax.random.key(1), shardings)
    update = make_update(MODEL, PRECISION.policy, get_algorithm("grpo"), OPTIMIZER, microbatch_size=4,
                         state_shardings=shardings_of(state))
    metrics = []
    for _ in range(2):
        state, found = update(state, batch)
        metrics += [float(found["loss"]), float(found["grad_norm"])]
    # The base is the same arrays as before, and nothing compiled twice.
    assert pointers(state.params["base"]) == base and update._cache_size() == 1
    for leaf, sharding in zip(jax.tree.leaves(state.params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return metrics


def test_loss_and_gradient_norm_are_those_of_one_device():
    expected = steps_on(single())
    assert min(map(abs, expected)) > 1e-4
    for shape in ((2, 2, 1), (1, 2, 2)):
        np.testing.assert_allclose(steps_on(make_mesh(MeshConfig(*shape))), expected, rtol=1e-5)


def test_the_mesh_divides_base_and_adapters():
    mesh = make_mesh(MeshConfig(1, 2, 2))
    params = parameters(mesh)
    specs = jax.tree.map(lambda x: x.sharding.spec, params["lora"]["layers"]["attention"])
    kernels = jax.tree.map(lambda x: x.sharding.spec, params["base"]["layers"]["attention"])
    for name in ("q", "v"):     # A is divided as its kernel's inputs are, B as its outputs
        assert tuple(specs[name]["a"])[:2] == (None, "fsdp") == tuple(kernels[name]["kernel"])[:2]
        assert tuple(specs[name]["b"])[2] == "tensor" == tuple(kernels[name]["kernel"])[2]
    assert tuple(specs["o"]["a"])[1] == "tensor" and "fsdp" in specs["o"]["b"]


def test_a_rollout_is_that_of_one_device():
    config = SamplingConfig(max_new_tokens=8, group_size=2)
    sample = make_sampler(MODEL, PRECISION.policy, config, eos_id=1, pad_id=0)
    prompts = np.random.default_rng(1).integers(2, VOCAB, (4, 5)).astype(np.int32)

    def rollout_on(mesh):
        tokens, mask = shard_batch((prompts, np.ones((4, 5), bool)), mesh)
        return jax.tree.map(np.asarray, sample(parameters(mesh), tokens, mask, jax.random.key(2)))

    found, expected = rollout_on(make_mesh(MeshConfig(1, 2, 2))), rollout_on(single())
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_the_digest_of_the_base_is_that_of_one_device():
    params = jax.tree.map(to_host, parameters(single()))
    digests = set()
    for shape in ((4, 1, 1), (2, 2, 1), (1, 1, 4), (1, 4, 1)):
        placed = jax.device_put(params, param_shardings(MODEL, make_mesh(MeshConfig(*shape))))
        digests.add(describe_frozen(saved_and_frozen(named_leaves(placed))[1])["digest"])
    assert len(digests) == 1


def test_adapters_go_out_and_come_in_divided(tmp_path):
    mesh = make_mesh(MeshConfig(1, 2, 2))
    one, divided = parameters(single()), parameters(mesh)
    save_adapter(tmp_path / "one", MODEL, one)
    save_adapter(tmp_path / "divided", MODEL, divided)
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "divided" / name).read_bytes()
    loaded = load_adapter(tmp_path / "one", MODEL, divided["base"], policy=PRECISION.policy)
    for leaf, sharding in zip(jax.tree.leaves(loaded), jax.tree.leaves(param_shardings(MODEL, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(to_host(a), to_host(b)), loaded["lora"], one["lora"])
