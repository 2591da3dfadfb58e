"""Ranges against NumPy's own casts and against the untapped gradient; what is named when something is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import hidden_states, score
from jaxrl_fp16.masking import masked_sum
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.models.numerics import NumericsConfig
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.telemetry import by_tensor, first_overflow, margin, name_not_finite, summarize, underflow_share
from jaxrl_fp16.telemetry.ranges import LARGEST, dtype_of, make_peaks, make_ranges, module_names, weight_ranges
from jaxrl_fp16.training.updates.sft_update import SFTRows

pytestmark = pytest.mark.usefixtures("quick_compile")
MODEL = Decoder(DecoderConfig(family="qwen2", vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=2,
                              num_heads=2, num_kv_heads=1, head_dim=8, tie_embeddings=False), attention="plain")
FP16, FP32 = (get_precision(name).policy for name in ("fp16", "fp32"))


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    mask = np.arange(9) >= np.asarray([[0], [2], [5]])  # on the left, as prompts are padded
    return SFTRows(generator.integers(0, 24, mask.shape).astype(np.int32), mask, mask & (np.arange(9) > 5))


def loss_of(logprobs, entropy, rows, total):
    """`total` stands for whatever makes a loss steep."""
    return -masked_sum(logprobs, rows.loss_mask) * total


@pytest.fixture(scope="module")
def peaks():
    return make_peaks(MODEL, FP16, loss_of)


@pytest.fixture(scope="module")
def ranges():
    program = make_ranges(MODEL, FP16, loss_of)
    return lambda *arguments: jax.device_get(program(*arguments))


def changed(params, path, factor, layer=None):
    """`params` with the array at `path`, of one layer where given, times `factor`."""
    first, *rest = path.split(".")
    if rest:
        return {**params, first: changed(params[first], ".".join(rest), factor, layer)}
    array = params[first]
    return {**params, first: array * factor if layer is None else array.at[layer].multiply(factor)}


# -- figures ---------------------------------------------------------------------------------------------------------


def test_weights_are_counted_as_a_cast_would_change_them(params):
    small = params["layers"]["mlp"]["up"]["kernel"].at[1, 0, :4].set(jnp.asarray([2.0**-25, 2.1**-25, 3.1e-8, 1e-5]))
    big = params["layers"]["attention"]["o"]["kernel"].at[0, 0, 0, :3].set(jnp.asarray([1e5, -65504.0, -70000.0]))
    layers = params["layers"]
    params = {**params, "layers": {**layers, "mlp": {**layers["mlp"], "up": {"kernel": small}},
                                   "attention": {**layers["attention"], "o": {"kernel": big}}}}
    found = dict(by_tensor(MODEL, jax.device_get(weight_ranges(params))))
    assert list(found)[0] == "model.embed_tokens.weight" and list(found)[-2:] == ["model.norm.weight", "lm_head.weight"]
    names = {"model.layers.1.mlp.up_proj.weight": small[1], "model.layers.0.self_attn.o_proj.weight": big[0],
             "model.layers.0.mlp.up_proj.weight": small[0], "lm_head.weight": params["head"]}
    for name, array in names.items():
        array = np.asarray(array)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        assert found[name].entries == array.size and found[name].peak == np.abs(array).max()
        assert found[name].lost == ((array != 0) & (half == 0)).sum()
        assert found[name].subnormal == ((half != 0) & (np.abs(array) < 2.0**-14)).sum()
        assert found[name].beyond == np.isinf(half).sum()
    assert found["model.layers.1.mlp.up_proj.weight"].lost == 2
    assert found["model.layers.0.self_attn.o_proj.weight"].beyond == 2


def test_a_weight_that_is_no_number_wins_the_peak(params):
    params = {**params, "head": params["head"].at[3, 3].set(jnp.nan)}
    found = dict(by_tensor(MODEL, jax.device_get(weight_ranges(params))))
    assert np.isnan(found["lm_head.weight"].peak) and found["lm_head.weight"].beyond == 1


def test_activations_are_those_of_the_forward_over_real_tokens(ranges, params, rows):
    found = ranges(params, jnp.float32(1), rows, jnp.float32(1))
    assert set(found.activations) == set(found.exact) == set(module_names(2))
    untapped = jax.jit(lambda policy: hidden_states(MODEL, params, rows.tokens, rows.mask, policy), static_argnums=0)
    for policy, peaks, tolerance in ((FP16, found.activations, 5e-3), (FP32, found.exact, 1e-5)):
        hidden, (order, _) = untapped(policy)
        real = np.asarray(hidden, np.float32)[np.take_along_axis(rows.mask, np.asarray(order), axis=1)]
        np.testing.assert_allclose(peaks["final_norm"], np.abs(real).max(), rtol=tolerance)
    embedded = np.asarray(params["embedding"])[rows.tokens[rows.mask]]
    assert found.exact["embedding"] == np.abs(embedded).max()
    # What goes into the MLP's last projection grows with the kernel of one of its factors.
    steep = ranges(changed(params, "layers.mlp.up.kernel", 100.0, layer=0), jnp.float32(1), rows, jnp.float32(1)).exact
    np.testing.assert_allclose(steep["layers.0.mlp.product"], 100 * found.exact["layers.0.mlp.product"], rtol=1e-4)
    assert steep["layers.0.attention.v"] == found.exact["layers.0.attention.v"]


def test_underflow_is_what_two_gradients_say(ranges, params, rows):
    """Beside it the gradients of the model as the update runs it, without taps."""
    steepness, scale = jnp.float32(1e-7), 4.0
    found = by_tensor(MODEL, ranges(params, jnp.float32(scale), rows, steepness).gradients)

    def scaled(policy, params):
        return scale * loss_of(score(MODEL, params, rows.tokens, rows.mask, policy)[0], None, rows, steepness)

    untapped = jax.jit(jax.grad(scaled, argnums=1), static_argnums=0)
    half, full = (by_tensor(MODEL, jax.device_get(untapped(policy, params))) for policy in (FP16, FP32))
    lost = nonzero = 0
    for (name, given), (_, true), (_, each) in zip(half, full, found, strict=True):
        assert abs(int(each.nonzero) - (true != 0).sum()) <= 0.01 * true.size, name
        assert abs(int(each.underflow) - ((true != 0) & (given == 0)).sum()) <= 0.02 * true.size + 2, name
        np.testing.assert_allclose(each.peak, np.abs(given).max() / scale, rtol=0.05, atol=2.0**-24 / scale)
        lost, nonzero = lost + int(each.underflow), nonzero + int(each.nonzero)
    assert underflow_share(found) == lost / nonzero and 0.05 < lost / nonzero < 0.95
    ample = by_tensor(MODEL, ranges(params, jnp.float32(2.0**24), rows, steepness).gradients)
    assert underflow_share(ample) < 0.01


def test_the_metrics_of_a_look(ranges, params, rows):
    tall = changed(params, "layers.mlp.down.kernel", 1000.0, layer=1)
    found = ranges(tall, jnp.float32(8), rows, jnp.float32(1))
    metrics = summarize(MODEL, FP16, found, jax.device_get(weight_ranges(tall)))
    peak = max(found.activations.values())
    assert metrics["telemetry/activation_max"] == peak and metrics["telemetry/margin"] == LARGEST / peak
    assert metrics["telemetry/activation_module"] in ("layers.1.mlp", "layers.1")
    assert metrics["telemetry/activation_layer"] == 1
    assert metrics["telemetry/weight_max"] == np.abs(tall["layers"]["mlp"]["down"]["kernel"]).max()
    gradients = {name: each.peak for name, each in by_tensor(MODEL, found.gradients)}
    largest = max(gradients.values())
    assert metrics["telemetry/gradient_max"] == gradients[metrics["telemetry/gradient_tensor"]] == largest > 0


@pytest.mark.parametrize("peak, expected", [(65504.0, 1.0), (0.0, np.inf), (np.inf, 0.0), (np.nan, 0.0)])
def test_the_margin(peak, expected):
    assert margin(peak, jnp.float16) == expected


# -- what is named ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second, layer, named", [
    ("mlp.up", "mlp.down", 1, "the activation of layers.1.mlp, "),
    ("mlp.up", "mlp.down", 0, "the activation of layers.0.mlp, "),
    ("mlp.gate", "mlp.up", 1, "the activation of layers.1.mlp.product, inf"),
    ("attention_norm", "attention.v", 0, "the activation of layers.0.attention.v, "),
    ("attention.v", "attention.o", 1, "the activation of layers.1.attention, "),
])
def test_the_first_activation_is_named(peaks, params, rows, first, second, layer, named):
    """Every weight is within float16's range, and so is what the first of the two makes of it."""
    steep = params
    for module, factor in ((first, 100.0), (second, 3e4)):
        leaf = "scale" if module.endswith("norm") else "kernel"
        steep = changed(steep, f"layers.{module}.{leaf}", factor, layer)
    text = name(peaks, steep, 2.0**15, rows, 1.0)
    assert text.startswith(named) and "weights" not in text
    assert "inf" in text or "where float16 ends at 65,504" in text


@pytest.mark.parametrize("path, module, tensor", [
    ("embedding", "embedding", "model.embed_tokens.weight"), ("final_norm.scale", "final_norm", "model.norm.weight"),
    ("layers.attention.q.kernel", "layers.0.attention.q", "model.layers.0.self_attn.q_proj.weight"),
])
def test_weights_that_are_too_large_are_named_beside(peaks, params, rows, path, module, tensor):
    text = name(peaks, changed(params, path, 1e6), 1.0, rows, 1.0)
    assert text.startswith(f"the activation of {module}, ") and f"; the weights {tensor} hold " in text


def test_what_stays_in_float32_may_be_larger():
    of = lambda model: {name for name in module_names(2) if dtype_of(model, FP16, name) == jnp.float32}
    assert of(MODEL) == set()
    kept = of(MODEL.clone(numerics=NumericsConfig(float32_residual=True)))
    assert kept >= {"embedding", "layers.0", "layers.1.mlp", "layers.0.attention"}
    assert not kept & {"layers.0.attention.q", "layers.1.mlp.product", "layers.0.mlp_norm", "layers.1.attention_norm"}
    small = dict.fromkeys(module_names(2), 1.0)
    assert first_overflow(MODEL, FP16, small | {"layers.0": 1e5}) == "layers.0"
    wide = MODEL.clone(numerics=NumericsConfig(float32_residual=True))
    assert first_overflow(wide, FP16, small | {"layers.0": 1e5}) is None
    assert first_overflow(wide, FP16, small | {"layers.0": 1e5, "layers.1.mlp.product": 1e5}) == "layers.1.mlp.product"


def name(peaks, params, scale, rows, steepness):
    return name_not_finite(MODEL, FP16, peaks, params, jnp.float32(scale), rows, jnp.float32(steepness))


def test_a_finite_step_names_nothing(peaks, params, rows):
    assert name(peaks, params, 2.0**10, rows, 1.0) is None


def test_the_loss_is_named_where_activations_are_finite(peaks, params, rows):
    assert name(peaks, params, 1.0, rows, np.inf).startswith("the loss, inf, with finite activations")


def test_a_gradient_says_whether_the_scale_alone_was_too_large(peaks, params, rows):
    assert name(peaks, params, 2.0**30, rows, 1.0) == (
        "the gradient of final_norm at loss scale 1.07374e+09; at scale 1 all is finite")
    assert name(peaks, params, 2.0**30, rows, 1e30) == "the gradient of final_norm, at scale 1 too"
    assert name(peaks, params, 1.0, rows, 1e30) == "the gradient of final_norm"


def test_a_gradient_is_followed_from_the_head_down(peaks, params, rows):
    """A tiny norm before large kernels: its activation is small, and its gradient is multiplied by them."""
    steep = changed(changed(params, "layers.mlp_norm.scale", 1e-4, layer=0), "layers.mlp.gate.kernel", 1e4, layer=0)
    steep = changed(steep, "layers.mlp.up.kernel", 1e4, layer=0)
    assert name(peaks, steep, 2.0**14, rows, 1.0).startswith("the gradient of layers.0.mlp_norm at loss scale 16384")


# -- what a look costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_ranges, make_peaks])
def test_a_look_takes_no_more_memory_than_a_gradient(make):
    """Of programs that are compiled and not run, at two depths: nothing in it may be quadratic in depth."""
    deep = {layers: Decoder(dataclasses.replace(MODEL.config, vocab_size=512, hidden_size=256, intermediate_size=768,
                                                num_layers=layers)) for layers in (4, 12)}
    array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)
    rows = SFTRows(array(4, 64, dtype="int32"), array(4, 64, dtype="bool"), array(4, 64, dtype="bool"))

    def memory(program, model):
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        found = program.lower(params, array(), rows, array()).compile().memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes

    def gradient(params, scale, rows, total):
        loss = lambda params: loss_of(score(deep[12], params, rows.tokens, rows.mask, FP16)[0], None, rows, total)
        return jax.grad(lambda params: scale * loss(params))(params)

    looks = {layers: memory(make(model, FP16, loss_of), model) for layers, model in deep.items()}
    whole = memory(jax.jit(gradient), deep[12])
    print(looks, whole, looks[12] / whole)
    assert looks[12] <= 1.3 * whole and looks[12] <= 2.5 * looks[4]
