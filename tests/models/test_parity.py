"""Against Transformers in float32: the same log-probs from its folders, the same logits from ours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import load_pretrained, save_pretrained
from jaxrl_fp16.precision import get_precision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
CASES = {
    "qwen2": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen2_tied": dict(tie_word_embeddings=True),
    "qwen2_yarn": dict(rope_parameters=YARN, max_position_embeddings=32),
    "qwen2_yarn_all": dict(rope_parameters=YARN | dict(
        factor=2.5, beta_fast=16.0, beta_slow=2.0, truncate=False), head_dim=16),
    "qwen3_yarn": dict(rope_parameters=YARN | dict(factor=8.0, attention_factor=1.3), head_dim=32),
    "mistral": dict(sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e5)),
    "qwen3": dict(head_dim=32, rms_norm_eps=1e-5),
    "qwen3_bias": dict(head_dim=16, attention_bias=True, tie_word_embeddings=True),
    "llama": dict(rope_parameters=LLAMA3, num_key_value_heads=1),
    "llama_bias": dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4, head_dim=8),
}

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module", params=CASES)
def reference(request, random_model, tmp_path_factory):
    """A random model by Transformers, every parameter away from its usual start, and its folder."""
    model = random_model("AutoModelForCausalLM", request.param.partition("_")[0], **CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def ragged_batch(rows=4, columns=90, vocab=97):
    """Left-padded rows of different lengths, longer than a block of attention and than LLAMA3's original."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocab, (rows, columns))
    starts = np.array([0, 7, 61, columns - 2])
    mask = np.arange(columns) >= starts[:, None]
    return np.where(mask, tokens, 0), mask


def reference_logits(model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64)),
                     position_ids=torch.tensor(positions)).logits


def test_logprobs(reference):
    hf, folder = reference
    tokens, mask = ragged_batch()
    logprobs = torch.log_softmax(reference_logits(hf, tokens, mask)[:, :-1], dim=-1)
    expected = torch.gather(logprobs, 2, torch.tensor(tokens)[:, 1:, None])[..., 0].numpy()
    model, params = load_pretrained(folder)
    got = token_logprobs(model, params, tokens, mask, policy=get_precision("fp32").policy)
    scored = mask[:, 1:] & mask[:, :-1]
    np.testing.assert_allclose(np.asarray(got)[:, 1:][scored], expected[scored], atol=2e-4)
    assert expected[scored].std() > 0.3  # else any model would pass


def test_written_back(reference, tmp_path):
    hf, folder = reference
    model, params = load_pretrained(folder)
    save_pretrained(tmp_path / "out", model, params, dtype="float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.dtype == torch.float32
    tokens, mask = ragged_batch()
    first, back = (reference_logits(m, tokens, mask)[torch.tensor(mask)] for m in (hf, again))
    np.testing.assert_allclose(back.numpy(), first.numpy(), atol=1e-4)


def test_config_survives_the_way_there_and_back(reference, tmp_path, random_model):
    hf, folder = reference
    model, params = load_pretrained(folder)
    save_pretrained(tmp_path / "out", model, params)
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert load_pretrained(tmp_path / "out")[0].config == model.config
    assert random_model.rotary(again) == random_model.rotary(hf.config)
    assert again.architectures == hf.config.architectures
    for key in random_model.shape.keys() | {"rms_norm_eps", "tie_word_embeddings"}:
        assert getattr(again, key) == getattr(hf.config, key), key


def test_config_of_transformers_4(reference, tmp_path, random_model):
    """The same folder with the rotary settings where version 4 wrote them, and nothing where 5 does."""
    if random_model.older:
        pytest.skip("this Transformers writes no other")
    _, folder = reference
    model, _ = load_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    for path in folder.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path)[0].config == model.config


def test_yarn_by_mscale(tmp_path, random_model):
    """Two slopes give the attention factor; it is that which is written."""
    rope = YARN | dict(mscale=0.7, mscale_all_dim=1.2)
    hf = random_model("AutoModelForCausalLM", "qwen2", rope_parameters=rope, max_position_embeddings=32)
    hf.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert model.config.rope_yarn.amplitude == pytest.approx(hf.model.rotary_emb.attention_scaling, rel=1e-12)
    save_pretrained(tmp_path / "ours", model, params, dtype="float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens, mask = ragged_batch()
    assert torch.equal(*(reference_logits(each, tokens, mask)[torch.tensor(mask)] for each in (hf, again)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_folders(reference, tmp_path, dtype):
    """Transformers' file in half precision is read exactly, and so is ours by Transformers."""
    hf, folder = reference
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model, params = load_pretrained(tmp_path / "theirs")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.float32.dtype}
    save_pretrained(tmp_path / "ours", model, params, dtype=dtype, shard_bytes=40_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    for (name, theirs), ours in zip(hf.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(theirs, ours), name


def small_tokenizer():
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(["<unk>", "<end>", "<pad>", "one", "two"])}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>", eos_token="<end>", pad_token="<pad>",
    )


def test_tokenizer_and_generation_config_go_out_too(reference, tmp_path):
    model, params = load_pretrained(reference[1])
    save_pretrained(tmp_path / "out", model, params, tokenizer=small_tokenizer(),
                    generation_config={"eos_token_id": [1, 5], "temperature": 0.7, "top_p": 0.9})
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id) == ([1, 5], 2)
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.7, 0.9)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer("two")["input_ids"] == [4]
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert hf.config.eos_token_id == [1, 5]
    hf.generation_config.do_sample = False
    out = hf.generate(torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 2), max_new_tokens=3,
                      temperature=None, top_p=None)
    assert out.shape[1] <= 5


def test_greedy_generation_config_loads_without_a_warning(reference, tmp_path):
    model, params = load_pretrained(reference[1])
    save_pretrained(tmp_path / "out", model, params, generation_config={"temperature": 0, "eos_token_id": 1})
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 1, "do_sample": False}
    transformers.GenerationConfig.from_pretrained(tmp_path / "out").validate(strict=True)
