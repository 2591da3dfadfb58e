"""Adapters beside frozen weights: what they compute, that they begin as nothing, their gradients, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import cast_to_compute, score
from jaxrl_fp16.models import (
    FAMILIES, Critic, Decoder, DecoderConfig, LoraConfig, critic_params, init_lora, merge_lora, param_axes,
    param_shapes,
)
from jaxrl_fp16.models.frozen import without_adapters
from jaxrl_fp16.precision import get_precision

pytestmark = pytest.mark.usefixtures("quick_compile")

SHAPE = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2,
             head_dim=6)
PARTS = {"llama": dict(qkv_bias=True, output_bias=True, mlp_bias=True)}
ADAPTERS = {
    "all": LoraConfig(rank=4, alpha=6),
    "some": LoraConfig(rank=3, alpha=5, targets=("q_proj", "o_proj", "down_proj"), rslora=True),
}
FP32 = get_precision("fp32").policy
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
MASK = jnp.arange(12) >= jnp.array([[3], [0]])


def decoder(family="qwen2", lora=ADAPTERS["all"], **fields):
    return Decoder(DecoderConfig(family=family, **SHAPE, **PARTS.get(family, {})), lora=lora, **fields)


def random_like(shapes, size=0.2):
    """Arrays of these shapes, norms about 1; without a program for each."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(generator.normal(mean, size, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def parameters(model):
    """Float32, with adapters that do something."""
    return random_like(param_shapes(model))


def logprobs(model, params, policy=FP32):
    return score(model, params, TOKENS, MASK, policy)[0]


def added(base, lora, scale):
    """The reference: each kernel W as W + A B scale, in plain JAX."""
    if "a" in lora:
        depth, rank = lora["a"].shape[0], lora["a"].shape[-1]
        product = lora["a"].reshape(depth, -1, rank) @ lora["b"].reshape(depth, rank, -1)
        return {**base, "kernel": base["kernel"] + scale * product.reshape(base["kernel"].shape)}
    return {**base, **{name: added(base[name], own, scale) for name, own in lora.items()}}


CASES = [*((family, "all") for family in FAMILIES), ("llama", "some")]


@pytest.mark.parametrize("family, name", CASES)
def test_adapters_are_what_their_sum_with_the_kernels_would_be(family, name):
    """Log-probs and the gradients of A and B, against a plain model whose kernels are W + A B scale."""
    lora = ADAPTERS[name]
    model = decoder(family, lora, attention="plain", remat=False)
    params = parameters(model)
    scale = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    plain, merged = merge_lora(model, params, params["base"])
    assert plain == model.clone(lora=None)
    reference = added(params["base"], params["lora"], scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, reference)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), merged, params["base"])
    assert sum(jax.tree.leaves(changed)) == len(jax.tree.leaves(params["lora"])) / 2

    def loss(own, same):
        beside = logprobs(model, {**params, "lora": own})
        summed = logprobs(plain, added(params["base"], same, scale))
        return jnp.sum(beside**2) + jnp.sum(summed**2), (beside, summed)

    gradients, (beside, summed) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params["lora"], params["lora"])
    np.testing.assert_allclose(beside, summed, atol=2e-4)
    own, same = gradients
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(same), strict=True):
        assert float(jnp.abs(b).max()) > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()), err_msg=str(path))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_at_the_start_it_is_the_base_to_the_last_bit(precision):
    """And without adapters at any time: what KL terms refer to."""
    model, policy = decoder("qwen3", attention="plain", remat=False), get_precision(precision).policy
    given = parameters(model)
    params = init_lora(model, given["base"], jax.random.key(1), policy=policy)
    assert {leaf.dtype for leaf in jax.tree.leaves(params["base"])} == {jnp.dtype(policy.compute_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params["lora"])} == {jnp.dtype("float32")}
    rounded = jax.tree.map(lambda x: x.astype(policy.compute_dtype).astype(jnp.float32), given["base"])
    run = jax.jit(lambda model, params: logprobs(model, params, policy), static_argnums=0)
    expected = run(model.clone(lora=None), rounded)
    np.testing.assert_array_equal(run(model, params), expected)
    np.testing.assert_array_equal(run(model, without_adapters({**params, "lora": given["lora"]})), expected)
    assert float(jnp.abs(run(model, {**params, "lora": given["lora"]}) - expected).max()) > 0.05


def test_fresh_adapters_are_drawn_within_the_inverse_root_of_their_inputs():
    """B is 0: the product is. Two keys give two A."""
    model = decoder()
    base = parameters(model)["base"]
    one, two = (init_lora(model, base, jax.random.key(seed), policy=FP32)["lora"]["layers"] for seed in (1, 2))
    for part, name, inputs in (("attention", "q", 24), ("attention", "o", 24), ("mlp", "down", 40)):
        a, b = one[part][name]["a"], one[part][name]["b"]
        bound = 1 / math.sqrt(inputs)
        assert not b.any() and 0.9 * bound < float(jnp.abs(a).max()) <= bound and abs(float(a.mean())) < bound / 5
        assert (a != two[part][name]["a"]).all() and (a[0] != a[1]).any()


def test_only_the_targets_have_adapters():
    lora = param_shapes(decoder(lora=LoraConfig(rank=2, targets=["v", "gate_proj"])))["lora"]["layers"]
    assert {part: set(names) for part, names in lora.items()} == {"attention": {"v"}, "mlp": {"gate"}}
    shapes = jax.tree.map(lambda x: x.shape, lora)
    assert shapes["attention"]["v"] == {"a": (2, 24, 2), "b": (2, 2, 2, 6)}
    assert shapes["mlp"]["gate"] == {"a": (2, 24, 2), "b": (2, 2, 40)}


def test_every_parameter_has_axes():
    for model in (decoder("llama"), Critic(decoder("llama"))):
        same = jax.tree.map(lambda axes, leaf: len(axes) == leaf.ndim, param_axes(model), param_shapes(model))
        assert all(jax.tree.leaves(same))


def test_a_critic_shares_the_base_and_has_adapters_of_its_own():
    params = parameters(decoder())
    critic = critic_params(params)
    pointers = lambda tree: [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
    assert pointers(critic["base"]) == pointers(params["base"])
    assert not set(pointers(critic["lora"])) & set(pointers(params["lora"]))
    expected = param_shapes(Critic(decoder()))
    assert jax.tree.map(jnp.shape, critic) == jax.tree.map(lambda x: x.shape, expected)
    compute = cast_to_compute(critic, get_precision("fp16").policy)
    assert {leaf.dtype for leaf in jax.tree.leaves(compute["body"]["lora"])} == {jnp.dtype("float16")}


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [dict(rank=0), dict(alpha=0), dict(alpha=-1.0), dict(dropout=1.0),
                                    dict(dropout=-0.1), dict(alpha=float("nan")), dict(alpha=float("inf"))])
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match="allowed: rank >= 1, 0 < alpha < inf, 0 <= dropout < 1"):
        LoraConfig(**fields)


def test_settings_are_one_however_they_are_written():
    same = [LoraConfig(targets=given) for given in (("q", "up"), ["q_proj", "up_proj", "q_proj"], ("q_proj", "up"))]
    assert len(set(same)) == 1 and same[0].targets == ("q", "up")
    assert LoraConfig(targets="q_proj").targets == ("q",) and LoraConfig(targets=None) == LoraConfig()
    assert LoraConfig(rank=4, alpha=8).scale == 2 and LoraConfig(rank=4, alpha=8, rslora=True).scale == 4


def test_what_is_no_base_of_the_model_is_refused():
    model = decoder()
    params = parameters(model)
    base = params["base"]
    init = lambda model, base: init_lora(model, base, jax.random.key(0), policy=FP32)
    with pytest.raises(ValueError, match="Decoder has no adapters; allowed: Decoder.config, lora=LoraConfig"):
        init(decoder(lora=None), base)
    with pytest.raises(ValueError, match="Critic has no adapters"):
        init(Critic(model), base)
    with pytest.raises(ValueError, match="targets name k_prj_proj, lm_head_proj; allowed: o_proj, q_proj, k"):
        init(decoder(lora=LoraConfig(targets=("k_prj", "lm_head", "q"))), base)
    with pytest.raises(ValueError, match=r"base_params\['embedding'\] has shape \(49, 24\); allowed: \(50, 24\)"):
        init(model, {**base, "embedding": base["embedding"][1:]})
    with pytest.raises(ValueError, match=r"base_params\['base'\].* has shape .*; allowed: None|allowed: "):
        init(model, params)


def test_what_cannot_be_merged_is_refused():
    model = decoder()
    params = parameters(model)
    base = params["base"]
    with pytest.raises(ValueError, match="Decoder has no adapters"):
        merge_lora(decoder(lora=None), params, base)
    with pytest.raises(ValueError, match=r'params\["lora"\].* has shape .*; allowed: '):
        merge_lora(decoder(lora=LoraConfig(rank=5)), params, base)
    with pytest.raises(ValueError, match=r'params\["lora"\].* has shape None; allowed: '):
        fewer = parameters(decoder(lora=ADAPTERS["some"]))
        merge_lora(decoder(lora=LoraConfig(rank=3)), fewer, base)
    with pytest.raises(ValueError, match=r"base_params\['head'\] has shape None"):
        merge_lora(model, params, {name: leaf for name, leaf in base.items() if name != "head"})
