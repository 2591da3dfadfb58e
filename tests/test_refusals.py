"""Bad input through the command line: exit code 2, one line that names what is at fault, and nothing written.

The cases are those of benchmarks/reliability/bad_input_cases.py, which runs each as a process of its own.
"""

import importlib
from pathlib import Path
import sys

import jax
import pytest

from jaxrl_fp16 import cli

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "reliability"


def load():
    """The script, which is in no package and finds what it imports beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER.parent)
        patch.syspath_prepend(FOLDER)
        script = importlib.import_module("bad_input")
    sys.modules.pop("record")  # the other tests of benchmarks import their own
    return script


script = load()
INSIDE = [case for case in script.CASES if not case.environment]
ALONE = [case for case in script.CASES if case.environment]


def marked(found):
    return [pytest.param(case, marks=pytest.mark.fault(case.row), id=f"{case.row} {case.name}") for case in found]


@pytest.fixture(scope="module")
def sound(quick_compile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    script.lay_out(folder)
    return folder


@pytest.fixture(autouse=True)
def platforms():
    """A command chooses JAX's platform; it is put back."""
    before = jax.config.jax_platforms
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("case", marked(INSIDE))
def test_bad_input_is_refused(case, sound, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if case.backend is not None:
        monkeypatch.setattr(jax, "default_backend", lambda: case.backend)
    with script.prepared(case, sound, tmp_path):
        before = script.snapshot(tmp_path)
        code = cli.main(case.argv)
    output = capsys.readouterr()
    assert script.faults(case, code, output.out, output.err) == [], output.err
    assert script.snapshot(tmp_path) == before, "something was written"


@pytest.mark.parametrize("case", marked(ALONE))
def test_what_hangs_on_the_environment_is_refused(case, sound, tmp_path):
    if case.row == 5 and jax.default_backend() != "cpu":
        pytest.skip("this machine has an accelerator")
    assert script.run_alone(case, sound, tmp_path)["wrong"] == ""
