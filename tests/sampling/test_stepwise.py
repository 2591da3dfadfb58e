"""The sampler in several calls: the bits of one call, whatever the cut; what it says on the way; how it is ended."""

import jax
import numpy as np
import pytest

from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler, make_stepwise_sampler, slots, stepwise

pytestmark = pytest.mark.usefixtures("quick_compile")

V, PAD, ENDS, KEY = 24, 0, (1, 2), jax.random.key(7)
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, tie_embeddings=True))


@pytest.fixture(autouse=True)
def every_length_is_long(monkeypatch):
    monkeypatch.setattr(slots, "LONG", 0)
    monkeypatch.setattr(slots, "LEAST_SLOTS", 1)


def programs(precision="fp32", **settings):
    """`(one program, several)` and what both take."""
    config = SamplingConfig(**{"max_new_tokens": 80, "group_size": 2, **settings})
    mask = np.arange(6) >= np.random.default_rng(0).integers(0, 6, (10, 1))
    tokens = np.where(mask, np.random.default_rng(1).integers(4, V, mask.shape), PAD).astype(np.int32)
    made = [make(MODEL, get_precision(precision).policy, config, eos_id=ENDS, pad_id=PAD)
            for make in (make_sampler, make_stepwise_sampler)]
    return made, (init_params(MODEL, jax.random.key(0)), tokens, mask, KEY)


@pytest.mark.parametrize("precision, settings", [
    ("fp32", dict(max_rows=6, top_p=0.9)), ("fp16", dict(max_rows=4)), ("bf16", {})])
def test_the_bits_are_those_of_one_program(precision, settings, monkeypatch):
    """Rows that are refilled, batches that shrink and caches that grow, cut after every 3 steps."""
    (whole, cut), given = programs(precision, **settings)
    monkeypatch.setattr(stepwise, "_next_steps", lambda steps, seconds: 3)
    expected = whole(*given)
    lengths = np.asarray(expected.response_mask).sum(1)
    assert lengths.min() < 5 and lengths.max() > 60
    jax.tree.map(np.testing.assert_array_equal, cut(*given), expected)


def test_it_says_how_far_it_is(monkeypatch):
    (_, cut), given = programs(max_rows=4)
    monkeypatch.setattr(stepwise, "_next_steps", lambda steps, seconds: 5)
    said = []
    rollout = cut(*given, said.append)
    assert len(said) > 10 and {found.of for found in said} == {20}
    for name in ("rows", "tokens", "seconds"):
        values = [getattr(found, name) for found in said]
        assert values == sorted(values)
    assert said[-1].rows == 20 and said[-1].tokens == int(rollout.response_mask.sum())
    # The first tokens of all rows are drawn with the prompts, and a step draws one of each slot.
    assert 20 < said[0].tokens <= 20 + 4 * stepwise.FIRST


def test_what_the_watcher_raises_ends_the_batch():
    (_, cut), given = programs()

    def stop(found):
        raise InterruptedError(f"{found.rows} rows")

    with pytest.raises(InterruptedError, match="rows"):
        cut(*given, stop)


def test_rows_that_end_at_once_take_no_further_program(monkeypatch):
    (whole, cut), given = programs(max_new_tokens=1)
    said = []
    jax.tree.map(np.testing.assert_array_equal, cut(*given, said.append), whole(*given))
    assert [(found.rows, found.tokens) for found in said] == [(20, 20)]


@pytest.mark.parametrize("steps, seconds, expected", [
    (8, 2.0, 8), (8, 0.001, 32), (8, 100.0, 1), (100, 4.0, 50), (3, 0.0, 12),
])
def test_the_next_call_takes_about_the_pace(steps, seconds, expected):
    assert stepwise._next_steps(steps, seconds) == expected
