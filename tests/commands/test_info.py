"""`info` through the command line: sound weights, and each thing that float16 does not hold, named."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_fp16 import cli
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params, save_pretrained
from jaxrl_fp16.tasks import ALPHABET
from jaxrl_fp16.tokenizer import character_tokenizer, vocabulary_size

TOKENIZER = character_tokenizer(ALPHABET)
SHAPE = ("family", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
         "tie_embeddings")
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def weights():
    """Of a folder with two layers, by their names there."""
    config = DecoderConfig(family="qwen2", vocab_size=vocabulary_size(TOKENIZER), hidden_size=32, intermediate_size=48,
                           num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True)
    return Decoder(config), init_params(Decoder(config), jax.random.key(0))


@pytest.fixture
def info(tiny, compile_cache, weights, tmp_path, capsys):
    """info({tensor: change}, flag, ...) -> the JSON line and the last line, of a folder whose tensors are changed."""

    def info(changes, *flags):
        folder = tmp_path / "model"
        save_pretrained(folder, *weights, dtype="float32", tokenizer=TOKENIZER, overwrite=True)
        tensors = load_file(folder / "model.safetensors")
        for name, change in changes.items():
            tensors[name] = np.ascontiguousarray(change(tensors[name]).astype(np.float32))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        before = sorted(tmp_path.rglob("*"))
        shape = [text for name in SHAPE for text in (f"--model.{name}", "null")]
        code = cli.main(["info", str(tiny), "--run.compile_cache", compile_cache, *shape, "--model.path", str(folder),
                         "--model.attention", "plain", *flags])
        *_, line, verdict = capsys.readouterr().out.splitlines()
        assert code == 0 and (flags or sorted(tmp_path.rglob("*")) == before)
        return json.loads(line), verdict

    return info


def put(value):
    """Sets one entry of a tensor."""
    def change(array):
        array[3, 5] = value
        return array

    return change


def test_a_sound_model(info, tmp_path):
    found, verdict = info({}, "--info.output", str(tmp_path / "all.json"))
    kept = json.loads((tmp_path / "all.json").read_text())
    assert found["safe"] is True and verdict == found["verdict"] and found["responses"] == "the task's solutions"
    largest = max(found["activations"]["max"], found["weights"]["max"])
    assert verdict.startswith("FP16: yes, with a factor of ") and found["margin"] == 65504 / largest > 1000
    assert found["rows"] == 6 and found["gradients"]["loss_scale"] == 2**15
    # The file has every tensor and module too, which say the same.
    assert kept["activations"]["max"] == max(kept["activations"]["float32"].values())
    assert kept["weights"]["max"] == max(each["max"] for each in kept["weights"]["tensors"].values())
    for name, value in kept["activations"]["float32"].items():
        np.testing.assert_allclose(kept["activations"]["float16"][name], value, rtol=2e-2, err_msg=name)
    assert set(kept["gradients"]["tensors"]) == set(kept["weights"]["tensors"])


def test_a_weight_beyond_float16_is_reported_and_not_refused(info):
    found, verdict = info({LAYER + "mlp.up_proj.weight": put(1e5), "model.embed_tokens.weight": put(1e-9)})
    assert found["safe"] is False and found["weights"]["lost"] > 0
    assert verdict == f"FP16: no, the weights {LAYER}mlp.up_proj.weight hold 100000; float16 ends at 65,504"


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite_is_reported(info, value):
    found, verdict = info({"model.layers.0.self_attn.q_proj.weight": put(value)})
    assert f"no, the weights model.layers.0.self_attn.q_proj.weight hold {abs(value):g}" in verdict
    assert "activations" not in found and found["weights"]["max"] == ("NaN" if np.isnan(value) else "Infinity")


def test_the_first_layer_that_overflows_is_named(info):
    found, verdict = info({LAYER + "mlp.down_proj.weight": lambda array: 2e4 * array,
                           LAYER + "mlp.up_proj.weight": lambda array: 100 * array})
    assert found["safe"] is False and found["weights"]["max"] < 65504 < found["activations"]["max"]
    assert found["activations"]["first_beyond"] == "layers.1.mlp"
    assert verdict.startswith("FP16: no, the activation of layers.1.mlp reaches ")


def test_gradients_that_underflow_are_counted_at_the_scale(info):
    """A last norm of 1e-6 makes logits that hardly differ, and the gradients before it a millionth."""
    small = {"model.norm.weight": lambda array: 1e-6 * array}
    found, _ = info(small, "--loss_scale.initial", "1")
    scaled, verdict = info(small)
    assert found["gradients"]["underflow"] > 0.2 > 0.05 > scaled["gradients"]["underflow"]
    assert found["gradients"]["loss_scale"] == 1 and "underflow at loss scale 32768" in verdict


def test_a_scale_that_is_too_large_falls_as_in_a_run(info):
    found, verdict = info({}, "--loss_scale.initial", str(2**40), "--loss_scale.maximum", str(2**40),
                          "--loss_scale.backoff", "0.00390625")
    assert found["safe"] is True and found["gradients"]["loss_scale"] in (2.0**8, 2.0**16, 2.0**24)


def test_problems_without_solutions_are_answered_by_the_model(info, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(8)))
    found, verdict = info({}, "--task.name", "math", "--task.path", str(data), "--task.template", "{problem}",
                          "--task.answer_from", "text", "--task.heldout_size", "2", "--info.rows", "2")
    assert found["responses"] == "sampled" and found["rows"] == 2 and found["tokens"] > 8
    assert found["safe"] is True


def test_a_run_folder_and_an_absent_output_folder_are_refused(tiny, capsys):
    assert cli.main(["info", str(tiny), "--resume", "runs/x"]) == 2
    assert "info reads no run folder; allowed: --model.path runs/x/model" in capsys.readouterr().err
    assert cli.main(["info", str(tiny), "--info.output", "absent/all.json"]) == 2
    assert "the folder of absent/all.json does not exist" in capsys.readouterr().err
