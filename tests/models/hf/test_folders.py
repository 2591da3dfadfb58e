"""Folders in and out: what is refused and in which words, shards, memory, interrupted exports."""

import functools
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_fp16.models import (
    FAMILIES, Critic, Decoder, DecoderConfig, PretrainedError, RopeScaling, YarnScaling, check_range, load_pretrained,
    param_shapes, read_config, save_pretrained, save_reward_model,
)
from jaxrl_fp16.models.families.family import TRANSFORMS, Tensor
from jaxrl_fp16.models.hf import export, load
from jaxrl_fp16.models.hf.weight_files import find_tensors
from jaxrl_fp16.parallel import axes_sharding, make_mesh
from jaxrl_fp16.tokenizer import character_tokenizer

SHAPE = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
             head_dim=8)
GATE = "model.layers.1.mlp.gate_proj.weight"


@functools.cache
def small(family="qwen2", **fields):
    model = Decoder(DecoderConfig(family=family, **SHAPE | fields))
    generator = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32),
                               param_shapes(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An untied qwen2 in float32, as one file and in shards."""
    root = tmp_path_factory.mktemp("saved")
    model, params = small()
    save_pretrained(root / "single", model, params, dtype="float32")
    save_pretrained(root / "shards", model, params, dtype="float32", shard_bytes=8000)
    return root, params


@pytest.fixture
def single(saved, tmp_path):
    return shutil.copytree(saved[0] / "single", tmp_path / "single")


@pytest.fixture
def shards(saved, tmp_path):
    return shutil.copytree(saved[0] / "shards", tmp_path / "shards")


def edit_json(path, **changes):
    """Sets keys; None as a value removes one."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, pattern, **how):
    with pytest.raises(PretrainedError, match=pattern) as caught:
        load_pretrained(folder, **how)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [True, False])
def test_table_names_every_parameter_once(family, tie):
    parts = {"llama": dict(qkv_bias=True, output_bias=True, mlp_bias=True)}.get(family, {})
    model = Decoder(DecoderConfig(family=family, tie_embeddings=tie, **SHAPE, **parts))
    shapes = {tuple(key.key for key in path): leaf.shape
              for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(model))}
    table = FAMILIES[family].tensors(model.config)
    assert sorted(tensor.path for tensor in table) == sorted(shapes)
    for tensor in table:
        assert len(tensor.axes) + len(tensor.counted) == len(shapes[tensor.path])


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_an_array_as_a_folder_holds_it_is_a_view(kind):
    rank = {"same": 2, "transpose": 2, "bias_of_heads": 2}.get(kind, 3)
    tensor, ours = Tensor("x", ("x",), (None,) * rank, kind), np.arange(24.0).reshape((4, 6, 1)[:rank])
    stored = tensor.to_hf(ours)
    assert stored.shape == tensor.hf_shape(ours.shape) and np.shares_memory(stored, ours)
    index = (slice(1, 3), *(slice(0, size) for size in ours.shape[1:]))
    np.testing.assert_array_equal(stored[tensor.hf_index(index, ours.shape)], tensor.to_hf(ours[index]))


def test_heads_are_cut_whole():
    tensor = Tensor("x", ("x",), ("embed", "heads", "head_dim"), "to_heads")
    with pytest.raises(ValueError, match="whole heads"):
        tensor.hf_index((slice(0, 4), slice(0, 2), slice(0, 3)), (4, 2, 6))


def test_a_tensor_of_each_expert_of_each_layer_is_read_and_written(tmp_path):
    """What a mixture of experts will need of the table: one array for all, stacked by layer and then by expert."""
    tensor = Tensor("model.{layer}.experts.{expert}.up.weight", ("up",), ("embed", "mlp"), "transpose")
    wanted = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    entries = tensor.entries(wanted.shape)
    assert tensor.counted == ("layer", "expert") and entries[4] == ((1, 1), "model.1.experts.1.up.weight")
    tensors = {name: export.hf_array(tensor, jnp.asarray(wanted), index, "float32") for index, name in entries}
    assert len(tensors) == 6 and {array.shape for array in tensors.values()} == {tensor.hf_shape((4, 5))} == {(5, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = find_tensors(tmp_path)
    whole = load._read_part(tensor, wanted.shape, [(0, size) for size in wanted.shape], stored)
    np.testing.assert_array_equal(whole, wanted)
    part = load._read_part(tensor, wanted.shape, [(1, 2), (1, 3), (0, 4), (2, 5)], stored)
    np.testing.assert_array_equal(part, wanted[1:2, 1:3, :, 2:5])
    assert axes_sharding(("layers", "experts", "embed", "mlp"), wanted.shape, make_mesh()).spec[:2] == (None, None)


# -- in and out -----------------------------------------------------------------------------------


def test_a_folder_gives_back_what_was_saved(saved):
    root, params = saved
    assert_equal_trees(load_pretrained(root / "single")[1], params)
    assert_equal_trees(load_pretrained(root / "shards")[1], params)
    assert len(list((root / "shards").glob("model-*-of-*.safetensors"))) > 3
    sizes = [path.stat().st_size for path in (root / "shards").glob("*.safetensors")]
    assert max(sizes) < 8000 + 2000


def test_the_model_gets_what_the_caller_says(single):
    model, _ = load_pretrained(single, attention="plain", remat=False)
    assert (model.attention, model.remat, model.dtype) == ("plain", False, jnp.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_once(tmp_path, dtype):
    model, params = small("qwen3")
    save_pretrained(tmp_path / "out", model, params, dtype=dtype)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params)
    assert_equal_trees(load_pretrained(tmp_path / "out")[1], rounded)
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert stored < 2.5 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_float64_is_read(single, saved):
    edit_tensors(single / "model.safetensors", lambda t: t.update({name: x.astype("float64") for name, x in t.items()}))
    assert_equal_trees(load_pretrained(single)[1], saved[1])
    edit_tensors(single / "model.safetensors", set_tensor(GATE, np.full((24, 16), 1e39)))
    refused(single, f"{re.escape(GATE)} holds inf; allowed: finite values")


def test_tensors_larger_than_what_is_read_at_once(saved, monkeypatch):
    monkeypatch.setattr("jaxrl_fp16.models.hf.weight_files.CHUNK_BYTES", 200)
    assert_equal_trees(load_pretrained(saved[0] / "single")[1], saved[1])


def test_config_of_every_part(tmp_path):
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
    model, params = small("llama", rope_theta=5e5, rope_scaling=scaling, norm_eps=1e-5, tie_embeddings=True,
                          qkv_bias=True, output_bias=True, mlp_bias=True, max_positions=512)
    save_pretrained(tmp_path / "out", model, params, dtype="bfloat16")
    assert read_config(tmp_path / "out") == model.config
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"]["rope_type"] == written["rope_parameters"]["rope_type"] == "llama3"
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("family, fields, pattern", [
    ("qwen2", dict(qkv_bias=False), "qkv_bias is False; allowed: True"),
    ("qwen3", dict(qk_norm=False), "qk_norm is False; allowed: True"),
    ("llama", dict(qkv_bias=True), "qkv_bias and output_bias differ; .*attention_bias"),
])
def test_a_config_that_the_format_cannot_express_is_not_written(tmp_path, family, fields, pattern):
    model, params = small(family, **fields)
    with pytest.raises(ValueError, match=pattern):
        save_pretrained(tmp_path / "out", model, params)
    assert list(tmp_path.iterdir()) == []


def test_rotary_constants_of_old_files_are_passed_over(single):
    edit_tensors(single / "model.safetensors",
                 lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    load_pretrained(single)


def test_tied_model_with_a_stored_head(tmp_path):
    model, params = small(tie_embeddings=True)
    save_pretrained(tmp_path / "out", model, params, dtype="float32")
    path = tmp_path / "out" / "model.safetensors"
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_equal_trees(load_pretrained(tmp_path / "out")[1], params)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    refused(tmp_path / "out", "lm_head.weight differs from model.embed_tokens.weight")


# -- config.json that is refused -------------------------------------------------------------------


@pytest.mark.parametrize("changes, pattern", [
    (dict(model_type="unheard_of"), f"model_type is 'unheard_of'; allowed: {', '.join(FAMILIES)}"),
    (dict(model_type=None), "model_type is None"),
    (dict(architectures=["Qwen2Model"]), 'architectures is .*; allowed: .*Qwen2ForCausalLM'),
    (dict(hidden_act="gelu"), 'hidden_act is "gelu"; allowed: "silu"'),
    (dict(quantization_config={"bits": 4}), "quantization_config is .* quantised by some method cannot be trained"),
    (dict(quantization_config={"quant_method": "fp8"}), "quantised by fp8 cannot be .*; allowed: the unquantised"),
    (dict(quantization={"group_size": 64, "bits": 4}), "quantization is .* cannot be trained"),
    (dict(auto_map={"AutoModel": "evil.Model"}), "auto_map is"),
    (dict(hidden_size=None), "hidden_size is missing; allowed: an integer"),
    (dict(hidden_size="16"), "hidden_size is '16'; allowed: an integer"),
    (dict(hidden_size=True), "hidden_size is True; allowed: an integer"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0; allowed: an integer >= 1"),
    (dict(rms_norm_eps=-1.0), "rms_norm_eps is -1.0; allowed: a number > 0"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings is 1; allowed: true or false"),
    (dict(num_key_value_heads=3), "num_kv_heads is 3; allowed: a divisor of num_heads, 4"),
    (dict(use_sliding_window=True, max_window_layers=1), "use_sliding_window is true; allowed: false"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types is .*sliding"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear"}),
     'rope_type is "linear"; allowed: "default", "llama3", "yarn"; without these settings the model is another one'),
    (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "the model is the same up to max_position"),
    (dict(rope_parameters={"rope_type": "longrope"}), "the model is another one at every length, unless all of"),
    (dict(rope_parameters={"rope_type": "mrope"}), "the model is the same for text alone"),
    (dict(rope_parameters={"rope_type": "new"}), "without these settings the model is another one$"),
    (dict(rope_parameters={"rope_type": ["yarn"]}), r'rope_type is \["yarn"\]; allowed: "default"'),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "factor is missing; allowed: a number > 0"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4, "beta_fast": 1, "beta_slow": 2}),
     "beta_fast is 1; allowed: from beta_slow, here 2"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4, "low_freq_factor": 1}),
     "rope_parameters.low_freq_factor is 1 with rope_type 'yarn'"),
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e6}), "factor is missing"),
    (dict(rope_parameters={"rope_theta": 1e6, "mrope_section": [1]}), "rope_parameters.mrope_section is"),
    (dict(rope_theta=5.0), "rope_theta is given as 5.0 and as 1000000.0"),
    (dict(rope_parameters=[1]), r"rotary settings are \[1\]"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; allowed: 1.0"),
])
def test_config_is_refused(single, changes, pattern):
    edit_json(single / "config.json", **changes)
    message = refused(single, pattern)
    assert "allowed" in message or "multiple" in message


@pytest.mark.parametrize("changes", [
    dict(use_sliding_window=True, max_window_layers=2, sliding_window=4),
    dict(layer_types=["full_attention"] * 2, use_sliding_window=False, sliding_window=None),
    dict(attention_dropout=0.1, initializer_range=0.02, use_cache=False, transformers_version="4.40.0"),
    dict(head_dim=8, hidden_act="swish", partial_rotary_factor=1.0),
])
def test_settings_without_effect_are_let_through(single, changes):
    edit_json(single / "config.json", **changes)
    assert read_config(single) == small()[0].config


@pytest.mark.parametrize("declared, original", [(32768, 32768), (131072, 32768), (32768, None)])
def test_the_limit_of_yarn_is_original_positions_times_factor(single, tmp_path, declared, original):
    """As Qwen's pages write it, with `max_position_embeddings` from before or from after."""
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    edit_json(single / "config.json", rope_parameters=None, rope_scaling=rope, max_position_embeddings=declared)
    config = read_config(single)
    assert config.max_positions == 131072 and config.rope_yarn.original_max_position == 32768
    model, params = load_pretrained(single)
    save_pretrained(tmp_path / "out", model, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert read_config(tmp_path / "out") == config and written["max_position_embeddings"] == declared
    assert written["rope_scaling"] == {
        "factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn"}


def test_two_scalings_are_refused():
    yarn = YarnScaling(factor=4.0, original_max_position=64)
    assert DecoderConfig(family="qwen2", **SHAPE, rope_yarn=yarn).max_positions == 256
    with pytest.raises(ValueError, match="rope_scaling and rope_yarn are both given; allowed: one of them"):
        DecoderConfig(family="llama", **SHAPE, rope_yarn=yarn, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64))


@pytest.fixture
def mistral(tmp_path):
    save_pretrained(tmp_path / "mistral", *small("mistral"), dtype="float32")
    return tmp_path / "mistral"


def test_a_window_of_mistral_is_off_only_where_it_is_null(mistral):
    """Where Transformers finds no key it takes a window of 4,096."""
    assert json.loads((mistral / "config.json").read_text())["sliding_window"] is None
    assert read_config(mistral) == small("mistral")[0].config
    for window, said in ((4096, "4096"), (0, "0"), (131072, "131072"), (False, "false")):
        edit_json(mistral / "config.json", sliding_window=window)
        refused(mistral, f"sliding_window is {said}; allowed: null, no layer here attends within a window")
    edit_json(mistral / "config.json", sliding_window=None)  # removes it
    refused(mistral, "sliding_window is missing, which is 4096; allowed: null")


@pytest.mark.parametrize("family, heads", [("qwen2", 32), ("qwen3", 32), ("mistral", 8), ("llama", None)])
def test_key_value_heads_that_are_absent_or_null(tmp_path, family, heads):
    """Absent: what Transformers takes. Null: as many as query heads."""
    save_pretrained(tmp_path / "out", *small(family))
    path = tmp_path / "out" / "config.json"
    found = json.loads(path.read_text()) | {"num_attention_heads": 64, "head_dim": 8}
    path.write_text(json.dumps(found | {"num_key_value_heads": None}))
    assert read_config(tmp_path / "out").num_kv_heads == 64
    del found["num_key_value_heads"]
    path.write_text(json.dumps(found))
    assert read_config(tmp_path / "out").num_kv_heads == (heads or 64)


@pytest.mark.parametrize("text, pattern", [
    (b"[1]", "holds a list"),
    (b"{", "is not a JSON file"),
    (b'{"a": 1, "a": 2}', "'a' is there twice"),
    (b"\xff\xfe", "is not a JSON file"),
    (b"[" * 100_000, "is not a JSON file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
])
def test_a_config_that_is_no_object_is_refused(single, text, pattern):
    (single / "config.json").write_bytes(text)
    refused(single, pattern)


# -- weights that are refused ----------------------------------------------------------------------


def test_folders_without_a_model(tmp_path, single):
    refused(tmp_path / "absent", "does not exist; allowed: a local folder, nothing is downloaded$")
    refused(tmp_path, "config.json is missing")
    (single / "model.safetensors").unlink()
    refused(single, "holds no weights")
    # A pickle that leaves a file behind if anything opens it as one.
    (single / "pytorch_model.bin").write_text(f"cposix\nsystem\n(S'touch {tmp_path}/ran'\ntR.")
    refused(single, r"pickled weights only \(pytorch_model.bin\), which are never opened")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file, pattern", [
    ("adapter_config.json", r"holds an adapter \(adapter_config.json: \? of \?\), not a whole .*merge_and_unload"),
    ("adapter_model.safetensors", r"missing \(it holds an adapter's weights \(adapter_model.safetensors\)"),
    ("small-q4.gguf", r"missing \(it holds GGUF \(small-q4.gguf\)"),
    ("consolidated.00.pth", r"missing \(it holds consolidated.00.pth, its maker's own format"),
    ("checkpoints/4/x", r"missing \(it is a run folder; `jaxrl-fp16 export CONFIG --resume "),
    ("snapshots/0123/config.json", r"missing \(it is the Hub's cache; the model is in .*/snapshots/0123\)"),
    ("step-5/config.json", r"missing \(step-5/config.json is there: perhaps that folder is meant\)"),
])
def test_other_folders_are_named_as_what_they_are(tmp_path, file, pattern):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    refused(tmp_path, pattern)


def test_an_adapter_beside_whole_weights_is_refused(single):
    """Transformers would take the adapter's own base for them."""
    (single / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    refused(single, r"holds an adapter \(adapter_config.json: LORA of a/b\)")


def test_weights_without_their_index_are_named(shards):
    (shards / INDEX).unlink()
    refused(shards, r"holds no weights \(it holds model-00001-of-\d+.safetensors, which no index lists\)")


@pytest.mark.parametrize("place", ["", "https://huggingface.co/", "hf.co/"])
def test_a_name_on_the_hub_is_told_how_to_fetch_it(place):
    refused(f"{place}Qwen/Qwen2.5-0.5B", "does not exist; .* nothing is .* `hf download Qwen/Qwen2.5-0.5B --")


def test_a_file_is_no_folder(single):
    refused(single / "model.safetensors", "model.safetensors is a file; allowed: the model folder .* in, .*single")


def test_a_folder_at_home(single, monkeypatch):
    monkeypatch.setenv("HOME", str(single.parent))
    params = load_pretrained("~/single")[1]
    save_pretrained("~/again", small()[0], params, dtype="float32")
    assert_equal_trees(load_pretrained(single.parent / "again")[1], params)
    with pytest.raises(PretrainedError, match=re.escape(f"model folder {single.parent}/absent does not exist")):
        load_pretrained("~/absent")


def set_tensor(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize("change, pattern", [
    (lambda t: t.pop(GATE), f"tensor {re.escape(GATE)} is missing"),
    (set_tensor("score.weight", np.ones(1, np.float32)), "score.weight in model.safetensors is unknown"),
    (set_tensor(GATE, np.ones((16, 24), np.float32)), r" has shape \[16, 24\]; allowed: \[24, 16\]"),
    (set_tensor(GATE, np.ones((24, 16), np.int8)), "is stored as I8; allowed: F32, F16, BF16, F64; a quantised"),
    (set_tensor(GATE, np.full((24, 16), np.nan, np.float32)), "1.mlp.gate_proj.weight holds nan; allowed: "),
    (set_tensor(GATE, np.full((24, 16), -np.inf, np.float32)), "1.mlp.gate_proj.weight holds inf; allowed: "),
])
def test_tensors_are_refused(single, change, pattern):
    edit_tensors(single / "model.safetensors", change)
    refused(single, pattern)


@pytest.mark.parametrize("width", [64, 4096])
@pytest.mark.parametrize("place", [(0, 0), (1, 37), 1, ...])
def test_a_nan_is_found_in_and_kept_out_of_a_folder(tmp_path, place, width):
    """One entry, a row, a whole tensor; also at widths at which XLA's own maximum drops it."""
    model, params = small(intermediate_size=width)
    save_pretrained(tmp_path / "good", model, params, dtype="float32")
    name, kernel = "model.layers.1.mlp.down_proj.weight", params["layers"]["mlp"]["down"]["kernel"]
    bad = np.array(kernel)
    bad[1].T[place] = np.nan
    broken = jax.tree.map(lambda leaf: jnp.asarray(bad) if leaf is kernel else leaf, params)
    with pytest.raises(ValueError, match=f"{re.escape(name)} holds nan"):
        save_pretrained(tmp_path / "bad", model, broken, dtype="float32")
    assert not (tmp_path / "bad").exists()
    edit_tensors(tmp_path / "good" / "model.safetensors", set_tensor(name, np.ascontiguousarray(bad[1].T)))
    for dtype in ("float16", "float32"):
        refused(tmp_path / "good", f"{re.escape(name)} holds nan; allowed: ", compute_dtype=dtype)


def test_range_of_float16_is_asked_only_of_float16(single):
    value = np.ones((24, 16), np.float32)
    value[3, 5] = -65505
    edit_tensors(single / "model.safetensors", set_tensor(GATE, value))
    model, params = load_pretrained(single, compute_dtype="bfloat16")
    pattern = f"{re.escape(GATE)} holds 65505; allowed: finite values up to 65504, the range of float16"
    refused(single, pattern, compute_dtype=jnp.float16)
    with pytest.raises(PretrainedError, match=pattern):
        check_range(model, params, "float16")


def test_weights_of_another_config(single):
    edit_json(single / "config.json", num_hidden_layers=3)
    refused(single, "model.layers.2.*is missing")
    edit_json(single / "config.json", num_hidden_layers=1)
    refused(single, r"model.layers.1.* is unknown; .*qwen2, 1 layers")
    edit_json(single / "config.json", num_hidden_layers=2, tie_word_embeddings=True)
    refused(single, "lm_head.weight differs")


@pytest.mark.parametrize("cut", [0, 5, 300, -1])
def test_truncated_files(single, cut):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refused(single, "model.safetensors is damaged")


def test_git_lfs_pointer(single):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(single, "model.safetensors is a Git LFS pointer")


# -- shards that are refused -----------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("name", [
    "../single/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\model.safetensors", "..", "",
    "pytorch_model.bin", "a\0.safetensors", 7,
])
def test_an_index_cannot_lead_out_of_the_folder(shards, name):
    edit_json(shards / INDEX, weight_map=weight_map(shards) | {GATE: name})
    refused(shards, f"{re.escape(GATE)} is said to lie in .*; allowed: the name of a .safetensors file")


def test_shards_and_index_must_agree(shards):
    where = weight_map(shards)
    edit_json(shards / INDEX, weight_map=where | {GATE: where["model.norm.weight"]})
    refused(shards, "is unknown to model.safetensors.index.json")
    edit_json(shards / INDEX, weight_map=where | {"score.weight": where[GATE]})
    refused(shards, "score.weight is missing; .* says it is there")
    edit_json(shards / INDEX, weight_map=where)
    other = next(name for name in where.values() if name != where[GATE])
    edit_tensors(shards / other, set_tensor(GATE, np.ones((24, 16), np.float32)))
    refused(shards, f"{re.escape(GATE)} is in .* and in |{re.escape(GATE)} is unknown to")
    (shards / other).unlink()
    refused(shards, f"{other} is missing")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "no"])
def test_an_index_without_a_map_is_refused(shards, text):
    (shards / INDEX).write_text(text)
    refused(shards, "weight_map is missing|is not a JSON file")


# -- exports that are refused or interrupted --------------------------------------------------------


def test_export_refuses_before_it_writes(tmp_path):
    model, params = small()
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: float32, float16, bfloat16"):
        save_pretrained(tmp_path / "out", model, params, dtype="int8")
    large = jax.tree.map(lambda x: x, params)
    large["layers"]["mlp"]["gate"]["kernel"] = params["layers"]["mlp"]["gate"]["kernel"].at[1, 0, 0].set(7e4)
    with pytest.raises(ValueError, match=f"export to .*{re.escape(GATE)} holds 70000; .*float16"):
        save_pretrained(tmp_path / "out", model, large)
    del large["head"]
    with pytest.raises(ValueError, match=r"parameter \['head'\] has shape None; allowed: \(32, 16\)"):
        save_pretrained(tmp_path / "out", model, large)
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_a_folder_only_when_told(tmp_path):
    model, params = small()
    target = tmp_path / "a" / "out"
    target.mkdir(parents=True)
    save_pretrained(target, model, params)
    (target / "extra").write_text("mine")
    with pytest.raises(FileExistsError, match="out is not empty; allowed: .*overwrite"):
        save_pretrained(target, model, params)
    assert (target / "extra").exists()
    save_pretrained(target, model, params, overwrite=True)
    assert not (target / "extra").exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_usual_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_pretrained(tmp_path / "out", *small(), tokenizer=character_tokenizer("123"), shard_bytes=8000)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) > 6 and set(modes.values()) == {0o666 & ~umask}


def test_a_tokenizer_goes_out_under_names_that_transformers_4_knows(tmp_path):
    tokenizer = character_tokenizer("123")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    critic = Critic(small()[0], bias=False)
    for name, save, model in (("policy", save_pretrained, small()[0]), ("reward", save_reward_model, critic)):
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), param_shapes(model))
        save(tmp_path / name, model, params, tokenizer=tokenizer)
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not isinstance(config.get("extra_special_tokens"), list)
        assert config["additional_special_tokens"] == ["<a>", "<b>"]
        assert not [path for path in (tmp_path / name).glob("*.json") if "TokenizersBackend" in path.read_text()]


class Interrupted:
    """A tokenizer at which an export is interrupted."""

    def save_pretrained(self, folder):
        raise KeyboardInterrupt


@pytest.mark.fault(32)
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_export_leaves_no_partial_folder(tmp_path, before):
    model, params = small()
    if before:
        save_pretrained(tmp_path / "out", model, params)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path / "out", model, params, tokenizer=Interrupted(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * before
    if before:
        load_pretrained(tmp_path / "out")


# -- memory -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_one_copy(tmp_path, dtype):
    """Peak resident memory grows by at most 1.3 times the float32 parameters, 193 MB of them here."""
    shape = dict(vocab_size=16000, hidden_size=512, intermediate_size=2048, num_layers=10, num_heads=8)
    model = Decoder(DecoderConfig(family="qwen2", **shape, num_kv_heads=4, head_dim=64, tie_embeddings=True))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), param_shapes(model))
    save_pretrained(tmp_path / "warm", *small(), dtype=dtype)
    save_pretrained(tmp_path / "big", model, params, dtype=dtype)
    script = """
        import sys, jax
        from jaxrl_fp16.models import load_pretrained

        def memory(key):
            lines = open("/proc/self/status").read().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

        load_pretrained(sys.argv[1] + "/warm")
        before = memory("VmRSS")
        _, params = load_pretrained(sys.argv[1] + "/big")
        print((memory("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
                         capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.3
