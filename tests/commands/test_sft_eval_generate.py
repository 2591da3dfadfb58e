"""sft, eval, generate and export through the command line, on a tiny model."""

import json
from pathlib import Path
import re
import signal

import jax
import numpy as np
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.console import Console
from jaxrl_fp16.logs import RunLog, read_metrics
from jaxrl_fp16.models import load_pretrained
from jaxrl_fp16.tokenizer import end_ids, load_tokenizer

SETS = ("--evaluation.sets", "[{name: sampled, samples: 4, temperature: 1}, {name: greedy, limit: 3}]",
        "--evaluation.rows", "16")


@pytest.fixture(scope="module")
def command(tiny, compile_cache):
    """command(name, flag, ...) -> exit code of that command on the tiny config."""
    return lambda name, *flags: cli.main([name, str(tiny), "--run.compile_cache", compile_cache, *flags])


def one_run(folder):
    (found,) = Path(folder).glob("*")
    return found


def embedding(folder):
    return np.asarray(load_pretrained(folder)[1]["embedding"])


def test_sft_from_start_to_resume_and_export(command, tmp_path, capsys):
    flags = ("--run.dir", str(tmp_path / "runs"), "--sft.steps", "4", "--checkpoint.every", "2",
             "--algorithm.kl_coef", "0.1")  # which `sft` has no use for, nor its checkpoints a reference
    assert command("sft", *flags) == 0
    folder, said = one_run(tmp_path / "runs"), capsys.readouterr().out
    assert "supervised: 4 steps of 16 rows" in said and "step 4/4  loss" in said
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "loss_scale", "skipped", "learning_rate"} <= set(records[0])
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
    weights = embedding(folder / "model")

    # At its end already: nothing is done but the export.
    assert command("sft", *flags, "--resume", str(folder)) == 0
    assert read_metrics(folder) == records
    np.testing.assert_array_equal(embedding(folder / "model"), weights)
    # Further, as a run of six steps would have gone.
    assert command("sft", *flags, "--sft.steps", "6", "--resume", str(folder)) == 0
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert (embedding(folder / "model") != weights).any()

    # Its newest checkpoint again, where the export was lost.
    last = embedding(folder / "model")
    for path in (folder / "model").iterdir():
        path.unlink()
    (folder / "model").rmdir()
    capsys.readouterr()
    assert command("export", *flags, "--sft.steps", "6", "--resume", str(folder)) == 0
    assert f"weights for Transformers and vLLM: {folder}/model" in capsys.readouterr().out
    np.testing.assert_array_equal(embedding(folder / "model"), last)


def test_packed_sft_resumes_bit_for_bit(command, tmp_path):
    """3 + 3 steps against 6."""
    flags = ("--sft.packing", "true", "--sft.batch_size", "4", "--sft.microbatch_size", "2", "--sft.max_length", "32",
             "--task.arithmetic.digits", "2", "--training.max_prompt_tokens", "8", "--checkpoint.every", "3")
    assert command("sft", *flags, "--run.dir", str(tmp_path / "whole"), "--sft.steps", "6") == 0
    whole = one_run(tmp_path / "whole")
    assert command("sft", *flags, "--run.dir", str(tmp_path / "cut"), "--sft.steps", "3") == 0
    cut = one_run(tmp_path / "cut")
    assert command("sft", *flags, "--run.dir", str(tmp_path / "cut"), "--sft.steps", "6", "--resume", str(cut)) == 0
    one, two = read_metrics(whole), read_metrics(cut)
    assert [record["step"] for record in one] == list(range(1, 7))
    for name in ("loss", "grad_norm", "examples", "filled"):
        assert [record[name] for record in one] == [record[name] for record in two]
    assert all(record["examples"] > 8 and record["filled"] > 0.75 for record in one)
    assert one[-1]["loss"] < one[0]["loss"]
    first, second = (load_pretrained(folder / "model")[1] for folder in (whole, cut))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_signal_ends_supervised_training_too(command, tmp_path, monkeypatch):
    write = RunLog.metrics

    def write_and_signal(log, step, values):
        write(log, step, values)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "metrics", write_and_signal)
    flags = ("--run.dir", str(tmp_path), "--sft.steps", "4", "--checkpoint.every", "0")
    assert command("sft", *flags) == 143
    assert [path.name for path in (one_run(tmp_path) / "checkpoints").iterdir()] == ["1"]


@pytest.mark.fault(22)
@pytest.mark.fault(23)
@pytest.mark.fault(25)
def test_a_warm_start_that_was_cut_off_goes_on_where_it_was(command, tmp_path, monkeypatch, capsys):
    """Its last checkpoint is damaged as well: it continues from the one before."""
    flags = ("--run.steps", "0", "--sft.steps", "5", "--sft.packing", "true", "--sft.max_length", "20",
             "--checkpoint.every", "2")
    assert command("train", *flags, "--run.dir", str(tmp_path / "whole")) == 0
    assert "warm start 5/5  loss " in capsys.readouterr().out
    folder = one_run(tmp_path / "whole")
    (record,) = read_metrics(folder)
    assert record["step"] == 0 and 0 < record["sft/loss"] < 4 and (folder / "model" / "config.json").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0"] and not (folder / "warm_start").exists()

    say = Console.say

    def say_and_signal(console, text):
        say(console, text)
        if text.startswith("warm start 3/5"):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "say", say_and_signal)
        assert command("train", *flags, "--run.dir", str(tmp_path / "cut")) == 130
    assert "stopped by SIGINT; saved in the warm start, after step 3" in capsys.readouterr().out
    cut = one_run(tmp_path / "cut")
    (cut / "warm_start" / "3" / "about.json").write_text("{}")
    assert command("train", *flags, "--run.dir", str(tmp_path / "cut"), "--resume", str(cut)) == 0
    said = capsys.readouterr().out
    assert "warm_start/3: damaged, about.json" in said and "warm start: resumed after step 2" in said
    assert read_metrics(cut) == [record]
    np.testing.assert_array_equal(embedding(cut / "model"), embedding(folder / "model"))


@pytest.mark.parametrize("until, steps", [(0.5, 4), (1.0, 6)], ids=["reached", "never reached"])
def test_a_warm_start_ends_at_an_accuracy(command, tmp_path, capsys, until, steps):
    reward = tmp_path / "right_in_the_end.py"
    reward.write_text("from pathlib import Path\n\n\ndef reward(prompts, responses, examples):\n"
                      f"    with open({str(tmp_path / 'calls')!r}, 'a') as calls:\n        calls.write('x')\n"
                      f"    late = len(Path({str(tmp_path / 'calls')!r}).read_text()) > 6\n"
                      "    return [0.75 * late] * len(responses)\n")
    flags = ("--run.steps", "0", "--run.export", "false", "--sft.steps", "6", "--sft.check_every", "2", *SETS,
             "--sft.until_accuracy", str(until), "--task.reward_file", str(reward), "--task.workers", "1")
    assert command("train", *flags, "--run.dir", str(tmp_path / "runs")) == 0
    (record,) = read_metrics(one_run(tmp_path / "runs"))
    assert record["sft/steps"] == steps and record["eval/sampled/accuracy"] == 0.75
    assert f"warm start {steps}/6" in capsys.readouterr().out


def test_sft_without_steps_is_refused(command, tmp_path, capsys):
    assert command("sft", "--run.dir", str(tmp_path / "runs")) == 2
    assert "sft.steps is 0; allowed: 1 or more" in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [("--sft.max_length", "4"), ("--task.name", "math")], ids=["too long", "no solution"])
def test_sft_without_a_solution_that_fits_is_refused(command, tmp_path, capsys, flags):
    if "math" in flags:
        data = tmp_path / "data.jsonl"
        data.write_text('{"problem": "1+1", "answer": "2"}\n' * 8)
        flags = (*flags, "--task.path", str(data), "--task.template", "{problem}", "--task.heldout_size", "1")
    assert command("sft", "--sft.steps", "2", "--run.dir", str(tmp_path / "runs"), *flags) == 2
    error = capsys.readouterr().err
    said = "none of the 7 problems has a solution; " if "math" in flags else "has a solution that fits into max_length"
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_eval_prints_a_table_and_a_json_line(command, tmp_path, capsys):
    assert command("eval", *SETS, "--run.dir", str(tmp_path / "runs")) == 0
    said = capsys.readouterr().out
    metrics = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert metrics["eval/sampled/problems"] == 6 and metrics["eval/greedy/problems"] == 3
    assert {"eval/sampled/stderr", "eval/sampled/pass@4", "eval/greedy/accuracy"} <= set(metrics)
    assert "eval/greedy/pass@1" not in metrics
    assert "random weights in fp16" in said and "sampled/accuracy" in said
    assert not (tmp_path / "runs").exists()


def test_each_set_is_told_when_it_is_done(command, monkeypatch, capsys):
    """And within a set how far it is, as often as lines of progress come."""
    monkeypatch.setattr(Console, "status", lambda console, text: console.say(f"status: {text}"))
    assert command("eval", *SETS, "--evaluation.rows", "8") == 0
    said = capsys.readouterr().out
    told = [line for line in said.splitlines() if line.startswith(("status: ", "sampled: ", "greedy: "))]
    assert [re.sub(r"[0-9.]+(e-\d+)?$", "X", line.partition(" +-")[0]) for line in told] == [
        "status: evaluating sampled: 2 of 6 problems, accuracy so far X",
        "status: evaluating sampled: 4 of 6 problems, accuracy so far X", "sampled: accuracy X", "greedy: accuracy X"]
    metrics = json.loads(said.splitlines()[-1])
    assert f"sampled: accuracy {metrics['eval/sampled/accuracy']:.4g} +- " in said and " on 6 problems\n" in said


def test_what_only_a_training_needs_is_not_asked_of_others(command, tmp_path, capsys):
    """Groups of one under a group's baseline, minibatches that do not divide, a mesh's rows."""
    flags = ("--sampling.group_size", "1", "--training.minibatch_size", "7", "--training.microbatch_size", "2")
    assert command("train", *flags, "--run.dir", str(tmp_path)) == 2
    capsys.readouterr()
    assert command("generate", *flags, "--generate.count", "3") == 0
    assert len(re.findall(r"^> ", capsys.readouterr().out, flags=re.MULTILINE)) == 3
    assert command("info", *flags, "--algorithm.importance", "tis", "--algorithm.cap", "null") == 2
    assert "algorithm: cap is None; importance 'tis' needs a number" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_responses_steer_no_terminal(command, monkeypatch, capsys):
    monkeypatch.setattr("jaxrl_fp16.training.rollouts.collect.decode_responses",
                        lambda *rest: ["\x1b[2Jhidden\x07 [/foo]"] * 8)
    assert command("generate", "--generate.prompts", '["1+2="]', "--sampling.group_size", "8") == 0
    said = capsys.readouterr().out
    assert "[2Jhidden [/foo]\n" in said and "\x1b" not in said and "\x07" not in said


def test_generate_prints_a_group_for_each_prompt(command, capsys):
    flags = ("--generate.count", "2", "--training.max_prompt_tokens", "6")
    assert command("generate", *flags) == 0
    first = capsys.readouterr().out
    blocks = re.split("^> ", first, flags=re.MULTILINE)[1:]  # a response may hold "<unk> "
    assert len(blocks) == 2
    for block in blocks:
        prompt, *responses = block.rstrip("\n").split("\n")
        assert prompt.endswith("=") and len(responses) == 4
        assert all(response.endswith(("   [0]", "   [1]")) for response in responses)
    assert command("generate", *flags) == 0
    assert re.split("^> ", capsys.readouterr().out, flags=re.MULTILINE)[1:] == blocks
    # Own prompts have no answer to be graded against.
    assert command("generate", "--generate.prompts", '["1+2=", "7+7="]') == 0
    said = capsys.readouterr().out
    assert len(re.findall("^> ", said, flags=re.MULTILINE)) == 2 and "> 1+2=\n" in said and "   [" not in said
    alone = ("--task.name", "math", "--task.path", "absent.jsonl", "--task.reward_file", "absent.py")   # are not read
    assert command("generate", "--generate.prompts", '["1+2="]', *alone, "--task.template", "none") == 0


@pytest.mark.parametrize("name, flags, message", [
    ("eval", (), "evaluation.sets is empty; allowed: one set or more"),
    ("eval", (*SETS, "--resume", "somewhere"), "eval reads no run folder; allowed: --model.path somewhere/model"),
    ("generate", ("--resume", "somewhere"), "generate reads no run folder"),
    ("generate", ("--generate.prompts", '["1+1+1+1="]'), "'1+1+1+1=' is longer than training.max_prompt_tokens = 6"),
    ("generate", ("--task.template", "chat"), "task: template 'chat' needs a tokenizer with a chat template; this one"),
    ("eval", (*SETS, "--task.template", "chat"), "template 'chat' needs a tokenizer with a chat template; this one"),
    ("export", (), "export needs --resume RUN_FOLDER"),
    ("export", ("--resume", "somewhere"), "resume: somewhere does not exist; allowed: the folder of an earlier run"),
    ("eval", ("--evaluation.sets", "[{name: a, path: absent.jsonl}]"), "evaluation: absent.jsonl: no such data file"),
])
def test_what_is_refused(command, capsys, name, flags, message):
    assert command(name, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_evaluation_is_the_same_each_time(command, capsys):
    """Sampled with the keys of run.seed."""
    lines = []
    for _ in range(2):
        assert command("eval", *SETS) == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert lines[0] == lines[1] and lines[0].startswith("{")


@pytest.mark.fault(28)
def test_the_folder_of_another_command_is_refused(command, tmp_path, capsys):
    flags = ("--run.dir", str(tmp_path), "--run.steps", "0", "--run.export", "false")
    assert command("train", *flags) == 0
    folder, _ = one_run(tmp_path), capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for other in ("sft", "filter"):
        assert command(other, *flags, "--sft.steps", "1", "--resume", str(folder)) == 2
        error = capsys.readouterr().err
        assert f"resume: {folder} is a run of the command train; allowed: that command, or" in error
        assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_export_says_what_ends_a_response(command, tmp_path):
    assert command("sft", "--run.dir", str(tmp_path), "--sft.steps", "1", "--sampling.end_tokens", '["=", "<eos>"]',
                   "--sampling.stop", '["7+", "8"]') == 0
    folder = one_run(tmp_path) / "model"
    generation, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("generation_config", "config"))
    tokenizer = load_tokenizer(folder)
    assert generation["eos_token_id"] == config["eos_token_id"] == list(end_ids(tokenizer, names=["=", "<eos>"]))
    assert generation["stop_strings"] == ["7+", "8"]
