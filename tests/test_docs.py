"""docs/algorithms.md says of each preset what PRESETS holds, docs/precision.md names the terms that are logged, and
docs/reliability.md and docs/gpu.md have the figures of the result files."""

import dataclasses
import importlib
from pathlib import Path
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_fp16 import objectives
from jaxrl_fp16.config import yaml_files
from jaxrl_fp16.tokenizer import character_tokenizer
from jaxrl_fp16.training.loops.mismatch_terms import staleness_terms, tokenisation_terms
from jaxrl_fp16.training.runs.sections import TrainingConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "algorithms.md").read_text()
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
    assert len(named) == len(set(named)) and set(named) == set(objectives.PRESETS) | OTHERS
    for lines in ENTRIES.values():
        assert list(lines) == ["Loss", "Paper", "Config", "Use"]


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_the_config_is_the_presets(name):
    shown = yaml_files.parse("\n".join(re.findall(r"`(\w+: [^`]+)`", ENTRIES[name,]["Config"])), "the page")
    preset, grpo = objectives.get_algorithm(name), objectives.AlgorithmConfig()
    for field, value in shown.items():
        assert getattr(preset, field) == value, field
    differs = {field.name for field in dataclasses.fields(preset)
               if getattr(preset, field.name) != getattr(grpo, field.name)}
    assert differs | {"preset", "advantage", "loss", "importance", "aggregation"} <= set(shown)


def test_every_named_part_is_explained():
    words = PAGE.split("## Presets")[0]
    corrections = set(objectives.IMPORTANCES) - {"none"}
    parts = [*objectives.BASELINES, "gae", *objectives.AGGREGATIONS, *objectives.KL_ESTIMATORS, *objectives.LEVELS]
    parts += corrections
    for part in parts:
        assert re.search(rf"\b{part}\b", words), part


def test_the_papers_table_names_presets():
    table = PAGE.split("## What 2510.26788 found")[1].split("## ")[0]
    named = re.findall(r"^\| `(\w+)`", table, flags=re.M)
    assert len(named) == len(set(named)) == 9 and set(named) <= set(objectives.PRESETS)


def test_what_pages_list_is_written_from_the_code():
    done = subprocess.run([sys.executable, DOCS / "derive.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}: python docs/derive.py"


def test_the_four_terms_are_those_that_are_logged():
    page = (DOCS / "precision.md").read_text()
    table = page.split("## The four terms")[1].split("\n\n")[2]
    ones = np.ones((1, 2), int)
    logged = {"terms/numerics", "terms/truncation", *staleness_terms([(0.0, 1)]),
              *tokenisation_terms(character_tokenizer("ab"), ones, ones, ones, [1], 1)}
    assert set(re.findall(r"`(terms/\w+)`", table)) == logged == set(re.findall(r"`(terms/\w+)`", page))
    assert f"evenly spread ({TrainingConfig().tokenisation_rows}; 0: none" in page


def test_the_figures_of_reliability_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(DOCS.parent / "benchmarks" / "reliability")
    figures = importlib.import_module("figures")
    written = (DOCS / "reliability.md").read_text()
    assert figures.table(figures.RESULTS) in written, "python benchmarks/reliability/figures.py"


def test_the_figures_of_the_gpu_are_those_of_the_results():
    figures = runpy.run_path(str(DOCS.parent / "benchmarks" / "gpu" / "figures.py"))
    page = (DOCS / "gpu.md").read_text()
    assert figures["filled"](page) == page, "python benchmarks/gpu/figures.py"
    assert re.findall(r"<!-- (\w+): start -->", page) == list(figures["PASSAGES"])
    assert "not explained" not in page


def test_the_figures_of_engines_are_those_of_the_results():
    figures = runpy.run_path(str(DOCS.parent / "benchmarks" / "engine_figures.py"))
    page = (DOCS / "engines.md").read_text()
    assert figures["filled"](page) == page, "python benchmarks/engine_figures.py"
    assert re.findall(r"<!-- (\w+): start -->", page) == list(figures["PASSAGES"])


def test_the_figures_of_plan_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))
    figures = runpy.run_path(str(DOCS.parent / "benchmarks" / "aot_figures.py"))
    page = (DOCS / "plan.md").read_text()
    assert figures["filled"](page, figures["PASSAGES"]) == page, "python benchmarks/aot_figures.py"
    assert re.findall(r"<!-- (\w+): start -->", page) == list(figures["PASSAGES"])


def test_the_figures_of_speed_are_those_of_the_results():
    figures = runpy.run_path(str(DOCS.parent / "benchmarks" / "speed_figures.py"))
    for name in ("speed.md", "lora.md"):
        page = (DOCS / name).read_text()
        assert figures["filled"](page) == page, "python benchmarks/speed_figures.py"
        assert re.findall(r"<!-- (\w+): start -->", page)


def test_the_real_runs_table_is_that_of_its_result(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))    # where its neighbours are
    figures = runpy.run_path(str(DOCS.parent / "benchmarks" / "real_run.py"))
    page = (DOCS.parent / "README.md").read_text()
    assert "<!-- real_run: start -->" in page and figures["filled"](page) == page, "python benchmarks/real_run.py"


def test_the_table_of_faults_has_every_row():
    rows = re.findall(r"^\| (\d+) \| ", (DOCS / "reliability.md").read_text(), flags=re.M)
    assert [int(row) for row in rows] == [*range(1, 33), 36, 37]
