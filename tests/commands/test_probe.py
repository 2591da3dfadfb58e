"""A whole probe: it samples, grades, scores and takes gradients as any run, and leaves the weights as they are."""

import math
import signal

import jax
import numpy as np
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.logs import RunLog, read_metrics
from jaxrl_fp16.training.loops import iterations as loop


@pytest.fixture(scope="module")
def probe(tiny, compile_cache, digits_reward, tmp_path_factory):
    """probe(flag, ...) -> `(exit code, run folder, parameters after each iteration)`."""
    def probe(*flags):
        runs, seen = tmp_path_factory.mktemp("runs"), []
        own = ["--run.dir", str(runs), "--run.compile_cache", compile_cache, "--task.reward_file", digits_reward,
               "--sampling.top_k", "20", "--training.probe"]
        with pytest.MonkeyPatch.context() as patch:
            learn = loop.learn

            def watched(programs, learner, *rest, **named):
                seen.append(jax.tree.map(np.array, learner.actor.params))
                learner, *others = learn(programs, learner, *rest, **named)
                seen.append(jax.tree.map(np.array, learner.actor.params))
                return learner, *others

            patch.setattr(loop, "learn", watched)
            code = cli.main(["train", str(tiny), *own, *flags])
        (folder,) = runs.iterdir()
        return code, folder, seen

    return probe


def test_a_probe_after_a_warm_start(probe, capsys):
    sets = "[{name: own, samples: 2, temperature: 1}]"
    code, folder, seen = probe(
        "--run.steps", "3", "--sft.steps", "2", "--sft.optimizer.learning_rate", "1e-2", "--evaluation.sets", sets,
        "--evaluation.every", "1", "--optimizer.weight_decay", "0.1",
    )
    said = capsys.readouterr().out
    start, *steps = read_metrics(folder)
    assert code == 0 and len(steps) == 3 and len(seen) == 6
    for params in seen[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32)), params, seen[0])
    # The weights that the warm start led to were evaluated once, and nothing was saved of them.
    assert start["sft/steps"] == 2 and "eval/own/accuracy" in start
    assert not any(key.startswith("eval/") for step in steps for key in step)
    assert not list((folder / "checkpoints").glob("*")) and not (folder / "model").exists()
    assert not (folder / "warm_start").exists()
    for step in steps:
        assert step["learning_rate"] == 0 and step["grad_norm"] > 0 and step["empty"] == 0
        assert step["terms/numerics"] == step["mismatch/kl_k3"] < 1e-4 and step["terms/truncation"] > 0
        # Of the two minibatches the second meets the weights of the first: what is left is rounding.
        assert abs(step["terms/staleness"]) < 1e-6 and step["terms/staleness_last"] == step["terms/staleness"]
        assert step["terms/tokenisation"] == step["terms/tokenisation_tokens"] == 0  # characters do not merge
    assert len({step["entropy"] for step in steps}) == 3, "each step draws anew"
    assert "probe: learning rate 0; no weight moves from here on, nothing is saved and nothing exported" in said
    for text in ("probe in fp16: learning rate 0, no weight moved", "std over steps", "mismatch_grad/kl_k3",
                 "terms/tokenisation_tokens", "not from the policy"):
        assert text in said
    assert "what happened" not in said


def test_a_signal_ends_a_probe_and_saves_nothing(probe, monkeypatch, capsys):
    write = RunLog.metrics

    def write_and_signal(log, step, values):
        write(log, step, values)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "metrics", write_and_signal)
    code, folder, _ = probe("--run.steps", "3", "--training.tokenisation_rows", "0", "--optimizer.weight_decay", "0.1")
    last = read_metrics(folder)[-1]
    assert code == 143 and last["step"] == 1 and "terms/numerics" in last and "terms/tokenisation" not in last
    assert "stopped by SIGTERM; a probe saves nothing" in capsys.readouterr().out
    assert not list((folder / "checkpoints").glob("*"))
    assert all(math.isfinite(value) for value in last.values())
