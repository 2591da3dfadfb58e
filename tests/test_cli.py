"""The command line: what it refuses, in one line and with nothing written, and what it says of itself."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.config import describe
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params, save_pretrained
from jaxrl_fp16.tokenizer import character_tokenizer, save_tokenizer
from jaxrl_fp16.training.run_config import Config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def refused(tiny, compile_cache, tmp_path, monkeypatch, capsys):
    """refused(flag, ...) -> the line on stderr of a train that is refused with nothing written."""
    monkeypatch.chdir(tmp_path)

    def refused(*flags, config=tiny):
        before = sorted(tmp_path.rglob("*"))
        code = cli.main(["train", str(config), "--run.compile_cache", compile_cache, *flags])
        output = capsys.readouterr()
        assert code == 2 and output.out == "" and sorted(tmp_path.rglob("*")) == before
        assert output.err.startswith("jaxrl-fp16: ") and output.err.count("\n") == 1
        assert "Traceback" not in output.err
        return output.err

    return refused


# -- arguments and config ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (["trian", "x.yaml"], "command 'trian' is unknown; allowed: train, sft, "),
    (["train"], "train needs a config file: jaxrl-fp16 train CONFIG"),
    (["eval", "--run.steps", "3"], "eval needs a config file"),
    (["train", "absent.yaml"], "absent.yaml: no such config file"),
    (["train", "absent.yaml", "more"], '"more" is not allowed; allowed: --key VALUE (command line)'),
])
def test_arguments_that_make_no_command(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--sampling.temprature", "1"], "unknown key sampling.temprature; did you mean sampling.temperature?"),
    (["--run.steps", "many"], "run.steps: \"many\" is not allowed; allowed: integer >= 0 (command line)"),
    (["--run.steps"], "--run.steps has no value; allowed: --run.steps VALUE (command line)"),
    (["--run.steps=-1"], "run.steps: -1 is not allowed; allowed: integer >= 0"),
    (["--precision", "fp17"], "precision 'fp17' is unknown; allowed: fp16, bf16, fp32"),
    (["--precision", "params=float16,compute=float16,output=float32"], "params is 'float16'; allowed: float32"),
    (["--rollout_precision", "int8"], "rollout_precision: precision 'int8' is unknown; allowed: fp16, bf16, fp32"),
    (["--algorithm.preset", "grop"], "algorithm.preset: \"grop\" is not allowed; allowed: grpo | dr_grpo"),
    (["--algorithm.preset", "dapo", "--algorithm.overlong_penalty", "5"],
     "overlong_penalty is 5.0; allowed: above 0, up to max_new_tokens 4"),
    (["--critic.precision", "fp8"], "critic.precision: precision 'fp8' is unknown; allowed: fp16, bf16, fp32"),
    (["--algorithm.preset", "ppo", "--critic.path", "absent"], "critic: model folder absent does not exist"),
    (["--task.name", "maths"], "task.name is 'maths'; allowed: arithmetic, math"),
    (["--task.template", "{question}"], "template names the field 'question'; known: kind, problem, q"),
    (["--task.reward_file", "absent.py"], "task.reward_file: absent.py is no file"),
    (["--model.family", "gpt2"], "model: model family 'gpt2' is unknown; allowed: qwen2, qwen3, llama"),
    (["--model.num_kv_heads", "3"], "model: num_kv_heads is 3; allowed: a divisor of num_heads, 2"),
    (["--model.hidden_size", "null"], "model: hidden_size missing; allowed: model.path, or all of family, vocab_size"),
    (["--model.vocab_size", "20"], "model: the tokenizer has ids up to 20 and the model's embedding 20 rows"),
    (["--training.minibatch_size", "12"], "training.minibatch_size is 12; allowed: a divisor of prompts_per_step x"),
    (["--training.microbatch_size", "5"], "training.microbatch_size is 5; allowed: a divisor of minibatch_size, 16"),
    (["--sampling.group_size", "1"], "group_size is 1; advantage 'group_std' allows 2 or more, gae 1"),
    (["--mesh.fsdp", "7"], "does not fit"),
    (["--evaluation.sets", "[{name: a, path: absent.jsonl}]"], "evaluation: absent.jsonl: no such data file"),
    (["--critic.optimizer.schedule", "linear"], "schedule 'linear' with decay_steps 0; allowed: more than warmup"),
    (["--resume", "absent"], "resume: absent has no config.yaml; allowed: the folder of an earlier run"),
])
def test_values_that_are_refused(refused, flags, message):
    assert message in refused(*flags)


@pytest.mark.parametrize("text, message", [
    ("run: {steps: 1}\nrun: {steps: 2}\n", "config.yaml, line 2: the key 'run' stands twice"),
    ("model: &a {family: qwen2}\n", "anchors and aliases are not allowed"),
    ("run: !!python/object:os.system {}\n", "the tag"),
    ("", "config.yaml: holds nothing; a mapping of keys to values is wanted"),
    ("run: {steps: [1\n", "config.yaml, line"),
    ("extends: absent.yaml\n", 'extends: "absent.yaml" is no file beside'),
])
def test_files_that_are_refused(refused, tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert message in refused(config=path)


# -- data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, message", [
    (None, "task: data.jsonl: no such data file"),
    ("", "task: data.jsonl: no rows; at least one JSON object is needed"),
    ('{"problem": "1", "answer": "1"}\n\n{"problem": "2", answer: "2"}\n', "task: data.jsonl, line 3: not JSON"),
    ('{"problem": "1", "answer": "1"}\n{"problem": "2"}\n', "task: data.jsonl, line 2: "),
    ('["1", "2"]\n', "task: data.jsonl, line 1: a JSON list; a JSON object is needed"),
    ('{"problem": "\xff", "answer": "1"}\n', "task: data.jsonl, line 1: not UTF-8"),
])
def test_data_that_is_refused(refused, tmp_path, text, message):
    if text is not None:
        (tmp_path / "data.jsonl").write_text(text, encoding="latin-1")
    assert message in refused("--task.name", "math", "--task.path", "data.jsonl", "--task.template", "{problem}")


# -- models and tokenizers ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a model of 25 ids and the characters of the sums as tokenizer."""
    model = Decoder(DecoderConfig(family="qwen2", vocab_size=25, hidden_size=8, intermediate_size=8, num_layers=1,
                                  num_heads=1, num_kv_heads=1, head_dim=8, tie_embeddings=True))
    save_pretrained(tmp_path / "model", model, init_params(model, jax.random.key(0)),
                    tokenizer=character_tokenizer("0123456789+="))
    return tmp_path / "model"


# A folder goes in place of a shape.
NO_SHAPE = [text for name in ("family", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                              "head_dim", "tie_embeddings") for text in (f"--model.{name}", "null")]


def lose(name):
    return lambda folder: (folder / name).unlink()


def rewrite(name, change):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize("damage, message", [
    (lose("config.json"), "config.json is missing; allowed: a model folder as Transformers saves it"),
    (lose("tokenizer.json"), "model.path: {folder}: no tokenizer.json; a folder with a fast tokenizer is needed"),
    (rewrite("tokenizer_config.json", lambda c: c.pop("eos_token")), "the tokenizer has no end-of-text token"),
    (rewrite("config.json", lambda c: c.update(model_type="gpt2")), "model_type is 'gpt2'; allowed: "),
    (rewrite("config.json", lambda c: c.update(hidden_size=16)), "model.embed_tokens.weight"),
    (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json is not a JSON file"),
    (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
     "Git LFS pointer"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "safetensors"),
    (lambda folder: save_tokenizer(character_tokenizer("".join(map(chr, range(33, 90)))), folder),
     "model: the tokenizer has ids up to 59 and the model's embedding 25 rows"),
], ids=["config", "tokenizer", "end of text", "family", "shape", "generation", "pointer", "pickle", "vocabulary"])
def test_a_model_folder_at_fault_is_refused(refused, folder, damage, message):
    damage(folder)
    assert message.format(folder=folder) in refused(*NO_SHAPE, "--model.path", str(folder))


def test_an_absent_model_folder_is_refused(refused, folder):
    assert "no tokenizer.json" in refused(*NO_SHAPE, "--model.path", "absent")
    assert "absent does not exist; allowed: a local folder, nothing is downloaded" in refused(
        *NO_SHAPE, "--model.path", "absent", "--model.tokenizer", str(folder))


def test_a_shape_that_is_not_the_folders_is_refused(refused, folder):
    message = refused("--model.path", str(folder))
    assert f"model: hidden_size is 32 and path {folder} has 8; allowed: the folder's, or null" in message


# -- the machine -------------------------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_made_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "run.dir: file" in refused("--run.dir", "file")


def test_a_run_that_cannot_fit_is_refused(refused, monkeypatch):
    monkeypatch.setattr("jaxrl_fp16.training.run.device_bytes", lambda device: 2**20)
    assert "memory: the run needs about" in refused()


def in_a_process(tiny, cwd, *flags, **environment):
    command = [sys.executable, "-m", "jaxrl_fp16.cli", "train", str(tiny), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("platform, environment", [("gpu", {}), ("tpu", {}), ("gpu", {"JAX_PLATFORMS": ""})],
                         ids=["gpu", "tpu", "gpu, where JAX may choose"])
def test_a_platform_that_is_absent_is_refused(tiny, tmp_path, platform, environment):
    if platform in ("gpu", "tpu") and jax.default_backend() != "cpu":
        pytest.skip("this machine has an accelerator")
    done = in_a_process(tiny, tmp_path, "--platform", platform, **environment)
    assert done.returncode == 2, done.stderr
    assert f"run.platform: JAX finds no {platform} here" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not any(tmp_path.iterdir())


# -- help ----------------------------------------------------------------------------------------------------------


def test_help_names_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)
    assert cli.main([]) == 2 and capsys.readouterr().out == said


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_lists_every_key(command, capsys):
    assert cli.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    for row in describe(Config):
        assert f"--{row.key} ({row.type}; {row.default})\n      {row.doc}\n" in said


def test_both_spellings_of_an_override(tiny, compile_cache, tmp_path, capsys):
    """Seen in the config of a run without steps."""
    flags = ["--run.steps=0", f"--run.dir={tmp_path}", "--run.export=false", "--optimizer.learning_rate", "2e-6",
             "--run.name=a=b", f"--run.compile_cache={compile_cache}"]
    assert cli.main(["train", str(tiny), *flags]) == 0
    (folder,) = tmp_path.iterdir()
    text = (folder / "config.yaml").read_text()
    assert folder.name.startswith("a=b-") and "learning_rate: 2.0e-06" in text and "steps: 0" in text
