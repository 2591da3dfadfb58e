"""Supervised steps: the loss falls, the mask decides what is learnt, an empty batch changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.packing import pack
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.updates import init_train_state
from jaxrl_fp16.training.updates.sft_update import SFTRows, make_sft_update

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def update(toy):
    return make_sft_update(toy.model, get_precision("fp16").policy, toy.optimizer, microbatch_size=4)


def pairs_of(toy, **fields):
    batch = toy.batch()
    return SFTRows(batch.tokens, batch.mask, batch.response_mask).replace(**fields)


def examples(lengths=(70, 12, 3, 40, 66, 9), columns=140, seed=0):
    """Right-padded tokens, mask and loss_mask [n,T] of ragged examples, each with a prompt of two tokens."""
    at = np.arange(columns)
    mask = at < np.array(lengths)[:, None]
    return np.random.default_rng(seed).integers(0, 32, mask.shape).astype(np.int32), mask, mask & (at >= 2)


def keeps_gradient():
    """An optimizer whose state is the last gradient."""
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
    return optax.GradientTransformation(zeros, lambda grads, *_: (grads, grads))


@functools.cache
def gradient_update(toy, precision, microbatch_size, **model):
    policy = get_precision(precision).policy
    return make_sft_update(toy.model.clone(**model), policy, keeps_gradient(), microbatch_size=microbatch_size)


def loss_and_gradient(toy, precision, pairs, microbatch_size, **model):
    params, scale = jax.tree.map(jnp.copy, toy.params), get_precision(precision).loss_scale
    state = init_train_state(params, keeps_gradient(), scale, jax.random.key(0))
    state, metrics = gradient_update(toy, precision, microbatch_size, **model)(state, pairs)
    assert float(metrics["skipped"]) == 0
    return float(metrics["loss"]), host(state.opt_state)


@pytest.mark.parametrize("precision, kind, remat, tolerance", [
    ("fp32", "blockwise", True, 1e-5), ("fp32", "plain", False, 1e-5),
    ("fp16", "blockwise", True, 8e-3), ("bf16", "blockwise", False, 4e-2),
])
def test_packed_examples_teach_what_single_ones_do(toy, precision, kind, remat, tolerance):
    """Against single ones in float32; 4 heads over 2 of keys, several blocks of attention in a row.

    In half precision both are as far from float32: 5e-3 of a leaf's largest entry in float16, 2.7e-2 in
    bfloat16. What padding holds does not matter.
    """
    arrays = examples()
    packed, count = pack(*arrays, 2)
    assert count == 6 and (packed.segments.max(axis=1) >= 2).all()
    junk = SFTRows(*packed).replace(tokens=np.where(packed.mask, packed.tokens, 10**6).astype(np.int32))
    single, expected = loss_and_gradient(toy, "fp32", SFTRows(*arrays), 3, attention="plain", remat=False)
    loss, found = loss_and_gradient(toy, precision, junk, 1, attention=kind, remat=remat)
    assert loss == pytest.approx(single, rel=tolerance)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def test_a_segment_does_not_see_its_neighbour(toy):
    """The first example's tokens change; what the others teach stays the same to the last bit."""
    packed, _ = pack(*examples(), 2)
    pairs = SFTRows(*packed).replace(loss_mask=packed.loss_mask & (packed.segments > 1))
    other = pairs.replace(tokens=np.where(packed.segments == 1, (packed.tokens + 1) % 32, packed.tokens))
    (loss, one), (same, two) = (loss_and_gradient(toy, "fp16", x, 1, attention="blockwise", remat=True)
                                for x in (pairs, other))
    assert loss == same
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def host(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_the_loss_is_the_mean_over_the_tokens_that_count_and_falls(toy, update):
    pairs, state = pairs_of(toy), toy.start("fp16")
    logprobs = jax.jit(lambda *rows: token_logprobs(toy.model, toy.params, *rows, policy=get_precision("fp32").policy))(
        pairs.tokens, pairs.mask)
    expected = -np.asarray(logprobs)[np.asarray(pairs.loss_mask)].mean()
    losses = []
    for _ in range(20):
        state, metrics = update(state, pairs)
        losses.append(float(metrics["loss"]))
        assert float(metrics["skipped"]) == float(metrics["empty"]) == 0
    assert losses[0] == pytest.approx(expected, rel=2e-3)
    assert losses[-1] < losses[0] - 0.5 and int(state.step) == 20


def test_tokens_off_the_mask_teach_nothing(toy, update):
    """The last token of a row that is not to be learnt may be any: nothing comes after it."""
    pairs = pairs_of(toy, mask=jnp.ones((8, 20), bool))
    pairs = pairs.replace(loss_mask=pairs.loss_mask.at[:, -1].set(False))
    other = pairs.replace(tokens=pairs.tokens.at[:, -1].set((pairs.tokens[:, -1] + 1) % 32))
    (one, _), (two, _) = update(toy.start("fp16"), pairs), update(toy.start("fp16"), other)
    for a, b in zip(host(one.params), host(two.params)):
        np.testing.assert_array_equal(a, b)
    learnt = update(toy.start("fp16"), pairs.replace(loss_mask=pairs.loss_mask.at[:, -1].set(True)))[0]
    assert any((a != b).any() for a, b in zip(host(one.params), host(learnt.params)))


def test_an_empty_batch_changes_nothing(toy, update):
    state, _ = update(toy.start("fp16"), pairs_of(toy))     # momentum that would move the weights
    before = host((state.params, state.opt_state, state.loss_scale, state.step))
    state, metrics = update(state, pairs_of(toy, loss_mask=jnp.zeros((8, 20), bool)))
    for a, b in zip(before, host((state.params, state.opt_state, state.loss_scale, state.step))):
        np.testing.assert_array_equal(a, b)
    assert float(metrics["empty"]) == 1 and float(metrics["loss"]) == 0
