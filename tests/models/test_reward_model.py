"""Reward models: folders in and out, and the scores of Transformers' ForSequenceClassification in float32."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_fp16.forward import sequence_scores
from jaxrl_fp16.models import (
    FAMILIES, Critic, Decoder, DecoderConfig, PretrainedError, critic_params, init_params, load_pretrained,
    load_reward_model, param_shapes, save_pretrained, save_reward_model,
)
from jaxrl_fp16.precision import get_precision

CASES = {
    "qwen2": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen3": dict(head_dim=32, tie_word_embeddings=True),
    "llama": dict(head_dim=8, attention_bias=True, mlp_bias=True),
}
PAD, COLUMNS = 5, 90
OURS = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


@functools.cache
def small(family="qwen2", tie_embeddings=True):
    """A random Critic without a bias."""
    model = Critic(Decoder(DecoderConfig(family=family, tie_embeddings=tie_embeddings, **OURS)), bias=False)
    return model, init_params(model, jax.random.key(0))


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- against Transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pytest.importorskip("transformers")
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def reference(request, transformers, random_model, tmp_path_factory):
    """A random classifier by Transformers, every parameter away from its usual start, and its folder."""
    settings = dict(num_labels=1, pad_token_id=PAD, **CASES[request.param])
    model = random_model("AutoModelForSequenceClassification", request.param, **settings)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model, folder


def ragged_batch(left):
    """Rows of different lengths, longer than a block of attention, padded on one side."""
    generator = np.random.default_rng(0)
    lengths = np.array([[COLUMNS], [83], [29], [1]])
    tokens, at = generator.integers(0, 97, (4, COLUMNS)), np.arange(COLUMNS)
    tokens = np.where(tokens == PAD, PAD + 1, tokens)
    mask = at >= COLUMNS - lengths if left else at < lengths
    return np.where(mask, tokens, PAD), mask


def their_scores(model, tokens, mask):
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64)),
                     position_ids=torch.tensor(positions)).logits[:, 0].numpy()


def our_scores(model, params, tokens, mask, precision="fp32"):
    return np.asarray(sequence_scores(model, params, tokens, mask, policy=get_precision(precision).policy))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_scores_are_those_of_transformers(reference, left):
    hf, folder = reference
    tokens, mask = ragged_batch(left)
    expected = their_scores(hf, tokens, mask)
    got = our_scores(*load_reward_model(folder), tokens, mask)
    assert got.dtype == np.float32 and got.shape == (4,)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert expected.std() > 0.3  # else any model would pass


def test_written_back(reference, transformers, tmp_path):
    hf, folder = reference
    model, params = load_reward_model(folder)
    save_reward_model(tmp_path / "out", model, params, pad_token_id=PAD, shard_bytes=40_000)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(hf) and (again.config.num_labels, again.config.pad_token_id) == (1, PAD)
    for (name, theirs), (_, ours) in zip(hf.named_parameters(), again.named_parameters(), strict=True):
        np.testing.assert_array_equal(ours.detach().numpy(), theirs.detach().numpy(), err_msg=name)
    tokens, mask = ragged_batch(left=False)
    np.testing.assert_allclose(their_scores(again, tokens, mask), their_scores(hf, tokens, mask), atol=1e-5)


# -- scores -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(quick_compile):
    return small()


def test_padding_and_what_stands_in_it_change_no_score(quick):
    model, params = quick
    tokens = np.random.default_rng(1).integers(0, 32, (1, 9)).astype(np.int32)
    alone = our_scores(model, params, tokens, np.ones((1, 9), bool))
    row, mask = np.full((3, 14), 31, np.int32), np.zeros((3, 14), bool)
    row[0, :9], mask[0, :9] = tokens, True
    row[1, 5:], mask[1, 5:] = tokens, True
    scores = our_scores(model, params, row, mask)
    np.testing.assert_allclose(scores[:2], np.repeat(alone, 2), atol=1e-5)
    assert scores[2] == 0 and abs(alone[0]) > 1e-3


@pytest.mark.parametrize("precision, bound", [("fp16", 4e-3), ("bf16", 4e-2)])
def test_half_precision_is_near(quick, precision, bound):
    tokens = np.random.default_rng(2).integers(0, 32, (8, 12)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    full, half = (our_scores(*quick, tokens, mask, name) for name in ("fp32", precision))
    assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < bound * np.abs(full).max()


# -- folders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "reward"
    save_reward_model(folder, *small(), pad_token_id=0)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "reward")


def refused(folder, pattern, load=load_reward_model, **how):
    with pytest.raises(PretrainedError, match=pattern) as caught:
        load(folder, **how)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def edit_json(path, **changes):
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_back_what_was_saved(tmp_path, family):
    model, params = small(family)
    save_reward_model(tmp_path / "one", model, params, pad_token_id=0)
    save_reward_model(tmp_path / "half", model, params, dtype="float16", shard_bytes=4000)
    again, loaded = load_reward_model(tmp_path / "one", attention="plain", remat=False)
    assert again == model.clone(body=model.body.clone(attention="plain", remat=False))
    assert_equal_trees(loaded, params)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)
    assert_equal_trees(load_reward_model(tmp_path / "half")[1], rounded)
    names = set(load_file(tmp_path / "one" / "model.safetensors"))
    assert "score.weight" in names and "lm_head.weight" not in names
    assert not (tmp_path / "one" / "generation_config.json").exists()


def test_a_body_with_a_head_of_its_own_goes_out_without_it(tmp_path):
    model, params = small(tie_embeddings=False)
    assert "head" in params["body"]
    save_reward_model(tmp_path / "out", model, params)
    again, loaded = load_reward_model(tmp_path / "out")
    assert_equal_trees(loaded, {**params, "body": {k: v for k, v in params["body"].items() if k != "head"}})


def test_an_untied_config_is_read_without_a_head(folder):
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert_equal_trees(load_reward_model(folder)[1], small()[1])


def test_the_other_kind_of_folder_is_refused(folder, tmp_path):
    decoder = Decoder(DecoderConfig(family="qwen2", tie_embeddings=True, **OURS))
    save_pretrained(tmp_path / "lm", decoder, init_params(decoder, jax.random.key(0)))
    refused(tmp_path / "lm", r'architectures is \["Qwen2ForCausalLM"\]; allowed: \["Qwen2ForSequenceClassification"\]')
    refused(folder, r'"Qwen2ForSequenceClassification"\]; allowed: \["Qwen2ForCausalLM"\]', load_pretrained)
    refused(tmp_path / "absent", "does not exist")


@pytest.mark.parametrize("changes", [dict(num_labels=2), dict(id2label={"0": "a", "1": "b"}), dict(id2label=None)])
def test_several_labels_are_refused(folder, changes):
    edit_json(folder / "config.json", **changes)
    refused(folder, "num_labels is 2 .*; allowed: 1, a reward is one number")


def test_the_number_of_labels_alone_is_enough(folder):
    edit_json(folder / "config.json", num_labels=1, id2label=None)
    load_reward_model(folder)


@pytest.mark.parametrize("change, pattern", [
    (lambda t: t.pop("score.weight"), "tensor score.weight is missing"),
    (lambda t: t.update({"score.weight": np.ones((2, 16), np.float32)}), r"has shape \[2, 16\]; allowed: \[1, 16\]"),
    (lambda t: t.update({"score.bias": np.ones(1, np.float32)}), "tensor score.bias in .* is unknown"),
    (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}), "lm_head.weight in .* is unknown"),
    (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
    (lambda t: t.update({"score.weight": np.full((1, 16), 7e4, np.float32)}), "score.weight holds 70000; .*float16"),
])
def test_tensors_are_refused(folder, change, pattern):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    refused(folder, pattern, compute_dtype="float16")


def test_what_is_no_reward_model_is_not_written(tmp_path):
    model, params = small()
    with pytest.raises(ValueError, match="a Decoder cannot be exported as a reward model; allowed: a Critic"):
        save_reward_model(tmp_path / "out", model.body, params["body"])
    with pytest.raises(ValueError, match=r"the Critic has a bias, .*; allowed: Critic\(body, bias=False\)"):
        save_reward_model(tmp_path / "out", Critic(model.body), critic_params(params["body"]))
    with pytest.raises(ValueError, match="a Critic cannot be exported; allowed: a Decoder"):
        save_pretrained(tmp_path / "out", model, params)
    assert list(tmp_path.iterdir()) == []


def test_a_critic_without_a_bias_starts_at_zero():
    model, params = small()
    start = critic_params(params["body"], bias=False)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(lambda leaf: leaf.shape, param_shapes(model))
    assert not np.asarray(start["value"]["kernel"]).any()
