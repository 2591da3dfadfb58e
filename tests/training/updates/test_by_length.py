"""Parts by length: the same loss, gradient, metrics and log-probs as all rows at once, in few programs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import Critic
from jaxrl_fp16.objectives import PreferenceConfig, get_algorithm
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.updates import (
    PreferencePairs, RewardPairs, init_train_state, make_dpo_update, make_pair_scorer, make_reward_update, make_update,
    make_value_update,
)
from jaxrl_fp16.training.updates.scorer import make_scorer, make_valuer
from jaxrl_fp16.training.updates.sft_update import SFTRows, make_sft_update

ROWS, COLUMNS, NEW, VOCAB, KEPT = 8, 96, 72, 32, 5
FP32 = get_precision("fp32")
CASES = {
    "grpo": {}, "gspo": {}, "cispo": {}, "dr_grpo": {}, "ppo": {}, "grpo_token_tis": {}, "grpo_seq_mis": {},
    "kl": dict(preset="grpo", kl_coef=0.1, kl_in="loss"), "entropy": dict(preset="grpo", entropy_coef=0.02),
}


def make_batch(toy, seed=0, **fields):
    """Rows of all lengths, one without a token and one whose response does not count."""
    generator, at = np.random.default_rng(seed), np.arange(COLUMNS)
    begins = generator.integers(4, COLUMNS - NEW, ROWS)[:, None]
    ends = COLUMNS - NEW + np.array([1, 3, 6, 20, 33, 50, NEW, 0])[:, None]
    mask = (at >= begins) & (at < ends)
    mask[7] = False
    counted = mask & (at >= COLUMNS - NEW)
    counted[2] = False
    normal = lambda *shape: generator.normal(size=shape).astype(np.float32)
    support = generator.integers(0, VOCAB, (ROWS, NEW, KEPT)).astype(np.int32)
    tokens = generator.integers(0, VOCAB, (ROWS, COLUMNS)).astype(np.int32)
    support[:, :, 0], support[:3, :, 2:] = tokens[:, COLUMNS - NEW:], -1
    batch = toy.batch(ROWS, COLUMNS).replace(
        tokens=tokens, mask=mask, response_mask=counted, rollout_logprobs=-np.abs(normal(ROWS, COLUMNS)),
        old_logprobs=-np.abs(normal(ROWS, COLUMNS)), advantages=normal(ROWS), support=support,
        ref_logprobs=-np.abs(normal(ROWS, COLUMNS)), values=normal(ROWS, COLUMNS), returns=normal(ROWS, COLUMNS),
    )
    return jax.tree.map(jnp.asarray, batch.replace(**fields))


@functools.cache
def chosen(name):
    settings = dict(CASES[name])
    return get_algorithm(settings.pop("preset", name), **settings)


def step(make, params, toy, batch, whole=False, **settings):
    """(metrics, gradient as one vector), by parts or as one program of all rows."""
    update = make(optimizer=toy.recorder(), max_new_tokens=NEW, **settings)
    state = init_train_state(params, toy.recorder(), FP32.loss_scale, jax.random.key(0))
    state, metrics = (jax.jit(update) if whole else update)(state, batch)
    return metrics, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)])


def assert_same(found, expected):
    (metrics, gradient), (wanted, exact) = found, expected
    assert metrics.keys() == wanted.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.linalg.norm(exact) > 1e-4 and np.linalg.norm(gradient - exact) <= 1e-5 * np.linalg.norm(exact)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("name", "budget"), [("grpo", 3 * COLUMNS), *((name, None) for name in CASES)])
def test_a_step_is_that_of_all_rows_at_once(bigrams, toy, name, budget):
    fields = {} if name == "grpo" else {"support": None}
    batch = make_batch(toy, **fields)
    if name == "ppo":
        batch = batch.replace(advantages=batch.returns)
    make = functools.partial(
        make_update, bigrams.model, FP32.policy, chosen(name), temperature=0.8, keep_logprobs=True)
    expected = step(make, bigrams.params, toy, batch, whole=True, microbatch_size=ROWS)
    size = 2 if budget is None else 4
    assert_same(step(make, bigrams.params, toy, batch, microbatch_size=size, microbatch_tokens=budget), expected)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_a_minibatch_that_is_one_part_is_as_wide_as_its_longest_row(bigrams, toy, name):
    batch, short = make_batch(toy), np.arange(COLUMNS) < 60
    batch = batch.replace(mask=batch.mask & short, response_mask=batch.response_mask & short)
    make = functools.partial(make_update, bigrams.model, FP32.policy, get_algorithm(name), keep_logprobs=True)
    expected = step(make, bigrams.params, toy, batch, whole=True, microbatch_size=ROWS)
    assert_same(step(make, bigrams.params, toy, batch, microbatch_size=ROWS), expected)


@pytest.mark.parametrize("budget", [None, 3 * COLUMNS])
def test_a_critics_step_is_that_of_all_rows_at_once(bigrams, toy, budget):
    make = functools.partial(make_value_update, Critic(bigrams.model), FP32.policy, get_algorithm("ppo"))
    run = functools.partial(step, make, bigrams.critic_params, toy, make_batch(toy, support=None))
    assert_same(run(microbatch_size=4, microbatch_tokens=budget), run(whole=True, microbatch_size=ROWS))


@pytest.mark.usefixtures("quick_compile")
def test_a_decoders_step_and_log_probs_are_those_of_full_width(toy):
    """Attention over fewer columns, and in FP16 the loss scale."""
    batch, settings = make_batch(toy), dict(temperature=0.8, keep_logprobs=True)
    for precision, close, near in (("fp32", 1e-5, 1e-5), ("fp16", 5e-3, 1e-2)):
        found, expected = (
            toy.update(precision, microbatch_size=size, **settings) for size in (2, ROWS)
        )
        (state, metrics), (other, wanted) = (
            found(toy.start(precision), batch), jax.jit(expected)(toy.start(precision), batch))
        np.testing.assert_allclose(metrics["logprobs"], wanted["logprobs"], atol=close)
        np.testing.assert_allclose(metrics["grad_norm"], wanted["grad_norm"], rtol=near)
        assert int(state.step) == int(other.step) == 1 and found._cache_size() == 5   # 3 widths, a start, an end


def test_programs_are_few_whatever_the_lengths(bigrams, toy):
    update = make_update(bigrams.model, FP32.policy, get_algorithm("grpo"), toy.recorder(), microbatch_size=2)
    state = init_train_state(bigrams.params, toy.recorder(), FP32.loss_scale, jax.random.key(0))
    generator, at, said = np.random.default_rng(1), np.arange(COLUMNS), set()
    for _ in range(50):
        mask = at < generator.integers(1, generator.integers(3, COLUMNS + 1), ROWS)[:, None]
        state, _ = update(state, make_batch(toy, mask=mask, response_mask=mask & (at > 0), support=None))
        said.add(update._cache_size())
    assert max(said) <= 6       # of 96 columns there are 3 widths


def test_what_compiles_is_announced_once(bigrams, toy):
    said = []
    announce = lambda text: said.append(text) or contextlib.nullcontext()
    update = make_update(
        bigrams.model, FP32.policy, get_algorithm("grpo"), toy.recorder(), microbatch_size=2, announce=announce)
    state = init_train_state(bigrams.params, toy.recorder(), FP32.loss_scale, jax.random.key(0))
    for _ in range(2):
        state, _ = update(state, make_batch(toy, support=None))
    assert [text.split(",")[0] for text in said] == [
        f"compiling the update for 2 rows of {width} tokens" for width in (96, 64, 32)]


def test_equal_lengths_take_one_program_as_ever(bigrams, toy):
    update = make_update(bigrams.model, FP32.policy, get_algorithm("grpo"), toy.recorder(), microbatch_size=2)
    state = init_train_state(bigrams.params, toy.recorder(), FP32.loss_scale, jax.random.key(0))
    everywhere = np.ones((ROWS, COLUMNS), bool)
    update(state, make_batch(toy, mask=everywhere, response_mask=everywhere, support=None))
    assert update._cache_size() == 1


def test_a_bad_microbatch_is_refused(bigrams, toy):
    update = make_update(bigrams.model, FP32.policy, get_algorithm("grpo"), toy.recorder(), microbatch_size=3)
    state = init_train_state(bigrams.params, toy.recorder(), FP32.loss_scale, jax.random.key(0))
    with pytest.raises(ValueError, match="microbatch_size is 3; allowed: a divisor of the batch's 8 rows"):
        update(state, make_batch(toy, support=None))


@pytest.mark.parametrize("budget", [None, 3 * COLUMNS])
def test_scorer_and_values_are_those_of_full_width(bigrams, toy, budget):
    batch, shared = make_batch(toy), dict(microbatch_size=4, microbatch_tokens=budget)
    scorer = make_scorer(bigrams.model, FP32.policy, temperature=0.8, with_entropy=True, **shared)
    arrays = bigrams.params, batch.tokens, batch.mask, batch.decisions
    for found, expected in zip(scorer(*arrays), jax.jit(scorer)(*arrays)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    valuer = make_valuer(Critic(bigrams.model), FP32.policy, **shared)
    arrays = bigrams.critic_params, batch.tokens, batch.mask
    np.testing.assert_allclose(valuer(*arrays), jax.jit(valuer)(*arrays), atol=1e-5)


def test_token_logprobs_are_those_of_full_width(bigrams, toy):
    batch = make_batch(toy)
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x, x[:3]]), batch)    # 19 rows: parts of 8, not all full
    mask = batch.mask.astype(jnp.int32)     # 0/1 is as good as bool
    score = functools.partial(
        token_logprobs, bigrams.model, bigrams.params, policy=FP32.policy, temperature=0.8, support=batch.support)
    found, expected = score(batch.tokens, mask), jax.jit(score)(batch.tokens, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.any(np.asarray(found)[np.asarray(mask) == 0])


# -- the other updates ---------------------------------------------------------------------------


def make_pairs(seed=0):
    """Tokens, mask and response mask [B,2,T], the two of a pair of other lengths, padding on either side."""
    generator, at = np.random.default_rng(seed), np.arange(COLUMNS)
    begins = generator.integers(0, 8, (ROWS, 2, 1))
    sizes = [(9, 5), (12, 20), (40, 10), (9, 60), (20, 21), (COLUMNS - 8, 30), (50, 9), (10, 10)]
    ends = begins + np.array(sizes)[..., None]
    mask = (at >= begins) & (at < ends)
    return generator.integers(0, VOCAB, mask.shape).astype(np.int32), mask, mask & (at >= begins + 4)


def same_step(toy, make, params, batch):
    """One step by parts against one of all rows."""
    def run(size, whole=False):
        update = make(microbatch_size=size)
        state = init_train_state(params, toy.recorder(), FP32.loss_scale, jax.random.key(0))
        state, metrics = (jax.jit(update) if whole else update)(state, batch)
        assert whole or update._cache_size() == 5
        return metrics, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)])

    assert_same(run(2), run(ROWS, whole=True))


@pytest.mark.parametrize("packed", [False, True])
def test_a_supervised_step(bigrams, toy, packed):
    tokens, mask, counted = (x[:, 0] for x in make_pairs())
    segments = np.where(mask, 1 + (np.cumsum(mask, axis=1) > 7), 0).astype(np.int32) if packed else None
    make = functools.partial(make_sft_update, bigrams.model, FP32.policy, toy.recorder())
    same_step(toy, make, bigrams.params, SFTRows(tokens, mask, counted, segments))


def test_a_preference_step(bigrams, toy):
    tokens, mask, counted = make_pairs()
    scorer = make_pair_scorer(bigrams.model, FP32.policy, microbatch_size=2)
    pairs = PreferencePairs(tokens, mask, counted)
    found, expected = scorer(bigrams.params, pairs), jax.jit(scorer)(bigrams.params, pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    noise = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32)
    make = functools.partial(make_dpo_update, bigrams.model, FP32.policy, PreferenceConfig(), toy.recorder())
    same_step(toy, make, bigrams.params, pairs.replace(ref_logprobs=expected + noise))


def test_a_reward_models_step(bigrams, toy):
    (tokens, mask, _), body = make_pairs(), bigrams.critic_params
    params = {**body, "value": {"kernel": body["value"]["kernel"]}}
    make = functools.partial(make_reward_update, Critic(bigrams.model, bias=False), FP32.policy, toy.recorder())
    pairs = RewardPairs(tokens[:, 0], mask[:, 0], tokens[:, 1], mask[:, 1])
    same_step(toy, make, params, pairs)
