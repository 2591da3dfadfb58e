"""What a command starts from: which ids end a response, where folders are, the day of a run's start."""

import dataclasses
import datetime
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrl_fp16.config import ConfigError, parse_config, to_yaml
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params, save_pretrained
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.tokenizer import character_tokenizer
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.setup import attention_of_run, dated, make_model, set_up

TOKENIZER = character_tokenizer("0123456789+=")


@pytest.fixture
def folder(tmp_path):
    """A model whose tokenizer ends with 1."""
    shape = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    model = Decoder(DecoderConfig(family="llama", vocab_size=16, **shape))
    save_pretrained(tmp_path / "model", model, init_params(model, jax.random.key(0)), tokenizer=TOKENIZER)
    return tmp_path / "model"


def edit(path, **changes):
    """Sets keys of a JSON file; None removes one."""
    found = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def opened(folder, *end_tokens):
    """The Setup of a config with this model."""
    return set_up(parse_config(Config, {
        "precision": "fp32", "model": {"path": str(folder)}, "sampling": {"end_tokens": list(end_tokens)},
    }))


def test_ends_come_from_every_place(folder):
    edit(folder / "config.json", eos_token_id=[5, 6])
    assert opened(folder).eos_ids == (1, 5, 6)
    edit(folder / "generation_config.json", eos_token_id=[7, 5])
    assert opened(folder).eos_ids == (1, 7, 5, 6)
    edit(folder / "config.json", eos_token_id=8)
    (folder / "generation_config.json").unlink()
    assert opened(folder).eos_ids == (1, 8)


def test_named_ends_take_their_place(folder):
    edit(folder / "config.json", eos_token_id=[5, 6])
    assert opened(folder, "=", "<eos>").eos_ids == (14, 1)
    with pytest.raises(ConfigError, match=r"^sampling.end_tokens: '<end>' is no token of the tokenizer; allowed: "):
        opened(folder, "=", "<end>")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_that_are_no_ids_are_refused(folder, file):
    edit(folder / file, eos_token_id=["<eos>"])
    with pytest.raises(ConfigError, match=rf"^model.path: {file}: eos_token_id is \['<eos>'\]; allowed: an id or a"):
        opened(folder)


@pytest.mark.parametrize("section, message", [
    ({"path": "absent"}, "^model.path: model folder absent does not exist; allowed: a local folder, nothing is d.*d$"),
    ({"path": "a/b"}, "^model.path: model folder a/b does not exist; .* `hf download a/b --local-dir FOLDER`"),
    ({"tokenizer": "~/absent"}, "^model.tokenizer: tokenizer folder .*/absent does not exist"),
])
def test_folders_are_looked_at_before_jax_is(section, message, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("JAX looked for devices"))
    with pytest.raises(ConfigError, match=message):
        set_up(parse_config(Config, {"model": section}))


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    config = opened("~/model").config
    assert config.model.path == str(folder) and config.model.tokenizer is None
    section = {"tokenizer": "~/model", "path": "~/model"}
    config = set_up(parse_config(Config, {
        "model": section, "run": {"dir": "~/runs"}, "critic": {"path": "~/model"}, "task": {"reward_model": section},
        "training": {"truncated": "keep"},
    })).config
    found = [config.model.tokenizer, config.critic.path, config.task.reward_model.tokenizer]
    assert found == [str(folder)] * 3 and config.run.dir == str(folder.parent / "runs")


# -- the day --------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("kind, changes, expected", [
    ("NVIDIA H200", {}, "cudnn"), ("cpu", {}, "blockwise"), ("AMD Instinct MI300X", {}, "blockwise"),
    ("NVIDIA H200", {"precision": "fp32"}, "blockwise"), ("NVIDIA H200", {"rollout_precision": "fp32"}, "blockwise"),
    ("NVIDIA H200", {"sft": {"packing": True}}, "blockwise"), ("NVIDIA H200", {"head_dim": 12}, "blockwise"),
    ("NVIDIA H200", {"numerics": {"float32_cache": True}}, "blockwise"), ("cpu", {"attention": "plain"}, "plain"),
])
def test_the_kernel_that_auto_stands_for(kind, changes, expected):
    model = {"family": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2,
             "num_kv_heads": 1, "head_dim": changes.pop("head_dim", 16)}
    model["attention"] = changes.pop("attention", "auto")
    config = parse_config(Config, {"model": model, **changes})
    precisions = [get_precision(name or "fp16") for name in (changes.get("precision"), config.rollout_precision)]
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)]))
    assert attention_of_run(config, mesh, precisions) == expected


@pytest.mark.parametrize("wanted, available, expected", [
    ("auto", 2**40, False), ("auto", 2**20, True), (True, 2**40, True), (False, 2**20, False),
])
def test_layers_are_computed_again_where_memory_is_short(folder, monkeypatch, wanted, available, expected):
    monkeypatch.setattr("jaxrl_fp16.training.runs.setup.device_bytes", lambda device: available)
    config = parse_config(Config, {"model": {"path": str(folder), "remat": wanted}})
    assert make_model(set_up(config)).remat is expected
