"""`import jaxrl_fp16 as rl`: the names, and the whole way from a folder to a step and back."""

from pathlib import Path
import re

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest

import jaxrl_fp16 as rl
from jaxrl_fp16.tasks import ALPHABET
from jaxrl_fp16.tokenizer import character_tokenizer

NAMES = (
    "get_precision", "load_pretrained", "save_pretrained", "Decoder", "DecoderConfig", "init_params", "token_logprobs",
    "make_sampler", "SamplingConfig", "Rollout", "get_algorithm", "AlgorithmConfig", "group_advantages", "gae",
    "policy_loss", "mismatch_metrics", "init_train_state", "TrainState", "Batch", "make_update", "make_value_update",
    "Critic", "critic_params", "PreferenceConfig", "dpo_loss", "PreferencePairs", "make_pair_scorer", "make_dpo_update",
    "load_tokenizer", "encode_prompts", "decode_responses",
)
pytestmark = pytest.mark.usefixtures("quick_compile")
P, N, GROUP = 5, 6, 4
TOKENIZER = character_tokenizer(ALPHABET)
EOS, PAD = 1, 0


def test_every_name_is_there_and_listed():
    assert not set(NAMES) - set(rl.__all__) and sorted(rl.__all__) == dir(rl)
    assert all(getattr(rl, name) is not None for name in rl.__all__)


def test_an_unknown_name_is_answered_with_those_that_exist():
    with pytest.raises(AttributeError, match="jaxrl_fp16 has no 'make_samplers'; it has: .*make_sampler, make_update"):
        getattr(rl, "make_samplers")  # noqa: B009


@pytest.mark.parametrize("name, dtype, after_overflow", [
    ("fp16", jnp.float16, 2**14), ("bf16", jnp.bfloat16, 1), ("fp32", jnp.float32, 1),
    ("params=float32,compute=float16,output=float32", jnp.float16, 2**14),
])
def test_a_precision_is_a_policy_and_a_loss_scale(name, dtype, after_overflow):
    precision = rl.get_precision(name)
    scale, tree = precision.loss_scale, {"x": jnp.float32(3.0)}
    assert isinstance(precision.policy, jmp.Policy) and precision.policy.compute_dtype == dtype
    assert scale.unscale(scale.scale(tree)) == tree and scale.scale(tree)["x"] == 3 * scale.loss_scale
    assert scale.adjust(jnp.asarray(False)).loss_scale == after_overflow


@pytest.fixture(scope="module")
def model():
    config = rl.DecoderConfig(family="qwen2", vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=1,
                              num_heads=2, num_kv_heads=1, head_dim=8)
    return rl.Decoder(config)


@pytest.fixture(scope="module")
def params(model):
    return rl.init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    mask = np.arange(P) >= np.array([[0], [2], [4]])
    return jnp.asarray(np.where(mask, np.arange(15).reshape(3, P) + 3, PAD), jnp.int32), jnp.asarray(mask)


@pytest.fixture(scope="module")
def sampled(model, params, prompts):
    """A rollout of 3 prompts with groups of 4, under top-k, and the policy."""
    policy = rl.get_precision("fp16").policy
    config = rl.SamplingConfig(max_new_tokens=N, temperature=1.0, top_k=8, top_p=1.0, group_size=GROUP)
    sample = rl.make_sampler(model, policy, config, eos_id=(EOS, 7), pad_id=PAD)
    return sample(params, *prompts, jax.random.key(1)), policy


def test_the_fields_of_a_rollout(sampled, prompts):
    rollout, _ = sampled
    rows, columns = 3 * GROUP, P + N
    assert rollout.tokens.shape == (rows, columns) and rollout.tokens.dtype == jnp.int32
    for grid in (rollout.mask, rollout.response_mask, rollout.logprobs, rollout.full_logprobs):
        assert grid.shape == (rows, columns)
    assert rollout.logprobs.dtype == rollout.full_logprobs.dtype == jnp.float32
    assert rollout.support.shape == (rows, N, 8) and rollout.support.dtype == jnp.int32
    assert rollout.finished.shape == (rows,) and rollout.finished.dtype == bool
    np.testing.assert_array_equal(rollout.tokens[:, :P], np.repeat(prompts[0], GROUP, axis=0))     # prompt-major
    np.testing.assert_array_equal(rollout.mask[:, :P], np.repeat(prompts[1], GROUP, axis=0))
    for row in range(rows):
        response = np.asarray(rollout.response_mask[row, P:])
        length, tokens = int(response.sum()), np.asarray(rollout.tokens[row, P:])
        ends = np.isin(tokens[:length], (EOS, 7))
        assert response[:length].all() and not ends[:-1].any() and bool(ends[-1]) == bool(rollout.finished[row])
        assert (tokens[length:] == PAD).all() and (length == N or rollout.finished[row])
        assert (np.asarray(rollout.logprobs[row, :P + length][P:]) < 0).all()
        assert not np.asarray(rollout.logprobs[row])[np.r_[:P, P + length:columns]].any()
    assert bool((rollout.full_logprobs <= rollout.logprobs + 1e-6).all())


def test_from_a_rollout_to_steps_of_policy_and_critic(model, params, sampled):
    rollout, policy = sampled
    score = jax.jit(lambda params: rl.token_logprobs(
        model, params, rollout.tokens, rollout.mask, policy=policy, temperature=1.0, support=rollout.support))
    old = score(params)
    assert old.dtype == jnp.float32 and old.shape == rollout.tokens.shape
    found = rl.mismatch_metrics(rollout.logprobs, old, rollout.response_mask)
    assert 0 <= float(found["mismatch/kl_k3"]) < 1e-5 and float(found["mismatch/ess_seq"]) > 0.999

    rewards = rollout.response_mask.sum(axis=1).astype(jnp.float32)
    advantages = rl.group_advantages(rewards, group_size=GROUP, kind="group_std", valid=None)
    assert advantages.shape == rewards.shape and abs(float(advantages.sum())) < 1e-4
    algorithm = rl.get_algorithm("grpo", clip_high=0.28)
    assert algorithm.clip_high == 0.28 and isinstance(algorithm, rl.AlgorithmConfig)
    loss, metrics = rl.policy_loss(
        algorithm, logprobs=old, old_logprobs=old, rollout_logprobs=rollout.logprobs, advantages=advantages,
        mask=rollout.response_mask, ref_logprobs=None, entropy=None, max_new_tokens=N,
    )
    precision, optimizer = rl.get_precision("fp16"), optax.adamw(1e-2)
    state = rl.init_train_state(params, optimizer, precision.loss_scale, jax.random.key(2))
    batch = rl.Batch(tokens=rollout.tokens, mask=rollout.mask, response_mask=rollout.response_mask,
                     rollout_logprobs=rollout.logprobs, old_logprobs=old, advantages=advantages,
                     support=rollout.support)
    update = rl.make_update(model, precision.policy, algorithm, optimizer, microbatch_size=6, temperature=1.0,
                            max_new_tokens=None)
    state, metrics = update(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), abs=1e-3)
    assert float(metrics["grad_norm"]) > 0 and float(metrics["loss_scale"]) == 2**15 and float(metrics["skipped"]) == 0
    assert int(state.step) == 1 and state.loss_scale.good == 1 and state.key.shape == ()
    # Better than average became likelier, by the masters that the state now holds.
    gain = ((score(state.params) - old) * rollout.response_mask).sum(axis=1)
    assert float((gain * advantages).sum()) > 0 and jax.tree.structure(state.params) == jax.tree.structure(params)

    critic = rl.Critic(model)
    values = jnp.zeros(old.shape)
    on_last = jnp.zeros(old.shape).at[jnp.arange(len(rewards)), P + rewards.astype(int) - 1].set(rewards)
    advantages, returns = rl.gae(on_last, values, rollout.response_mask, discount=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(returns, rewards[:, None] * rollout.response_mask)
    critic_state = rl.init_train_state(rl.critic_params(params), optimizer, precision.loss_scale, jax.random.key(3))
    update_value = rl.make_value_update(critic, precision.policy, rl.get_algorithm("ppo"), optimizer, microbatch_size=6)
    critic_state, metrics = update_value(critic_state, batch.replace(
        advantages=advantages, values=values, returns=returns))
    assert float(metrics["loss"]) > 0 and int(critic_state.step) == 1


def test_a_folder_out_and_in_again(model, params, tmp_path):
    rl.save_pretrained(tmp_path / "model", model, params, dtype="float16", tokenizer=TOKENIZER)
    again, loaded = rl.load_pretrained(tmp_path / "model")
    assert again.config == model.config
    half = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, half)
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in (tmp_path / "model").iterdir()}


def test_text_to_rows_and_back(model, params, tmp_path):
    rl.save_pretrained(tmp_path / "model", model, params, dtype="float16", tokenizer=TOKENIZER)
    tokenizer = rl.load_tokenizer(tmp_path / "model")
    prompts = rl.encode_prompts(tokenizer, ["1+2=", "", "1+2+3+4="], 6)
    assert prompts.tokens.shape == (3, 6) and prompts.kept.tolist() == [True, False, False]
    assert rl.decode_responses(tokenizer, prompts.tokens, prompts.mask) == ["1+2=", "", ""]
    with pytest.raises(ValueError):
        rl.load_tokenizer(tmp_path / "nowhere")


def test_the_example_of_the_readme_runs_as_printed(model, params, tmp_path, monkeypatch, capsys):
    """With a tiny folder's path, and the id of its end of text, in place of those named there."""
    page = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "import jaxrl_fp16" in block)
    assert code.count('"models/Qwen2.5-0.5B"') == 2 and code.count("=151643") == 2
    rl.save_pretrained(tmp_path / "tiny", model, params, dtype="float16", tokenizer=TOKENIZER)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("models/Qwen2.5-0.5B", "tiny").replace("=151643", f"={EOS}"), names)  # noqa: S102
    assert "mismatch/kl_k3" in capsys.readouterr().out
    assert names["rollout"].tokens.shape == (16, 96) and len(names["responses"]) == 16
    assert float(names["metrics"]["skipped"]) == 0 and int(names["state"].step) == 1 - int(names["metrics"]["empty"])
    again, _ = rl.load_pretrained(tmp_path / "out")
    assert again.config == model.config and rl.load_tokenizer(tmp_path / "out").get_vocab() == TOKENIZER.get_vocab()
