"""The config of a run: what it refuses, and that every field says what it is."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxrl_fp16.config import ConfigError, describe, load_config, parse_config, to_dict
from jaxrl_fp16.objectives import PRESETS, get_algorithm
from jaxrl_fp16.training.runs.run_config import MAY_CHANGE, Config, check_mesh_rows, resolve_algorithm

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("mapping, message", [
    ({"training": {"minibatch_size": 100}},
     r"training.minibatch_size is 100; allowed: a divisor of prompts_per_step x group_size = 64 x 8 = 512"),
    ({"training": {"microbatch_size": 3}}, "training.microbatch_size is 3; allowed: a divisor of minibatch_size, 128"),
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
    check_mesh_rows(Config(), SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 5}))


def test_every_field_says_what_it_is():
    rows = describe(Config)
    assert len(rows) > 120 and not [row.key for row in rows if not row.doc]


def test_what_may_change_is_a_key():
    keys = {row.key for row in describe(Config)} | {key for key, value in to_dict(Config()).items()}
    assert not set(MAY_CHANGE) - keys


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_sound(path):
    config = load_config(Config, path)
    assert parse_config(Config, to_dict(config)) == config
