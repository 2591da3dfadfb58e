"""What the engine reports of the tokens that it chose: against the scorer, and with the settings of the run."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from jaxrl_fp16.config import ConfigError, parse_config
from jaxrl_fp16.forward import score
from jaxrl_fp16.models import init_params
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig
from jaxrl_fp16.tokenizer import encode_prompts
from jaxrl_fp16.training.rollouts.engine import make_engine
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.setup import opened, set_up

PROMPTS = ("1+1=", "12+3=", "7+88=", "5+5=")
PRECISION = "fp16"
SAMPLING = {"max_new_tokens": 6, "group_size": 2, "temperature": 1.5}

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def bench():
    """A run, opened: `(setup, model, params, prompt tokens, their mask)`."""

    def made(**sampling):
        config = parse_config(Config, {
            "precision": PRECISION, "model": {
                "family": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2,
                "num_kv_heads": 1, "head_dim": 16, "tie_embeddings": True},
            "sampling": {**SAMPLING, **sampling}, "training": {"prompts_per_step": 4, "minibatch_size": 8},
        })
        setup = set_up(config)
        with opened(setup) as found:
            tokens, mask, _ = encode_prompts(setup.tokenizer, PROMPTS, 6)
            return setup, found.model, init_params(found.model, jax.random.key(0)), tokens, mask

    return made


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.8}])
def test_its_logprobs_are_the_scorers(bench, sampling):
    """The rollout's decisions go to the scorer whole, as scorer and update pass them on."""
    setup, model, params, tokens, mask = bench(**sampling)
    rollout = make_engine(setup, model)(params, tokens, mask, jax.random.key(1))
    assert rollout.tokens.shape == (8, 12) and rollout.response_mask[:, 6].all()
    scored, _ = score(model, params, rollout.tokens, rollout.mask, setup.precision.policy, SAMPLING["temperature"],
                      rollout.decisions)
    mine = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(rollout.logprobs)[mine], np.asarray(scored)[mine], atol=5e-3)
    assert not np.asarray(rollout.logprobs)[~mine].any()
    assert (rollout.support is not None) == bool(sampling)


@pytest.fixture
def other():
    """What makes `rollout.engine` of a setup Transformers; its process ends with the test."""
    pytest.importorskip("torch")
    with contextlib.ExitStack() as stack:
        def changed(setup):
            stack.enter_context(contextlib.closing(setup.engines))
            rollout = dataclasses.replace(setup.config.rollout, engine="transformers")
            return dataclasses.replace(setup, config=dataclasses.replace(setup.config, rollout=rollout))

        yield changed


def test_another_engine_gives_what_ours_does(bench, other):
    """Kept ids, stop strings, padding and masks; its log-probs are the scorer's as well."""
    setup, model, params, tokens, mask = bench(top_k=5, top_p=0.9, stop=["1", "2"], group_size=4, max_rows=8)
    setup = other(setup)
    mine, theirs = (make_engine(setup, model, engine=name)(params, tokens, mask, jax.random.key(1))
                    for name in ("jit", None))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), mine) == jax.tree.map(lambda x: (x.shape, x.dtype), theirs)
    assert setup.engines.metrics()["rollout/version"] == 1
    scored, _ = score(model, params, theirs.tokens, theirs.mask, setup.precision.policy, SAMPLING["temperature"],
                      theirs.decisions)
    inside, found = np.asarray(theirs.response_mask), np.asarray(theirs.tokens)
    np.testing.assert_allclose(np.asarray(theirs.logprobs)[inside], np.asarray(scored)[inside], atol=2e-2)
    assert (np.asarray(theirs.full_logprobs) <= np.asarray(theirs.logprobs) + 1e-6).all()
    stops = setup.tokenizer.convert_tokens_to_ids(["1", "2"])
    last = found.shape[1] - 1 - inside[:, ::-1].argmax(axis=1)
    ends = np.isin(found[np.arange(len(found)), last], [*stops, *setup.eos_ids])
    assert (ends == np.asarray(theirs.finished)).all() and ends.any() and not ends.all()
    assert np.isin(found[inside], stops).sum() == np.isin(found[np.arange(len(found)), last], stops).sum()
    assert (found[:, 6:][~inside[:, 6:]] == setup.pad_id).all()


def test_several_processes_sample_by_jit_alone(bench, other, monkeypatch):
    setup, model, *_ = bench()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="rollout: engine is transformers in a run of 2 processes; allowed: jit"):
        make_engine(other(setup), model)


def test_the_key_alone_decides(bench):
    setup, model, params, tokens, mask = bench()
    engine = make_engine(setup, model)
    one, same, other = (engine(params, tokens, mask, jax.random.key(n)).tokens for n in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_a_command_may_ask_for_other_sampling_and_precision(bench):
    """As evaluation does, greedily, and a comparison of precisions."""
    setup, model, params, tokens, mask = bench()
    greedy = SamplingConfig(max_new_tokens=3, group_size=1, temperature=0.0)
    exact = make_engine(setup, model, greedy, get_precision("fp32"))
    first, second = (exact(params, tokens, mask, jax.random.key(n)) for n in (1, 2))
    assert first.tokens.shape == (4, 9) and (first.tokens == second.tokens).all()
    half = make_engine(setup, model, greedy)(params, tokens, mask, jax.random.key(1))
    assert (np.asarray(half.logprobs) != np.asarray(first.logprobs)).any()


def test_it_ends_responses_by_the_runs_ids(bench):
    """Every id ends a response here: one token each, and pad after it."""
    setup, model, params, tokens, mask = bench()
    ending = dataclasses.replace(setup, eos_ids=tuple(range(model.config.vocab_size)), pad_id=2)
    rollout = make_engine(ending, model)(params, tokens, mask, jax.random.key(1))
    assert rollout.finished.all() and (rollout.response_mask.sum(1) == 1).all() and (rollout.tokens[:, 7:] == 2).all()
