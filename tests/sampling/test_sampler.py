"""The sampler: its contract, its distribution, its agreement with the scorer, and when its loop ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import entropy_of, logits, logprob_of, tempered, token_logprobs
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler, slots
from jaxrl_fp16.sampling.support import draw, kept_ids, support_size
from jaxrl_fp16.tokenizer import character_tokenizer, token_bytes

pytestmark = pytest.mark.usefixtures("quick_compile")

V, PAD, EOS = 24, 0, 1
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, tie_embeddings=True))
LENGTHS = (6, 1, 4)
COLUMNS = 6
MASK = np.arange(COLUMNS) >= COLUMNS - np.array(LENGTHS)[:, None]
PROMPTS = np.where(MASK, np.random.default_rng(0).integers(2, V, MASK.shape), PAD).astype(np.int32)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def params():
    params = init_params(MODEL, jax.random.key(0))
    return {**params, "final_norm": {"scale": 2.0 * params["final_norm"]["scale"]}}


@functools.cache
def maker(eos_id=EOS, tokenizer=None, **settings):
    config = SamplingConfig(**{"max_new_tokens": 12, "group_size": 4, **settings})
    policy = get_precision("fp32").policy
    return make_sampler(MODEL, policy, config, eos_id=eos_id, pad_id=PAD, tokenizer=tokenizer)


def scored(params, rollout, temperature):
    settings = dict(policy=get_precision("fp32").policy, temperature=temperature)
    score = jax.jit(lambda p, r: token_logprobs(MODEL, p, r.tokens, r.mask, support=r.support, **settings))
    return score(params, rollout)


def assert_same_rollout(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- the contract of a Rollout -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout(params):
    return maker()(params, PROMPTS, MASK, KEY)


def test_shapes_and_dtypes(rollout):
    grid = (12, COLUMNS + 12)
    found = {name: (getattr(rollout, name).shape, str(getattr(rollout, name).dtype))
             for name in ("tokens", "mask", "response_mask", "logprobs", "finished")}
    assert found == dict(tokens=(grid, "int32"), mask=(grid, "bool"), response_mask=(grid, "bool"),
                         logprobs=(grid, "float32"), finished=((12,), "bool"))
    assert rollout.support is None and rollout.full_logprobs is None


def test_rows_are_prompt_major_and_start_with_their_prompt(rollout):
    np.testing.assert_array_equal(rollout.tokens[:, :COLUMNS], np.repeat(PROMPTS, 4, axis=0))
    np.testing.assert_array_equal(rollout.mask[:, :COLUMNS], np.repeat(MASK, 4, axis=0))
    assert not np.asarray(rollout.response_mask)[:, :COLUMNS].any()


def test_a_response_ends_with_its_first_end_and_padding_follows(rollout):
    tokens, response = np.asarray(rollout.tokens)[:, COLUMNS:], np.asarray(rollout.response_mask)[:, COLUMNS:]
    ends = tokens == EOS
    lengths = np.where(ends.any(1), ends.argmax(1) + 1, 12)
    assert 0 < ends.any(1).sum() < 12  # the test sees both kinds
    np.testing.assert_array_equal(response, np.arange(12) < lengths[:, None])
    np.testing.assert_array_equal(rollout.finished, ends.any(1))
    np.testing.assert_array_equal(np.asarray(rollout.mask)[:, COLUMNS:], response)
    assert (tokens[~response] == PAD).all()
    assert not np.asarray(rollout.logprobs)[~np.asarray(rollout.response_mask)].any()
    assert (np.asarray(rollout.logprobs)[np.asarray(rollout.response_mask)] < 0).all()


def test_rows_of_a_group_differ(rollout):
    rows = np.asarray(rollout.tokens)[:, COLUMNS:].reshape(3, 4, 12)
    assert all(len({tuple(row) for row in group}) == 4 for group in rows)


def test_the_same_key_gives_the_same_rollout_and_another_key_another(params, rollout):
    assert_same_rollout(maker()(params, PROMPTS, MASK, KEY), rollout)
    other = maker()(params, PROMPTS, MASK, jax.random.key(8))
    assert (np.asarray(other.tokens) != np.asarray(rollout.tokens)).any()


def test_nothing_is_compiled_again_from_one_iteration_to_the_next(params):
    sample = maker()
    for iteration in range(3):
        newer = jax.tree.map(lambda x, iteration=iteration: x * (1 + 0.01 * iteration), params)
        prompts, mask = (np.roll(x, iteration, axis=0) for x in (PROMPTS, MASK))
        sample(newer, prompts, mask, jax.random.key(iteration))
    assert sample._cache_size() == 1


def test_decoding_in_parts_gives_the_same_rollout(params, rollout):
    """Two prompts at once do not divide three: the surplus is dropped."""
    parts = maker(max_rows=8)(params, PROMPTS, MASK, KEY)
    for name in ("tokens", "mask", "response_mask", "finished"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(rollout, name))
    np.testing.assert_allclose(parts.logprobs, rollout.logprobs, atol=1e-5)


def test_end_tokens_are_the_ends(params):
    tokenizer = character_tokenizer("0123456789+-*/%()=,")
    named, by_id = maker(tokenizer=tokenizer, end_tokens=("2", "5")), maker(eos_id=(5, 8))
    assert_same_rollout(named(params, PROMPTS, MASK, KEY), by_id(params, PROMPTS, MASK, KEY))
    with pytest.raises(ValueError, match=r"end_tokens \('2',\) need a tokenizer"):
        maker(end_tokens=("2",))
    with pytest.raises(ValueError, match="'<eot>' is no token of the tokenizer; allowed: .*'<eos>'"):
        maker(tokenizer=tokenizer, end_tokens=("<eot>",))


def test_any_of_several_ends_ends(params):
    ends = (EOS, 5, 9)
    rollout = maker(eos_id=ends)(params, PROMPTS, MASK, KEY)
    tokens, response = np.asarray(rollout.tokens)[:, COLUMNS:], np.asarray(rollout.response_mask)[:, COLUMNS:]
    last = tokens[np.arange(12), response.sum(1) - 1]
    assert len(set(last[np.asarray(rollout.finished)])) > 1
    np.testing.assert_array_equal(np.isin(last, ends), rollout.finished)
    assert not (np.isin(tokens, ends) & (np.arange(12) < response.sum(1)[:, None] - 1)).any()


def test_a_stop_string_ends_with_the_token_that_completes_it(params):
    tokenizer = character_tokenizer("abcdefghijklmnopqrstu")
    texts = [piece.decode() for piece in token_bytes(tokenizer)]
    stops = ("ab", "c", "hg")
    sample = maker(tokenizer=tokenizer, stop=stops, max_new_tokens=24)
    rollout = sample(params, PROMPTS, MASK, KEY)
    endings = set()
    for row, finished in zip(range(12), np.asarray(rollout.finished), strict=True):
        ids = np.asarray(rollout.tokens)[row][np.asarray(rollout.response_mask)[row]]
        text = "".join(texts[i] for i in ids)
        found = [stop for stop in stops if text.endswith(stop)]
        assert finished == bool(found or ids[-1] == EOS) and finished or len(ids) == 24
        assert not any(stop in text[:-1] for stop in stops)
        endings.update(found)
    assert endings


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="need a tokenizer"):
        make_sampler(MODEL, get_precision("fp32").policy, SamplingConfig(stop=("a",)), eos_id=EOS, pad_id=PAD)


@pytest.mark.parametrize("fields, message", [
    (dict(max_new_tokens=0), "max_new_tokens is 0"),
    (dict(temperature=-1.0), "temperature -1.0"),
    (dict(top_p=0.0), "top_p 0.0"),
    (dict(top_k=-1), "top_k -1"),
    (dict(top_k=257), "top_k is 257; allowed: up to max_support, 256"),
    (dict(top_k=5, max_support=4), "top_k is 5; allowed: up to max_support, 4"),
    (dict(stop=("",)), "empty string"),
    (dict(max_rows=3, group_size=4), "max_rows is 3, less than group_size 4"),
])
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


# -- against the scorer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(), dict(top_k=5), dict(top_p=0.8, temperature=1.3), dict(top_k=7, top_p=0.7), dict(temperature=0.0),
], ids=str)
def test_log_probs_are_the_scorers_in_float32(params, settings):
    rollout = maker(**settings)(params, PROMPTS, MASK, KEY)
    temperature = settings.get("temperature", 1.0)
    response = np.asarray(rollout.response_mask)
    expected = np.where(response, scored(params, rollout, temperature=temperature), 0.0)
    np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)
    if rollout.support is not None:
        full = scored(params, rollout.replace(support=None), temperature=temperature)
        np.testing.assert_allclose(rollout.full_logprobs, np.where(response, full, 0.0), atol=1e-5)
        assert (np.asarray(rollout.logprobs) >= np.asarray(rollout.full_logprobs) - 1e-6).all()


def test_greedy_takes_the_likeliest_token(params):
    rollout = maker(temperature=0.0, group_size=1)(params, PROMPTS, MASK, KEY)
    scores = logits(MODEL, params, rollout.tokens, rollout.mask, get_precision("fp32").policy)
    best, response = np.asarray(scores.argmax(-1))[:, :-1], np.asarray(rollout.response_mask)[:, 1:]
    np.testing.assert_array_equal(np.asarray(rollout.tokens)[:, 1:][response], best[response])


def test_more_left_padding_changes_no_token(params, rollout):
    """Nor a log-prob by more than the prefill's own float32 rounding."""
    extra = 20
    padded = maker()(params, *(np.pad(x, ((0, 0), (extra, 0))) for x in (PROMPTS, MASK)), KEY)
    for name in ("tokens", "mask", "response_mask"):
        np.testing.assert_array_equal(getattr(padded, name)[:, extra:], getattr(rollout, name))
    np.testing.assert_allclose(padded.logprobs[:, extra:], rollout.logprobs, atol=1e-5)
    np.testing.assert_array_equal(padded.finished, rollout.finished)


# -- the distribution --------------------------------------------------------------------------------------


def expected_support(probs, top_k, top_p):
    """Ids kept of one distribution, float64: top-k, renormalise, top-p."""
    order = np.argsort(-probs, kind="stable")[: top_k or len(probs)]
    kept = probs[order] / probs[order].sum()
    return set(order[: int(np.searchsorted(np.cumsum(kept), top_p) + 1)])


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (0, 0.7), (6, 0.6), (1, 1.0), (0, 0.01), (V, 0.9)])
def test_kept_ids_are_those_of_the_definition(top_k, top_p):
    scores = 2 * np.random.default_rng(3).normal(size=(200, V))
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    size = support_size(SamplingConfig(top_k=top_k, top_p=top_p), V)
    found = np.asarray(kept_ids(jnp.asarray(scores, jnp.float32), size, top_k, top_p))
    for row in range(len(scores)):
        assert {i for i in found[row] if i >= 0} == expected_support(probs[row], top_k, top_p)
        assert len(found[row][found[row] >= 0]) == len(set(found[row][found[row] >= 0]))


@pytest.mark.parametrize("settings", [dict(), dict(top_k=5), dict(top_p=0.9)], ids=str)
@pytest.mark.parametrize("temperature", [1e-9, 1e-20, 1e-30, 1.2e-38, 1e-38, 1e-45])
def test_temperatures_near_0_draw_as_greedy(settings, temperature):
    """Down to numbers that float32 has as 0, with logits as far apart as FP16 allows."""
    scores = np.random.default_rng(3).permutation(64 * 50).reshape(64, 50).astype(np.float32)
    scores = jnp.asarray(scores * 40 - 65000)
    keys = jax.random.split(jax.random.key(1), 64)
    drawn = jax.jit(functools.partial(draw, SamplingConfig(temperature=temperature, **settings)))(scores, keys)
    np.testing.assert_array_equal(drawn[0], scores.argmax(axis=-1))
    assert not np.asarray(drawn[1]).any() and (drawn[3] is None or not np.asarray(drawn[3]).any())
    logits = tempered(scores, temperature)
    assert np.isfinite(logits).all() and not np.asarray(entropy_of(logits)).any()
    slopes = jax.grad(lambda x: logprob_of(tempered(x, temperature), drawn[0]).sum())(scores)
    assert np.isfinite(slopes).all()


def test_a_cold_rollout_is_scored_as_it_was_drawn(params):
    cold, greedy = (maker(temperature=temperature)(params, PROMPTS, MASK, KEY) for temperature in (1e-38, 0.0))
    np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    np.testing.assert_allclose(scored(params, cold, 1e-38)[cold.response_mask], 0.0)
    assert not np.asarray(cold.logprobs).any()


def test_max_support_bounds_what_top_p_keeps():
    config = SamplingConfig(top_p=0.999, max_support=4)
    assert support_size(config, V) == 4
    found = kept_ids(jnp.zeros((2, V)), 4, 0, 0.999)
    assert found.shape == (2, 4) and (np.asarray(found) >= 0).all()


def chi_square_limit(freedom):
    """What chance exceeds 1 time in 10,000 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("size", [10, 150])
@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.5), dict(top_k=4), dict(top_p=0.8)], ids=str)
def test_tokens_are_as_frequent_as_they_are_likely(settings, size):
    config, count = SamplingConfig(**settings), 40_000
    scores = np.random.default_rng(4).normal(size=size)
    probs = np.exp(scores / config.temperature)
    probs /= probs.sum()
    kept = np.isin(np.arange(size), list(expected_support(probs, config.top_k, config.top_p)))
    expected = np.where(kept, probs, 0) / probs[kept].sum()
    keys = jax.random.split(jax.random.key(5), count)
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, size))
    token, logprob, _, full = jax.jit(lambda rows, keys: draw(config, rows, keys))(rows, keys)
    frequency = np.bincount(token, minlength=size) / count
    assert not frequency[~kept].any()
    distance = count * ((frequency - expected)[kept] ** 2 / expected[kept]).sum()
    assert distance < chi_square_limit(kept.sum() - 1)
    np.testing.assert_allclose(logprob, np.log(expected[token]), atol=1e-5)
    if full is not None:
        np.testing.assert_allclose(full, np.log(probs[token]), atol=1e-5)


def test_an_id_without_mass_is_never_drawn():
    """Nor one beyond the vocabulary: 64 does not divide 100."""
    scores = jnp.where(jnp.arange(100) % 3 == 1, 0.0, -jnp.inf).at[99].set(-200.0)
    keys = jax.random.split(jax.random.key(6), 20_000)
    token, *_ = draw(SamplingConfig(), jnp.broadcast_to(scores, (20_000, 100)), keys)
    assert set(np.asarray(token).tolist()) == set(range(1, 99, 3))


@pytest.mark.parametrize("settings", [
    dict(top_k=5), dict(top_p=0.8, temperature=1.3), dict(top_k=7, top_p=0.7),
], ids=str)
def test_a_truncated_rollout_carries_what_it_kept(params, settings):
    rollout = maker(**settings)(params, PROMPTS, MASK, KEY)
    support, response = np.asarray(rollout.support), np.asarray(rollout.response_mask)[:, COLUMNS:]
    assert support.shape == (12, 12, settings.get("top_k", V)) and support.dtype == np.int32
    token = np.asarray(rollout.tokens)[:, COLUMNS:, None]
    assert (support == token).any(-1)[response].all()
    assert (support[~response] == -1).all()


# -- the program ---------------------------------------------------------------------------------------------


def test_the_loop_ends_when_all_rows_have(params, monkeypatch):
    """Counted on the host: every id is an end, so the one column drawn before the loop is the last."""
    steps = []
    original = slots.decode_step

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return original(*args)

    monkeypatch.setattr(slots, "decode_step", counted)
    for ends, expected in ((tuple(range(V)), 0), ((V,), 11)):
        steps.clear()
        config = SamplingConfig(max_new_tokens=12, group_size=1)
        sample = make_sampler(MODEL, get_precision("fp32").policy, config, eos_id=ends, pad_id=PAD)
        rollout = jax.block_until_ready(sample(params, PROMPTS, MASK, KEY))
        jax.effects_barrier()
        assert len(steps) == expected
        assert np.asarray(rollout.finished).all() == (expected == 0)
