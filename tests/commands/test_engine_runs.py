"""Commands that sample by another engine: Transformers and vLLM for real, and one that fails as it is told."""

import json
import os
from pathlib import Path

import jax
import psutil
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.engines import engine, pipe, weights
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig, Checkpoints

FAKE = Path(__file__).parents[1] / "engines" / "fake_child.py"
OTHER = ("--rollout.engine", "transformers")
VLLM = ("--rollout.engine", "vllm", "--rollout.python", os.environ.get("JAXRL_FP16_VLLM_PYTHON", ""),
        "--model.hidden_size", "64", "--model.head_dim", "32")      # the narrowest heads that it has on a CPU
LOOSE = (*OTHER, "--rollout.stop_above", "1e9", "--run.export", "false")     # the fake draws evenly
SEEN = 3    # answers that the start takes


def ends_clean(children):
    """No process and no weights are left of a command."""
    assert not [pid for pid in children if psutil.pid_exists(pid)]
    assert not list(Path(weights.MEMORY).iterdir())


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
    """A place of the test's own for weights."""
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(weights, "MEMORY", str(tmp_path / "memory"))


@pytest.fixture
def children(monkeypatch):
    """Process ids of the engines that were started."""
    found, start = [], pipe.Pipe.__init__

    def noted(self, *arguments):
        start(self, *arguments)
        found.append(self.pid)

    monkeypatch.setattr(pipe.Pipe, "__init__", noted)
    return found


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(fault, at, times) puts the fake engine in the place of Transformers."""
    def put(fault="", at=0, times=1):
        monkeypatch.setattr(pipe, "CHILD", FAKE)
        monkeypatch.setenv("FAKE_LOG", str(tmp_path / "fake.log"))
        for name, value in (("FAULT", fault), ("AT", at), ("TIMES", times)):
            monkeypatch.setenv(f"FAKE_{name}", str(value))

    return put


# -- Transformers and vLLM -------------------------------------------------------------------------


@pytest.mark.fault(37)
@pytest.mark.parametrize("name", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_ten_steps_with_another_engine_and_then_old_weights(train_command, monkeypatch, capsys, children, name):
    """Rewards by the grader, a version of the weights for each step, a quiet canary. From the eleventh step on the
    child is told each new version and given the weights of the tenth: the run stops."""
    if name == "transformers":
        pytest.importorskip("torch")
    flags = {"transformers": OTHER, "vllm": VLLM}[name]
    send, kept = engine.written, []

    def stale(place, model, params, dtype, version):
        if version == 11:
            kept.append(jax.device_get(params))
        return send(place, model, kept[0] if kept else params, dtype, version)

    monkeypatch.setattr(engine, "written", stale)
    run = train_command(*flags, "--run.steps", "20", "--checkpoint.keep", "1")
    error, (_, *steps) = capsys.readouterr().err, read_metrics(run.folder)
    assert [record["rollout/version"] for record in steps] == list(range(2, len(steps) + 2)) and len(steps) >= 10
    assert all(record["rollout/restarts"] == 0 < record["seconds/weights"] for record in steps)
    assert all(1e-8 < record["mismatch/kl_k3"] < 1e-4 for record in steps[:10]), "another engine, of like numerics"
    for line in map(json.loads, (run.folder / "samples.jsonl").read_text().splitlines()):
        assert line["reward"] == sum(character.isdigit() for character in line["response"]) / 4
    assert steps[9]["reward"] > steps[0]["reward"] + 0.1
    record = json.loads((run.folder / "environment.json").read_text())
    assert record["engine"]["name"] == name and record["engine"]["dtype"] == "float16"
    assert {name, "torch", "transformers", "python"} <= set(record["engine"])
    assert run.code == 3 and error.count("\n") == 1 and error.endswith(f"/checkpoints/{len(steps)}\n"), error
    assert f"mismatch/kl_k3 of rollout.engine {name} against the scorer is " in error
    assert "above rollout.stop_above 0.05; no update was made. It may be: stale weights" in error
    assert len(children) == 1
    ends_clean(children)


# -- an engine that fails --------------------------------------------------------------------------


@pytest.mark.fault(37)
def test_another_distribution_stops_the_run_before_an_update(train_command, fake, capsys, children):
    fake()
    run = train_command(*OTHER, "--run.steps", "3")
    error = capsys.readouterr().err
    assert run.code == 3 and "log-probs of another distribution than was drawn from" in error
    assert error.endswith("; there is no checkpoint yet\n") and [r["step"] for r in read_metrics(run.folder)] == [0]
    ends_clean(children)


@pytest.mark.fault(36)
def test_a_killed_engine_changes_nothing_of_the_run(train_run, fake, children):
    """Killed within the second step: the same weights are sent again and the same seeds drawn."""
    fake()
    whole = train_run(*LOOSE, "--run.steps", "2")
    fake("kill", at=2 * SEEN + 3)
    killed = train_run(*LOOSE, "--run.steps", "2")
    assert whole.code == killed.code == 0 and len(children) == 3
    assert "the engine's process was killed by SIGKILL, as the system does where memory is short" in killed.said
    assert "; it is started once more" in killed.said
    left = ("seconds/", "tokens_per_second", "rollout/restarts")
    metrics = [[{key: value for key, value in record.items() if not key.startswith(left)}
                for record in read_metrics(run.folder)] for run in (whole, killed)]
    assert metrics[0] == metrics[1]
    assert [record.get("rollout/restarts") for record in read_metrics(killed.folder)] == [None, 0, 1]
    ends_clean(children)


@pytest.mark.fault(36)
def test_one_that_fails_twice_stops_the_run(train_command, fake, capsys, children):
    """With the last checkpoint intact. An ablation, whose dtype is the engine's."""
    fake("exit", at=SEEN + 1, times=2)
    run = train_command(*LOOSE, "--rollout_precision", "bf16", "--run.steps", "2")
    error = capsys.readouterr().err
    assert run.code == 3 and error.count("\n") == 1, error
    assert "rollout.engine transformers failed twice: the engine's process ended with code 7; its last line: " in error
    assert error.endswith("/checkpoints/1\n") and len(children) == 2
    assert json.loads((run.folder / "environment.json").read_text())["engine"]["dtype"] == "bfloat16"
    with Checkpoints(run.folder / "checkpoints", CheckpointConfig()) as checkpoints:
        assert checkpoints.arrays(1)[1]["position"] == 8
    ends_clean(children)


@pytest.mark.fault(36)
@pytest.mark.parametrize("fault, says", [
    ("dtype", "rollout: the engine transformers has weights in bfloat16 after loading; the run samples in float16"),
    ("no start", "rollout: the engine says: Refused: this engine never starts"),
])
def test_what_shows_at_the_start_is_refused(train_command, fake, capsys, children, fault, says):
    fake(fault)
    run = train_command(*OTHER)
    error = capsys.readouterr().err
    assert (run.code, run.folder) == (2, None) and says in error and error.count("\n") == 1
    ends_clean(children)


# -- other commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command, flags", [
    ("generate", ("--generate.prompts", '["1+1=", "2+2="]')),
    ("eval", ("--evaluation.sets", "[{name: own, samples: 2, temperature: 1.0}]")),
    ("filter", ("--filter.samples", "4", "--task.train_size", "8")),
])
def test_other_commands_sample_by_it(tiny, fake, tmp_path, capsys, children, command, flags):
    fake()
    flags = ("--run.dir", str(tmp_path / "runs"), "--run.compile_cache", "null", *OTHER, *flags)
    assert cli.main([command, str(tiny), *flags]) == 0
    assert len(children) == 1 and (tmp_path / "fake.log").read_text().count("load version-1") == 1
    ends_clean(children)
    if command == "filter":
        return
    fake("dtype")
    assert cli.main([command, str(tiny), *flags]) == 2
    assert "rollout: the engine transformers has weights in bfloat16" in capsys.readouterr().err
    fake("nan", at=0, times=99)
    assert cli.main([command, str(tiny), *flags]) == 3
    assert "rollout.engine transformers failed twice: " in capsys.readouterr().err
    ends_clean(children)


def test_stop_strings_are_cut_on_our_side(tiny, fake, tmp_path, capsys):
    """The child is not told of them: a response ends with the token that completes one."""
    fake()
    flags = ("--generate.prompts", '["1+1="]', "--sampling.stop", '["1", "2", "3", "4"]', "--sampling.group_size", "16",
             "--sampling.max_new_tokens", "12", "--run.compile_cache", "null", *OTHER)
    assert cli.main(["generate", str(tiny), *flags]) == 0
    said = capsys.readouterr().out.split("> 1+1=\n")[1].splitlines()
    assert len(said) == 16 and any(line[-1:] in "1234" for line in said)
    assert not [line for line in said if any(character in line[:-1] for character in "1234")]
