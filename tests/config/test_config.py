from dataclasses import dataclass, field
import math
from pathlib import Path
import subprocess
import sys
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxrl_fp16.config import (
    ConfigError, Doc, describe, diff, load_config, parse_config, parse_overrides, to_dict, to_yaml, yaml_files,
)


@dataclass(frozen=True)
class Optimizer:
    learning_rate: Annotated[float, Gt(0), Doc("peak step size")] = 1e-6
    betas: Annotated[tuple[float, float], Doc("Adam's decays")] = (0.9, 0.95)
    warmup: Annotated[int, Ge(0), Doc("optimizer steps")] = 0


@dataclass(frozen=True)
class EvalSet:
    name: Annotated[str, Doc("in metrics")]
    samples: Annotated[int, Ge(1), Le(64), Doc("answers a problem")] = 1


@dataclass(frozen=True)
class Sampling:
    top_p: Annotated[float, Gt(0), Le(1), Doc("kept mass")] = 1.0
    group_size: Annotated[int, Ge(1), Doc("answers a prompt")] = 8
    stop: Annotated[tuple[str, ...], Doc("stop strings")] = ()
    greedy: Annotated[bool, Doc("no sampling")] = False

    def __post_init__(self):
        if self.greedy and self.group_size > 1:
            raise ValueError(f"greedy with group_size {self.group_size}; allowed: group_size 1")


@dataclass(frozen=True)
class Config:
    steps: Annotated[int, Ge(1), Doc("iterations")]
    name: Annotated[str | None, Doc("of the run")] = None
    platform: Annotated[Literal["auto", "cpu", "gpu"], Doc("where")] = "auto"
    eos: Annotated[int | str, Doc("an id or a token")] = 0
    limit: Annotated[int | None, Ge(1), Doc("null: none")] = None
    optimizer: Optimizer = Optimizer(warmup=3)
    sampling: Sampling = Sampling()
    critic: Annotated[Optimizer | None, Doc("its own optimizer")] = None
    sets: Annotated[tuple[EvalSet, ...], Doc("evaluations")] = ()
    options: Annotated[dict[str, Any], Doc("passed on")] = field(default_factory=dict)


@pytest.fixture
def load(tmp_path):
    """load(text, *command line) -> Config; errors name `run.yaml`."""

    def load(text, *overrides):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(Config, path, overrides)

    return load


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_sections_and_defaults(load):
    config = load(
        "steps: 3\noptimizer: {learning_rate: 1e-6, betas: [0, 0.5]}\ncritic: {}\n"
        "sets: [{name: a}, {name: b, samples: 2}]\nsampling:\n  stop: ['no', \"\\n\"]\n"
    )
    assert config.steps == 3 and config.name is None and config.critic == Optimizer()
    assert config.optimizer == Optimizer(1e-6, (0.0, 0.5), 0)
    assert config.sets == (EvalSet("a"), EvalSet("b", 2)) and config.sampling.stop == ("no", "\n")
    assert load("steps: 3").optimizer.warmup == 3


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("2.5e3", 2500.0),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("010", "010"),
        (".nan", ".nan"),
        ("0x10", "0x10"),
        ("'1'", "1"),
    ],
)
def test_plain_scalars_follow_the_newer_yaml(text, expected):
    value = yaml_files.parse(text, "here")
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("steps: true", ["steps: true", "integer >= 1", "run.yaml"]),
        ("steps: yes", ['steps: "yes"', "integer"]),
        ("steps: 1.0", ["steps: 1.0", "integer"]),
        ("steps: '1'", ['steps: "1"', "integer"]),
        ("steps: 0", ["steps: 0", ">= 1"]),
        ("steps: null", ["steps: null", "integer"]),
        ("steps: [1]", ["steps: [1]", "integer"]),
        ("{}", ["steps is missing", "integer >= 1", "run.yaml"]),
        ("steps: 1\nname: 3", ["name: 3", "text or null"]),
        ("steps: 1\nlimit: 0", ["limit: 0", "integer >= 1 or null"]),
        ("steps: 1\nplatform: cuda", ['platform: "cuda"', "auto | cpu | gpu"]),
        ("steps: 1\noptimizer: null", ["optimizer: null", "learning_rate"]),
        ("steps: 1\noptimizer: 3", ["optimizer: 3", "learning_rate"]),
        ("steps: 1\noptimizer: {learning_rate: -1}", ["optimizer.learning_rate: -1", "number > 0"]),
        ("steps: 1\noptimizer: {learning_rate: .inf}", ['optimizer.learning_rate: ".inf"', "number"]),
        ("steps: 1\noptimizer: {learning_rate: 1e999}", ["optimizer.learning_rate: Infinity", "number"]),
        ("steps: 1\noptimizer: {betas: [0.9, a]}", ['optimizer.betas[1]: "a"', "list of 2 x number"]),
        ("steps: 1\noptimizer: {betas: [0.9]}", ["optimizer.betas: [0.9]", "list of 2 x number"]),
        ("steps: 1\ncritic: 3", ["critic: 3", "learning_rate", "null"]),
        ("steps: 1\nsets: [{name: a, samples: 65}]", ["sets[0].samples: 65", ">= 1 and <= 64", "run.yaml"]),
        ("steps: 1\nsets: [{samples: 6}]", ["sets[0].name is missing"]),
        ("steps: 1\nsets: {name: a}", ["sets", "list of"]),
        ("steps: 1\nsets: [a]", ['sets[0]: "a"', "name"]),
        ("steps: 1\nsampling: {greedy: true}", ["sampling: greedy with group_size 8", "allowed", "run.yaml"]),
        ("steps: 1\noptions: {a: 1e999}", ["options", "Infinity"]),
        ("stepz: 1", ["unknown key stepz", "did you mean steps?", "run.yaml"]),
        (
            "steps: 1\nlearning_rate: 1",
            ["unknown key learning_rate", "did you mean optimizer.learning_rate?"],
        ),
        ("steps: 1\noptimizer: {xyz: 1}", ["unknown key optimizer.xyz", "learning_rate, betas, warmup"]),
        ("steps: 1\nsteps: 2", ["run.yaml, line 2", "'steps' is given twice"]),
        ("steps: 1\noptimizer:\n  warmup: 1\n  warmup: 1", ["line 4", "'warmup' is given twice"]),
        ("a: &a [1]\nb: *a", ["line 1", "anchors and aliases"]),
        ("steps: *a", ["line 1", "anchors and aliases"]),
        ("steps: !!python/object/apply:os.system [ls]", ["line 1", "tag", "os.system"]),
        ("steps: !!int '3'", ["line 1", "tag"]),
        ("1: 2", ["line 1", "key must be text"]),
        ("? [a]\n: 2", ["line 1", "key must be text"]),
        ("", ["run.yaml: holds nothing"]),
        ("# only a comment\n", ["run.yaml: holds nothing"]),
        ("- steps", ["run.yaml: holds", "mapping"]),
        ("just text", ["run.yaml: holds", "mapping"]),
        ("steps: 1\n---\nsteps: 2", ["run.yaml", "document"]),
        ("steps: [1", ["run.yaml, line"]),
        ("steps: 1\n\tname: x", ["run.yaml, line 2"]),
        ("steps: \x01", ["run.yaml"]),
        ("[" * 100_000, ["run.yaml", "deep"]),
        ("steps: " + "9" * 5000, ["run.yaml", "digits"]),
        (b"steps: 1\nname: \xff", ["run.yaml", "UTF-8"]),
        (b"# " + b"x" * (1 << 20), ["run.yaml", "1,048,576"]),
        ("extends: [a]\nsteps: 1", ["extends", "run.yaml"]),
        ("extends: run.yaml", ["extends itself"]),
        ("extends: absent.yaml", ["extends", "absent.yaml", "run.yaml"]),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(load, text, parts):
    message = refusal(load, text)
    for part in parts:
        assert part in message, message


def test_extends_is_relative_to_the_file_and_merges_mappings(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/a.yaml").write_text("steps: 1\noptimizer: {warmup: 7}\nsampling: {stop: [x, y]}\n")
    (tmp_path / "base/b.yaml").write_text("extends: a.yaml\nsteps: 2\n")
    (tmp_path / "c.yaml").write_text(
        "extends: base/b.yaml\noptimizer: {learning_rate: 1}\nsampling: {stop: [z]}\n"
    )
    monkeypatch.chdir("/")
    config = load_config(Config, tmp_path / "c.yaml", ["--optimizer.learning_rate=0.5"])
    assert (
        config.steps == 2 and config.optimizer == Optimizer(0.5, warmup=7) and config.sampling.stop == ("z",)
    )


def test_errors_name_the_file_that_holds_the_value(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 1\noptimizer: {warmup: -7}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nsteps: 2\n")
    assert "a.yaml)" in refusal(load_config, Config, tmp_path / "b.yaml")
    overrides = ["--optimizer.warmup", "-8"]
    assert refusal(load_config, Config, tmp_path / "b.yaml", overrides).endswith("(command line)")


def test_extends_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert "extends itself, by way of a.yaml -> b.yaml" in refusal(load_config, Config, tmp_path / "a.yaml")


def test_overrides_read_as_their_field_wants(load):
    config = load(
        "steps: 1\ncritic: {warmup: 1}",
        "--steps",
        "5",
        "--name=1e5",
        "--optimizer.learning_rate",
        "2e-6",
        "--sampling.stop",
        '["a", "\\n"]',
        "--sets",
        "[{name: x}]",
        "--options.deep.value",
        "-1",
        "--options.text",
        "off",
        "--critic",
        "null",
        "--steps",
        "6",
    )
    assert config.steps == 6 and config.name == "1e5" and config.optimizer.learning_rate == 2e-6
    assert config.sampling.stop == ("a", "\n") and config.sets == (EvalSet("x"),) and config.critic is None
    assert config.options == {"deep": {"value": -1}, "text": "off"}
    assert load("steps: 1", "--eos", "7").eos == 7 and load("steps: 1", "--eos", "<end>").eos == "<end>"
    assert (
        load("steps: 1", "--name", "a: b {c}").name == "a: b {c}"
        and load("steps: 1", "--name", "").name == ""
    )
    assert load("steps: 1\nname: x\nlimit: 2", "--name", "null", "--limit", "null") == load("steps: 1")


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["--steps"], ["--steps has no value"]),
        (["--steps", "--name", "x"], ["--steps has no value"]),
        (["steps", "3"], ['"steps"', "--key VALUE"]),
        (["--steps", "three"], ['steps: "three"', "integer", "command line"]),
        (["--steps", "[1"], ["command line, --steps", "line 1"]),
        (["--steps="], ["steps: null", "integer"]),
        (["--platfrom", "cpu"], ["unknown key platfrom", "did you mean platform?", "command line"]),
        (["--optimizer.learning_rate.x", "3"], ["optimizer.learning_rate", "number", "command line"]),
        (["--optimizer.betas", "[1, 2, !!int 3]"], ["command line, --optimizer.betas", "tag"]),
        (["--name"], ["--name has no value; allowed: --name VALUE (command line)"]),
        (["--optimizer"], ["--optimizer has no value"]),
        (["--sets", "--steps", "2"], ["--sets has no value"]),
        (["--options.deep.value"], ["--options.deep.value has no value"]),
        (["--sampling.greeedy"], ["unknown key sampling.greeedy", "did you mean sampling.greedy?", "command line"]),
        (["--sampling.greedy="], ["sampling.greedy: null", "true or false"]),
        (["--sampling.greedy", "yes"], ['sampling.greedy: "yes"', "true or false"]),
    ],
)
def test_overrides_refused(load, overrides, parts):
    message = refusal(load, "steps: 1", *overrides)
    for part in parts:
        assert part in message, message


def test_a_flag_without_a_value_is_true(tmp_path):
    @dataclass(frozen=True)
    class Flags:
        loud: Annotated[bool, Doc("plain")] = False
        tied: Annotated[bool | None, Doc("null: as it comes")] = None
        mode: Annotated[bool | str, Doc("also a name")] = "auto"
        count: Annotated[int, Doc("no flag")] = 1

    def read(*arguments):
        return load_config(Flags, path, arguments)

    path = tmp_path / "flags.yaml"
    path.write_text("count: 1")
    assert read("--loud") == read("--loud", "true") == read("--loud=true") == Flags(loud=True)
    assert read("--loud", "--tied", "--count", "-3", "--mode") == Flags(True, True, True, -3)
    assert read("--loud", "--loud", "false") == read("--mode", "auto") == Flags()
    assert read("--mode", "true").mode is True and read("--mode", "fast").mode == "fast"
    for wrong in (["--count"], ["--count", "--loud"]):
        assert "--count has no value" in refusal(read, *wrong)
    assert "count: true is not allowed" in refusal(read, "--count", "true")


def test_parse_overrides_gives_pairs():
    assert parse_overrides(["--a.b", "1", "--c=2=3", "--e", "--d", "-1", "--f"]) == [
        ("a.b", "1"),
        ("c", "2=3"),
        ("e", "true"),
        ("d", "-1"),
        ("f", "true"),
    ]


def test_round_trip_of_a_resolved_config(load):
    config = load(
        "steps: 4\nname: '1e5'\neos: 'no'\ncritic: {learning_rate: 1e-12}\n"
        "sets: [{name: '2024-01-01'}]\noptions: {a: [1, 1.5, null, true, {b: '~'}], c: '1:30'}\n"
    )
    assert load(to_yaml(config)) == config
    assert parse_config(Config, to_dict(config)) == config


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("abc:- "), inner),
        max_leaves=8,
    )
)
def test_what_is_dumped_reads_back(value):
    read = yaml_files.parse(yaml_files.dump(value), "dump")
    assert repr(read) == repr(value)


def test_describe_lists_every_key_with_its_doc():
    rows = {row.key: row for row in describe(Config)}
    assert rows["steps"] == ("steps", "integer >= 1", "required", "iterations")
    assert rows["platform"].type == "auto | cpu | gpu" and rows["platform"].default == '"auto"'
    assert rows["optimizer.warmup"].default == "3" and rows["critic.warmup"].default == "0"
    assert (
        rows["sets[].samples"].type == "integer >= 1 and <= 64" and rows["sets[].name"].default == "required"
    )
    assert rows["name"].type == "text or null" and "optimizer" not in rows
    assert all(row.doc for row in rows.values())


def test_diff_names_what_differs_unless_ignored():
    old = Config(steps=1, options={"a": 1})
    new = Config(steps=2, optimizer=Optimizer(warmup=4), options={"b": 1}, critic=Optimizer())
    assert diff(old, new, ignore=["steps", "critic"]) == {
        "optimizer.warmup": (3, 4),
        "options.a": (1, None),
        "options.b": (None, 1),
    }
    assert diff(old, new, ignore=["steps", "critic", "optimizer", "options"]) == {} == diff(old, old)
    assert diff(old, to_dict(new), ignore=["options", "critic"]) == {
        "steps": (1, 2),
        "optimizer.warmup": (3, 4),
    }


def test_mappings_from_python_are_held_to_the_same(tmp_path):
    assert "api" in refusal(parse_config, Config, {"steps": math.nan}, "api")
    assert "steps" in refusal(parse_config, Config, {"steps": object()})
    assert parse_config(Config, {"steps": 1, "optimizer": {"betas": (0, 1)}}).optimizer.betas == (0.0, 1.0)
    assert "no such config file" in refusal(load_config, Config, tmp_path)


def test_reading_a_config_does_not_import_jax():
    code = "import sys, jaxrl_fp16.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
