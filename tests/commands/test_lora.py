"""Adapters through every command, on a tiny model: what runs write, resume, go on from, export and refuse."""

import json
from pathlib import Path
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_fp16 import cli
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.models import (
    Decoder, DecoderConfig, init_params, load_adapter, load_pretrained, merge_lora, read_adapter, save_pretrained,
)
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.tasks import ALPHABET
from jaxrl_fp16.tokenizer import character_tokenizer, vocabulary_size
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig, Checkpoints

TIMES = ("seconds/sample", "seconds/learn", "tokens_per_second")
SETS = ("--evaluation.sets", "[{name: own, samples: 4, temperature: 1}]", "--evaluation.rows", "32")
KL = ("--algorithm.kl_coef", "0.1")
# One update a step: at the first, policy and reference are one.
RL = (*KL, "--training.minibatch_size", "32", "--training.microbatch_size", "32")
TOKENIZER = character_tokenizer(ALPHABET)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder."""
    path = tmp_path_factory.mktemp("base") / "model"
    model = Decoder(DecoderConfig(
        family="qwen2", vocab_size=vocabulary_size(TOKENIZER), hidden_size=32, intermediate_size=48, num_layers=1,
        num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True))
    save_pretrained(path, model, init_params(model, jax.random.key(0)), dtype="float32", tokenizer=TOKENIZER)
    return str(path)


@pytest.fixture(scope="module")
def command(tiny, compile_cache, digits_reward, base, tmp_path_factory):
    """command(name, flag, ...) -> (exit code, run folder or None), with adapters of rank 4 beside the base."""
    given = json.loads(Path(tiny).read_text())
    config = tmp_path_factory.mktemp("config") / "lora.yaml"
    config.write_text(json.dumps({
        **given, "model": {"path": base, "attention": "plain"}, "lora": {"rank": 4, "alpha": 16.0},
        "logging": {"tensorboard": False},
        "dpo": {"batch_size": 8, "microbatch_size": 4, "max_length": 10, "optimizer": {"learning_rate": 3e-3}},
    }))

    def command(name, *flags):
        runs = tmp_path_factory.mktemp("runs")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxrl_fp16.commands.train.draw_run", lambda *given: None)
            code = cli.main([name, str(config), "--run.compile_cache", compile_cache, "--run.dir", str(runs),
                             "--task.reward_file", digits_reward, *flags])
        return code, next(runs.glob("*"), None)

    return command


def arrays(folder, step):
    with Checkpoints(folder / "checkpoints", CheckpointConfig(keep=9)) as checkpoints:
        return checkpoints.arrays(step)[0]


def without_times(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def adapter_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(one, two, step):
    assert without_times(read_metrics(one)) == without_times(read_metrics(two))
    found, expected = arrays(one, step), arrays(two, step)
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []
    file = "adapter/adapter_model.safetensors"
    assert found.keys() == expected.keys() and (one / file).read_bytes() == (two / file).read_bytes()


# -- RL --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo(command):
    """Three steps with a KL term without a break."""
    code, folder = command("train", *RL, "--run.steps", "3")
    assert code == 0
    return folder


def test_a_run_trains_adapters_alone_and_keeps_no_copy(grpo, base):
    steps = read_metrics(grpo)[1:]
    assert [record["step"] for record in steps] == [1, 2, 3]
    for record in steps:
        assert record["loss_scale"] == 2**15 and record["skipped"] == 0 < record["grad_norm"]
        assert record["mismatch/kl_k3"] < 1e-4
    # The reference is the policy without adapters, which the first step begins as.
    assert abs(steps[0]["kl"]) < 1e-6 < steps[2]["kl"] and steps[-1]["reward"] > steps[0]["reward"]
    found = arrays(grpo, 3)
    assert not any("base" in name or name.startswith("reference") for name in found)
    assert found["policy.params.lora.layers.attention.q.b"].any() and found["policy.step"] == 3
    frozen = json.loads((grpo / "checkpoints" / "3" / "about.json").read_text())["frozen"]
    assert frozen["dtypes"] == ["float16"] and frozen["bytes"] == 2 * sum(
        x.size for x in load_file(Path(base) / "model.safetensors").values())
    assert not (grpo / "model").exists() and read_adapter(grpo / "adapter").rank == 4
    written = json.loads((grpo / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == base


def test_a_resumed_run_is_bitwise_one_that_never_stopped(command, grpo, capsys):
    _, half = command("train", *RL, "--run.steps", "2")
    capsys.readouterr()
    assert command("train", *RL, "--run.steps", "3", "--resume", str(half)) == (0, None)
    said = capsys.readouterr().out
    assert "resumed after step 2" in said and "LoRA: 0.0" in said and "adapters of rank 4" in said
    assert "frozen weights 0.0 MiB" in said and ", reference" not in said
    assert_same_run(half, grpo, 3)


def test_another_base_is_refused_when_a_run_goes_on(command, grpo, base, capsys):
    """The folder is as it was called, its weights are others: what the adapters were trained beside is gone."""
    file = Path(base) / "model.safetensors"
    before = file.read_bytes()
    save_file({name: array * 1.01 for name, array in load_file(file).items()}, file, metadata={"format": "pt"})
    code, _ = command("train", *RL, "--run.steps", "4", "--resume", str(grpo))
    file.write_bytes(before)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "model.safetensors of model.path has changed" in error
    assert [record["step"] for record in read_metrics(grpo)] == [0, 1, 2, 3]


def remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_export_writes_adapters_and_with_merge_the_whole_model(command, grpo, base, capsys):
    before = (grpo / "adapter" / "adapter_model.safetensors").read_bytes()
    remove(grpo / "adapter")
    assert command("export", *RL, "--run.steps", "3", "--resume", str(grpo))[0] == 0
    assert (grpo / "adapter" / "adapter_model.safetensors").read_bytes() == before and not (grpo / "model").exists()
    assert command("export", *RL, "--run.steps", "3", "--resume", str(grpo), "--lora.merge", "true")[0] == 0
    assert f"{grpo}/model" in capsys.readouterr().out
    # What is merged is the folder's float32, not the half of it that the run computed with, and rounded once.
    model, weights = load_pretrained(base, lora=read_adapter(grpo / "adapter"))
    params = load_adapter(grpo / "adapter", model, weights, policy=get_precision("fp32").policy)
    plain, merged = merge_lora(model, params, weights)
    found_model, found = load_pretrained(grpo / "model")
    assert found_model.config == plain.config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype("float16").astype("float32")),
                 found, merged)
    assert (found["layers"]["mlp"]["up"]["kernel"] != weights["layers"]["mlp"]["up"]["kernel"]).any()


def test_ppo_has_a_critic_of_adapters_beside_the_same_base(command):
    code, folder = command("train", "--algorithm.preset", "ppo", *RL, "--algorithm.kl_in", "reward", "--run.steps", "2",
                           "--run.export", "false")
    assert code == 0 and not (folder / "adapter").exists()
    steps, found = read_metrics(folder)[1:], arrays(folder, 2)
    for record in steps:
        assert record["critic/skipped"] == record["skipped"] == 0 < record["critic/grad_norm"]
    assert found["critic.params.lora.value.kernel"].any() and found["critic.params.lora.body.layers.mlp.up.b"].any()
    assert found["policy.params.lora.layers.mlp.up.b"].any() and found["critic.step"] == 2
    assert not any("base" in name for name in found)
    frozen = json.loads((folder / "checkpoints" / "2" / "about.json").read_text())["frozen"]
    assert frozen["arrays"] > 0


# -- supervised and preference steps, and what goes on from them ------------------------------------------


@pytest.fixture(scope="module")
def sft(command):
    """Three steps with dropout."""
    code, folder = command("sft", "--sft.steps", "3", "--lora.dropout", "0.2", "--lora.targets", "[q_proj, v_proj]")
    assert code == 0
    return folder


def test_supervised_steps_with_dropout_resume_bit_for_bit(command, sft):
    flags = ("--lora.dropout", "0.2", "--lora.targets", "[q_proj, v_proj]")
    _, half = command("sft", "--sft.steps", "2", *flags)
    assert command("sft", "--sft.steps", "3", *flags, "--resume", str(half))[0] == 0
    assert_same_run(half, sft, 3)
    assert len(adapter_of(sft)) == 2 * 2 and read_adapter(sft / "adapter").dropout == 0.2
    assert all(record["skipped"] == 0 < record["grad_norm"] for record in read_metrics(sft))


def test_a_run_goes_on_from_an_adapter(command, sft, capsys):
    """With the settings of its folder, but for dropout, which RL refuses."""
    path = ("--lora.rank", "null", "--lora.alpha", "null", "--lora.path", str(sft / "adapter"))
    assert command("train", *path, *KL, "--run.steps", "1")[0] == 2
    assert "lora.dropout is 0.2 with train; allowed: 0" in capsys.readouterr().err
    code, folder = command("train", *path, "--lora.dropout", "0", *RL, "--run.steps", "1", "--optimizer.learning_rate",
                           "0")
    assert code == 0
    before, after = adapter_of(sft), adapter_of(folder)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    # The reference is the base, which the adapter has left.
    assert read_metrics(folder)[1]["kl"] > 1e-5


@pytest.fixture(scope="module")
def dpo(command):
    code, folder = command("dpo", "--dpo.steps", "2", "--lora.dropout", "0.1")
    assert code == 0
    return folder


def test_preferences_are_held_against_the_base(dpo):
    first, *steps = read_metrics(dpo)
    assert len(steps) == 2 and all(record["skipped"] == 0 < record["grad_norm"] for record in steps)
    found = arrays(dpo, 2)
    assert not any(name.startswith("reference") or "base" in name for name in found) and adapter_of(dpo)


def test_a_warm_start_alone(command):
    code, folder = command("warmup", "--sft.steps", "2", "--lora.dropout", "0.1")
    assert code == 0 and len(adapter_of(folder)) == 2 * 7
    assert not (folder / "warm_start").exists()
    assert any(array.any() for name, array in adapter_of(folder).items() if "lora_B" in name)


# -- the commands that train nothing -----------------------------------------------------------------------


def adapted(grpo):
    return "--lora.rank", "null", "--lora.alpha", "null", "--lora.path", str(grpo / "adapter")


def test_eval_finds_what_the_adapters_learnt(command, grpo, capsys):
    assert command("eval", *adapted(grpo), *SETS)[0] == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert command("eval", *SETS)[0] == 0
    fresh = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["eval/own/accuracy"] > fresh["eval/own/accuracy"]


def test_generate_and_filter(command, grpo, capsys):
    assert command("generate", *adapted(grpo), "--generate.count", "2")[0] == 0
    assert len(re.findall("^> ", capsys.readouterr().out, flags=re.MULTILINE)) == 2
    code, folder = command("filter", *adapted(grpo), "--task.train_size", "4", "--filter.samples", "4",
                           "--evaluation.rows", "16", "--filter.low", "0", "--filter.high", "1")
    assert code == 0 and len((folder / "accuracy.jsonl").read_text().splitlines()) == 4


def test_info_looks_at_base_and_adapters(command, grpo, tmp_path, capsys):
    out = tmp_path / "all.json"
    assert command("info", *adapted(grpo), "--info.output", str(out))[0] == 0
    assert "FP16: yes" in capsys.readouterr().out
    found = json.loads(out.read_text())
    weights, gradients = set(found["weights"]["tensors"]), set(found["gradients"]["tensors"])
    assert gradients == set(adapter_of(grpo)) < weights and "model.embed_tokens.weight" in weights


def test_mismatch_measures_adapters(command, grpo):
    code, folder = command("mismatch", *adapted(grpo), "--mismatch.prompts", "4", "--mismatch.precisions", "[fp16]",
                           "--mismatch.reference", "fp16")
    found = json.loads((folder / "report.json").read_text())["metrics"]["fp16"]
    assert code == 0 and 0 < found["sampler|scorer"]["kl_k3"] < 1e-7 and found["scorer|gradient"]["kl_k3"] < 1e-8


# -- what is refused ---------------------------------------------------------------------------------------


NONE = ("--lora.rank", "null", "--lora.alpha", "null")


@pytest.mark.parametrize("name, flags, message", [
    ("train", ("--lora.rank", "null"), "lora.alpha is 16.0 without adapters; allowed: with lora.rank or lora.path, or"),
    ("train", (*NONE, "--lora.targets", "[q_proj]"), "lora.targets is "),
    ("train", ("--lora.dropout", "0.1"), "lora.dropout is 0.1 with train; allowed: 0, as a policy that drops"),
    ("train", ("--lora.targets", "[q_proj, qkv]"), "lora: targets name qkv_proj; allowed: "),
    ("train", ("--lora.rank", "0"), "lora.rank: 0 is not allowed; allowed: "),
    ("train", ("--lora.dropout", "1"), "lora.dropout: 1 is not allowed"),
    ("sft", ("--sft.steps", "1", "--lora.path", "absent"), "lora.path: adapter folder absent does not exist"),
    ("eval", (*SETS, "--lora.path", "absent"), "lora.path: adapter folder absent does not exist"),
    ("export", ("--lora.merge", "true"), "export needs --resume RUN_FOLDER"),
    ("mismatch", ("--lora.dropout", "0.1"), "lora.dropout is 0.1 with mismatch; allowed: 0"),
    ("train", ("--lora.alpha", ".inf"), "lora.alpha"),
])
def test_what_is_refused_before_anything_is_written(command, capsys, name, flags, message):
    code, folder = command(name, *flags)
    error = capsys.readouterr().err
    assert (code, folder) == (2, None) and message in error and error.count("\n") == 1, error


def test_a_folder_of_adapters_that_is_asked_for_otherwise_is_refused(command, grpo, base, capsys):
    for flags, message in (
        (("--lora.path", str(grpo / "adapter"), "--lora.rank", "8"), "lora: rank is 8 and path "),
        (("--lora.path", base, *NONE), "lora: "),
        (("--model.path", str(grpo / "adapter")), "model: "),
    ):
        assert command("train", *flags) == (2, None)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_merge_without_a_folder_of_the_weights_or_without_adapters_is_refused(command, grpo, capsys):
    flags = (*RL, "--run.steps", "3", "--resume", str(grpo), "--lora.merge", "true")
    for others, message in (
        (NONE, "lora.merge is true and the run has no adapters; allowed: false, or adapters with model.path"),
        (("--model.path", "null"), "lora.merge is true and the run has no folder of the weights that they are added"),
    ):
        assert command("export", *flags, *others) == (2, None)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
