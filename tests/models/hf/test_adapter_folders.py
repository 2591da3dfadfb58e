"""Adapters in and out of PEFT's format: bit for bit, what is refused, and PEFT itself on the same folders."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_fp16.forward import score
from jaxrl_fp16.models import (
    FAMILIES, Critic, Decoder, DecoderConfig, LoraConfig, PretrainedError, load_adapter, merge_lora, param_shapes,
    read_adapter, save_adapter, save_pretrained,
)
from jaxrl_fp16.models.init import adapter_table, at
from jaxrl_fp16.precision import get_precision

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
             head_dim=8, max_positions=128)
ALL = LoraConfig(rank=4, alpha=6)
SOME = LoraConfig(rank=3, alpha=5, targets=("q_proj", "o_proj", "down_proj"), rslora=True, dropout=0.1)
FIRST = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
FP32 = get_precision("fp32").policy


def small(lora=ALL, family="qwen2"):
    """A Decoder with adapters, and random `{"base", "lora"}`."""
    model = Decoder(DecoderConfig(family=family, **SHAPE), lora=lora, attention="plain", remat=False)
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(generator.normal(mean, 0.2, leaf.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, param_shapes(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model, params = small()
    save_adapter(folder, model, params, base_model="some/base")
    return folder, model, params


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved[0], tmp_path / "adapter")


def edit_json(folder, **changes):
    path = folder / "adapter_config.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, pattern, load=None):
    with pytest.raises(PretrainedError, match=pattern) as caught:
        (load or read_adapter)(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message


# -- in and out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [ALL, SOME], ids=["all", "some"])
def test_a_folder_gives_back_what_was_saved(tmp_path, lora):
    model, params = small(lora)
    save_adapter(tmp_path / "out", model, params)
    found = read_adapter(tmp_path / "out")
    assert (found.rank, found.alpha, found.rslora, found.dropout) == (lora.rank, lora.alpha, lora.rslora, lora.dropout)
    loaded = load_adapter(tmp_path / "out", model.clone(lora=found), params["base"], policy=FP32)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "adapter_config.json", "adapter_model.safetensors"]


def test_the_base_is_kept_in_the_policys_dtype_or_as_it_is(saved):
    folder, model, params = saved
    half = load_adapter(folder, model, params["base"], policy=get_precision("fp16").policy)
    assert {leaf.dtype for leaf in jax.tree.leaves(half["base"])} == {jnp.dtype("float16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(half["lora"])} == {jnp.dtype("float32")}
    kept = load_adapter(folder, model, half["base"])
    assert kept["base"]["embedding"] is half["base"]["embedding"]


def test_the_folder_names_its_base_and_its_layers(saved):
    folder, _, params = saved
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "some/base" and written["peft_type"] == "LORA"
    assert (written["r"], written["lora_alpha"], written["task_type"]) == (4, 6, "CAUSAL_LM")
    assert written["target_modules"] == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2 and {array.dtype for array in tensors.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(tensors[FIRST], params["lora"]["layers"]["attention"]["q"]["a"][1].T)


def test_full_paths_in_target_modules_are_read_by_their_last_name(folder, saved):
    edit_json(folder, target_modules=[f"model.layers.{layer}.{name}" for layer in (0, 1) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj")])
    load_adapter(folder, saved[1], saved[2]["base"])


def test_what_cannot_be_saved_is_refused(tmp_path, saved):
    _, model, params = saved
    save = lambda model, params: save_adapter(tmp_path / "out", model, params)
    for other in (model.clone(lora=None), Critic(model)):
        with pytest.raises(ValueError, match="has no adapters; allowed: Decoder"):
            save(other, params)
    with pytest.raises(ValueError, match=r'params\["lora"\].* has shape .*; allowed: '):
        save(model.clone(lora=LoraConfig(rank=5)), params)
    bad = jax.tree.map(lambda x: x, params)
    bad["lora"]["layers"]["attention"]["q"]["a"] = params["lora"]["layers"]["attention"]["q"]["a"].at[1].set(np.nan)
    with pytest.raises(ValueError, match=f"{re.escape(FIRST)} holds nan; allowed: finite"):
        save(model, bad)
    assert list(tmp_path.iterdir()) == []
    save(model, params)
    with pytest.raises(FileExistsError, match="is not empty; allowed: a new or empty folder, or overwrite=True"):
        save(model, params)
    save_adapter(tmp_path / "out", model, params, overwrite=True)
    with pytest.raises(ValueError, match="a Decoder with adapters cannot be exported; allowed: .* save_adapter"):
        save_pretrained(tmp_path / "model", model, params)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, pattern", [
    (dict(use_dora=True), "use_dora is true; allowed: null or false"),
    (dict(bias="lora_only"), 'bias is "lora_only"; allowed: null or "none"'),
    (dict(lora_bias=True), "lora_bias is true"),
    (dict(modules_to_save=["lm_head"]), 'modules_to_save is .*lm_head.*; allowed: null or '),
    (dict(rank_pattern={"q_proj": 8}), "rank_pattern is .*; allowed: null or {}"),
    (dict(alpha_pattern={"q_proj": 8}), "alpha_pattern is "),
    (dict(layers_to_transform=[0]), "layers_to_transform is .*; allowed: null"),
    (dict(exclude_modules=["lm_head"]), "exclude_modules is"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out is true"),
    (dict(peft_type="IA3"), 'peft_type is "IA3"; allowed: "LORA"'),
    (dict(peft_type=...), 'peft_type is null; allowed: "LORA"'),
    (dict(task_type="SEQ_CLS"), 'task_type is "SEQ_CLS"; allowed: null or "CAUSAL_LM"'),
    (dict(target_modules="all-linear"), 'target_modules is "all-linear"; allowed: a list'),
    (dict(target_modules=r".*\.(q|v)_proj"), "target_modules is .*; allowed: a list of linear layers' names"),
    (dict(target_modules=[]), r"target_modules is \[\]"),
    (dict(r="4"), 'r is "4"; allowed: a number'),
    (dict(r=0), "rank is 0, alpha 6.0, dropout 0.0; allowed: rank >= 1"),
    (dict(r=True), "r is true; allowed: a number"),
    (dict(lora_alpha=...), "lora_alpha is null; allowed: a number"),
    (dict(lora_alpha=-1), "alpha -1.0"),
    (dict(lora_alpha=float("inf")), "lora_alpha is Infinity; allowed: a number below 2.31"),
    (dict(lora_alpha=10**400), "lora_alpha is 1000.*; allowed: a number below"),
    (dict(r=2**40), "r is 1099511627776; allowed: a number below"),
    (dict(lora_dropout=1.5), "dropout 1.5"),
    (dict(use_rslora="no"), 'use_rslora is "no"'),
])
def test_settings_of_another_method_are_refused(folder, changes, pattern):
    edit_json(folder, **changes)
    refused(folder, pattern)


def test_a_folder_that_is_none_is_refused(tmp_path, folder):
    with pytest.raises(PretrainedError, match="absent does not exist"):
        read_adapter(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "adapter_config.json is missing; allowed: an adapter's folder")
    for text in ("{", "[1]"):
        (folder / "adapter_config.json").write_text(text)
        refused(folder, "adapter_config.json")


def set_tensor(name, array):
    return lambda tensors: tensors.__setitem__(name, np.ascontiguousarray(array, dtype=np.float32))


@pytest.mark.parametrize("change, pattern", [
    (lambda tensors: tensors.pop(FIRST), f"tensor {re.escape(FIRST)} is missing, with 0 others; allowed: all 28"),
    (set_tensor("base_model.model.lm_head.lora_A.weight", np.zeros((4, 32))), "lm_head.lora_A.weight in .* is unknown"),
    (set_tensor(FIRST, np.zeros((5, 32))), r"q_proj.lora_A.weight has shape \[5, 32\]; allowed: \[4, 32\]"),
    (set_tensor(FIRST, np.full((4, 32), np.nan)), f"{re.escape(FIRST)} holds nan; allowed: finite"),
    (set_tensor(FIRST, np.full((4, 32), np.inf)), f"{re.escape(FIRST)} holds inf; allowed: finite"),
])
def test_tensors_that_do_not_fit_are_refused(folder, saved, change, pattern):
    edit_tensors(folder, change)
    refused(folder, pattern, lambda folder: load_adapter(folder, saved[1], saved[2]["base"]))


def test_an_entry_beyond_the_compute_dtype_is_refused(folder, saved):
    edit_tensors(folder, set_tensor(FIRST, np.full((4, 32), 1e5)))
    load_adapter(folder, saved[1], saved[2]["base"], policy=get_precision("bf16").policy)
    refused(folder, f"{re.escape(FIRST)} holds 100000; .*float16",
            lambda folder: load_adapter(folder, saved[1], saved[2]["base"], policy=get_precision("fp16").policy))


@pytest.mark.parametrize("lora, pattern", [
    (LoraConfig(rank=5, alpha=6), "rank is 4, and the model's lora has 5; allowed: the folder's"),
    (LoraConfig(rank=4, alpha=7), "alpha is 6.0, and the model's lora has 7"),
    (LoraConfig(rank=4, alpha=6, rslora=True), "rslora is False, and the model's lora has True"),
    (LoraConfig(rank=4, alpha=6, targets=("q_proj",)), "targets is .*, and the model's lora has .*q_proj"),
])
def test_other_settings_than_the_models_are_refused(saved, lora, pattern):
    folder, model, params = saved
    refused(folder, pattern, lambda folder: load_adapter(folder, model.clone(lora=lora), params["base"]))


def test_the_models_dropout_may_be_another(saved):
    folder, model, params = saved
    load_adapter(folder, model.clone(lora=LoraConfig(rank=4, alpha=6, dropout=0.5)), params["base"])


def test_pickles_are_never_opened(folder, saved):
    load = lambda folder: load_adapter(folder, saved[1], saved[2]["base"])
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "lacks adapter_model.safetensors; allowed: adapter_model.safetensors", load)
    (folder / "adapter_model.bin").write_bytes(b"not opened")
    refused(folder, r"holds pickled weights only \(adapter_model.bin\), which are never opened", load)


@pytest.mark.parametrize("keep", [0, 7, 100, -10])
def test_a_cut_file_is_refused(folder, saved, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "adapter_model.safetensors", lambda folder: load_adapter(folder, saved[1], saved[2]["base"]))


# -- PEFT ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_torch_thread", "quick_compile")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_peft_computes_the_same_and_reads_what_is_written_here(tmp_path, family):
    """Log-probs, the gradients of A and B, folders both ways, and merging by either."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, params = small(ALL if family != "llama" else SOME, family)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_pretrained(base, model.clone(lora=None), params["base"], dtype="float32")
    save_adapter(adapter, model, params, base_model=str(base))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, adapter, is_trainable=True).eval()
    tokens = np.random.default_rng(0).integers(2, 64, (3, 16)).astype(np.int32)
    ids = torch.tensor(tokens, dtype=torch.long)

    def logprobs_of(module):
        return module(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]

    expected = logprobs_of(theirs)
    (expected**2).sum().backward()
    merged_model, merged = merge_lora(model, params, params["base"])

    @jax.jit
    def ours(adapters):
        def loss(adapters):
            own = score(model, {**params, "lora": adapters}, tokens, np.ones(tokens.shape, bool), FP32)[0]
            return jnp.sum(own**2), own

        gradients, own = jax.grad(loss, has_aux=True)(adapters)
        return gradients, own, score(merged_model, merged, tokens, np.ones(tokens.shape, bool), FP32)[0]

    gradients, own, of_sum = ours(params["lora"])
    np.testing.assert_allclose(own[:, 1:], expected.detach().numpy(), atol=1e-4)
    found = {name.replace(".default", ""): x.grad.numpy() for name, x in theirs.named_parameters() if x.requires_grad}
    for row in adapter_table(model):
        array = np.asarray(at(gradients, row.path))
        for index, name in row.entries(array.shape):
            exact = found.pop(name)
            np.testing.assert_allclose(row.to_hf(array[index]), exact, atol=1e-4 * np.abs(exact).max(), err_msg=name)
    assert not found
    theirs.save_pretrained(tmp_path / "theirs")
    lora = read_adapter(tmp_path / "theirs")
    again = load_adapter(tmp_path / "theirs", model.clone(lora=lora), params["base"], policy=FP32)
    jax.tree.map(np.testing.assert_array_equal, again["lora"], params["lora"])
    with torch.no_grad():
        np.testing.assert_allclose(of_sum[:, 1:], logprobs_of(theirs.merge_and_unload()).numpy(), atol=2e-4)
