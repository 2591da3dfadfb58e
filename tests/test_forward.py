"""Log-probs and values against naive float32 ones: padding, chunks, temperature, support, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import forward
from jaxrl_fp16.forward import cast_to_compute, entropy_of, logits, logprob_of, score, token_logprobs, token_values
from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, critic_params, init_params
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.types import Decisions

pytestmark = pytest.mark.usefixtures("quick_compile")

V, ROWS, COLUMNS = 23, 5, 12
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, tie_embeddings=True))
FP32 = get_precision("fp32").policy
# Padding nowhere, left, right, between, everywhere but at one token.
MASK = np.array([[1] * 12, [0] * 4 + [1] * 8, [1] * 7 + [0] * 5, [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1],
                 [0] * 11 + [1]], bool)
TOKENS = np.random.default_rng(0).integers(0, V, (ROWS, COLUMNS)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    params = init_params(MODEL, jax.random.key(0))
    return {**params, "final_norm": {"scale": 2.0 * params["final_norm"]["scale"]}}


def naive(params, temperature=1.0, support=None):
    """(log-probs, entropies) [B,T]: rows compacted by NumPy, plain attention, one softmax over everything."""
    rows, columns = np.nonzero(MASK)
    places = (np.cumsum(MASK, axis=1) - 1)[MASK]
    compact = np.zeros(MASK.shape, np.int32)
    compact[rows, places] = TOKENS[MASK]
    hidden = MODEL.clone(attention="plain", remat=False).apply({"params": params}, jnp.asarray(compact))
    later = places > 0
    rows, columns, places = rows[later], columns[later], places[later]
    scores = (hidden @ params["embedding"].T)[rows, places - 1] / temperature
    full = jax.nn.log_softmax(scores, axis=-1)
    entropies = -jnp.sum(jnp.exp(full) * full, axis=-1)
    if support is not None:
        kept = (support[rows, columns][..., None] == np.arange(V)).any(axis=1)
        full = jax.nn.log_softmax(jnp.where(kept | ~kept.any(-1, keepdims=True), scores, -jnp.inf), axis=-1)
    chosen = full[np.arange(len(rows)), TOKENS[rows, columns]]
    spread = lambda x: jnp.zeros(MASK.shape).at[rows, columns].set(x)
    return spread(chosen), spread(entropies)


def some_support(columns):
    """int32 [B,columns,K]: the token and another id; every third place keeps all."""
    generator = np.random.default_rng(1)
    token = TOKENS[:, COLUMNS - columns :]
    other = (token + generator.integers(1, V, token.shape)) % V
    kept = np.stack([token, other, np.full(token.shape, -1)], axis=-1)
    kept[:, ::3] = -1
    return kept.astype(np.int32)


def test_log_probs_wherever_the_padding_stands(params):
    found = token_logprobs(MODEL, params, TOKENS, MASK, policy=FP32, temperature=0.5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, naive(params, 0.5)[0], atol=1e-5)


def test_zero_at_the_first_real_token_and_at_padding(params):
    found = np.asarray(token_logprobs(MODEL, params, TOKENS, MASK, policy=FP32))
    first = np.cumsum(MASK, axis=1) == 1
    assert not found[~MASK | first].any()
    assert (found[MASK & ~first] < 0).all()


def test_what_stands_at_padding_does_not_matter(params):
    junk = np.where(MASK, TOKENS, np.array([-5, 10**6, V])[np.arange(COLUMNS) % 3])
    as_integers = token_logprobs(MODEL, params, junk, MASK.astype(np.int32), policy=FP32)
    np.testing.assert_array_equal(as_integers, token_logprobs(MODEL, params, TOKENS, MASK, policy=FP32))


def test_a_row_of_padding_alone_is_zero(params):
    mask = MASK.copy()
    mask[1] = False
    grad = jax.grad(lambda p: jnp.sum(token_logprobs(MODEL, p, TOKENS, mask, policy=FP32)))(params)
    assert not np.asarray(token_logprobs(MODEL, params, TOKENS, mask, policy=FP32))[1].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


def test_temperature_zero_scores_at_temperature_one(params):
    greedy = token_logprobs(MODEL, params, TOKENS, MASK, policy=FP32, temperature=0)
    np.testing.assert_array_equal(greedy, token_logprobs(MODEL, params, TOKENS, MASK, policy=FP32))


# Row 3's padding is left of its examples and between the tokens of one.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] * 3, [9] * 4 + [1] * 8, [1] + [2] * 6 + [0] * 5,
                     [5, 1, 1, 1, 1, 1, 7, 2, 2, 2, 0, 2], [1] * 12], np.int32)


@pytest.mark.parametrize("kind", ["blockwise", "plain"])
def test_each_example_of_a_packed_row_is_scored_as_if_it_stood_alone(params, kind):
    """What `segments` and `tokens` hold at padding does not matter."""
    model = MODEL.clone(attention=kind)
    junk = np.where(MASK, TOKENS, np.array([-5, 10**6, V])[np.arange(COLUMNS) % 3])
    found = np.asarray(token_logprobs(model, params, junk, MASK, policy=FP32, segments=SEGMENTS))
    assert not found[~MASK].any()
    for row in range(ROWS):
        for segment in set(SEGMENTS[row][MASK[row]]):
            columns = np.flatnonzero(MASK[row] & (SEGMENTS[row] == segment))
            alone = np.zeros((1, COLUMNS), np.int32)
            alone[0, : len(columns)] = TOKENS[row, columns]
            mask = np.arange(COLUMNS)[None] < len(columns)
            expected = token_logprobs(MODEL, params, alone, mask, policy=FP32)[0, : len(columns)]
            np.testing.assert_allclose(found[row, columns], expected, atol=1e-5)
            assert found[row, columns[0]] == 0


@pytest.mark.parametrize("columns", [COLUMNS, 7])
def test_a_support_renormalises_the_last_columns(params, columns):
    support = some_support(columns)
    whole = np.concatenate([np.full((ROWS, COLUMNS - columns, 3), -1, np.int32), support], axis=1)
    found = token_logprobs(MODEL, params, TOKENS, MASK, policy=FP32, temperature=0.7, support=support)
    np.testing.assert_allclose(found, naive(params, 0.7, whole)[0], atol=1e-5)


def test_logits_predict_each_tokens_successor(params):
    found = logits(MODEL, params, TOKENS, MASK, FP32)
    assert found.shape == (ROWS, COLUMNS, V) and found.dtype == jnp.float32
    row = 3
    columns = np.flatnonzero(MASK[row])
    hidden = MODEL.apply({"params": params}, jnp.asarray(TOKENS[row, columns])[None])[0]
    np.testing.assert_allclose(found[row, columns], hidden @ params["embedding"].T, atol=1e-5)


def test_entropy_is_that_of_the_whole_distribution(params):
    _, entropy = score(MODEL, params, TOKENS, MASK, FP32, 0.7, with_entropy=True)
    np.testing.assert_allclose(entropy, naive(params, 0.7)[1], atol=1e-5)
    _, nothing = score(MODEL, params, TOKENS, MASK, FP32)
    assert not np.asarray(nothing).any()
    np.testing.assert_allclose(entropy_of(jnp.zeros(8)), np.log(8), rtol=1e-6)


def test_a_support_of_one_id_is_certain():
    x = jax.random.normal(jax.random.key(0), (4, V))
    token = jnp.arange(4)
    support = jnp.stack([token, jnp.full(4, -1)], axis=1)
    np.testing.assert_array_equal(logprob_of(x, token, support), np.zeros(4))


# -- chunks and gradients ------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(2).normal(size=(2, ROWS, COLUMNS)).astype(np.float32)


def weighed(pair):
    return jnp.sum(WEIGHTS[0] * pair[0]) + jnp.sum(WEIGHTS[1] * pair[1])


def assert_close(found, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("truncated, columns_at_once", [(False, 1), (True, 5), (True, COLUMNS)])
def test_chunks_change_neither_values_nor_gradients(params, monkeypatch, truncated, columns_at_once):
    """5 of 12 columns at once do not divide; every gradient is that of the naive program."""
    monkeypatch.setattr(forward, "LOGIT_BYTES", 4 * ROWS * V * columns_at_once)
    support = some_support(COLUMNS) if truncated else None

    def ours(params):
        return weighed(score(MODEL, params, TOKENS, MASK, FP32, 0.7, Decisions(support), with_entropy=True))

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda p: weighed(naive(p, 0.7, support))))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_close(grads, expected_grads)


def test_logits_exist_a_chunk_at_a_time():
    """Forward and backward: never an array of all the batch's logits."""
    rows, columns, vocab = 4, 1024, 16384
    hidden = jax.ShapeDtypeStruct((rows, columns, 8), jnp.float16)
    head = jax.ShapeDtypeStruct((vocab, 8), jnp.float16)
    targets = jax.ShapeDtypeStruct((rows, columns), jnp.int32)

    def total(hidden, head, targets):
        return jnp.sum(forward._chunked(1.0, False, False, hidden, head, targets, None)[0])

    memory = jax.jit(jax.grad(total, (0, 1))).lower(hidden, head, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * forward.LOGIT_BYTES < 2 * 4 * rows * columns * vocab


def test_the_heads_gradient_is_summed_over_chunks_in_float32(monkeypatch):
    """4,096 columns add 1 each, a column a chunk: a float16 sum would stop at 2,048."""
    monkeypatch.setattr(forward, "LOGIT_BYTES", 1)
    columns = 4096
    hidden, head = jnp.ones((1, columns, 1), jnp.float16), jnp.array([[0.0], [60.0]], jnp.float16)
    total = lambda head: jnp.sum(
        forward._chunked(1.0, False, False, hidden, head, jnp.zeros((1, columns), jnp.int32), None)[0])
    grad = jax.grad(total)(head)
    assert grad.dtype == jnp.float16
    np.testing.assert_array_equal(grad[:, 0], [columns, -columns])


def test_an_embedding_row_of_8192_equal_tokens_has_its_whole_gradient(params):
    """In float16: against float32, where the sum over one row's tokens exceeds what float16 adds up."""
    tokens, mask = np.full((1, 8192), 3, np.int32), np.ones((1, 8192), bool)
    one_layer = Decoder(DecoderConfig(
        family="qwen2", vocab_size=V, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=8))
    weights = init_params(one_layer, jax.random.key(0))

    def embedding_gradient(name):
        policy = get_precision(name).policy
        total = lambda p: jnp.sum(token_logprobs(one_layer, p, tokens, mask, policy=policy))
        return np.asarray(jax.jit(jax.grad(total))(weights)["embedding"])

    half, single = embedding_gradient("fp16"), embedding_gradient("fp32")
    assert np.linalg.norm(single[3]) > 0 and not half[np.arange(V) != 3].any()
    np.testing.assert_allclose(half[3], single[3], atol=5e-3 * np.linalg.norm(single[3]))


# -- casts and values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_kernels_and_head_are_cast_and_nothing_else(params, name):
    policy = get_precision(name).policy
    for tree in (cast_to_compute(params, policy), cast_to_compute(critic_params(params), policy)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            cast = path[-1].key in ("kernel", "head")
            assert leaf.dtype == (policy.compute_dtype if cast else jnp.float32), path


def test_a_value_is_the_critics_output_one_token_before(params):
    critic = Critic(MODEL)
    weights = critic_params(params)
    weights["value"] = {"kernel": jax.random.normal(jax.random.key(1), (16, 1)), "bias": jnp.array([0.3])}
    found = token_values(critic, weights, TOKENS, MASK, policy=FP32)
    expected = np.zeros(MASK.shape, np.float32)
    for row in (0, 3):
        columns = np.flatnonzero(MASK[row])
        outputs = critic.apply({"params": weights}, jnp.asarray(TOKENS[row, columns])[None])[0]
        expected[row, columns[1:]] = outputs[:-1]
    np.testing.assert_allclose(found[np.array([0, 3])], expected[[0, 3]], atol=1e-5)
    assert not np.asarray(found)[~MASK].any()
