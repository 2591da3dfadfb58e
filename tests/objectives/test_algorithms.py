"""Presets are the table of the definitions; what makes no sense is refused by name."""

import dataclasses

import pydantic
import pytest

from jaxrl_fp16 import config, objectives

TIS, MIS, IS = ("tis", "token", 2.0), ("mis", "sequence", 10.0), ("is", "sequence", None)
# preset: advantage, loss, clip range, (importance, level, cap), aggregation
TABLE = {
    "grpo": ("group_std", "ppo_clip", (0.2, 0.2), None, "sequence_mean"),
    "dr_grpo": ("group_mean", "ppo_clip", (0.2, 0.2), None, "fixed_length"),
    "grpo_token_tis": ("group_mean", "ppo_clip", (0.2, 0.2), TIS, "fixed_length"),
    "grpo_seq_mis": ("group_mean", "ppo_clip", (0.2, 0.2), MIS, "fixed_length"),
    "grpo_icepop": ("group_mean", "ppo_clip", (0.2, 0.2), ("icepop", "token", 5.0), "fixed_length"),
    "gspo": ("group_std", "gspo", (3e-4, 4e-4), None, "sequence_mean"),
    "pg_seq_is": ("group_mean", "pg", None, IS, "fixed_length"),
    "pg_seq_tis": ("group_mean", "pg", None, ("tis", "sequence", 10.0), "fixed_length"),
    "pg_seq_mis": ("group_mean", "pg", None, MIS, "fixed_length"),
    "pg_token_is": ("group_mean", "pg", None, ("is", "token", None), "fixed_length"),
    "pg_token_tis": ("group_mean", "pg", None, TIS, "fixed_length"),
    "reinforce": ("group_mean", "pg", None, None, "fixed_length"),
    "rloo": ("leave_one_out", "ppo_clip", (0.2, 0.2), None, "fixed_length"),
    "cispo": ("group_std", "cispo", (1.0, 4.0), None, "token_mean"),
    "dapo": ("group_std", "ppo_clip", (0.2, 0.28), None, "token_mean"),
    "ppo": ("gae", "ppo_clip", (0.2, 0.2), None, "token_mean"),
}


def test_every_preset_of_the_table_is_there():
    """What else there is has its row in docs/algorithms.md, which test_docs.py holds against PRESETS."""
    assert set(TABLE) <= set(objectives.PRESETS)


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_the_table(name):
    advantage, loss, clip, correction, aggregation = TABLE[name]
    preset = objectives.get_algorithm(name)
    assert (preset.preset, preset.advantage, preset.loss) == (name, advantage, loss)
    assert preset.aggregation == aggregation
    assert clip is None or (preset.clip_low, preset.clip_high) == clip
    assert preset.importance == (correction[0] if correction else "none")
    assert correction is None or (preset.level, preset.cap) == correction[1:]
    assert preset.floor == (0.5 if name == "grpo_icepop" else None)
    assert preset.dynamic_sampling == (preset.overlong_penalty is not None) == (name == "dapo")
    assert (preset.kl, preset.kl_in, preset.kl_coef, preset.entropy_coef) == ("k3", "loss", 0, 0)
    assert (preset.value_clip, preset.discount, preset.gae_lambda, preset.dual_clip) == (0.2, 1, 1, None)


def test_overrides_make_a_frozen_hashable_config():
    algorithm = objectives.get_algorithm("grpo", clip_high=0.28, cap=float("inf"), importance="tis")
    assert (algorithm.clip_low, algorithm.clip_high) == (0.2, 0.28)
    assert hash(algorithm) == hash(dataclasses.replace(algorithm))
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithm.clip_high = 1.0


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"loss": "ppo"}, "loss is 'ppo'.*ppo_clip.*pg"),
        ({"advantage": "mean"}, "advantage is 'mean'.*group_std.*gae"),
        ({"importance": "wis"}, "importance is 'wis'.*tis"),
        ({"kl": "k4"}, "kl is 'k4'.*k3"),
        ({"kl_in": "both"}, "kl_in is 'both'.*reward"),
        ({"aggregation": "mean"}, "aggregation is 'mean'.*token_mean"),
        ({"clip_low": 0.0}, "clip_low is 0.0.*greater than 0"),
        ({"clip_high": "0.2"}, "clip_high is '0.2'"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0.*greater than 1"),
        ({"dual_clip": 3.0, "loss": "cispo"}, "dual_clip is 3.0; loss 'cispo'"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1"),
        ({"discount": 1.5}, "discount is 1.5.*less than or equal to 1"),
        ({"entropy_coef": float("nan")}, "entropy_coef is nan"),
        ({"importance": "tis"}, "cap is None; importance 'tis'"),
        ({"importance": "icepop", "cap": 5.0}, "floor is None"),
        ({"importance": "icepop", "cap": 5.0, "floor": 6.0}, "floor is 6.0.*cap 5.0"),
        ({"importance": "icepop", "cap": 5.0, "floor": 0.5, "level": "sequence"}, "level is 'sequence'"),
        ({"overlong_penalty": -1.0}, "overlong_penalty is -1"),
        ({"clip": 0.2}, "'clip' is unknown; allowed: advantage, loss"),
        ({"preset": "dapo"}, "'preset' is unknown"),
    ],
)
def test_refusals_name_the_value_and_the_allowed(overrides, named):
    with pytest.raises(ValueError, match=named):
        objectives.get_algorithm("grpo", **overrides)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="'grop' is unknown; allowed: grpo, dr_grpo"):
        objectives.get_algorithm("grop")


def test_every_field_is_documented_for_the_command_line():
    rows = config.describe(objectives.AlgorithmConfig)
    assert [row.key for row in rows] == [field.name for field in dataclasses.fields(objectives.AlgorithmConfig)]
    assert all(row.doc for row in rows)


def test_pydantic_reads_the_annotations():
    adapter = pydantic.TypeAdapter(objectives.AlgorithmConfig)
    assert adapter.validate_python({"loss": "pg", "kl_coef": "1e-3"}).kl_coef == 1e-3
    with pytest.raises(pydantic.ValidationError, match="greater than 0"):
        adapter.validate_python({"cap": -1})
    with pytest.raises(pydantic.ValidationError, match="cap is None"):
        adapter.validate_python({"importance": "mis"})


def test_who_needs_what():
    without = {name for name in objectives.PRESETS if not objectives.needs_scorer(objectives.get_algorithm(name))}
    assert without == {name for name, row in TABLE.items() if row[1] == "pg"}
    assert not objectives.needs_scorer(objectives.get_algorithm("reinforce", kl_coef=0.1))
    assert objectives.needs_scorer(objectives.get_algorithm("reinforce", kl_coef=0.1, kl_in="reward"))
    assert objectives.needs_reference(objectives.get_algorithm("grpo", kl_coef=0.1))
    assert not objectives.needs_reference(objectives.get_algorithm("grpo", kl_in="reward"))
    assert [name for name in objectives.PRESETS if objectives.needs_critic(objectives.get_algorithm(name))] == ["ppo"]


@pytest.mark.parametrize(
    "preset, group_size, old_logprobs, named",
    [
        ("grpo", 1, "recompute", "group_size is 1.*group_std.*gae"),
        ("grpo", 0, "recompute", "group_size is 0"),
        ("grpo", 8, "sampler", "'sampler'; allowed: recompute, rollout"),
        ("grpo_token_tis", 8, "rollout", "'rollout'; importance 'tis'.*recompute"),
    ],
)
def test_what_cannot_learn_is_refused(preset, group_size, old_logprobs, named):
    with pytest.raises(ValueError, match=named):
        objectives.check_algorithm(objectives.get_algorithm(preset), group_size, old_logprobs)


def test_what_can_learn_is_not():
    objectives.check_algorithm(objectives.get_algorithm("ppo"), 1)
    objectives.check_algorithm(objectives.get_algorithm("ppo"), 8)
    objectives.check_algorithm(objectives.get_algorithm("grpo"), 8, "rollout")
    objectives.check_algorithm(objectives.get_algorithm("pg_seq_is"), 8, "rollout")
    with pytest.raises(ValueError, match="dynamic_sampling"):
        objectives.check_algorithm(objectives.get_algorithm("ppo", dynamic_sampling=True), 1)
