"""The table and the picture that a run ends with, from its metrics alone."""

import json
import math

import numpy as np
import pytest

from jaxrl_fp16.lab.report import draw_run, summary

STEP = {"reward": 0.5, "response_length": 4.0, "mismatch/kl_k3": 2e-6, "mismatch_grad/kl_k3": 0.0, "entropy": 1.25,
        "loss_scale": 32768.0, "skipped": 0.0}


@pytest.fixture
def write(tmp_path):
    """write(record, ...) -> a run folder with these metrics."""

    def write(*records):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path

    return write


def a_run():
    """Two evaluations around three steps, one of them skipped and without a finite mismatch."""
    return (
        {"step": 0, "sft/loss": 0.3, "eval/greedy/accuracy": 0.25, "eval/greedy/stderr": 0.1},
        {"step": 1, **STEP},
        {"step": 2, **STEP, "reward": 0.6, "skipped": 1.0, "mismatch/kl_k3": "NaN", "grad_norm": "Infinity"},
        {"step": 3, **STEP, "reward": 0.75, "loss_scale": 16384.0, "eval/greedy/accuracy": 0.5,
         "eval/late/accuracy": 1.0},
    )


def test_the_table_compares_first_and_last(write):
    rows = {name: (first, last) for name, first, last in summary(write(*a_run()))}
    assert rows["greedy accuracy, held out"] == ("0.250", "0.500")
    assert rows["late accuracy, held out"] == ("-", "1.000")
    assert rows["reward"] == ("0.500", "0.750")
    assert rows["loss scale"] == ("32,768", "16,384")
    assert rows["token KL (k3), sampler | scorer"] == ("2.0e-06", "2.0e-06")
    assert rows["token KL (k3), scorer | gradient"] == ("0.0e+00", "0.0e+00")
    assert "effective sample size" not in rows      # the run did not measure it


def test_a_run_without_a_step_has_no_picture(write):
    folder = write({"step": 0, "eval/greedy/accuracy": 0.25})
    assert summary(folder) == [("greedy accuracy, held out", "0.250", "0.250")]
    assert draw_run(folder, "none") is None and not (folder / "plot.png").exists()
    assert summary(write({"step": 0})) == []


def picture(path):
    import matplotlib.image

    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return matplotlib.image.imread(path)


def test_the_picture(write):
    path = draw_run(write(*a_run()), "a run in fp16")
    assert path.name == "plot.png"
    pixels = picture(path)
    assert pixels.shape[:2] == (768, 1200)
    # All four panels hold ink.
    for half in (pixels[:384], pixels[384:]):
        for panel in (half[:, :600], half[:, 600:]):
            assert np.unique(panel.reshape(-1, panel.shape[-1]), axis=0).shape[0] > 20


@pytest.mark.parametrize("change", [
    {"mismatch/kl_k3": 0.0},
    {"mismatch/kl_k3": math.nan, "loss_scale": 1.0},
    {"entropy": math.inf, "skipped": 1.0},
], ids=["exact", "no mismatch", "no entropy"])
def test_odd_runs_are_drawn_without_a_warning(write, change):
    path = draw_run(write({"step": 1, **STEP, **change}), "odd")
    assert picture(path).shape[:2] == (768, 1200)


def test_a_supervised_run_has_no_reward_to_show(write):
    folder = write({"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": 1.0, "grad_norm": 1.0})
    assert summary(folder) == [] and draw_run(folder, "sft") is None
