"""The command line: what it says of itself, and a run that cannot fit. What else it refuses: test_refusals.py."""

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


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_lists_every_key(command, capsys):
    assert cli.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    for row in describe(Config):
        assert f"--{row.key} ({row.type}; {row.default})\n      {row.doc}\n" in said


def test_both_spellings_of_an_override(tiny, compile_cache, tmp_path, capsys):
    """Seen in the config of a run without steps."""
    flags = ["--run.steps=0", f"--run.dir={tmp_path}", "--run.export=false", "--optimizer.learning_rate", "2e-6",
             "--run.name=a=b", f"--run.compile_cache={compile_cache}"]
    assert cli.main(["train", str(tiny), *flags]) == 0
    (folder,) = tmp_path.iterdir()
    text = (folder / "config.yaml").read_text()
    assert folder.name.startswith("a=b-") and "learning_rate: 2.0e-06" in text and "steps: 0" in text
