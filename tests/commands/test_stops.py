"""What ends a run of a tiny model before its last step: signals, rewards, memory, the disk, gradients."""

import math
import signal

import jax
import pytest

from jaxrl_fp16.logs import RunLog, read_metrics
from jaxrl_fp16.training.checkpoints.checkpoint import Checkpoints
from jaxrl_fp16.training.rollouts import engine
from jaxrl_fp16.training.runs.run import Run


@pytest.mark.fault(23)
@pytest.mark.parametrize("number, place", [(signal.SIGTERM, "metrics"), (signal.SIGINT, "samples")])
def test_a_signal_ends_the_step_and_saves(train_run, monkeypatch, number, place):
    write = getattr(RunLog, place)

    def write_and_signal(log, step, values):
        write(log, step, values)
        if step == 1:
            signal.raise_signal(number)

    monkeypatch.setattr(RunLog, place, write_and_signal)
    before = signal.getsignal(number)
    run = train_run("--checkpoint.every", "0", "--run.steps", "3")
    assert run.code == 128 + number
    assert f"stopped by {number.name}; saved after step 1" in run.said
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["1"]
    assert [record["step"] for record in read_metrics(run.folder)] == [0, 1]
    assert signal.getsignal(number) == before and not (run.folder / "model").exists()


@pytest.mark.fault(23)
@pytest.mark.parametrize("during, rows, saved", [
    (1, [0], "there is no checkpoint yet"), (3, [0, 1, 2], "the last checkpoint is {}/checkpoints/2")])
def test_a_signal_in_the_middle_of_a_long_batch(train_run, monkeypatch, during, rows, saved):
    """What was done is saved, and the run that goes on is bitwise one that never stopped."""
    monkeypatch.setattr(engine, "LONG", 0)
    tell_how_far, flags = Run.tell, ("--checkpoint.every", "0", "--run.steps", "3")

    def tell_and_signal(run, what):
        tell = tell_how_far(run, what)
        if what == f"step {during}: sampling":
            return lambda found: [signal.raise_signal(signal.SIGTERM), tell(found)]
        return tell

    with monkeypatch.context() as patch:
        patch.setattr(Run, "tell", tell_and_signal)
        run = train_run(*flags)
    assert run.code == 143 and [record["step"] for record in read_metrics(run.folder)] == rows
    assert f"stopped by SIGTERM; in the middle of step {during}: sampling; {saved.format(run.folder)}" in run.said
    if during > 1:
        assert train_run(*flags, "--resume", str(run.folder)).code == 0
        found, expected = read_metrics(run.folder), read_metrics(train_run(*flags).folder)
        assert len(found) == 4 and [len(found), *learnt(found)] == [len(expected), *learnt(expected)]


def learnt(records):
    """What depends on all that a step sampled and learnt."""
    return [[record[name] for name in ("reward", "loss", "grad_norm", "mismatch/kl_k3")] for record in records[1:]]


@pytest.mark.fault(23)
def test_a_second_signal_stops_at_once(train_run, monkeypatch):
    def signal_twice(log, step, values):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "metrics", signal_twice)
    with pytest.raises(SystemExit, match="143"):
        train_run()


def failing(folder, body):
    path = folder / "failing.py"
    path.write_text(f"def reward(prompts, responses, examples):\n    {body}\n")
    return "--task.reward_file", str(path)


@pytest.mark.fault(14)
@pytest.mark.fault(16)
@pytest.mark.parametrize("body, message", [
    ("return [None] * len(responses)", "32 of 32 rewards failed (reward returned 'None' for a reward); allowed: a"),
    ("return 1 / 0", "32 of 32 rewards failed (ZeroDivisionError: division by zero); allowed: a share of training.max"),
    ("return [1.0]", "reward returned 1 rewards for a group of 4 responses; one number a response is needed"),
], ids=["no number", "raises", "wrong number"])
def test_a_reward_function_that_fails_stops_the_run(train_command, capsys, tmp_path, body, message):
    run = train_command(*failing(tmp_path, body))
    error = capsys.readouterr().err
    assert run.code == 3 and message in error and error.count("\n") == 1
    assert error.endswith("; there is no checkpoint yet\n")


def test_a_few_failed_rewards_are_left_out(train_run, tmp_path):
    flags = failing(tmp_path, "return [None] + [len(text) / 4 for text in responses[1:]]")
    run = train_run(*flags, "--training.max_failed_rewards", "0.25", "--run.steps", "1")
    step = read_metrics(run.folder)[-1]
    assert run.code == 0 and step["rewards_failed"] == 8 and math.isfinite(step["loss"])


def test_data_without_a_prompt_that_fits_is_refused_before_anything_is_written(train_command, capsys):
    run = train_command("--training.max_prompt_tokens", "3")
    error = capsys.readouterr().err
    assert (run.code, run.folder) == (2, None) and error.count("\n") == 1
    assert "none of the 64 prompts fits into training.max_prompt_tokens = 3" in error


@pytest.mark.fault(21)
@pytest.mark.fault(24)
@pytest.mark.parametrize("place, error, code, message", [
    ("loops.iterations.learn", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"), 3,
     "out of device memory; what lowers"),
    ("loops.iterations.sample_records", OSError(28, "No space left on device", "samples.jsonl"), 3,
     "No space left on device: 'samples.jsonl'; there is no checkpoint yet"),
    ("runs.run.save_pretrained", ValueError("tensor x holds 1e+06"), 3, "tensor x holds 1e+06"),
    ("runs.run.make_evaluators", KeyboardInterrupt(), 130, "interrupted"),
], ids=["memory", "disk", "export", "interrupt"])
def test_what_else_ends_a_run_in_one_line(train_command, monkeypatch, capsys, place, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"jaxrl_fp16.training.{place}", fail)
    run = train_command("--run.steps", "0" if place == "runs.run.save_pretrained" else "1")
    line = capsys.readouterr().err
    assert run.code == code and message in line and line.count("\n") == 1


@pytest.mark.fault(20)
def test_gradients_that_stay_infinite_stop_the_run(train_command, capsys):
    """A scale at which float16 overflows; each step that it skips halves it, and changes nothing else."""
    scale = 2.0**60
    run = train_command("--loss_scale.initial", str(scale), "--loss_scale.maximum", str(scale), "--run.steps", "5",
                  "--training.max_skipped_steps", "5")
    error = capsys.readouterr().err
    assert run.code == 3 and error.count("\n") == 1
    assert "5 optimizer steps of the policy skipped in a row: gradients are not finite" in error
    assert f"the last checkpoint is {run.folder}/checkpoints/2" in error
    records = read_metrics(run.folder)
    assert [(record["skipped"], record["loss_scale"]) for record in records[1:3]] == [(2, scale / 2), (2, scale / 8)]
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        (fresh, _), (state, _) = checkpoints.arrays(1), checkpoints.arrays(2)
    assert state["policy.loss_scale.skipped"] == 4 and state["policy.step"] == 0
    assert state["policy.loss_scale.loss_scale"] == scale / 16
    changed = {name for name in state if state[name].tobytes() != fresh[name].tobytes()}
    assert changed == {"policy.loss_scale.loss_scale", "policy.loss_scale.skipped", "policy.key"}
