"""The config of a run: what it refuses, and that every field says what it is."""

from pathlib import Path
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jaxrl_fp16.config import ConfigError, describe, load_config, parse_config, to_dict, to_yaml
from jaxrl_fp16.objectives import PRESETS, get_algorithm
from jaxrl_fp16.training.runs.run_config import (
    MAY_CHANGE, USED, Config, check_mesh_rows, load_for, resolve_algorithm,
)
from jaxrl_fp16.training.runs.sections import TrainingConfig

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("mapping, message", [
    ({"training": {"minibatch_size": 100}},
     r"training.minibatch_size is 100; allowed: a divisor of prompts_per_step x group_size = 64 x 8 = 512"),
    ({"training": {"microbatch_size": 3}}, "training.microbatch_size is 3; allowed: a divisor of minibatch_size, 128"),
    ({"training": {"microbatch_tokens": 1279}},
     r"training.microbatch_tokens is 1279; allowed: null, or at least .* = 1024 \+ 256 = 1280"),
    ({"sft": {"microbatch_size": 5}}, "sft.microbatch_size is 5; allowed: a divisor of batch_size, 64"),
    ({"sft": {"until_accuracy": 0.5}}, "sft.until_accuracy is 0.5 and evaluation.sets is empty; allowed: null, or one"),
    ({"sft": {"packing": True}, "model": {"attention": "cudnn"}},
     "sft.packing is true with model.attention cudnn; allowed: blockwise, plain"),
    ({"sampling": {"group_size": 1}}, "group_size is 1; advantage 'group_std' allows 2 or more, gae 1"),
    ({"sampling": {"group_sise": 4}}, "unknown key sampling.group_sise; did you mean sampling.group_size?"),
    ({"learning_rate": 1e-6}, "unknown key learning_rate; did you mean optimizer.learning_rate?"),
    ({"algorithm": {"preset": "dapo", "overlong_penalty": 300.0}},
     "overlong_penalty is 300.0; allowed: above 0, up to max_new_tokens 256"),
    ({"algorithm": {"preset": "grp"}}, "algorithm.preset: \"grp\" is not allowed; allowed: grpo | dr_grpo"),
    ({"algorithm": {"importance": "tis"}}, "cap is None; importance 'tis' needs a number"),
    ({"algorithm": {"preset": "grpo_token_tis"}, "training": {"old_logprobs": "rollout"}},
     "its weight would be 1 by construction"),
    ({"training": {"truncated": "cut"}}, "training.truncated: \"cut\" is not allowed; allowed: keep | zero | mask"),
    ({"task": {"arithmetic": {"kinds": []}}}, "task.arithmetic.kinds: .*length >= 1"),
    ({"training": {"probe": True}, "resume": "runs/x"},
     "training.probe is true with resume runs/x; allowed: a run from its start, with what `export` writes of a"),
    ({"run": {"steps": True}}, "run.steps: true is not allowed; allowed: integer >= 0"),
])
def test_what_is_refused(mapping, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(Config, mapping)


# What only a training needs is at fault; each is refused there.
UNREAD = {
    "groups of one": {"sampling": {"group_size": 1}, "training": {"minibatch_size": 64}},
    "a minibatch that does not divide": {"training": {"minibatch_size": 100}},
    "a microbatch that does not divide": {"training": {"microbatch_size": 3}},
    "rows of sft": {"sft": {"microbatch_size": 5}},
    "pairs of dpo": {"dpo": {"microbatch_size": 5}},
    "a best of no set": {"checkpoint": {"best": "eval/none/accuracy"}},
    "an export of no best": {"checkpoint": {"export": "best"}},
    "no accuracy to end by": {"sft": {"until_accuracy": 0.5}},
    "a reward model of truncated": {"task": {"reward_model": {"path": "judge"}}},
    "the critic's loss scale": {"critic": {"loss_scale": {"minimum": 2.0, "initial": 1.0}}},
    "precisions of a comparison": {"compare": {"precisions": ["fp16", "fp17"]}},
    "a package for the log": {"logging": {"wandb": True}},
    "a schedule": {"optimizer": {"schedule": "cosine", "decay_steps": 0}},
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrl_fp16.logs.importlib.util.find_spec", lambda name: None)

    def write(mapping):
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(mapping))
        return path

    return write


@pytest.mark.parametrize("name", UNREAD)
def test_a_command_is_refused_for_what_it_reads_alone(name, written):
    path = written(UNREAD[name])
    with pytest.raises(ConfigError):
        load_for("train", path)
    for command in ("eval", "generate", "info", "filter"):
        config = load_for(command, path)
        assert not config.trains and set(to_dict(config)) == set(to_dict(Config()))
        for section, values in UNREAD[name].items():    # what is read is as it was given
            if section in USED[command]:
                assert all(to_dict(getattr(config, section))[key] == to_dict(value) or isinstance(value, dict)
                           for key, value in values.items())


@pytest.mark.parametrize("command, mapping, message", [
    ("eval", {"evaluation": {"sets": [{"name": "a"}, {"name": "a"}]}}, "sets are named a, a; allowed: different"),
    ("filter", {"filter": {"low": 0.9}}, "low is 0.9; allowed: at most high"),
    ("generate", {"compare": {"precision": ["fp16"]}}, "unknown key compare.precision; did you mean"),
    ("generate", {"dpo": {"steps": 0}}, "dpo.steps: 0 is not allowed; allowed: integer >= 1"),
    ("info", {"model": {"attention": "cudnn"}, "numerics": {"float32_cache": True}}, "float32_cache is true with"),
    ("mismatch", {"training": {"microbatch_size": 3}}, "microbatch_size is 3; allowed: a divisor of minibatch_size"),
    ("mismatch", {"algorithm": {"importance": "tis"}}, "cap is None; importance 'tis' needs a number"),
])
def test_what_a_command_reads_is_held_to_its_rules(command, mapping, message, written):
    with pytest.raises(ConfigError, match=message):
        load_for(command, written(mapping))


def test_mismatch_takes_groups_of_one_and_any_number_of_rows(written):
    config = load_for("mismatch", written({"sampling": {"group_size": 1}, "training": {"prompts_per_step": 3}}))
    assert config.trains and config.sampling.group_size == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_get_algorithm_gives(preset):
    config = parse_config(Config, {"algorithm": {"preset": preset, "clip_high": 0.3}})
    assert resolve_algorithm(config) == get_algorithm(preset, clip_high=0.3)


def test_a_single_response_goes_with_a_critic():
    config = parse_config(Config, {"algorithm": {"preset": "ppo"}, "sampling": {"group_size": 1},
                                   "training": {"minibatch_size": 64}})
    assert config.sampling.group_size == 1


def test_rows_that_a_mesh_does_not_divide():
    mesh = SimpleNamespace(shape={"data": 3, "fsdp": 2, "tensor": 1})
    message = "training.microbatch_size is 8; allowed: multiples of mesh data x fsdp = 3 x 2 = 6"
    with pytest.raises(ValueError, match=message):
        check_mesh_rows(Config(), mesh)
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 5})
    check_mesh_rows(Config(), mesh)
    check_mesh_rows(Config(training=TrainingConfig(microbatch_tokens=4 * 1280)), mesh)
    with pytest.raises(ValueError, match="training.microbatch_tokens is 5119; allowed: null, or .* = 4 devices, 5120"):
        check_mesh_rows(Config(training=TrainingConfig(microbatch_tokens=5119)), mesh)


def test_only_rows_of_the_command_are_divided():
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 128, "tensor": 1})
    config = Config(training=TrainingConfig(microbatch_size=128, prompts_per_step=128))
    check_mesh_rows(config, mesh)
    warm = replace(config, sft=replace(config.sft, steps=1))
    for command, given in (("sft", config), ("train", warm), ("mismatch", warm)):
        with pytest.raises(ValueError, match="sft.microbatch_size is 64; allowed: multiples .* = 128"):
            check_mesh_rows(given, mesh, command)
    with pytest.raises(ValueError, match="dpo.microbatch_size is 8"):
        check_mesh_rows(config, mesh, "dpo")


def test_every_field_says_what_it_is():
    rows = describe(Config)
    assert len(rows) > 120 and not [row.key for row in rows if not row.doc]
    texts = [row.doc for row in rows]
    assert not {text for text in texts if texts.count(text) > 1}    # each stands alone, also those of one of three
    (rate,) = (row for row in rows if row.key == "sft.optimizer.learning_rate")
    assert rate.doc == "highest learning rate, after the warm-up (optimizer of supervised training)"


def test_what_may_change_is_a_key():
    keys = {row.key for row in describe(Config)} | {key for key, value in to_dict(Config()).items()}
    assert not set(MAY_CHANGE) - keys


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_sound(path):
    config = load_config(Config, path)
    assert parse_config(Config, to_dict(config)) == config
