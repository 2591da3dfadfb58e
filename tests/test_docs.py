"""docs/algorithms.md says of each preset what PRESETS holds."""

import dataclasses
from pathlib import Path
import re

import pytest

from jaxrl_fp16 import rl, yaml_files

PAGE = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
OTHERS = {"sft", "dpo", "ipo", "RLHF"}


def entries():
    """heading -> its four lines, by the bold word that each starts with."""
    found = {}
    for section in re.split(r"^### ", PAGE, flags=re.M)[1:]:
        heading, _, rest = section.partition("\n")
        body = rest.split("\n## ")[0].strip().splitlines()
        lines = dict(re.match(r"- \*\*(\w+)\*\*: (.*)", line).groups() for line in body)
        found[tuple(re.findall(r"\w+", heading))] = lines
    return found


ENTRIES = entries()


def test_every_preset_has_its_four_lines_and_no_other_does():
    named = [name for heading in ENTRIES for name in heading]
    assert len(named) == len(set(named)) and set(named) == set(rl.PRESETS) | OTHERS
    for lines in ENTRIES.values():
        assert list(lines) == ["Loss", "Paper", "Config", "Use"]


@pytest.mark.parametrize("name", rl.PRESETS)
def test_the_config_is_the_presets(name):
    shown = yaml_files.parse("\n".join(re.findall(r"`(\w+: [^`]+)`", ENTRIES[name,]["Config"])), "the page")
    preset, grpo = rl.get_algorithm(name), rl.AlgorithmConfig()
    for field, value in shown.items():
        assert getattr(preset, field) == value, field
    differs = {field.name for field in dataclasses.fields(preset)
               if getattr(preset, field.name) != getattr(grpo, field.name)}
    assert differs | {"preset", "advantage", "loss", "importance", "aggregation"} <= set(shown)


def test_every_named_part_is_explained():
    words = PAGE.split("## Presets")[0]
    parts = [*rl.BASELINES, "gae", *rl.AGGREGATIONS, *rl.KL_ESTIMATORS, *rl.LEVELS, *(set(rl.IMPORTANCES) - {"none"})]
    for part in parts:
        assert re.search(rf"\b{part}\b", words), part


def test_the_papers_table_has_every_preset():
    table = PAGE.split("## What 2510.26788 found")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.M)) == set(rl.PRESETS)
