"""Refilled slots, smaller batches and growing caches: none changes what a row draws, and no step is wasted."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.models.attention import BLOCK
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler, sampler, slots

pytestmark = pytest.mark.usefixtures("quick_compile")

V, PAD, ENDS = 24, 0, (1, 2, 3)
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, tie_embeddings=True))
FP32, KEY = get_precision("fp32").policy, jax.random.key(7)


@pytest.fixture(autouse=True)
def every_length_is_long(monkeypatch):
    monkeypatch.setattr(slots, "LONG", 0)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def prompts(count, columns=6):
    generator = np.random.default_rng(count)
    mask = np.arange(columns) >= columns - generator.integers(1, columns + 1, count)[:, None]
    return np.where(mask, generator.integers(4, V, mask.shape), PAD).astype(np.int32), mask


def sample(params, given, ends=ENDS, policy=FP32, lockstep=False, **settings):
    config = SamplingConfig(**{"max_new_tokens": 20, "group_size": 2, **settings})
    program = make_sampler(MODEL, policy, config, eos_id=ends, pad_id=PAD, lockstep=lockstep)
    return program(params, *given, KEY)


def assert_same_rollout(found, expected, atol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), found, expected)


@pytest.mark.parametrize("max_rows", [2, 5, 11])
def test_slots_fewer_than_rows_give_the_same_rollout(params, max_rows):
    """Numbers that divide nothing too; a row that ends with its first token is among them."""
    given, settings = prompts(20), dict(top_p=0.9, group_size=2)
    expected = sample(params, given, lockstep=True, **settings)
    lengths = np.asarray(expected.response_mask).sum(1)
    assert lengths.min() == 1 and lengths.max() == 20 and len(set(lengths)) > 5
    assert_same_rollout(sample(params, given, max_rows=max_rows, **settings), expected)


def test_more_slots_than_rows_and_all_slots_give_the_same_rollout(params):
    given = prompts(7)
    expected = sample(params, given, lockstep=True)
    for max_rows in (0, 100):
        assert_same_rollout(sample(params, given, max_rows=max_rows), expected)


def test_lockstep_in_parts_gives_the_same_rollout(params):
    given = prompts(7)
    assert_same_rollout(sample(params, given, max_rows=4, lockstep=True), sample(params, given, lockstep=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_refilled_slot_changes_no_bit(params, precision, monkeypatch):
    """From a part after a part, of as many rows: XLA's kernels round by how many those are."""
    monkeypatch.setattr(slots, "SHRINKS", ())
    given, settings = prompts(32), dict(policy=get_precision(precision).policy, max_rows=16)
    found, expected = (sample(params, given, lockstep=lockstep, **settings) for lockstep in (False, True))
    assert len(set(np.asarray(expected.response_mask).sum(1))) > 10
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_rows_that_end_with_their_first_token_take_no_slot(params, monkeypatch):
    steps = counted_steps(monkeypatch)
    for settings in (dict(ends=tuple(range(V))), dict(max_new_tokens=1)):
        rollout = sample(params, prompts(7), max_rows=4, **settings)
        jax.effects_barrier()
        assert not steps and np.asarray(rollout.response_mask).sum(1).tolist() == [1] * 14


def test_each_row_is_decoded_once_in_order_and_no_slot_idles(params, monkeypatch):
    """The sizes of all decode steps, counted on the host, are those of a queue worked off by hand."""
    steps = counted_steps(monkeypatch)
    rollout = sample(params, prompts(40), max_rows=16)
    jax.effects_barrier()
    queue = [length - 1 for length in np.asarray(rollout.response_mask).sum(1).tolist() if length > 1]
    size, living, expected = 16, [], []
    while queue or living:
        while queue and len(living) < size:
            living.append(queue.pop(0))
        while not queue and size // 2 >= 8 and len(living) <= size // 2:
            size = 8
        expected.append(size)
        living = [left - 1 for left in living if left > 1]
    assert steps == expected and {8, 16} == set(steps)


def counted_steps(monkeypatch):
    """A list that gets the number of rows of each decode step."""
    steps, original = [], slots.decode_step

    def counted(model, params, layers, token, *rest):
        jax.debug.callback(lambda: steps.append(len(token)), ordered=False)
        return original(model, params, layers, token, *rest)

    monkeypatch.setattr(slots, "decode_step", counted)
    monkeypatch.setattr(slots, "LEAST_SLOTS", 8)
    return steps


@pytest.mark.parametrize("columns", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_cache_that_grows_changes_no_bit(params, columns, monkeypatch):
    """Of 64 rows that go to the end, from prompts that end at, before and after the edge of a block."""
    monkeypatch.setattr(slots, "SHRINKS", ())
    given = prompts(64, columns)
    settings = dict(ends=V, group_size=1, max_new_tokens=3 * BLOCK)
    found = sample(params, given, **settings)
    widths = []

    def widest(*args, stages_of=sampler.stages_of):
        stages = stages_of(*args)
        widths.extend(stage.width for stage in stages)
        return stages[-1:]

    monkeypatch.setattr(sampler, "stages_of", widest)
    expected = sample(params, given, **settings)
    assert widths == sorted(set(widths)) and len(widths) == 2
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    scored = token_logprobs(MODEL, params, found.tokens, found.mask, policy=FP32)
    np.testing.assert_allclose(found.logprobs, jnp.where(found.response_mask, scored, 0.0), atol=1e-5)


def test_what_is_not_finite_stays_in_its_row(params):
    """A token whose embedding is not finite fills its slot with NaN: the next row there is not touched by it."""
    broken = {**params, "embedding": params["embedding"].at[V - 1].set(jnp.inf)}
    given = np.array([[5, V - 1], [5, 6], [V - 1, 7], [8, 9]], np.int32), np.ones((4, 2), bool)
    settings = dict(group_size=1, ends=V)
    expected, found = (sample(broken, given, max_rows=rows, **settings) for rows in (0, 1))
    finite = np.isfinite(np.asarray(expected.logprobs)).all(1)
    assert not finite[[0, 2]].any()
    np.testing.assert_array_equal(np.isfinite(np.asarray(found.logprobs)).all(1), finite)
    np.testing.assert_array_equal(np.asarray(found.tokens)[finite], np.asarray(expected.tokens)[finite])


def test_short_responses_are_one_programs(monkeypatch):
    monkeypatch.setattr(slots, "LONG", 64)
    count = lambda new: len(stages_of_a_batch(new))
    assert (count(63), count(64)) == (1, 4)


def stages_of_a_batch(new):
    """The Stages of 64 rows behind prompts of 20 tokens."""
    config = SamplingConfig(max_new_tokens=new)
    model = SimpleNamespace(numerics=SimpleNamespace(decode_rows=0))
    return slots.stages_of(SimpleNamespace(config=config, model=model, lockstep=False), 64, 20)
