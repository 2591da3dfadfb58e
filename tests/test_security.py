"""Nothing that a model, a checkpoint, a config or data hold is executed; nothing outside is read, nobody is called.

`hostile_input.py` takes each hostile case through the real commands under an audit hook; the rest reads our own source.
"""

import ast
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "hostile_input.py"
# What `extends` names is read wherever it lies; what it holds is not shown.
MAY_READ = ("extends a secret", "extends a secret mapping")


def load_script():
    spec = importlib.util.spec_from_file_location("hostile_input", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def results():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {record["name"]: record for record in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", script.CASES)
def test_hostile_input_runs_nothing_and_reads_nothing_outside(results, name):
    record = results[name]
    found = [event for event in record["found"] if not (name in MAY_READ and event.startswith("open: ../secret/"))]
    assert found == [] and not record["echoed"], record
    assert record["ended"] == record["wanted"], record
    if record["wanted"] == 2:
        assert record["error"].startswith("jaxrl-fp16: ") and record["error"].count("\n") == 1


@pytest.mark.parametrize("event", script.MISDEEDS)
def test_the_hook_notices_what_it_is_there_for(results, event):
    found = results[f"control {event}"]["found"]
    assert any(text.startswith(f"{event}: ") for text in found), found


# -- our own source ---------------------------------------------------------------------------------------

FILES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
         for path in sorted((ROOT / "jaxrl_fp16").rglob("*.py"))}
# Each reads or runs code, or talks to others; with the files that may use it all the same.
MODULES = {name: () for name in (
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code", "urllib", "http",
    "requests", "huggingface_hub", "ftplib", "smtplib", "xmlrpc", "socketserver",
)} | {"torch": ("jaxrl_fp16/engines/child.py",), "socket": (  # pairs within this process and its workers
    "jaxrl_fp16/tasks/grading/pool.py", "jaxrl_fp16/tasks/grading/worker.py",
    "jaxrl_fp16/training/safety/deadlines.py")}
REWARD_FILE = ("jaxrl_fp16/tasks/rewards.py",)  # loads the one Python file that a config may name
CALLS = {
    "eval": (), "exec": (), "compile": (), "__import__": (), "os.system": (), "os.popen": (), "yaml.unsafe_load": (),
    "yaml.full_load": (), "yaml.unsafe_load_all": (), "yaml.full_load_all": (), "yaml.load_all": (),
    "spec.loader.exec_module": REWARD_FILE, "importlib.util.spec_from_file_location": REWARD_FILE,
    "yaml.load": ("jaxrl_fp16/config/yaml_files.py",),  # with a loader that knows plain values alone
}


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES)
def test_no_module_unpickles_evaluates_or_calls_out(path):
    for node in ast.walk(FILES[path]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            assert path in MODULES.get(name.partition(".")[0], (path,)), f"{path} imports {name}"
    for call in calls(FILES[path]):
        name = ast.unparse(call.func)
        assert path in CALLS.get(name, (path,)), f"{path}, line {call.lineno}: {name}"
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert "trust_remote_code" not in options, f"{path}, line {call.lineno}: trust_remote_code"
        assert options.get("shell", "False") == "False", f"{path}, line {call.lineno}: a shell"
        if name in ("np.load", "numpy.load"):
            assert options.get("allow_pickle") == "False", f"{path}, line {call.lineno}: np.load may unpickle"
        if name == "yaml.load":
            assert options.get("Loader") == "_Loader"
        if name.endswith("from_pretrained"):
            assert options.get("local_files_only") == "True", f"{path}, line {call.lineno}: may download"


def test_the_exceptions_are_still_needed():
    for name, paths in CALLS.items():
        for path in paths:
            assert name in {ast.unparse(call.func) for call in calls(FILES[path])}
