"""The order of the files: each imports only from files above it, and importing does nothing."""

import ast
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "jaxrl_fp16"

# From the bottom up: a file imports from lines above its own here, or from its own line in no circle. A name is a
# file, or a folder with all in it that has no line of its own.
ORDER = """
types masking finite config folders
precision parallel console logs tokenizer
models/numerics models/lora models/frozen models/layers models/families
models/attention models/decoder models/critic models/init models/adapters models/taps
models/hf
models
packing lengths
forward
sampling
engines
objectives
tasks
telemetry
training/updates
training/checkpoints
training/safety
training/rollouts
training/runs
training/loops
training
lab
plan
commands
cli
__main__
""".strip().splitlines()
FLOORS = {room: floor for floor, line in enumerate(ORDER) for room in line.split()}
MOST = 11  # files of a folder, without its `__init__`

# Workers, and the refusal of a bad config, start fast.
WITHOUT_JAX = ("config", "logs", "tasks/grading/pool", "tasks/grading/worker")
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


def module_files():
    """Every module by its path below the package, without `.py`; a folder's `__init__` by the folder's."""
    names = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE).with_suffix("").as_posix()
        names[name.removesuffix("__init__").rstrip("/")] = path
    return names


FILES = module_files()


def room_of(name):
    """The room that a module is in: the longest leading part of its path that has a place in ORDER, or None."""
    parts = name.split("/")
    leading = ("/".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((room for room in leading if room in FLOORS), None)


def imported(name):
    """What of the package a module imports, wherever in the file; "" is the package itself."""
    found = set()
    package = name if FILES[name].name == "__init__.py" else name.rpartition("/")[0]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split("/") if package else []
            base = [PACKAGE, *parts][: len(parts) + 2 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == PACKAGE:
                found.add(module_of(target.split(".")[1:]))
    return found - {name}


def module_of(parts):
    """The longest leading part that is a module: `a.b.function` is of `a/b`."""
    while parts and "/".join(parts) not in FILES:
        parts = parts[:-1]
    return "/".join(parts)


MODULES = [name for name in FILES if name]  # the package's own `__init__` names everything, lazily


@pytest.mark.parametrize("name", MODULES)
def test_a_file_has_its_place_and_imports_only_from_below(name):
    room = room_of(name)
    assert room is not None, f"{name}.py is in no room of ORDER; give it one"
    for other in imported(name):
        assert other, f"{name}.py imports from {PACKAGE} itself; name the file"
        place = room_of(other)
        assert FLOORS[place] <= FLOORS[room], f"{name}.py imports {other}.py: {place} is not below {room} in ORDER"


def test_every_room_is_there():
    assert not [room for room in FLOORS if room not in FILES]


def test_no_folder_is_a_heap():
    for folder in {path.parent for path in FILES.values()} - {ROOT / PACKAGE / "commands"}:  # which has one a command
        files = [path for path in folder.glob("*.py") if not path.stem.startswith("__")]
        assert len(files) <= MOST, f"{folder.name} holds {len(files)} files; allowed: {MOST}"


def test_no_circle():
    edges, done = {name: imported(name) for name in MODULES}, set()

    def walk(name, path):
        assert name not in path, f"imports in a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in edges.get(name, ()):
                walk(other, [*path, name])
            done.add(name)

    for name in MODULES:
        if FILES[name].name != "__init__.py":
            walk(name, [])


@pytest.mark.parametrize("name", [name for name in WITHOUT_JAX if name in FILES])
def test_some_modules_leave_jax_out(name):
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        seen.add(module)
        # Importing a/b/c runs a/__init__ and a/b/__init__ too.
        parents = {"/".join(module.split("/")[:depth]) for depth in range(1, module.count("/") + 1)}
        todo += (imported(module) | parents) - seen - {""}
    for module in seen:
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else ([node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
            )
            heavy = {found.split(".")[0] for found in names} & {"jax", "flax", "optax", "orbax", "jmp"}
            assert not heavy, f"{name}.py must not import {heavy}, but {module}.py does"


def test_files_are_named_by_their_contents():
    assert not [name for name in FILES if VAGUE & set(name.split("/"))]


def test_every_package_folder_has_an_init():
    assert {path.parent for path in FILES.values()} == {
        path.parent for path in FILES.values() if path.name == "__init__.py"
    }


def test_importing_has_no_effects():
    names = [f"{PACKAGE}.{name.replace('/', '.')}" for name in MODULES]
    code = f"""if True:
        import importlib, os, sys
        import {PACKAGE}
        assert "jax" not in sys.modules, "import {PACKAGE} imports JAX"
        import jax      # sets variables of its own
        environment = dict(os.environ)
        for name in {names}:
            importlib.import_module(name)
        from jax._src import xla_bridge
        assert not xla_bridge._backends, "some module looks for devices when it is imported"
        assert dict(os.environ) == environment, "some module sets an environment variable when it is imported"
        """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
