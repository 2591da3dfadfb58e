"""benchmarks/gpu.py and its scripts where there is no GPU: what they take, and every call in tiny sizes."""

import importlib
import importlib.util
import json
import math
import os
from pathlib import Path
import runpy
import subprocess
import sys
import time

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "qwen")

# script -> what its rows are told apart by, and for each kind the numbers that say whether it measured: above zero.
NUMBERS = {
    "suite": ("", {None: ["tests"]}),
    "main_job": ("", {None: ["wall_seconds", "steps_done", "seconds/sample", "seconds/learn"]}),
    "mismatch": ("", {None: ["entropy", "sampler_scorer_exact", "scorer_gradient_exact"]}),
    "invariance": ("what", {
        **dict.fromkeys("q k o up down head".split(), ["whole_ms", "exact_1", "exact_16", "tiled_ms_16"]),
        "attention": ["exact_decode", "exact_one_row"],
    }),
    "speed": ("what", {
        "copy": ["bytes_per_second"], "matmul": ["flop_per_second"],
        "decode": ["ms_per_step", "tokens_per_second", "bytes", "of_copy"],
        "update": ["step_seconds", "tflop_per_second", "of_matmul", "positions_per_second"],
    }),
    "torch_speed": ("what", {"decode": ["ms_per_step"], "update": ["step_seconds", "tflop_per_second"]}),
    "kernels": ("what", dict.fromkeys(["decode, 32 steps", "update"], ["busy_ms", "launches"])),
    "paper_test": ("what", dict.fromkeys(["warm start", "train"], ["wall_seconds", "last_step"])),
}


@pytest.fixture
def loading(monkeypatch):
    """The folder on the path; what is loaded from benchmarks/ is forgotten afterwards: other files have these names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(FOLDER.parent):
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_takes(name, loading, monkeypatch, capsys):
    if name == "torch_speed":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: {name}.py" in shown and len(shown.splitlines()) > 4


@pytest.fixture
def calls(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(FOLDER.parent)
    yield importlib.import_module("gpu")
    for name in ("gpu", "record"):
        sys.modules.pop(name, None)


def test_every_script_is_a_step(calls):
    steps = [step for steps in calls.CALLS.values() for step in steps]
    assert {step.script.removesuffix(".py") for step in steps} == set(SCRIPTS) - {"figures"}
    assert all(len({step.name for step in steps}) == len(steps) for steps in calls.CALLS.values())


def taken(call, folder, environment):
    """The rows of `gpu_call_CALL.json` after a dry run that has succeeded."""
    keep = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    ended = subprocess.run(
        [sys.executable, f"{FOLDER}.py", call, "--dry-run", "--out", folder], text=True, capture_output=True,
        env=os.environ | environment | keep, timeout=900,   # seconds; it only ends a hang
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((folder / f"gpu_call_{call}.json").read_text())["rows"]


def check_result(step, rows):
    """Each kind of row is there, none has an error, and their numbers are finite and above zero."""
    key, wanted = NUMBERS[step.script.removesuffix(".py")]
    absent = {"decode"} if step.name == "gpu_speed_without_remat" else set()
    assert {row.get(key) for row in rows} == set(wanted) - absent
    for row in rows:
        assert "error" not in row and "left_out" not in row
        for name in wanted[row.get(key)]:
            assert math.isfinite(float(row[name])) and float(row[name]) > 0, (step.name, row)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["right", "fast", "paper"])
def test_a_dry_run_takes_every_step(call, calls, tmp_path, quick_environment, compiled):
    before = {path: path.stat().st_mtime_ns for path in calls.RESULTS.iterdir()}
    rows = taken(call, tmp_path, {**quick_environment, "JAX_COMPILATION_CACHE_DIR": str(compiled)})
    assert sorted(row["step"] for row in rows) == sorted(step.name for step in calls.CALLS[call])
    for step in calls.CALLS[call]:
        (row,) = [row for row in rows if row["step"] == step.name]
        if step.needs and importlib.util.find_spec(step.needs) is None:
            assert row["left_out"] == f"{step.needs} is not installed"
            continue
        assert row["exit"] == 0 and row["problem"] is None
        check_result(step, json.loads((tmp_path / f"{step.name}.json").read_text())["rows"])
    assert before == {path: path.stat().st_mtime_ns for path in calls.RESULTS.iterdir()}


# -- steps that end in every way, by scripts that measure nothing ------------------------------------

WRITES = "import json, os, sys; json.dump({'rows': [%s]}, open(f'{os.environ[\"OUT\"]}/{sys.argv[2]}.json', 'w'))"
TICKS = "import time\nfor _ in range(600): print('.', file=open('%s', 'a'), end='', flush=True); time.sleep(0.05)"
WAITS = "import os, time\nwhile not os.path.exists(f'{os.environ[\"OUT\"]}/second.json'): time.sleep(0.05)"


@pytest.fixture
def run(calls, monkeypatch, tmp_path, capsys):
    """run({name: code}, flag, ...) -> the exit code of a dry run of steps with these scripts, and its rows by step."""
    monkeypatch.setattr(calls, "SCRIPTS", tmp_path)
    monkeypatch.setattr(calls, "DRY_SECONDS", 20)
    monkeypatch.setattr(calls.signal, "signal", lambda *_: None)

    def run(scripts, **settings):
        for name, code in scripts.items():
            (tmp_path / f"{name}.py").write_text(code)
        steps = tuple(calls.Step(f"{name}.py", name, 20, **settings.get(name, {})) for name in scripts)
        monkeypatch.setattr(calls, "CALLS", {"own": steps})
        monkeypatch.setattr(sys, "argv", ["gpu.py", "own", "--dry-run", "--out", str(tmp_path / "out")])
        code = calls.main()
        rows = json.loads((tmp_path / "out" / "gpu_call_own.json").read_text())["rows"]
        return code, {row["step"]: row for row in rows}

    return run


def test_a_step_that_fails_stops_no_other_and_is_told(run):
    code, rows = run({
        "fails": "print('first')\nraise SystemExit('the reason')", "errs": WRITES % "{}, {'error': 'a kernel'}",
        "silent": "", "empty": WRITES % "", "works": WRITES % "{'what': 1}",
    })
    assert code == 1 and {name: row["problem"] for name, row in rows.items()} == {
        "fails": "exit code 1: the reason", "errs": "1 of 2 rows have an error: a kernel",
        "silent": "no row in silent.json", "empty": "no row in empty.json", "works": None,
    }
    assert run({"works": WRITES % "{'what': 1}"})[0] == 0


def test_what_an_earlier_call_wrote_is_no_result(run, tmp_path):
    assert run({"works": WRITES % "{'what': 1}"})[0] == 0
    os.utime(tmp_path / "out" / "works.json", (1, 1))
    assert run({"works": ""})[0] == 1


def test_a_step_that_is_late_ends_with_all_that_it_started(run, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(calls, "DRY_SECONDS", 1.5)
    ticks = tmp_path / "ticks"
    child = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {TICKS % ticks!r}])\ntime.sleep(60)"
    code, rows = run({"hangs": child, "works": WRITES % "{'what': 1}"})
    assert code == 1 and rows["hangs"]["problem"] == "ended after its limit of 1.5 s"
    assert rows["works"]["problem"] is None
    count = ticks.stat().st_size
    time.sleep(0.3)
    assert count and ticks.stat().st_size == count


def test_a_step_beside_another_runs_at_the_same_time(run):
    scripts = {"first": f"{WAITS}\n{WRITES % '{}'}", "second": WRITES % "{}", "third": WRITES % "{}"}
    code, rows = run(scripts, first={"beside": True})
    assert code == 0 and list(rows)[-1] == "third"


def test_a_step_without_its_package_is_left_out(run):
    code, rows = run({"works": WRITES % "{}"}, works={"needs": "a_package_that_is_not_there"})
    assert code == 0 and rows["works"]["left_out"] == "a_package_that_is_not_there is not installed"


def test_tests_that_take_too_long_are_counted_and_told(tmp_path):
    (tmp_path / "test_own.py").write_text("import time\n\n\ndef test_a():\n    time.sleep(60)\n")
    ended = subprocess.run(
        [sys.executable, FOLDER / "suite.py", "--name", "own", "--limit", "2", "--tests", f"-n 0 {tmp_path}"],
        env=os.environ | {"OUT": str(tmp_path)}, timeout=50, capture_output=True)
    (row,) = json.loads((tmp_path / "own.json").read_text())["rows"]
    assert row["error"] == "interrupted after 2 s" and row["exit"] == ended.returncode != 0


def test_the_environment_of_a_step(calls, monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--first")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    step = calls.Step("a.py", "a", 1, xla="--second", environment={"OWN": "1"})
    real, dry = (calls.environment_of(step, tmp_path, dry) for dry in (False, True))
    assert real["JAX_PLATFORMS"] == "cuda,cpu" and dry["JAX_PLATFORMS"] == "cpu"
    assert real["XLA_FLAGS"] == "--first --second" and real["OWN"] == "1" and real["OUT"] == str(tmp_path)


def test_a_dry_run_leaves_the_results_alone(calls, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "right", "--dry-run", "--out", str(calls.RESULTS)])
    with pytest.raises(SystemExit) as refused:
        calls.main()
    assert refused.value.code == 2 and "allowed in a dry run: another folder" in capsys.readouterr().err
