"""The command line: what it says of itself, and a run that cannot fit. What else it refuses: test_refusals.py."""

from pathlib import Path
import subprocess
import sys

import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.config import describe
from jaxrl_fp16.training.runs.run_config import Config


def test_a_run_that_cannot_fit_is_refused_before_its_weights_are_read(
    tiny, compile_cache, tmp_path, monkeypatch, capsys,
):
    monkeypatch.setattr("jaxrl_fp16.training.runs.run.device_bytes", lambda device: 2**20)
    monkeypatch.setattr("jaxrl_fp16.training.runs.setup.load_params", lambda *_: pytest.fail("weights were read"))
    flags = ["--run.compile_cache", compile_cache, "--run.dir", str(tmp_path / "runs")]
    assert cli.main(["train", str(tiny), *flags]) == 2
    output = capsys.readouterr()
    assert "memory: the run needs about" in output.err and output.err.count("\n") == 1 and output.out == ""
    assert not any(tmp_path.iterdir())


# -- help ----------------------------------------------------------------------------------------------------------


def test_help_names_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)
    assert cli.main([]) == 2 and capsys.readouterr().out == said


def said_of(rows):
    return [f"--{row.key} ({row.type}; {row.default})\n      {row.doc}\n" for row in rows]


def section_of(row):
    return row.key.partition(".")[0] if "." in row.key else ""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_lists_its_own_keys_and_names_the_other_sections(command, capsys):
    assert cli.main([command, "--help"]) == 0
    said, rows = capsys.readouterr().out, describe(Config)
    own = ["", *cli.OWN.get(command, (command,))]
    assert {section_of(row) for row in rows} >= set(own)
    assert all(text in said for text in said_of(row for row in rows if section_of(row) in own))
    assert not any(f"--{row.key} " in said for row in rows if section_of(row) not in own)
    listed = said.partition("\nother sections ")[2].replace(",", "").split()
    assert all(section_of(row) in listed for row in rows if section_of(row) not in own)


def test_help_of_sections_and_of_every_key(capsys):
    assert cli.main(["train", "any.yaml", "--help", "telemetry", "mesh"]) == 0
    said, rows = capsys.readouterr().out, describe(Config)
    assert [line.split()[0] for line in said.splitlines() if line.startswith("  --")] == [
        f"--{row.key}" for row in rows if section_of(row) in ("telemetry", "mesh")]
    assert cli.main(["eval", "--help", "all"]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in said_of(rows))
    assert cli.main(["eval", "--help", "evaluations"]) == 2
    assert "eval --help: there is no section 'evaluations'; allowed: run, loss_scale" in capsys.readouterr().err


def test_help_without_a_command(capsys):
    assert cli.main(["--help", "mesh"]) == 0
    assert "--mesh.fsdp" in (said := capsys.readouterr().out) and "--model" not in said
    assert cli.main(["help", "eval"]) == 0 and cli.main(["eval", "--help"]) == 0
    texts = capsys.readouterr().out
    assert texts[:len(texts) // 2] == texts[len(texts) // 2:]
    assert cli.main(["--help", "mush"]) == 2 and "jaxrl-fp16: --help: there is no section 'mush'" in (
        capsys.readouterr().err)


def test_a_reader_of_the_help_may_leave():
    with subprocess.Popen([sys.executable, "-m", "jaxrl_fp16", "train", "--help"], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=Path(cli.__file__).parents[1]) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0


def test_the_package_is_a_program_too():
    done = subprocess.run([sys.executable, "-m", "jaxrl_fp16", "generate"], capture_output=True, text=True,
                          cwd=Path(cli.__file__).parents[1])
    assert done.returncode == 2 and done.stderr.startswith("jaxrl-fp16: generate needs a config file")


def test_xla_keeps_its_lines_from_the_console(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    code = "import sys; sys.argv = ['x', '--help']; from jaxrl_fp16 import cli\ntry: cli.entry()\nexcept SystemExit: " \
           "import os; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "3"      # errors too: "Very slow compile?" is one


def test_an_error_steers_no_terminal(capsys):
    assert cli.main(["\x1b[2Jtrain"]) == 2 and cli._end(3, "a\x1b[2J b\u202e\nc") == 3
    assert "\x1b" not in (said := capsys.readouterr().err) and said.endswith("jaxrl-fp16: a[2J b c\n")


def test_both_spellings_of_an_override(tiny, compile_cache, tmp_path, capsys):
    """Seen in the config of a run without steps."""
    flags = ["--run.steps=0", f"--run.dir={tmp_path}", "--run.export=false", "--optimizer.learning_rate", "2e-6",
             "--run.name=a=b", f"--run.compile_cache={compile_cache}"]
    assert cli.main(["train", str(tiny), *flags]) == 0
    (folder,) = tmp_path.iterdir()
    text = (folder / "config.yaml").read_text()
    assert folder.name.startswith("a=b-") and "learning_rate: 2.0e-06" in text and "steps: 0" in text
