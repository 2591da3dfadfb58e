"""What the tests of whole runs share: a reward, and `train` on the tiny config."""

import contextlib
import io
from pathlib import Path
import types

import pytest

REWARD = '''
def reward(prompts, responses, examples):
    """The share of digits among four characters."""
    return [sum(character.isdigit() for character in response) / 4 for response in responses]
'''


@pytest.fixture(scope="session")
def digits_reward(tmp_path_factory):
    """A reward file that tells the responses of a random model apart."""
    path = tmp_path_factory.mktemp("rewards") / "digits.py"
    path.write_text(REWARD)
    return str(path)


@pytest.fixture(scope="module")
def train_run(tiny, compile_cache, digits_reward, tmp_path_factory):
    """train_run(flag, ...) -> how a run with these flags ended, `code` and `folder`, and its console in `said`."""
    from jaxrl_fp16.config import load_config
    from jaxrl_fp16.commands.train import train
    from jaxrl_fp16.training.runs.run_config import Config

    def start(*flags, through=lambda arguments: train(load_config(Config, arguments[0], arguments[1:]))):
        own = ["--run.dir", str(tmp_path_factory.mktemp("runs")), "--run.compile_cache", compile_cache]
        if not any("reward_file" in flag for flag in flags):
            own += ["--task.reward_file", digits_reward]
        console = io.StringIO()
        with contextlib.redirect_stdout(console):
            outcome = through([str(tiny), *own, "--run.name", "tiny", *flags])
        return types.SimpleNamespace(code=outcome.code, folder=outcome.folder, said=console.getvalue(), flags=own)

    return start


@pytest.fixture(scope="module")
def train_command(train_run):
    """train_command(flag, ...) -> the same through the command line, which draws the picture too."""
    from jaxrl_fp16 import cli

    def through(arguments):
        code = cli.main(["train", *arguments])
        folders = list(Path(arguments[arguments.index("--run.dir") + 1]).glob("*"))
        return types.SimpleNamespace(code=code, folder=folders[0] if folders else None)

    return lambda *flags: train_run(*flags, through=through)
