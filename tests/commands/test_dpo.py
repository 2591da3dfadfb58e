"""`dpo` through the command line: what it writes, resumes, refuses, and how it stops."""

import json
import math
from pathlib import Path
import signal

import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.logs import RunLog, read_metrics

DPO = {"batch_size": 8, "microbatch_size": 4, "max_length": 10, "steps": 4, "optimizer": {"learning_rate": 3e-3}}


@pytest.fixture(scope="module")
def command(tiny, compile_cache, tmp_path_factory):
    """command(folder, flag, ...) -> exit code of `dpo` on the tiny config, its run folders in `folder`."""
    config = tmp_path_factory.mktemp("config") / "dpo.yaml"
    config.write_text(json.dumps({**json.loads(Path(tiny).read_text()), "dpo": DPO}))

    def command(folder, *flags, name="dpo"):
        return cli.main([name, str(config), "--run.compile_cache", compile_cache, "--run.dir", str(folder), *flags])

    return command


def one_run(folder):
    (found,) = Path(folder).glob("*")
    return found


# The evaluation is that of test_loop.py: one sampler is compiled for both.
WARM = ("--sft.steps", "2", "--evaluation.every", "2", "--evaluation.rows", "32", "--evaluation.sets",
        "[{name: own, samples: 4, temperature: 1}]")


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Four steps after a warm start, without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert command(folder, *WARM) == 0
    return one_run(folder)


def test_a_run_leaves_its_folder(whole):
    first, *steps = read_metrics(whole)
    assert first["step"] == 0 and first["heldout/accuracy"] == 0.5 and first["heldout/pairs"] == 6
    assert 0 < first["sft/loss"] < 4 and "eval/own/accuracy" in first
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    wanted = {"loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward", "grad_norm", "loss_scale",
              "skipped", "learning_rate"}
    assert all(wanted <= set(record) for record in steps) and steps[0]["loss_scale"] == 2**15
    assert [record["step"] for record in steps if "heldout/loss" in record] == [2, 4]
    assert steps[0]["loss"] == pytest.approx(math.log(2)) and steps[-1]["loss"] < steps[0]["loss"] - 1e-3
    assert all(record["prompts_set_aside"] == 0 for record in steps) and first["sft/prompts_set_aside"] == 0
    assert first["heldout/pairs_set_aside"] == 0
    assert steps[-1]["reward_margin"] > 0 and steps[-1]["heldout/loss"] != first["heldout/loss"]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["0", "1", "2", "3", "4"]  # 0: warm
    assert (whole / "model" / "config.json").exists()


def test_a_resumed_run_is_bitwise_one_that_never_stopped(command, whole, tmp_path, capsys):
    """The reference of a warm-started run comes back from the checkpoint: every margin depends on it."""
    assert command(tmp_path, *WARM, "--dpo.steps", "2") == 0
    folder = one_run(tmp_path)
    assert command(tmp_path, *WARM, "--resume", str(folder)) == 0
    said = capsys.readouterr().out
    assert "resumed after step 2" in said and said.count("warm start 2/2") == 1
    assert read_metrics(folder) == read_metrics(whole)
    assert weights(folder) == weights(whole)


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_export_reads_a_checkpoint_with_a_reference(command, whole, tmp_path):
    before = weights(whole)
    for path in (whole / "model").iterdir():
        path.unlink()
    (whole / "model").rmdir()
    assert command(tmp_path, *WARM, "--resume", str(whole), name="export") == 0
    assert weights(whole) == before


def test_pairs_of_a_file(command, tmp_path, capsys):
    rows = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n + 2}"} for n in range(6)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = ("--task.name", "preference", "--task.path", str(data), "--task.template", "{prompt}",
             "--task.train_size", "5", "--task.heldout_size", "1", "--dpo.steps", "1")
    assert command(tmp_path / "runs", *flags) == 0
    assert "dpo (sigmoid, beta 0.1): 1 steps of 8 pairs" in capsys.readouterr().out
    first, _ = read_metrics(one_run(tmp_path / "runs"))
    assert first["heldout/pairs"] == 1 and first["heldout/loss"] == pytest.approx(math.log(2))
    # Nothing to grade by: an evaluation would read 0 whatever the model does.
    assert command(tmp_path / "none", *flags, "--evaluation.sets", "[{name: own}]") == 2
    assert "evaluation set 'own' has problems without an answer to grade by" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_signal_ends_the_step_and_saves(command, tmp_path, monkeypatch):
    write = RunLog.metrics

    def write_and_signal(log, step, values):
        write(log, step, values)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "metrics", write_and_signal)
    assert command(tmp_path, "--checkpoint.every", "0") == 143
    assert [path.name for path in (one_run(tmp_path) / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("flags, message", [
    (("--dpo.microbatch_size", "3"), "dpo.microbatch_size is 3; allowed: a divisor of batch_size, 8"),
    (("--dpo.steps", "0"), "dpo.steps: 0 is not allowed; allowed: integer >= 1"),
    (("--dpo.beta", "0"), "dpo.beta: 0 is not allowed"),
    (("--dpo.loss", "hinge"), 'dpo.loss: "hinge" is not allowed; allowed: sigmoid | ipo'),
    (("--dpo.label_smoothing", "0.1", "--dpo.loss", "ipo"), "label_smoothing is 0.1 with loss 'ipo'; allowed: 0"),
    (("--dpo.max_length", "4"), "dpo: none of the 64 problems has a chosen and a rejected response that fit into"),
    (("--task.name", "preference"), "task 'preference' needs either task.path, a JSONL file, or task.hub"),
    (("--task.name", "preference", "--task.path", "absent.jsonl"), "task: absent.jsonl: no such data file"),
    (("--sft.steps", "1", "--sft.max_length", "4"), "sft: none of the 64 problems has a solution that fits"),
], ids=lambda value: value[0] + value[1] if isinstance(value, tuple) else "")
def test_what_is_refused_before_anything_is_written(command, tmp_path, capsys, flags, message):
    assert command(tmp_path / "runs", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_task_without_preferences_is_refused(command, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "1+1=", "answer": "2"}\n' * 4)
    flags = ("--task.name", "math", "--task.path", str(data), "--task.template", "{problem}",
             "--task.heldout_size", "1")
    assert command(tmp_path / "runs", *flags) == 2
    assert "allowed: task arithmetic or preference, or a larger limit" in capsys.readouterr().err
