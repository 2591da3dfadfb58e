"""What a resume depends on beside its config: content that changed is named, a moved one is the same."""

import json

import pytest

from jaxrl_fp16.config import ConfigError, parse_config, to_yaml
from jaxrl_fp16.training.checkpoints.checkpoint import ABOUT, newest_about
from jaxrl_fp16.training.checkpoints.manifest import write_manifest
from jaxrl_fp16.training.runs import inputs, run_folder
from jaxrl_fp16.training.runs.inputs import EDGE, NAME, check_inputs, inputs_of, recorded_inputs
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.run_folder import check_resumed

FILES = {
    "model/config.json": b"{}", "model/generation_config.json": b"{}", "model/tokenizer.json": b"{}",
    "model/tokenizer_config.json": b"{}", "model/chat_template.jinja": b"{{ messages }}",
    "model/model.safetensors": bytes(3 * EDGE), "critic/config.json": b"{}", "critic/model.safetensors": b"weights",
    "judge/config.json": b"{}", "judge/tokenizer.json": b"{}", "data.jsonl": b'{"problem": "1+1", "answer": "2"}\n',
    "reward.py": b"def reward(*_): return []\n",
}


def write(folder, **changes):
    for name, content in {**FILES, **changes}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def config_in(folder, **more):
    return parse_config(Config, {
        "model": {"path": str(folder / "model")}, "critic": {"path": str(folder / "critic")},
        "task": {"name": "math", "path": str(folder / "data.jsonl"), "reward_file": str(folder / "reward.py"),
                 "template": "none", "reward_model": {"path": str(folder / "judge")}},
        "training": {"truncated": "keep"}, **more,
    })


def run_of(tmp_path, config, **record):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / NAME).write_text(json.dumps(record or inputs_of(config)))
    return folder


def checkpoint_of(folder, step, **about):
    path = folder / "checkpoints" / str(step)
    path.mkdir(parents=True)
    (path / ABOUT).write_text(json.dumps({"step": step, **about}))
    write_manifest(path)
    return path


def test_a_moved_folder_is_the_same(tmp_path):
    before = config_in(write(tmp_path / "here"))
    folder = run_of(tmp_path, before)
    (tmp_path / "here").rename(tmp_path / "there")
    config = config_in(tmp_path / "there")
    check_resumed(config, folder)
    check_inputs(folder, inputs_of(config))
    assert set(recorded_inputs(folder)) == {
        "model.path", "critic.path", "task.path", "task.reward_file", "task.reward_model.path", "task.template"}


@pytest.mark.parametrize("name", FILES)
def test_what_changed_is_named(name, tmp_path):
    config = config_in(write(tmp_path))
    folder, place = run_of(tmp_path, config), tmp_path / name
    place.write_bytes(FILES[name][:-1] + b" ")
    key = {"model": "model.path", "critic": "critic.path", "judge": "task.reward_model.path", "data.jsonl": "task.path",
           "reward.py": "task.reward_file"}[name.split("/")[0]]
    part = name.split("/")[1] if "/" in name else "content"
    with pytest.raises(ConfigError, match=f"started with other content: {part} of {key} has changed; allowed: the s"):
        check_inputs(folder, inputs_of(config))
    exported = name.startswith("model/") and not name.endswith("safetensors")
    if not exported:
        check_inputs(folder, inputs_of(config), exporting=True)
    place.unlink()
    with pytest.raises(ConfigError, match=f"{part} of {key} is gone"):
        check_inputs(folder, inputs_of(config))


@pytest.mark.parametrize("change", [lambda x: b"1" + x[1:], lambda x: x[:-1] + b"1", lambda x: x + b"0"])
def test_weights_are_told_by_size_and_edges(change, tmp_path):
    config = config_in(write(tmp_path))
    before, path = inputs_of(config)["model.path"], tmp_path / "model" / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    after = inputs_of(config)["model.path"]
    assert [part for part in before if before[part] != after[part]] == ["model.safetensors"]


def test_shards_and_the_tokenizer_of_another_folder(tmp_path):
    write(tmp_path)
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/model-00001-of-00001.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text("{}")
    found = inputs_of(parse_config(Config, {"model": {"path": str(tmp_path / "model"),
                                                      "tokenizer": str(tmp_path / "judge")}}))
    assert set(found["model.path"]) == {
        "config.json", "generation_config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert set(found["model.tokenizer"]) == {"tokenizer.json"}


def test_a_template_that_reads_otherwise_by_now(tmp_path, monkeypatch):
    config = config_in(write(tmp_path))
    folder = run_of(tmp_path, config)
    monkeypatch.setattr(inputs, "get_template", lambda *_: type("T", (), {"text": "{q}?"}))
    with pytest.raises(ConfigError, match="text of task.template has changed"):
        check_inputs(folder, inputs_of(config))


def test_the_newest_sound_checkpoint_says_it(tmp_path):
    config = config_in(write(tmp_path))
    folder = run_of(tmp_path, config, **{"task.path": {"content": "of the last start"}})
    assert recorded_inputs(folder)["task.path"] == {"content": "of the last start"}
    for step in (9, 10, 11):
        checkpoint_of(folder, step, inputs={"task.path": {"content": f"of step {step}"}})
    damaged = folder / "checkpoints" / "11" / ABOUT
    damaged.write_bytes(damaged.read_bytes().replace(b"of step", b"of stop"))
    (folder / "checkpoints" / "12.partial").mkdir()
    assert recorded_inputs(folder)["task.path"] == {"content": "of step 10"}


def test_a_run_from_before_digests_is_compared_by_its_paths(tmp_path):
    config = config_in(write(tmp_path / "here"))
    folder = run_of(tmp_path, config)
    (folder / NAME).unlink()
    checkpoint_of(folder, 1)
    assert recorded_inputs(folder) == {} == newest_about(folder / "nowhere")
    check_resumed(config, folder)
    check_inputs(folder, inputs_of(config))
    with pytest.raises(ConfigError, match=r"model.path was '.*here/model', is '.*there/model'"):
        check_resumed(config_in(tmp_path / "there"), folder)
    check_resumed(config_in(tmp_path / "here" / ".." / "here"), folder)     # one place, spelled otherwise


def test_a_comparison_from_before_digests_moves_with_its_warm_start(tmp_path):
    def config(place):
        return parse_config(Config, {"run": {"dir": f"{place}"}, "model": {"path": f"{place}/warm-seed0/model"}})

    folder = run_of(tmp_path, config(tmp_path / "old"))
    (folder / NAME).unlink()
    check_resumed(config(tmp_path / "elsewhere" / "new"), folder)
    start = {"path": f"{tmp_path}/new/warm-seed1/model"}
    other = parse_config(Config, {"run": {"dir": f"{tmp_path}/new"}, "model": start})
    with pytest.raises(ConfigError, match="model.path was"):
        check_resumed(other, folder)


# -- the config of a run that was started elsewhere, or before ------------------------------------------------------


def test_an_old_config_is_compared_and_not_checked(tmp_path, monkeypatch):
    """It asks for a package that is not here, holds what is refused by now, and keys that are gone."""
    config = Config()
    folder = run_of(tmp_path, config, **{"x": {}})
    text = to_yaml(config).replace("wandb: false", "wandb: true").replace("keep: 2", "keep: 0")
    text = text.replace("  heldout_size: null\n", "") + "gone:\n  key: 3\n"
    (folder / "config.yaml").write_text(text)
    monkeypatch.setattr(run_folder, "GONE", {"gone.key": 3})
    check_resumed(config, folder)
    monkeypatch.setattr(run_folder, "GONE", {"gone.key": 4})
    with pytest.raises(ConfigError, match="gone.key was 3, and is no key any more, whose default was 4"):
        check_resumed(config, folder)
    monkeypatch.setattr(run_folder, "GONE", {})
    with pytest.raises(ConfigError, match="gone.key was 3, and is no key any more"):
        check_resumed(config, folder)
    (folder / "config.yaml").write_text("- not a config\n")
    with pytest.raises(ConfigError, match="holds a list"):
        check_resumed(config, folder)
