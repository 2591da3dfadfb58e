"""The scripts behind the figures of reliability, each with a few cases: they run, they count, and they can fail."""

import importlib
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "reliability"


@pytest.fixture
def script(monkeypatch, tmp_path, quick_compile, capsys):
    """script(name, flag, ...) -> the result file and the module, after its `main` in this process; its exit code is
    checked against what the file says."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)

    def script(name, *flags, work=tmp_path / "work"):
        module = importlib.import_module(name)
        folders = ["--work", str(work), "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *folders, *map(str, flags)])
        code = module.main()
        result = json.loads((tmp_path / f"reliability_{name}.json").read_text())
        assert code == (0 if result["passed"] else 1) and result["passed"] == (not result["problems"])
        return result, module

    yield script
    capsys.readouterr()
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(FOLDER.parent):
            del sys.modules[name]


@pytest.mark.fault(25)
def test_corruption(script, monkeypatch):
    result, module = script("corruption", "--count", 8)
    assert result["problems"] == [] and sum(row["noticed_and_fell_back"] for row in result["rows"]) == 8
    # Where the checksums see nothing, the script does.
    monkeypatch.setattr("jaxrl_fp16.training.checkpoints.manifest.find_damage", lambda folder: "")
    monkeypatch.setattr(module, "damage", lambda checkpoint, generator: ("unseen", "config.yaml", lambda: None))
    result, _ = script("corruption", "--count", 3)
    assert len(result["problems"]) == 3 and "step 3 instead of" in result["problems"][0]


@pytest.mark.fault(19)
def test_loss_scale(script, monkeypatch):
    result, module = script("loss_scale", "--count", 120, "--configs", "odd factors")
    (row,) = result["rows"]
    assert result["problems"] == [] and row["steps"] == 120
    assert row["skipped"] > 10 and row["at_minimum"] and row["at_maximum"]
    oracle = module.Oracle(module.CONFIGS["patient"], 2.0**10)
    for finite, wanted in ((True, (2.0**10, 1, 0, 0)), (False, (2.0**10, 0, 1, 1)), (False, (2.0**10, 0, 2, 2)),
                           (False, (2.0**9, 0, 0, 3))):
        oracle.step(finite)
        assert oracle.values() == wanted


@pytest.mark.fault(17)
def test_hostile_answers(script, monkeypatch):
    monkeypatch.setattr("hostile_answers.QUIET", 0.0)    # nine ordinary answers tell no rate
    result, module = script("hostile_answers", "--count", 8, "--workers", 2, "--deadline", 1, "--ordinary", 9)
    assert result["problems"] == [] and result["groups"] == 1 and result["orphans"] == 0
    assert result["sent_to_workers"] and result["ordinary_a_second"] > 0


@pytest.mark.fault(26)
def test_meshes(quick_environment, tmp_path):
    run = subprocess.run(
        [sys.executable, FOLDER / "meshes.py", "--count", "2", "--work", tmp_path / "work", "--out", tmp_path],
        text=True, capture_output=True, timeout=300,
        env=os.environ | quick_environment | {"PYTHONPATH": str(FOLDER.parents[1])},
    )
    result = json.loads((tmp_path / "reliability_meshes.json").read_text())
    assert run.returncode == 0 and result["problems"] == [] and result["devices"] == 8, run.stdout + run.stderr
    assert [row["restored_from_meshes"] for row in result["rows"]] == [2, 2] and result["rows"][1]["divided"] > 10


@pytest.fixture(scope="module")
def work(tmp_path_factory, quick_environment, compiled):
    """Shared: the run left alone, and the programs that the other tests of whole runs compile, in the same way."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "compiled").symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick_environment.items():
            patch.setenv(name, value)
        yield folder


@pytest.mark.fault(22)
def test_kills(script, work):
    result, module = script("kills", "--count", 2, "--runs", "plain", "--steps", 9, work=work)
    (row,) = result["rows"]
    assert result["problems"] == [] and row["kills"] == 2 and row["bitwise_equal"]
    assert row["at_start"] and row["before_a_checkpoint"]
    # Another run's checkpoints, a line more and another text are seen.
    runs = sys.modules["runs"]
    killed, alone = work / "plain-killed", work / "plain-undisturbed"
    assert runs.differences(killed, alone) == []
    about = killed / "checkpoints" / "9" / "about.json"
    with open(killed / "samples.jsonl", "a") as samples, open(killed / "metrics.jsonl", "a") as metrics:
        samples.write("{}\n"), metrics.write('{"step": 10}\n')
    about.write_text(about.read_text() + " ")
    assert [text.split()[0] for text in runs.differences(killed, alone)] == [
        "metrics.jsonl", "samples.jsonl", "checkpoint"]


@pytest.mark.fault(23)
def test_signals(script, work):
    result, module = script("signals", "--count", 1, "--runs", "plain", "--steps", 9, work=work)
    (row,) = result["rows"]
    assert result["problems"] == [] and row["signals"] == 1 and row["bitwise_equal"]


@pytest.mark.fault(24)
def test_disk_full(script, work):
    try:
        result, module = script("disk_full", "--count", 1, "--run", "plain", "--steps", 9, work=work)
    except SystemExit as refused:
        assert refused.code == 2
        pytest.skip("a tmpfs cannot be mounted here")
    (row,) = result["rows"]
    assert result["problems"] == [] and row["fillings"] == 1 and row["bitwise_equal_at_the_end"]
