"""The four terms, each against NumPy in float64 or where it is known beforehand."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.config import parse_config
from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import Critic
from jaxrl_fp16.objectives import get_algorithm
from jaxrl_fp16.parallel import make_mesh
from jaxrl_fp16.sampling import SamplingConfig
from jaxrl_fp16.sampling.support import draw
from jaxrl_fp16.tasks import Rewards
from jaxrl_fp16.training.loops.learn import _minibatches, learn, make_programs
from jaxrl_fp16.training.loops.mismatch_terms import staleness_terms, summed_kl, tokenisation_terms, truncation_term
from jaxrl_fp16.training.rollouts.collect import Graded
from jaxrl_fp16.training.runs.learner import Learner
from jaxrl_fp16.training.runs.run_config import Config, resolve_algorithm
from jaxrl_fp16.training.updates import init_train_state, make_value_update
from jaxrl_fp16.training.updates.optimizer import OptimizerConfig, make_optimizer
from jaxrl_fp16.types import Rollout

pytestmark = pytest.mark.usefixtures("quick_compile")
ROWS, GROUP = 8, 4


def k3_64(log_mu, log_pi):
    d = np.asarray(log_pi, np.float64) - np.asarray(log_mu, np.float64)
    return np.expm1(d) - d


# -- staleness ----------------------------------------------------------------------------------------


def test_the_pieces_of_a_token_kl():
    generator = np.random.default_rng(0)
    mask = generator.random((4, 6)) < 0.5
    mu = -generator.random((4, 6)).astype(np.float32)
    pi = mu + 0.3 * generator.normal(size=(4, 6)).astype(np.float32)
    expected = k3_64(mu, pi)[mask].sum()
    found, count = jax.jit(summed_kl)(np.where(mask, mu, np.nan), np.where(mask, pi, np.inf), mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert count == mask.sum()
    assert summed_kl(mu, pi, np.zeros((4, 6), bool)) == (0, 0)


@pytest.mark.parametrize("parts, numerics, mean, last", [
    ([(0.5, 10)], 0.05, 0.0, 0.0),
    ([(0.5, 10), (1.0, 10), (9.0, 30)], 0.05, 0.2, 0.25),
    ([(0.0, 0), (1.0, 10)], 0.0, 0.1, 0.1),
], ids=["one minibatch", "by tokens", "an empty one"])
def test_staleness_is_what_later_minibatches_add(parts, numerics, mean, last):
    found = staleness_terms([tuple(map(np.float32, part)) for part in parts])
    expected = {"terms/numerics_update": numerics, "terms/staleness": mean, "terms/staleness_last": last}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), atol=1e-7)


def test_where_the_critic_alone_has_learned_nothing_is_stale():
    assert staleness_terms([]) == {"terms/staleness": 0.0, "terms/staleness_last": 0.0}


class Iteration:
    """An iteration of `learn` on a `Bigram` in float32, from rollouts whose log-probs are a bit off."""

    mesh = make_mesh()
    key = jax.random.key(7)

    def __init__(self, bigrams, **training):
        self.config = parse_config(Config, {
            "algorithm": {"preset": "dr_grpo"}, "sampling": {"max_new_tokens": 10, "group_size": GROUP},
            "optimizer": {"learning_rate": 0.3, "weight_decay": 0.1},
            "training": {"prompts_per_step": ROWS // GROUP, "minibatch_size": 4, "microbatch_size": 4,
                         "truncated": "keep", **training},
        })
        self.model, self.params, self.precision = bigrams.model, bigrams.params, bigrams.precision
        batch = bigrams.batch
        noise = 0.01 * jax.random.normal(jax.random.key(5), batch.tokens.shape)
        rollout = self.logprobs(self.params, batch) + noise
        self.rollout = Rollout(
            batch.tokens, batch.mask, batch.response_mask, jnp.where(batch.response_mask, rollout, 0.0),
            finished=jnp.ones(ROWS, bool),
        )
        rewards = np.random.default_rng(0).random((ROWS // GROUP, GROUP)).astype(np.float32)
        rewards = Rewards(rewards, np.ones_like(rewards, bool))
        lengths = np.asarray(batch.response_mask).sum(axis=1)
        self.graded = Graded(self.rollout, [], rewards, np.ones(ROWS, bool), lengths)

    def logprobs(self, params, batch):
        return token_logprobs(self.model, params, batch.tokens, batch.mask, policy=self.precision.policy)

    def run(self, params=None, iterations=1):
        """`(learner, metrics of the last iteration, parameters before each optimizer step)`, on the same rollouts."""
        algorithm, before = resolve_algorithm(self.config), []
        setup = SimpleNamespace(config=self.config, precision=self.precision, mesh=self.mesh)
        optimizer = make_optimizer(self.config.optimizer)
        learner = Learner(init_train_state(params or self.params, optimizer, self.precision.loss_scale, self.key))
        programs = make_programs(setup, algorithm, self.model, None, learner)

        def update(state, batch, lengths):
            before.append(jax.tree.map(np.array, state.params))
            return programs.update(state, batch, lengths)

        watched = dataclasses.replace(programs, update=update)
        for _ in range(iterations):
            learner, metrics, _ = learn(watched, learner, self.graded, self.key)
        return learner, metrics, before


@pytest.mark.parametrize("old_logprobs", ["recompute", "rollout"])
def test_staleness_by_hand(bigrams, old_logprobs):
    """Two minibatches at a large learning rate: the second is scored with the weights that the first has led to."""
    iteration = Iteration(bigrams, old_logprobs=old_logprobs)
    learner, metrics, (start, between) = iteration.run()
    jax.tree.map(np.testing.assert_array_equal, start, iteration.params)
    assert np.abs(learner.actor.params["embedding"] - start["embedding"]).max() > 0.1
    first, second = _minibatches(jax.random.fold_in(iteration.key, 0), ROWS, 4)

    def kl(params, index):
        rows = jax.tree.map(lambda x: x[index], iteration.rollout)
        old = iteration.logprobs(start, rows) if old_logprobs == "recompute" else rows.logprobs
        return k3_64(old, iteration.logprobs(params, rows))[np.asarray(rows.response_mask)].mean()

    numerics, moved = kl(start, first), kl(between, second)
    assert moved > 1e-2 > 10 * kl(start, second), "without the step there is nothing to be stale"
    np.testing.assert_allclose(metrics["terms/numerics_update"], numerics, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(metrics["terms/staleness"], moved - numerics, rtol=1e-4)
    assert metrics["terms/staleness_last"] == metrics["terms/staleness"]
    assert metrics["terms/numerics"] == metrics["mismatch/kl_k3"] > 1e-5 and metrics["terms/truncation"] == 0
    if old_logprobs == "recompute":
        np.testing.assert_allclose(metrics["terms/numerics_update"], metrics["mismatch_grad/kl_k3"], atol=1e-12)


def test_one_minibatch_is_never_stale(bigrams):
    _, metrics, before = Iteration(bigrams, minibatch_size=ROWS).run()
    assert len(before) == 1 and metrics["terms/staleness"] == metrics["terms/staleness_last"] == 0


# -- the probe ----------------------------------------------------------------------------------------


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_probe_moves_no_bit_of_the_weights(bigrams):
    """Not by weight decay, nor by Adam's momentum, nor by an update of 0, which would turn -0.0 into 0.0."""
    iteration = Iteration(bigrams, probe=True)
    odd = np.array(iteration.params["embedding"])
    odd[0, :3] = -0.0, 1e-40, -1e-40
    params = {**iteration.params, "embedding": jnp.asarray(odd)}
    learner, metrics, before = iteration.run(params, iterations=2)
    assert all(bits(found) == bits(params) for found in (*before, learner.actor.params))
    adam = learner.actor.opt_state[1][0]
    assert learner.actor.step == adam.count == 4 and all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(adam.mu))
    assert metrics["grad_norm"] > 0 == metrics["skipped"] + metrics["empty"]
    # What is left of two minibatches is rounding.
    assert abs(metrics["terms/staleness"]) < 1e-12 and metrics["terms/numerics"] > 1e-5


def test_a_frozen_critic_keeps_its_weights_too(bigrams):
    precision, params, found = bigrams.precision, bigrams.critic_params, {}
    for frozen in (True, False):
        optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.1))
        update = make_value_update(
            Critic(bigrams.model), precision.policy, get_algorithm("ppo"), optimizer, microbatch_size=8, frozen=frozen
        )
        state = init_train_state(params, optimizer, precision.loss_scale, jax.random.key(0))
        state, metrics = update(state, bigrams.batch)
        assert state.step == 1 and metrics["grad_norm"] > 0
        found[frozen] = bits(state.params) == bits(params)
    assert found == {True: True, False: False}


# -- truncation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.6}], ids=str)
def test_truncation_is_the_kl_of_a_known_distribution(cut):
    """Each row's distribution is known; the KL of the kept part to all of it is -log of what it holds."""
    rows, temperature = 6, 0.8
    logits = np.random.default_rng(1).normal(size=(rows, 11)).astype(np.float32)
    config = SamplingConfig(temperature=temperature, max_new_tokens=1, **cut)
    token, logprob, support, full = draw(config, jnp.asarray(logits), jax.random.split(jax.random.key(0), rows))
    whole = np.exp(np.float64(logits) / temperature)
    whole /= whole.sum(axis=1, keepdims=True)
    expected = []
    for row, kept in zip(whole, np.asarray(support)):
        sampled = row[kept[kept >= 0]] / row[kept[kept >= 0]].sum()
        expected.append(np.sum(sampled * np.log(sampled / row[kept[kept >= 0]])))
    mask = np.zeros((rows, 4), bool)
    mask[:4, 3] = True  # two rows have no response
    place = lambda values: jnp.full((rows, 4), jnp.nan).at[:, 3].set(values)
    rollout = Rollout(None, None, jnp.asarray(mask), place(logprob), None, None, place(full))
    np.testing.assert_allclose(truncation_term(rollout), np.mean(expected[:4]), rtol=1e-5)
    assert np.mean(expected[:4]) > 0.05


def test_without_top_k_and_top_p_nothing_is_truncated():
    assert truncation_term(Rollout(None, None, jnp.ones((2, 3), bool), jnp.ones((2, 3)), None)) == 0


# -- tokenisation -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and `ab` and `xa` that merge; `</think>` is a special token, `<end>` ends a response."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "ab", "xa"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("x", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<end>", "<pad>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def rows_of(tokenizer, *pairs):
    """Arrays of `(prompt, response)` pairs, each a list of pieces, prompts to the left of column 4."""
    tokens = np.full((len(pairs), 14), tokenizer.pad_token_id, np.int32)
    mask, response_mask = np.zeros((2, *tokens.shape), bool)
    for row, (prompt, response) in enumerate(pairs):
        start, end = 4 - len(prompt), 4 + len(response)
        ids = [piece if isinstance(piece, int) else tokenizer.convert_tokens_to_ids(piece)
               for piece in (*prompt, *response)]
        assert None not in ids
        tokens[row, start:end], mask[row, start:end], response_mask[row, 4:end] = ids, True, True
    return tokens, mask, response_mask


EURO = ("â", "Ĥ", "¬")  # three bytes, one character
CASES = {
    "merged": (["x"], ["ab", "c", "<end>"], 0, 0),
    "apart": (["c"], ["a", "b", "c", "<end>"], 1, 2),
    "two of three places": (["c"], ["a", "b", "c", "a", "b", "c", "ab"], 1, 4),
    "across the border": (["c", "x"], ["a", "c"], 1, 1),
    "the prompt's own merge": (["xa"], ["c"], 0, 0),
    "padding and end": (["c"], ["c", "<pad>", "c", "<end>"], 0, 0),
    "nothing but an end": (["c"], ["<end>"], 0, 0),
    "a special token within": (["<end>", "c"], ["c", "</think>", "c"], 0, 0),
    "its text spelled out": (["c"], ["<", "/", "t", "h", "i", "n", "k", ">"], 1, 8),
    "a character of three bytes": (["c"], [*EURO, "c"], 0, 0),
    "half a character": (["c"], ["c", *EURO[:2], "c", "ab"], 1, 2),
    "an id without a token": (["c"], ["c", 900, "ab"], 1, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_response_that_comes_back_otherwise(tokenizer, name):
    prompt, response, differs, lost = CASES[name]
    arrays = rows_of(tokenizer, (prompt, response))
    count = sum(piece not in ("<end>", "<pad>") for piece in response)
    found = tokenisation_terms(tokenizer, *arrays, [tokenizer.eos_token_id], 8)
    assert found == {"terms/tokenisation": differs, "terms/tokenisation_tokens": lost / max(count, 1)}


def test_shares_are_of_the_rows_that_are_looked_at(tokenizer):
    good, bad = (["c"], ["c", "c"]), (["c"], ["a", "b"])
    arrays = rows_of(tokenizer, good, bad, good, good, bad, good, good, good, bad)
    of = lambda rows: tokenisation_terms(tokenizer, *arrays, [tokenizer.eos_token_id], rows)["terms/tokenisation"]
    # Evenly spread: all nine, the ends and the middle, the first.
    assert [of(99), of(9), of(3), of(1)] == [3 / 9, 3 / 9, 2 / 3, 0]
