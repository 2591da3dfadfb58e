"""The decoder: shapes, refusals, one step at a time against all at once, and what remat leaves unchanged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import cast_to_compute, in_compute_dtype
from jaxrl_fp16.models import FAMILIES, Critic, Decoder, DecoderConfig, critic_params, init_params, param_shapes
from jaxrl_fp16.models.attention import BLOCK, stored
from jaxrl_fp16.models.decoder import Cache, decode_step, embed, layers_of, unstack_layers
from jaxrl_fp16.models.layers import RMSNorm, RopeScaling, matmul, rope_angles
from jaxrl_fp16.precision import get_precision

SHAPE = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4, num_kv_heads=2,
             head_dim=6)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32)
CASES = {
    "qwen2": dict(family="qwen2"),
    "qwen3": dict(family="qwen3", tie_embeddings=True),
    "llama": dict(family="llama", rope_scaling=SCALING, mlp_bias=True, output_bias=True),
}


def decoder(case="qwen2", **fields):
    return Decoder(DecoderConfig(**SHAPE, **CASES[case]), **fields)


def random_params(model, seed=0):
    """Biases and norms too are away from where they start."""
    params = init_params(model, jax.random.key(seed))
    noise = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(str(path))), x.shape)
    return jax.tree_util.tree_map_with_path(noise, params)


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_dtypes(case):
    model = decoder(case)
    params = param_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert ("head" in params) is not bool(CASES[case].get("tie_embeddings"))
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(params["layers"]))
    tokens = jnp.zeros((2, 7), jnp.int32)
    for name, kept in (("fp16", jnp.float16), ("bf16", jnp.uint16), ("fp32", jnp.float32)):
        policy = get_precision(name).policy

        def run(params, tokens, policy=policy):
            return in_compute_dtype(model, policy).apply(
                {"params": cast_to_compute(params, policy)}, tokens, keep_cache=True)

        hidden, cache = jax.eval_shape(run, params, tokens)
        assert hidden.shape == (2, 7, 24) and hidden.dtype == policy.compute_dtype
        assert (cache.keys.shape, cache.values.shape) == ((3, 2, 2, 1, 6, BLOCK), (3, 2, 2, 7, 6))
        assert cache.keys.dtype == cache.values.dtype == kept


@pytest.mark.parametrize("fields, message", [
    (dict(family="gpt"), f"model family 'gpt' is unknown; allowed: {', '.join(FAMILIES)}"),
    (dict(num_kv_heads=3), "num_kv_heads is 3; allowed: a divisor of num_heads, 4"),
    (dict(head_dim=5), "head_dim is 5; allowed: even"),
])
def test_a_shape_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{"family": "qwen2", **SHAPE, **fields})


def test_fields_left_out_take_the_familys_value():
    qwen2, llama = (DecoderConfig(family=family, **SHAPE) for family in ("qwen2", "llama"))
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.rope_theta) == (True, False, 1e6)
    assert llama.qkv_bias is False
    assert DecoderConfig(family="qwen3", **SHAPE).qk_norm is True
    assert dataclasses.replace(qwen2, qkv_bias=False).qkv_bias is False
    assert hash(qwen2) == hash(DecoderConfig(family="qwen2", **SHAPE))


@pytest.mark.parametrize("case, kind", [("qwen2", "plain"), ("qwen3", "blockwise"), ("llama", "blockwise")])
def test_one_step_at_a_time_is_all_at_once(case, kind):
    """Rows are at positions of their own, across the border of a block."""
    model = decoder(case, attention=kind)
    params = cast_to_compute(random_params(model), get_precision("fp32").policy)
    tokens = jax.random.randint(jax.random.key(1), (2, BLOCK + 8), 0, 50)
    hidden, stacked = jax.jit(lambda p, t: model.apply({"params": p}, t, keep_cache=True))(params, tokens)
    layers, lengths, slots = unstack_layers(layers_of(params), 3), jnp.array([BLOCK - 4, 2]), 2 * BLOCK
    # Beyond a row's length a cache may hold anything finite.
    beyond = jnp.arange(slots) >= lengths[:, None]
    wide = stacked.widened("blockwise", slots)
    caches = [Cache(jnp.where(beyond.reshape(2, 1, 2, 1, BLOCK), 9, wide.keys[i]),
                    jnp.where(beyond[:, None, :, None], 9, wide.values[i])) for i in range(3)]
    step = jax.jit(lambda *args: decode_step(model, params, layers, *args))
    for count in range(8):
        at = lengths + count
        found, caches = step(tokens[jnp.arange(2), at], caches, at)
        np.testing.assert_allclose(found[:, 0], hidden[jnp.arange(2), at], rtol=2e-5, atol=2e-5)
    written, full = (np.swapaxes(keys, 1, 2).reshape(2, 6, -1)[..., : BLOCK + 4]
                     for keys in (caches[2].keys[0], stacked.keys[2, 0]))
    np.testing.assert_allclose(written, full, rtol=2e-5, atol=2e-5)


def test_a_step_writes_one_slot_of_each_row():
    model = decoder()
    params = random_params(model)
    empty = jnp.full((2, 2, BLOCK, 6), 9.0)
    caches = [Cache(*stored("blockwise", empty, empty)) for _ in range(3)]
    positions = jnp.array([5, 40])
    layers = unstack_layers(layers_of(params), 3)
    step = jax.jit(lambda *args: decode_step(model, params, layers, *args))
    _, written = step(jnp.array([1, 2]), caches, positions)
    for cache in written:
        for found, others in ((cache.keys[:, :, 0], (1, 2)), (cache.values, (1, 3))):
            changed = np.asarray(found != 9.0).any(axis=others)
            np.testing.assert_array_equal(changed, np.arange(BLOCK) == np.asarray(positions)[:, None])


def test_remat_changes_no_value():
    tokens = jax.random.randint(jax.random.key(1), (2, 30), 0, 50)
    params = random_params(decoder())

    def value_and_grad(remat):
        loss = lambda p: jnp.sum(decoder(remat=remat).apply({"params": p}, tokens) ** 2)
        return jax.jit(jax.value_and_grad(loss))(params)

    (kept, kept_grads), (again, grads) = value_and_grad(False), value_and_grad(True)
    np.testing.assert_allclose(again, kept, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(kept_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_remat_keeps_each_layers_input_alone():
    model = Decoder(DecoderConfig(family="qwen2", **{**SHAPE, "num_layers": 12}))
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def temporary_bytes(remat):
        loss = lambda p, t: jnp.sum(model.clone(remat=remat).apply({"params": p}, t) ** 2)
        program = jax.jit(jax.grad(loss)).lower(param_shapes(model), tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(True) < temporary_bytes(False) / 3


def test_no_token_sees_a_later_one():
    model = decoder()
    params = random_params(model)
    tokens = jax.random.randint(jax.random.key(1), (1, BLOCK + 10), 0, 50)
    run = jax.jit(lambda t: model.apply({"params": params}, t))
    changed = tokens.at[0, BLOCK - 1 :].set(7)
    np.testing.assert_array_equal(run(tokens)[:, : BLOCK - 1], run(changed)[:, : BLOCK - 1])


# -- parts ------------------------------------------------------------------------------------------


def test_rms_norm_of_float16_beyond_256_is_not_zero():
    x = jnp.full((1, 1, 64), 3e4, jnp.float16)
    out = RMSNorm(1e-6).apply({"params": {"scale": jnp.ones(64)}}, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_matmul_refuses_two_dtypes():
    with pytest.raises(TypeError, match="float16 and float32; allowed: one compute dtype"):
        matmul("ij,jk->ik", jnp.ones((2, 2), jnp.float16), jnp.ones((2, 2)))


def test_matmul_accumulates_in_float32():
    a = jnp.ones((1, 4096), jnp.float16)
    assert float(matmul("ij,jk->ik", a, a.T)[0, 0]) == 4096.0
    many = jnp.full((1, 1024), 100.0, jnp.float16)
    assert float(matmul("ij,jk->ik", many, many.T)[0, 0]) == 1024e4  # beyond float16's range


def test_the_embeddings_gradient_counts_8192_equal_tokens():
    """A scatter-add in float16 stops at 2,048."""
    tokens = jnp.full((1, 8192), 3)
    total = lambda table: jnp.sum(embed(table, tokens, jnp.float16).astype(jnp.float32))
    grad = jax.grad(total)(jnp.zeros((5, 2)))
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad, np.where(np.arange(5)[:, None] == 3, 8192.0, np.zeros((5, 2))))


def test_llama3_scaling_leaves_short_wavelengths_and_stretches_long_ones():
    plain = np.asarray(rope_angles(jnp.ones(1), 32, 1e4)[0])
    scaled = np.asarray(rope_angles(jnp.ones(1), 32, 1e4, SCALING)[0])
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 32 / 4, wavelengths > 32 / 1
    assert short.any() and long.any() and not (short | long).all()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = scaled[~(short | long)] / plain[~(short | long)]
    assert ((between > 1 / 8) & (between < 1)).all()


def test_a_critic_starts_at_zero_as_a_copy():
    model = decoder()
    params = random_params(model)
    critic = critic_params(params)
    tokens = jnp.arange(10).reshape(2, 5)
    values = jax.jit(lambda *args: Critic(model).apply(*args))({"params": critic}, tokens)
    assert values.dtype == jnp.float32 and values.shape == (2, 5) and not np.asarray(values).any()
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(critic["body"]), strict=True):
        assert leaf.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
