"""A reward model's steps on pairs: the order is learnt, in every precision, by rows at once or a few at a time."""

import jax
import numpy as np
import pytest

from jaxrl_fp16.forward import sequence_scores
from jaxrl_fp16.models import Critic, critic_params
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.updates import RewardPairs, init_train_state, make_reward_update

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def pairs(toy):
    one, other = toy.batch(seed=1), toy.batch(seed=2)
    return RewardPairs(one.tokens, one.mask, other.tokens, other.mask)


def start(toy, precision="fp32"):
    params = critic_params(toy.params, bias=False)
    return init_train_state(params, toy.optimizer, get_precision(precision).loss_scale, jax.random.key(0))


def updates(toy, precision="fp32", microbatch_size=4):
    model = Critic(toy.model, bias=False)
    return model, make_reward_update(model, get_precision(precision).policy, toy.optimizer,
                                     microbatch_size=microbatch_size)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_pairs_come_into_order(toy, pairs, precision):
    model, update = updates(toy, precision)
    state, found = start(toy, precision), []
    for _ in range(12):
        state, metrics = update(state, pairs)
        found.append({name: float(value) for name, value in metrics.items()})
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and found[0]["accuracy"] == 0.5
    assert found[-1]["loss"] < 0.3 and found[-1]["accuracy"] == 1 and found[-1]["margin"] > 1
    assert sum(each["skipped"] for each in found) == 0 and int(state.step) == 12 and update._cache_size() == 1
    policy = get_precision("fp32").policy
    chosen = sequence_scores(model, state.params, pairs.chosen, pairs.chosen_mask, policy=policy)
    rejected = sequence_scores(model, state.params, pairs.rejected, pairs.rejected_mask, policy=policy)
    assert bool((chosen > rejected).all())


def test_microbatches_make_the_same_step(toy, pairs):
    whole, parts = ([updates(toy, microbatch_size=size)[1](start(toy), pairs) for size in (8, 2)])
    for name in whole[1]:
        np.testing.assert_allclose(whole[1][name], parts[1][name], rtol=1e-5, atol=1e-7, err_msg=name)
