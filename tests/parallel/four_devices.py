"""Run by test_mesh.py in a process that has 4 virtual devices."""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.models import (
    Decoder, DecoderConfig, init_params, load_pretrained, param_shapes, param_shardings, save_pretrained,
)
from jaxrl_fp16.parallel import (
    MeshConfig, batch_sharding, make_mesh, row_shards, shard_batch, state_shardings, to_host,
)
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler

MESHES = [(1, 4, 1), (1, 1, 4), (2, 2, 1)]
SHAPE = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2)
MODEL = Decoder(DecoderConfig(family="qwen2", **SHAPE, num_heads=4, num_kv_heads=2, head_dim=6))


@pytest.fixture(scope="module", params=MESHES, ids=str)
def mesh(request):
    return make_mesh(MeshConfig(*request.param))


@pytest.fixture(scope="module")
def mixed():
    return make_mesh(MeshConfig(1, 2, 2))


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(path, MODEL, params, dtype="float32")
    return path


def assert_divided(tree, shardings):
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert {part.data.shape for part in leaf.addressable_shards} == {sharding.shard_shape(leaf.shape)}


def assert_equal(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(to_host(a), to_host(b)), tree, expected)


def test_fresh_parameters_hang_on_the_key_alone(mesh, params):
    divided = init_params(MODEL, jax.random.key(7), mesh)
    assert_divided(divided, param_shardings(MODEL, mesh))
    # Each device holds its part of the large arrays: the mesh does divide something.
    share = max(mesh.shape["fsdp"] * mesh.shape["tensor"], 1)
    assert divided["embedding"].addressable_shards[0].data.size == divided["embedding"].size // share
    if jax.version.__version_info__ < (0, 12):
        assert_equal(divided, params)
    # Since JAX 0.12 a CPU rounds the last bit of a normal number by where in its loop the number is.
    jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(to_host(a), to_host(b), maxulp=4), divided, params)


def test_a_folder_is_loaded_in_parts(mesh, params, folder):
    _, divided = load_pretrained(folder, mesh=mesh)
    assert_divided(divided, param_shardings(MODEL, mesh))
    assert_equal(divided, params)


def test_divided_parameters_go_out_again(mesh, params, folder, tmp_path):
    _, divided = load_pretrained(folder, mesh=mesh)
    save_pretrained(tmp_path / "out", MODEL, divided, dtype="float32")
    written, expected = tmp_path / "out" / "model.safetensors", folder / "model.safetensors"
    assert written.read_bytes() == expected.read_bytes()


def test_each_device_reads_its_part_only(folder, monkeypatch):
    from jaxrl_fp16.models.hf.weight_files import StoredTensor

    read, original = [], StoredTensor.read_into

    def count(self, out, index):
        read.append(out.size)
        return original(self, out, index)

    monkeypatch.setattr(StoredTensor, "read_into", count)
    load_pretrained(folder, mesh=make_mesh(MeshConfig(2, 2, 1)))
    # Of parameters on 2 x 2 devices, halves held twice, each half is read once.
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(param_shapes(MODEL)))


@struct.dataclass
class State:
    params: dict
    opt_state: tuple
    step: jax.Array


def test_moments_lie_where_their_parameters_do(mixed):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                            optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3), optax.ema(0.9))

    def start(key):
        params = init_params(MODEL, key)
        return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    expected = param_shardings(MODEL, mixed)
    shardings = state_shardings(jax.eval_shape(start, jax.random.key(0)), expected)
    state = jax.jit(start, out_shardings=shardings)(jax.random.key(0))
    adam = state.opt_state[1].inner_state[0]
    for tree in (state.params, adam.mu, adam.nu, state.opt_state[2].ema):
        assert_divided(tree, expected)
    for leaf in (state.step, adam.count, state.opt_state[1].hyperparams["learning_rate"]):
        assert leaf.sharding.is_fully_replicated


def test_moments_of_another_shape_are_whole(mixed):
    """Adafactor's factored moments are at the parameters' paths without their shapes."""
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=4)

    def start(key):
        params = init_params(MODEL, key)
        return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    shapes = jax.eval_shape(start, jax.random.key(0))
    shardings = state_shardings(shapes, param_shardings(MODEL, mixed))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings.opt_state[0].v_row))


def test_the_forward_and_its_gradient_agree_with_one_device(mixed, params):
    tokens = jax.random.randint(jax.random.key(1), (8, 20), 0, 64)

    def loss(params, tokens):
        hidden = MODEL.apply({"params": params}, tokens)
        logprobs = jax.nn.log_softmax(hidden @ params["head"].T)
        return -jnp.mean(jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1))

    program = jax.jit(jax.value_and_grad(loss))
    value, grads = program(params, tokens)
    batch = shard_batch(tokens, mixed)
    assert batch.sharding.is_equivalent_to(batch_sharding(mixed), 2)
    divided_value, divided = program(jax.device_put(params, param_shardings(MODEL, mixed)), batch)
    np.testing.assert_allclose(divided_value, value, rtol=1e-5)
    norms = [sum(np.sum(to_host(leaf) ** 2) for leaf in jax.tree.leaves(tree)) for tree in (divided, grads)]
    np.testing.assert_allclose(*np.sqrt(norms), rtol=1e-5)


def test_each_device_holds_its_rows():
    mesh = make_mesh(MeshConfig(2, 2, 1))
    batch = shard_batch({"tokens": np.arange(16).reshape(8, 2), "rewards": np.arange(8.0)}, mesh)
    assert {part.data.shape for part in batch["tokens"].addressable_shards} == {(2, 2)}
    assert {part.data.shape for part in batch["rewards"].addressable_shards} == {(2,)}


def test_a_mesh_samples_what_one_device_does(mesh, params):
    """In lockstep where rows are divided, as an engine has it; and with refilled slots, which are slower there."""
    prompts = np.random.default_rng(2).integers(8, 64, (8, 5), dtype=np.int32)
    given = prompts, np.ones(prompts.shape, bool)
    settings = dict(eos_id=tuple(range(8)), pad_id=0)
    config = SamplingConfig(max_new_tokens=12, group_size=2, max_rows=8)
    expected = make_sampler(MODEL, get_precision("fp32").policy, config, **settings)(params, *given, jax.random.key(3))
    divided = jax.device_put(params, param_shardings(MODEL, mesh)), *shard_batch(given, mesh)
    for lockstep in {False, row_shards(mesh) > 1}:
        sample = make_sampler(MODEL, get_precision("fp32").policy, config, **settings, lockstep=lockstep)
        found = sample(*divided, jax.random.key(3))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(to_host(a), b, atol=1e-5), found, expected)
