"""Supervised steps: the loss falls, the mask decides what is learnt, an empty batch changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.sft import Pairs, make_sft_update

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def update(toy):
    return make_sft_update(toy.model, get_precision("fp16").policy, toy.optimizer, microbatch_size=4)


def pairs_of(toy, **fields):
    batch = toy.batch()
    return Pairs(batch.tokens, batch.mask, batch.response_mask).replace(**fields)


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
