"""Which rows a command may make beyond a model's positions: none that it does not make."""

import pytest

from jaxrl_fp16.cli import COMMANDS
from jaxrl_fp16.config import ConfigError, parse_config
from jaxrl_fp16.training.runs.positions import ROWS, check_positions
from jaxrl_fp16.training.runs.run_config import Config

SHORT = {"training": {"max_prompt_tokens": 6}, "sampling": {"max_new_tokens": 4}, "sft": {"max_length": 10},
         "dpo": {"max_length": 10}, "info": {"max_new_tokens": 3}, "task": {"reward_model": {"max_length": 10}}}
SET = {"evaluation": {"sets": [{"name": "a"}], "max_new_tokens": 5}}


def check(command, limit, **changes):
    check_positions(parse_config(Config, {**SHORT, **changes}), command, limit)


def test_every_command_that_makes_rows_is_known():
    assert ROWS.keys() - {"reward model"} == COMMANDS.keys() - {"compare", "export"}


@pytest.mark.parametrize("command, limit, changes, message", [
    ("train", 9, {}, r"training.max_prompt_tokens \+ sampling.max_new_tokens is 6 \+ 4 = 10 tokens.* for 9 positions"),
    ("train", 10, SET, r"training.max_prompt_tokens \+ evaluation.max_new_tokens is 6 \+ 5 = 11 tokens"),
    ("train", 10, {"sft": {"steps": 1, "max_length": 11}}, "sft.max_length is 11 tokens"),
    ("sft", 9, {}, "sft.max_length is 10 tokens, and the model's weights were made for 9 positions"),
    ("warmup", 9, {}, "sft.max_length"), ("dpo", 9, {}, "dpo.max_length is 10 tokens"), ("eval", 10, SET, "evaluation"),
    ("generate", 9, {}, "sampling"), ("filter", 9, {}, "sampling"), ("mismatch", 9, {}, "sampling"),
    ("plan", 9, {}, "sampling"),
    ("info", 8, {}, r"info.max_new_tokens is 6 \+ 3 = 9"),
    ("reward model", 9, {}, "task.reward_model.max_length is 10"),
])
def test_rows_beyond_the_positions_are_refused(command, limit, changes, message):
    with pytest.raises(ConfigError, match=message + ".*; allowed: at most these, or model.allow_longer true"):
        check(command, limit, **changes)
    check(command, limit, model={"allow_longer": True}, **changes)
    check(command, limit + 1, **changes)
    check(command, None, **changes)


@pytest.mark.parametrize("command, changes", [
    ("train", {"dpo": {"max_length": 99}, "sft": {"max_length": 99}}), ("generate", SET), ("eval", {}),
    ("sft", {"sampling": {"max_new_tokens": 99}}), ("dpo", {"sft": {"max_length": 99}}),
])
def test_what_a_command_does_not_make_is_no_matter(command, changes):
    check(command, 10, **changes)
