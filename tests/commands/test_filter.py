"""`filter`: which problems are kept, and that a run that was cut off continues as if it had not been."""

import json
from pathlib import Path
import signal

import numpy as np
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.commands import filter as filtering
from jaxrl_fp16.tasks import load_examples
from jaxrl_fp16.training.rollouts import engine


@pytest.fixture(scope="module")
def start(tiny, compile_cache, digits_reward, tmp_path_factory):
    """start(flag, ...) -> (exit code, run folder or None); 12 problems, 8 samples each, 4 problems at once."""
    def start(*flags):
        runs = tmp_path_factory.mktemp("runs")
        code = cli.main(["filter", str(tiny), "--run.compile_cache", compile_cache, "--run.dir", str(runs),
                         "--task.reward_file", digits_reward, "--task.train_size", "12", "--filter.samples", "8",
                         "--evaluation.rows", "32", *flags])
        return code, next(runs.glob("*"), None)

    return start


@pytest.fixture(scope="module")
def whole(start):
    code, folder = start("--filter.low", "0.3", "--filter.high", "0.5")
    assert code == 0
    return folder


def accuracies(folder):
    return [json.loads(line)["accuracy"] for line in (folder / "accuracy.jsonl").read_text().splitlines()]


def test_the_kept_problems_are_those_between_the_bounds(whole):
    found = accuracies(whole)
    rows = [json.loads(line) for line in (whole / "filtered.jsonl").read_text().splitlines()]
    kept = [value for value in found if 0.3 <= value <= 0.5]
    assert len(found) == 12 and 0 < len(kept) < 12  # a random model: some within, some without
    assert [row["accuracy"] for row in rows] == kept
    assert all(abs(value * 32 - round(value * 32)) < 1e-6 for value in found)  # the mean of 8 quarters
    assert (whole / "histogram.png").read_bytes()[:4] == b"\x89PNG" and (whole / "config.yaml").is_file()
    examples = load_examples(whole / "filtered.jsonl", solution_field="solution")
    sums = [sum(map(int, example.problem.removesuffix("=").split("+"))) for example in examples]
    assert sums == [int(example.answer) for example in examples]


def test_the_table_counts_every_problem(start, capsys):
    code, folder = start("--filter.output", "kept.jsonl")
    said = capsys.readouterr().out
    counts = [int(line.split("│")[2]) for line in said.splitlines() if line.startswith("│")]
    Path("kept.jsonl").unlink()
    assert code == 0 and sum(counts) == 12 and "of 12 problems lie between 0.2 and 0.8: kept.jsonl" in said
    assert not (folder / "filtered.jsonl").exists()


@pytest.mark.parametrize("cut", ["after a chunk", "within a line", "at its end"])
def test_a_filter_that_was_cut_off_goes_on(start, whole, cut, tmp_path, capsys):
    """Other bounds are allowed: nothing is measured again for them."""
    code, folder = start()
    measured = (folder / "accuracy.jsonl").read_bytes()
    lines = measured.splitlines(keepends=True)
    left = {"after a chunk": lines[:4], "within a line": [*lines[:6], lines[6][:5]], "at its end": lines}[cut]
    (folder / "accuracy.jsonl").write_bytes(b"".join(left))
    (folder / "filtered.jsonl").unlink()
    code, other = start("--resume", str(folder), "--filter.low", "0.3", "--filter.high", "0.5")
    assert code == 0 and other is None
    assert (folder / "accuracy.jsonl").read_bytes() == measured == (whole / "accuracy.jsonl").read_bytes()
    assert (folder / "filtered.jsonl").read_bytes() == (whole / "filtered.jsonl").read_bytes()


def test_a_signal_ends_it_after_a_chunk(start, monkeypatch, capsys):
    chunks = filtering.grade_chunks

    def interrupted(*arguments):
        for number, chunk in enumerate(chunks(*arguments)):
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield chunk

    monkeypatch.setattr(filtering, "grade_chunks", interrupted)
    code, folder = start()
    assert code == 143 and len(accuracies(folder)) == 8 and not (folder / "filtered.jsonl").exists()
    assert "stopped by SIGTERM after 8 of 12 problems" in capsys.readouterr().out


def test_a_signal_ends_it_in_the_middle_of_a_chunk(start, monkeypatch, capsys):
    """What the chunk had is not written: the run that goes on samples it again."""
    monkeypatch.setattr(engine, "LONG", 0)
    watch = filtering._watch

    def signal_and_watch(console, signals, sampled):
        signal.raise_signal(signal.SIGTERM)
        watch(console, signals, sampled)

    monkeypatch.setattr(filtering, "_watch", signal_and_watch)
    code, folder = start()
    assert code == 143 and accuracies(folder) == [] and not (folder / "filtered.jsonl").exists()
    assert "stopped by SIGTERM after 0 of 12 problems" in capsys.readouterr().out


def test_rewards_that_are_not_known_are_left_out(start, tmp_path):
    reward = tmp_path / "some.py"
    reward.write_text("def reward(prompts, responses, examples):\n    return [None] * 7 + [0.75]\n")
    code, folder = start("--task.reward_file", str(reward))
    assert code == 0 and accuracies(folder) == [0.75] * 12
    reward.write_text("def reward(prompts, responses, examples):\n    return [None] * 8\n")
    code, folder = start("--task.reward_file", str(reward))
    assert code == 0 and accuracies(folder) == [None] * 12 and not (folder / "filtered.jsonl").read_text()


def test_prompts_that_do_not_fit_are_not_kept(start):
    _, folder = start("--training.max_prompt_tokens", "3")
    assert accuracies(folder) == [None] * 12


@pytest.mark.parametrize("flags, message", [
    (("--sampling.temperature", "0"), "sampling.temperature is 0; allowed: above 0"),
    (("--filter.low", "0.9"), "low is 0.9; allowed: at most high, 0.8"),
    (("--filter.samples", "0"), "filter.samples: 0 is not allowed; allowed: integer >= 1"),
])
def test_what_is_refused(start, capsys, flags, message):
    code, folder = start(*flags)
    error = capsys.readouterr().err
    assert (code, folder) == (2, None) and message in error and error.count("\n") == 1


def test_accuracies_are_read_back(whole):
    np.testing.assert_array_equal(filtering.read_accuracies(whole), accuracies(whole))
