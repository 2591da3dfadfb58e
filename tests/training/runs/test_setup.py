"""What a command takes from its surroundings: the day of a run's start."""

import dataclasses
import datetime

import pytest

from jaxrl_fp16.config import parse_config, to_yaml
from jaxrl_fp16.tokenizer import character_tokenizer
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.setup import dated

ASKS = character_tokenizer("1")
ASKS.chat_template = "{{ strftime_now('%Y') }}"


def date_of(tokenizer, **changes):
    return dated(parse_config(Config, changes), tokenizer).date


def test_a_run_keeps_the_day_of_its_start_where_its_prompts_hold_one(tmp_path):
    today = datetime.date.today().isoformat()
    assert date_of(character_tokenizer("1")) is None and date_of(ASKS) == today
    assert date_of(ASKS, task={"date": "2026-02-01"}) == "2026-02-01"
    started = parse_config(Config, {"task": {"date": "2026-01-31"}})
    (tmp_path / "config.yaml").write_text(to_yaml(dataclasses.replace(started, resume=None)))
    assert date_of(ASKS, resume=str(tmp_path)) == "2026-01-31"
    (tmp_path / "config.yaml").write_text(to_yaml(parse_config(Config, {})))  # of a run that kept none
    assert date_of(ASKS, resume=str(tmp_path)) is None
    assert date_of(ASKS, resume=str(tmp_path / "absent")) is None


def test_a_day_that_is_none_is_refused():
    with pytest.raises(ValueError, match="task: date is 'today'; allowed: a day as YYYY-MM-DD, or null"):
        parse_config(Config, {"task": {"date": "today"}})
