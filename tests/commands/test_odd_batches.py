"""Fault 18: batches that teach nothing. Every number stays finite, nothing is learnt, and that is counted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.sampling import make_sampler
from jaxrl_fp16.training.loops.learn import learn

END = 1  # of the characters' tokenizer
EQUAL = "return [0.5] * len(responses)"
UNEQUAL = "return [float(place % 2) for place in range(len(responses))]"


def cut(rollout, width):
    """No response ended by itself."""
    return rollout.replace(finished=jnp.zeros_like(rollout.finished))


def ended_at_once(rollout, width):
    """Each response is an end-of-text and nothing else: the text is empty."""
    columns = jnp.arange(rollout.tokens.shape[1])
    first, later = columns == width, columns > width
    return rollout.replace(
        tokens=jnp.where(first, END, jnp.where(later, 0, rollout.tokens)), mask=without(rollout.mask, later),
        response_mask=without(rollout.response_mask, later), logprobs=without(rollout.logprobs, later),
        finished=jnp.ones_like(rollout.finished),
    )


def without_a_token(rollout, width):
    later = jnp.arange(rollout.tokens.shape[1]) >= width
    return rollout.replace(mask=without(rollout.mask, later), response_mask=jnp.zeros_like(rollout.response_mask),
                           logprobs=jnp.zeros_like(rollout.logprobs))


def without(array, columns):
    """Zeros in some columns; the dtype stays, for another one would compile every program again."""
    return jnp.where(columns, jnp.zeros_like(array), array)


def numbers(state):
    """Every array of a state but its key, copied: the update deletes the originals."""
    leaves = jax.tree_util.tree_leaves_with_path(state.replace(key=None))
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


@pytest.fixture
def run(tiny, compile_cache, tmp_path, monkeypatch, capsys):
    """run(change of the rollout, reward's body, flag, ...) -> (exit code, records of its one step, the policy's state
    before it, and after)."""
    states = []

    def watched(programs, learner, *arguments, **options):
        states.append(numbers(learner.actor))
        learned = learn(programs, learner, *arguments, **options)
        states.append(numbers(learned[0].actor))
        return learned

    def run(change, body, *flags):
        def changed(*arguments, **options):
            sample = make_sampler(*arguments, **options)
            return lambda params, tokens, mask, key: change(sample(params, tokens, mask, key), tokens.shape[1])

        monkeypatch.setattr("jaxrl_fp16.training.loops.iterations.learn", watched)
        if change is not None:
            monkeypatch.setattr("jaxrl_fp16.training.rollouts.engine.make_sampler", changed)
        (tmp_path / "reward.py").write_text(f"def reward(prompts, responses, examples):\n    {body}\n")
        code = cli.main(["train", str(tiny), "--run.compile_cache", compile_cache, "--run.dir", str(tmp_path / "runs"),
                         "--task.reward_file", str(tmp_path / "reward.py"), "--logging.tensorboard", "false",
                         "--run.export", "false", "--run.steps", "1", *flags])
        capsys.readouterr()
        (folder,) = (tmp_path / "runs").iterdir()
        return code, read_metrics(folder)[1:], *states

    return run


@pytest.mark.fault(18)
@pytest.mark.parametrize("change, body, flags, empty", [
    (None, EQUAL, (), True),
    (cut, UNEQUAL, ("--training.truncated", "mask"), True),
    (ended_at_once, UNEQUAL, (), False),
    (without_a_token, UNEQUAL, (), True),
], ids=["equal rewards", "every response cut", "empty responses", "no token"])
def test_a_batch_that_teaches_nothing(run, change, body, flags, empty):
    code, (step,), before, after = run(change, body, *flags)
    assert code == 0 and all(math.isfinite(value) for value in step.values() if not isinstance(value, str)), step
    assert step["skipped"] == 0 and step["empty"] == (2 if empty else 0)  # of two minibatches
    changed = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert all(np.isfinite(leaf).all() for leaf in after.values()) and (changed == []) == empty, changed
    if change is not None:
        assert step["response_length"] == {cut: step["response_length"], ended_at_once: 1, without_a_token: 0}[change]
