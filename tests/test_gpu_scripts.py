"""The scripts of benchmarks/gpu where there is no GPU: they load, and say what they take."""

from pathlib import Path
import runpy
import subprocess
import sys

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "qwen")


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


def test_a_call_needs_its_part(tmp_path):
    done = subprocess.run([FOLDER / "call.sh"], text=True, capture_output=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2 and "call.sh right" in done.stdout
    assert set(SCRIPTS) - {"suite", "figures"} <= {
        word.rpartition("/")[2].removesuffix(".py") for word in (FOLDER / "call.sh").read_text().split()
        if word.endswith(".py")
    }
