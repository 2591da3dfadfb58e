"""The launch scripts, in a copy of their folder, with a stand-in for Python that logs what it is asked."""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from jaxrl_fp16.cli import COMMANDS

ROOT = Path(__file__).parents[1]
SCRIPTS = ("env.sh", "quickstart.sh", "test.sh", "gpu.sh", "tpu.sh", "lock.sh", "compilers.sh")
TOOLS = (
    "bash",
    "cat",
    "chmod",
    "cp",
    "dirname",
    "env",
    "flock",
    "grep",
    "head",
    "mkdir",
    "mktemp",
    "mv",
    "readlink",
    "rm",
    "sed",
    "sleep",
)

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason="needs a Linux shell's tools"
)

# Speaks like python, its venv module and pip; LOG takes a line for each pip and venv call.
PYTHON_STUB = r"""#!/usr/bin/env bash
case "$*" in
    *ensurepip*) exit "${STUB_UNUSABLE:-0}" ;;
    *'sep="."'*) echo "${STUB_VERSION:-3.11}" ;;
    --version) echo "Python ${STUB_VERSION:-3.11}.5" ;;
    "-m venv "*)
        echo "venv" >>"$LOG"
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *"-m pip"*" --version") ;;
    *"-m pip"*"--dry-run --report"*)
        echo "{\"name\": \"${STUB_TORCH_NEEDS:-filelock}\"}" >"${@: -2:1}" ;;
    *"-m pip"*" install "*)
        sleep "${STUB_SECONDS:-0}"
        all="$*" pins=""; [[ "$all" != *--constraint* ]] || pins=" by ${all#*--constraint }"
        pins="${pins%% --editable*}"
        echo "install ${@: -1}${pins%% torch*}" >>"$LOG"
        [[ -z "${STUB_PIP_FAILS:-}" ]] || exit 1
        command='echo "run $* XLA_FLAGS=${XLA_FLAGS:-} ${JAX_PLATFORMS:-}"'
        printf '#!/usr/bin/env bash\n%s\n' "$command" >"${0%/*}/jaxrl-fp16"
        chmod +x "${0%/*}/jaxrl-fp16" ;;
    *" freeze") printf '%s\n' a==1.0 torch==2.13.0+cpu "b @ file:///b" "-e /c" "d==2; x" "jaxrl_fp16 @ file:///r" ;;
    "-m pytest "*) echo "$* $PWD" ;;
    "- "*) echo "${STUB_SHARE:-0.92}"; exit "${STUB_NO_DEVICE:-0}" ;;
    *) echo "stub: $*" >&2; exit 9 ;;
esac
"""


class Project:
    """A copy of the scripts beside a pyproject.toml, on a PATH with nothing else than TOOLS and stubs."""

    def __init__(self, folder):
        self.root, self.bin, self.log = folder / "my project", folder / "bin", folder / "log"
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=shutil.ignore_patterns("constraints"))
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add("python3.12", PYTHON_STUB)

    def add(self, name, script):
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def start(self, script, *arguments, cwd="/", **environment):
        path = script if isinstance(script, Path) else self.root / "launch" / script
        return subprocess.Popen(
            [str(path), *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={"PATH": str(self.bin), "LOG": str(self.log), **environment},
        )

    def run(self, script, *arguments, **options):
        process = self.start(script, *arguments, **options)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def calls(self):
        """What was asked of pip and venv since the last time."""
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [call.replace(str(self.root), "ROOT") for call in calls]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_first_start_installs_and_the_second_does_not(project, tmp_path):
    config = project.root / "configs/quickstart.yaml"
    for expected in (["venv", "install ROOT"], []):
        done = project.run("quickstart.sh", "--precision", "bf16", "--run.name", "a b", cwd=tmp_path)
        assert done.returncode == 0, done.err
        assert done.out.startswith(f"run train {config} --precision bf16 --run.name a b ")
        assert project.calls() == expected
        assert ("installing jaxrl_fp16 into" in done.err) == bool(expected)


def test_what_the_quickstart_compares(project, tmp_path):
    (tmp_path / "compared" / "configs").mkdir(parents=True)
    (tmp_path / "one run").mkdir()
    ours, config = " --precisions fp16 bf16", f"{project.root}/configs/quickstart.yaml"
    for arguments, command, given in (
        ((), "compare", ours),
        (("--seeds", "0", "1"), "compare", ours),
        (("--precisions", "bf16", "fp32"), "compare", ""),
        (("--resume", "compared"), "compare", ours),
        (("--resume", "one run"), "train", ""),
        (("--precision=bf16",), "train", ""),
    ):
        out = project.run("quickstart.sh", *arguments, cwd=tmp_path).out
        assert out.startswith(f"run {command} {' '.join((config + given, *arguments))} "), arguments


def test_scripts_share_one_environment(project):
    assert "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -k x" in project.run("test.sh", "-k", "x").out
    assert project.calls() == ["venv", "install torch==2.13.0", "install ROOT[test]"]
    assert project.run("quickstart.sh").returncode == 0 and project.calls() == []
    assert project.run("test.sh").out.strip().endswith(str(project.root)) and project.calls() == []


def test_the_fast_tests_are_a_flag_of_their_own(project):
    assert "--no-loadscope-reorder -m not slow -k x" in project.run("test.sh", "--fast", "-k", "x").out


def test_the_tests_run_with_exact_versions_where_they_are_known(project):
    pins = project.root / "launch/constraints/python3.11.txt"
    pins.parent.mkdir()
    pins.write_text("a==1\n")
    by = "by ROOT/launch/constraints/python3.11.txt"
    pinned = [f"install torch==2.13.0 {by}", f"install ROOT[test] {by}"]
    assert project.run("quickstart.sh").returncode == 0 and project.calls() == ["venv", "install ROOT"]
    for content, expected in (("a==1\n", pinned), ("a==1\n", []), ("a==2\n", pinned)):
        pins.write_text(content)
        assert project.run("test.sh").returncode == 0 and project.calls() == expected
        assert project.run("quickstart.sh").returncode == 0 and project.calls() == []
    project.add("python3.12", PYTHON_STUB.replace("STUB_VERSION:-3.11", "STUB_VERSION:-3.12"))
    assert project.run("test.sh", PYTHON="python3.12").returncode == 0
    assert project.calls() == ["venv", "install ROOT[test]"]


def test_exact_versions_are_written_anew(project):
    done = project.run("lock.sh")
    assert done.returncode == 0 and project.calls() == ["venv", "install torch==2.13.0", "install ROOT[test]"], done.err
    written = project.root / "launch/constraints/python3.11.txt"
    assert done.out == f"{written}\n" and not (project.root / ".venv").exists()
    title, *pins = written.read_text().splitlines()
    assert title.startswith("# ") and pins == ["a==1.0", "torch==2.13.0", "d==2"]


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_exact_versions_are_within_the_ranges(path):
    from packaging.requirements import Requirement

    _, *lines = path.read_text().splitlines()
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line).groups() for line in lines]
    plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    found = {plain(name): version for name, version in pins}
    assert len(found) == len(lines) and ("torch" in found) == (path.stem == "python3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["test"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(found[plain(wanted.name)]), line


def test_it_works_through_a_symbolic_link(project, tmp_path):
    link = tmp_path / "link.sh"
    link.symlink_to(project.root / "launch/quickstart.sh")
    assert f"run compare {project.root}/configs/quickstart.yaml" in project.run(link).out
    assert (project.root / ".venv").is_dir()


def test_a_changed_pyproject_or_a_moved_folder_installs_again(project):
    project.run("quickstart.sh")
    project.calls()
    (project.root / "pyproject.toml").write_text("[project]\n# more\n")
    project.run("quickstart.sh")
    assert project.calls() == ["install ROOT"]
    project.root = project.root.rename(project.root.with_name("moved"))
    assert project.run("quickstart.sh").returncode == 0
    assert project.calls() == ["install ROOT"]


def test_an_install_that_failed_is_begun_again(project):
    assert project.run("quickstart.sh", STUB_PIP_FAILS="1").returncode == 1
    assert project.calls() == ["venv", "install ROOT"]
    assert project.run("quickstart.sh").returncode == 0 and project.calls() == ["install ROOT"]
    assert project.run("quickstart.sh").returncode == 0 and project.calls() == []


def test_an_environment_that_was_cut_short_is_made_anew(project):
    (project.root / ".venv/.launch").mkdir(parents=True)
    (project.root / ".venv/half").touch()
    done = project.run("quickstart.sh")
    assert (
        done.returncode == 0
        and "making .venv anew" in done.err
        and project.calls() == ["venv", "install ROOT"]
    )
    assert not (project.root / ".venv/half").exists()


def test_an_environment_that_is_not_ours_is_left_alone(project):
    (project.root / ".venv").mkdir()
    done = project.run("quickstart.sh")
    assert done.returncode == 2 and "was not made by these scripts" in done.err and project.calls() == []
    assert (project.root / ".venv").is_dir()


def test_two_starts_at_once_install_once(project):
    starts = [project.start("quickstart.sh", STUB_SECONDS="0.3") for _ in range(3)]
    assert all(process.communicate(timeout=60)[0].startswith("run compare") for process in starts)
    assert project.calls() == ["venv", "install ROOT"]


def test_python_may_be_named_and_another_version_makes_the_environment_anew(project):
    assert project.run("quickstart.sh").returncode == 0
    project.calls()
    project.add("python3.13", PYTHON_STUB.replace("STUB_VERSION:-3.11", "STUB_VERSION:-3.13"))
    for expected in (["venv", "install ROOT"], []):
        assert project.run("quickstart.sh", PYTHON="python3.13").returncode == 0
        assert project.calls() == expected
    done = project.run("quickstart.sh", PYTHON="/no/python")
    assert done.returncode == 2 and "PYTHON=/no/python" in done.err and len(done.err.splitlines()) == 1


def test_no_python_is_refused_in_one_line(project):
    done = project.run("quickstart.sh", STUB_UNUSABLE="1")
    assert done.returncode == 2 and len(done.err.splitlines()) == 1
    assert "3.11 to 3.13" in done.err and not (project.root / ".venv").exists()


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"STUB_TORCH_NEEDS": "nvidia-cublas"}, "CUDA"),
        ({"STUB_TORCH_NEEDS": "cuda-bindings"}, "CUDA"),
        ({"STUB_VERSION": "3.12"}, "3.11 has one"),
    ],
)
def test_pytorch_is_left_out_aloud_where_it_would_bring_cuda(project, environment, reason):
    done = project.run("test.sh", **environment)
    assert done.returncode == 0 and "parity tests will be skipped" in done.err and reason in done.err
    assert project.calls() == ["venv", "install ROOT[test]"]


NVIDIA_SMI = "#!/usr/bin/env bash\necho 'NVIDIA H100 80GB HBM3, {}'\n"


def test_gpu_start_sets_its_flags_before_the_callers(project):
    project.add("nvidia-smi", NVIDIA_SMI.format("550.54.15"))
    done = project.run("gpu.sh", "a.yaml", "--precision", "fp16", XLA_FLAGS="--mine")
    assert done.returncode == 0, done.err
    assert done.out == (
        "run train a.yaml --precision fp16 --platform gpu "
        "XLA_FLAGS=--xla_gpu_deterministic_ops=true --mine cuda,cpu\n"
    )
    assert project.calls() == ["venv", "install ROOT[gpu]"]
    assert project.run("gpu.sh", "sft", "a.yaml", DETERMINISTIC="0").out.startswith(
        "run sft a.yaml --platform gpu XLA_FLAGS=  cuda"
    )


def test_gpu_start_leaves_memory_to_another_engine(project):
    project.add("nvidia-smi", NVIDIA_SMI.format("550.54.15"))
    for environment, share in (({}, "0.92"), ({"STUB_SHARE": "0.52"}, "0.52"),
                               ({"STUB_SHARE": "0.52", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}, "0.3")):
        done = project.run("gpu.sh", "a.yaml", "--rollout.engine", "vllm", **environment)
        assert done.returncode == 0 and f"JAX's share of the memory: {share}\n" in done.err


@pytest.mark.parametrize("flags, share", [
    ((), "0.92"), (("--rollout.engine", "transformers"), "0.52"),
    (("--rollout.engine", "vllm", "--rollout.memory_fraction", "0.7"), "0.22"), (("--rollout.engine", "none"), "0.92"),
    (("--engines", "jit", "vllm", "compare"), "0.52"), (("--engines", "jit", "mismatch"), "0.92"),
])
def test_the_share_is_read_from_the_config(tmp_path, flags, share):
    """The script's own Python, with a JAX that has a GPU."""
    (code,) = re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON", (ROOT / "launch/gpu.sh").read_text(), flags=re.DOTALL)
    code = f"import jax, types; jax.devices = lambda kind: [types.SimpleNamespace(device_kind='H100')]\n{code}"
    (tmp_path / "a.yaml").write_text("run: {steps: 1}\n")
    *flags, command = flags if "--engines" in flags else (*flags, "train")
    done = subprocess.run([sys.executable, "-", command, str(tmp_path / "a.yaml"), *flags], input=code,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout == f"{share}\n" and "1 x H100" in done.stderr


def test_every_command_is_started_by_the_scripts(project, tmp_path):
    """A first word that is no file is a command: the program refuses what it does not know."""
    project.add("nvidia-smi", NVIDIA_SMI.format("550.54.15"))
    (tmp_path / "config").touch()
    for words, expected in (
        *(((name, "a.yaml"), f"{name} a.yaml") for name in COMMANDS), (("trian", "a.yaml"), "trian a.yaml"),
        (("a.yaml",), "train a.yaml"), (("configs/absent.json",), "train configs/absent.json"),
        (("config", "--seeds", "1"), "train config --seeds 1"),
    ):
        out = project.run("gpu.sh", *words, cwd=tmp_path).out
        assert out.startswith(f"run {expected} --platform gpu "), words


@pytest.mark.parametrize(
    "smi, environment, reason",
    [
        (None, {}, "nvidia-smi was not found"),
        ("#!/usr/bin/env bash\nexit 9\n", {}, "lists no GPU"),
        (NVIDIA_SMI.format("470.10"), {}, "driver 470.10 is too old"),
        (NVIDIA_SMI.format("550.1"), {"STUB_NO_DEVICE": "1"}, "JAX sees no GPU"),
    ],
)
def test_gpu_start_is_refused_without_a_gpu(project, smi, environment, reason):
    if smi:
        project.add("nvidia-smi", smi)
    done = project.run("gpu.sh", "a.yaml", **environment)
    assert done.returncode == 2 and reason in done.err and done.out == ""
    assert ("install" in str(project.calls())) == ("STUB_NO_DEVICE" in environment)


@pytest.mark.skipif(
    any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*")), reason="has a TPU"
)
def test_tpu_start_is_refused_without_chips(project):
    done = project.run("tpu.sh", "a.yaml")
    assert done.returncode == 2 and "no TPU chips" in done.err and project.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_at_the_top(project, script):
    done = project.run(script, "--help")
    assert done.returncode == 0 and f"launch/{script}" in done.out and "set -euo" not in done.out
    assert project.calls() == []


@pytest.mark.parametrize("script", ["gpu.sh", "tpu.sh"])
def test_a_start_without_a_config_shows_the_help(project, script):
    done = project.run(script)
    assert done.returncode == 2 and f"launch/{script}" in done.err and project.calls() == []


def test_scripts_are_executable_and_strict():
    for path in [*(ROOT / "launch" / name for name in SCRIPTS), ROOT / ".ci/run"]:
        assert os.access(path, os.X_OK), path
        assert "set -euo pipefail" in path.read_text(), path
        assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_gpu_flags_are_known_to_this_jaxlib():
    flags = re.findall(r"--xla_\w+=\w+", (ROOT / "launch/gpu.sh").read_text())
    code = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
    )
    assert flags and done.returncode == 0, done.stderr  # XLA ends the process at a flag that it does not know
