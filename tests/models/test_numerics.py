"""The remedies: what each leaves unrounded, in sampler, scorer and gradient program alike; off, nothing changes."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import cast_to_compute, hidden_states, in_compute_dtype, token_logprobs, token_values
from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, NumericsConfig, critic_params, init_params, param_shapes
from jaxrl_fp16.models.attention import BLOCK, attend, attend_cache
from jaxrl_fp16.models.numerics import jit, jit_by_model
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler

pytestmark = pytest.mark.usefixtures("quick_compile")
MODEL = Decoder(DecoderConfig(family="qwen2", vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=2,
                              num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True))
FP16 = get_precision("fp16").policy
TOKENS = np.random.default_rng(0).integers(2, 40, (3, 10)).astype(np.int32)
MASK = np.ones(TOKENS.shape, bool)
FIELDS = {"float32_head": True, "float32_weights": True, "float32_residual": True, "float32_cache": True,
          "decode_rows": 8, "excess_precision": False}


def with_remedy(name, model=MODEL):
    return model.clone(numerics=NumericsConfig(**{name: FIELDS[name]}))


def dots(function, *args):
    """(dtype, shape of the left, shape of the right) of every matmul of a program, inner programs too."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                left, right = (variable.aval for variable in equation.invars)
                assert left.dtype == right.dtype
                found.append((left.dtype.name, left.shape, right.shape))
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def scorer(model):
    return lambda params: token_logprobs(model, params, TOKENS, MASK, policy=FP16)


def gradient(model):
    return jax.grad(lambda params: jnp.sum(token_logprobs(model, params, TOKENS, MASK, policy=FP16)))


def sampler(model):
    sample = make_sampler(model, FP16, SamplingConfig(max_new_tokens=4, group_size=1), eos_id=1, pad_id=0)
    return lambda params: sample(params, TOKENS, MASK, jax.random.key(0)).logprobs


# remedy -> how many matmuls a layer, and the head, take float32: of scorer (one scanned layer), of sampler
# (prefill's scanned layer, two layers decoded, two heads).
FLOAT32 = {"float32_head": (1, 2), "float32_weights": (1, 3), "float32_residual": (0, 0), "float32_cache": (2, 6),
           "decode_rows": (0, 0), "excess_precision": (0, 0)}


@pytest.mark.parametrize("kind", ["blockwise", "plain"])
@pytest.mark.parametrize("name", FIELDS)
def test_sampler_scorer_and_gradient_take_the_same_matmuls_in_float32(name, kind):
    model = with_remedy(name, MODEL.clone(attention=kind))
    counts = [sum(dtype == "float32" for dtype, *_ in dots(program(model), param_shapes(model)))
              for program in (scorer, sampler, gradient)]
    assert tuple(counts[:2]) == FLOAT32[name]
    assert (counts[2] > counts[0]) is (counts[0] > 0)  # the backward pass keeps to it


@pytest.mark.parametrize("name", ["float32_cache", "float32_residual", "decode_rows", "excess_precision"])
def test_sampler_and_scorer_agree_and_stay_near_float32(name):
    plain = MODEL.clone(attention="plain")
    model, params = with_remedy(name, plain), init_params(MODEL, jax.random.key(0))
    sample = make_sampler(model, FP16, SamplingConfig(max_new_tokens=4, group_size=1), eos_id=1, pad_id=0)
    rollout = sample(params, TOKENS, MASK, jax.random.key(1))
    assert rollout.tokens.shape == (3, 14) and rollout.response_mask.any()
    for scored_by, policy in ((model, FP16), (plain, get_precision("fp32").policy)):
        scored = token_logprobs(scored_by, params, rollout.tokens, rollout.mask, policy=policy)
        np.testing.assert_allclose(rollout.logprobs, jnp.where(rollout.response_mask, scored, 0), atol=5e-3)


@pytest.mark.parametrize("name, hidden, stored", [
    ("float32_head", jnp.float32, jnp.float16), ("float32_residual", jnp.float16, jnp.float16),
    ("float32_cache", jnp.float16, jnp.float32), ("float32_weights", jnp.float16, jnp.float16)])
def test_dtypes_of_hidden_state_and_cache(name, hidden, stored):
    model = in_compute_dtype(with_remedy(name), FP16)

    def run(params):
        cast = cast_to_compute(params, FP16, model.numerics)
        assert cast["head"].dtype == hidden and cast["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float16
        return model.apply({"params": cast}, TOKENS, keep_cache=True)

    found, cache = jax.eval_shape(run, param_shapes(MODEL))
    assert found.dtype == hidden and cache.keys.dtype == cache.values.dtype == stored


def test_a_float32_residual_stream_holds_what_float16_cannot():
    params = init_params(MODEL, jax.random.key(0))
    params = {**params, "embedding": params["embedding"].at[:, 0].set(1e5)}  # beyond 65,504
    run = lambda model: np.asarray(hidden_states(model, params, TOKENS, MASK, FP16)[0])
    assert np.isfinite(run(with_remedy("float32_residual"))).all()
    assert not np.isfinite(run(MODEL)).all()


@pytest.mark.parametrize("name", ["float32_head", "float32_residual", "excess_precision"])
def test_a_critic_takes_them_too(name):
    params = critic_params(init_params(MODEL, jax.random.key(0)))
    params["value"]["kernel"] += 0.1
    values = lambda model, policy: token_values(Critic(model), params, TOKENS, MASK, policy=policy)
    expected = values(MODEL, get_precision("fp32").policy)
    np.testing.assert_allclose(values(with_remedy(name), FP16), expected, atol=5e-3)


def test_rows_are_filled_up_and_dropped_again():
    """A row alone gives the same tokens as among copies; the decode loop's matmuls have the rows asked for."""
    model = with_remedy("decode_rows")
    lefts = {left[:1] for _, left, _ in dots(sampler(model), param_shapes(model)) if left[1:2] == (1,)}
    assert (8,) in lefts
    params = init_params(MODEL, jax.random.key(0))
    config = SamplingConfig(max_new_tokens=4, group_size=3)
    alone, filled = (
        make_sampler(m, get_precision("fp32").policy, config, eos_id=1, pad_id=0)(
            params, TOKENS[:1], MASK[:1], jax.random.key(0))
        for m in (MODEL, model)
    )
    for a, b in zip(jax.tree.leaves(filled), jax.tree.leaves(alone), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_compiler_option_reaches_the_outermost_jit_alone():
    off = NumericsConfig(excess_precision=False)
    double = jit(lambda x: 2 * x, off)
    assert double.lower(jnp.ones(3)).compile()(jnp.ones(3)).tolist() == [2, 2, 2]
    assert double(jnp.ones(3)).tolist() == [2, 2, 2] and double._cache_size() == 1
    with pytest.raises(ValueError, match="top-level"):  # what JAX says without that detour
        jax.jit(jax.jit(lambda x: x, compiler_options=off.compiler_options))(jnp.ones(3))
    assert jax.jit(lambda x: double(x) + 1)(jnp.ones(3)).tolist() == [3, 3, 3]
    assert jax.grad(lambda x: double(x).sum())(jnp.ones(3)).tolist() == [2, 2, 2]
    assert double._cache_size() == 1


def test_a_model_brings_its_own_option():
    @jit_by_model(lambda model: model.numerics, static_argnames="model")
    def width(model, x):
        return model.config.hidden_size * x

    assert float(width(MODEL, 1.0)) == float(width(with_remedy("excess_precision"), 1.0)) == 32
    assert width._cache_size() == 2


@pytest.mark.parametrize("settings, message", [
    (dict(weights_dtype=jnp.float32), "attention 'cudnn' takes no weights in float32; allowed: blockwise, plain"),
    (dict(), "attention 'cudnn' takes no float32 queries; allowed: blockwise, plain")])
def test_a_vendors_kernel_refuses_what_it_cannot_keep(settings, message):
    q, k = jnp.ones((1, 1, 2, 16)), jnp.ones((1, 1, BLOCK, 16))
    with pytest.raises(ValueError, match=message):
        attend("cudnn", q, k, k, **settings)
    with pytest.raises(ValueError, match=message):
        attend_cache("cudnn", q, k, k, jnp.zeros(1, jnp.int32), **settings)
