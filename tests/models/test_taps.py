"""Taps: the decoder with them gives the decoder's result, and a change at a tap reaches what follows alone."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import cast_to_compute, in_compute_dtype
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.models.attention import BLOCK, stored
from jaxrl_fp16.models.decoder import Cache, decode_step, layers_of, unstack_layers
from jaxrl_fp16.models.taps import by_name, tap_names, tapped_decode_step, tapped_forward
from jaxrl_fp16.precision import get_precision

pytestmark = pytest.mark.usefixtures("quick_compile")
LAYERS, WIDTH = 2, 32
MODEL = Decoder(DecoderConfig(family="qwen3", vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_layers=LAYERS,
                              num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True),
                attention="plain", remat=False)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
NAMES = ["embedding", "layers.0.attention_norm", "layers.0.attention", "layers.0.mlp_norm", "layers.0.mlp", "layers.0",
         "layers.1.attention_norm", "layers.1.attention", "layers.1.mlp_norm", "layers.1.mlp", "layers.1", "final_norm"]


def in_precision(name):
    policy = get_precision(name).policy
    return in_compute_dtype(MODEL, policy), cast_to_compute(init_params(MODEL, jax.random.key(0)), policy)


def putting(put, given):
    """A change: `put(value, given[name])` at each tap that `given` names."""

    def change(module, layer, value):
        for name, array in given.items():
            place, _, inside = name.removeprefix("layers.").partition(".")
            if layer is None and name == module:
                value = put(value, array)
            elif layer is not None and place.isdigit() and inside == module:
                value = jnp.where(layer == int(place), put(value, array), value)
        return value

    return change


def forward(model, params, tokens, replace=None, add=None, **options):
    """`tapped_forward` with arrays by name, that stand in for a module's output or are added to it; taps by name."""
    change = putting(lambda value, array: array, replace) if replace else putting(jnp.add, add or {})
    hidden, taps = tapped_forward(model, params, tokens, change, **options)
    return hidden, by_name(*taps)


@cache
def program(name):
    model, params = in_precision(name)
    return partial(jax.jit(partial(forward, model)), params, TOKENS)


def run(name="fp32", **changes):
    return program(name)(**changes)


def run_adding(name, value):
    """One program for every name: what is added is zero elsewhere."""
    zeros = {name: jnp.zeros((*TOKENS.shape, WIDTH)) for name in NAMES}
    return run(add={**zeros, name: value})


@pytest.mark.parametrize("name, tolerance", [("fp32", 1e-6), ("fp16", 4e-3)])
def test_without_a_change_it_is_the_decoder(name, tolerance):
    model, params = in_precision(name)
    expected = jax.jit(lambda p: model.apply({"params": p}, TOKENS))(params)
    hidden, taps = run(name)
    assert hidden.dtype == expected.dtype == model.dtype
    assert tap_names(LAYERS) == NAMES and set(taps) == set(NAMES)
    assert all(tap.shape == (*TOKENS.shape, WIDTH) for tap in taps.values())
    np.testing.assert_allclose(hidden, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(hidden, taps["final_norm"])


def test_the_taps_of_a_layer_add_up():
    _, taps = run()
    before, inside = taps["embedding"], taps["layers.0.attention"] + taps["layers.0.mlp"]
    np.testing.assert_allclose(before + inside, taps["layers.0"], rtol=1e-6, atol=1e-6)


def test_packed_rows():
    segments = jnp.asarray(np.where(np.arange(12) < 5, 1, 2)[None].repeat(2, axis=0))
    model, params = in_precision("fp32")
    expected = jax.jit(lambda p: model.apply({"params": p}, TOKENS, segments=segments))(params)
    hidden, _ = run(segments=segments)
    np.testing.assert_allclose(hidden, expected, rtol=1e-6, atol=1e-6)


def check_reach(place, changed, taps):
    at = NAMES.index(place)
    for name in NAMES[:at]:
        np.testing.assert_allclose(changed[name], taps[name], rtol=1e-6, atol=1e-6)
    for name in NAMES[at + 1:]:
        assert not np.allclose(changed[name], taps[name]), name


def test_a_replacement_changes_what_follows_and_nothing_before():
    put = jnp.full((*TOKENS.shape, WIDTH), 0.5)
    changed = run(replace={"layers.0.attention": put})[1]
    np.testing.assert_array_equal(changed["layers.0.attention"], put)
    check_reach("layers.0.attention", changed, run()[1])


@pytest.mark.parametrize("place", ["embedding", "layers.0.mlp_norm", "layers.0", "layers.1.mlp"])
def test_what_is_added_changes_what_follows_and_nothing_before(place):
    more, (_, taps) = jax.random.normal(jax.random.key(4), (*TOKENS.shape, WIDTH)), run()
    changed = run_adding(place, more)[1]
    np.testing.assert_allclose(changed[place], taps[place] + more, rtol=1e-6, atol=1e-6)
    check_reach(place, changed, taps)


def test_a_later_column_changes_no_earlier_one():
    _, taps = run()
    late = (jnp.arange(12) >= 7)[None, :, None]
    hidden, _ = run_adding("layers.0.mlp", jnp.where(late, 1.0, 0.0) * jnp.ones((2, 12, WIDTH)))
    np.testing.assert_allclose(hidden[:, :7], taps["final_norm"][:, :7], rtol=1e-6, atol=1e-6)
    assert not np.allclose(hidden[:, 7:], taps["final_norm"][:, 7:])


def test_zeros_that_are_added_have_the_activations_gradient():
    model, params = in_precision("fp32")
    direction = jax.random.normal(jax.random.key(2), (2, 12, WIDTH))
    loss = lambda add: jnp.sum(forward(model, params, TOKENS, add={"layers.0.mlp": add})[0] ** 3)
    grad = jax.jit(jax.grad(loss))(jnp.zeros_like(direction))
    loss = jax.jit(loss)
    change = (loss(1e-2 * direction) - loss(-1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.sum(grad * direction), change, rtol=2e-2)


def test_one_decode_step():
    model, params = in_precision("fp32")
    layers, positions = unstack_layers(layers_of(params), LAYERS), jnp.array([0, 3])
    past = jax.random.normal(jax.random.key(3), (2, 1, BLOCK, 16))
    cache = Cache(*stored("blockwise", past, -past))
    expected, written = jax.jit(partial(decode_step, model))(params, layers, TOKENS[:, 0], [cache] * LAYERS, positions)

    def step(replace):
        stacked = jax.tree.map(lambda x: jnp.stack([x] * LAYERS), cache)
        change = putting(lambda value, array: array, replace)
        hidden, caches, taps = tapped_decode_step(model, params, TOKENS[:, 0], stacked, positions, change)
        return hidden, unstack_layers(caches, LAYERS), by_name(*taps)

    step = jax.jit(step)
    hidden, found, taps = step({})
    np.testing.assert_allclose(hidden, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(written), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert set(taps) == set(NAMES) and taps["layers.1"].shape == (2, 1, WIDTH)
    put = jnp.ones((2, 1, WIDTH))
    _, _, changed = step({"layers.0": put})
    np.testing.assert_array_equal(changed["layers.0"], put)
    np.testing.assert_array_equal(changed["layers.0.mlp"], taps["layers.0.mlp"])
    assert not np.allclose(changed["final_norm"], taps["final_norm"])


def test_the_program_does_not_grow_with_the_depth():
    """Its equations are as many for two layers as for ten."""

    def equations(layers):
        model = MODEL.clone(config=dataclasses.replace(MODEL.config, num_layers=layers))
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        return str(jax.make_jaxpr(partial(tapped_forward, model))(shapes, TOKENS)).count("\n")

    assert equations(2) == equations(10)
