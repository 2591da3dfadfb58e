"""Sampling with adapters: one program's bits in several, and how far the scorer is from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.forward import logits, token_logprobs
from jaxrl_fp16.models import Decoder, DecoderConfig, LoraConfig, init_lora, init_params
from jaxrl_fp16.objectives import mismatch_metrics
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler, make_stepwise_sampler, slots, stepwise

pytestmark = pytest.mark.usefixtures("quick_compile")

V, PROMPT, ROWS = 256, 8, 16
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=V, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, tie_embeddings=True), lora=LoraConfig(rank=4, alpha=16))


def prompts():
    generator = np.random.default_rng(0)
    mask = np.arange(PROMPT) >= generator.integers(0, PROMPT, ROWS)[:, None]
    return np.where(mask, generator.integers(4, V, mask.shape), 0).astype(np.int32), mask


@functools.cache
def parameters(precision):
    """Logits of standard deviation 3, half of it by the adapters."""
    base, policy = init_params(MODEL, jax.random.key(0)), get_precision("fp32").policy
    params = init_lora(MODEL, base, jax.random.key(1), policy=policy)
    generator = np.random.default_rng(1)
    params["lora"] = jax.tree.map(lambda x: jnp.asarray(generator.normal(0, 0.1, x.shape), jnp.float32), params["lora"])
    found = [np.asarray(logits(MODEL, each, *prompts(), policy)) for each in (params, {"base": params["base"]})]
    assert (found[0] - found[1]).std() > 0.5 * found[1].std()
    base = {**base, "final_norm": {"scale": 3.0 / found[0].std() * base["final_norm"]["scale"]}}
    dtype = get_precision(precision).policy.compute_dtype
    return {"base": jax.tree.map(lambda x: x.astype(dtype), base), "lora": params["lora"]}


@functools.cache
def rollout(precision):
    sample = make_sampler(MODEL, get_precision(precision).policy, config(), eos_id=(1, 2), pad_id=0)
    return sample(parameters(precision), *prompts(), jax.random.key(7))


def config():
    return SamplingConfig(max_new_tokens=24, group_size=2, max_rows=16)


def test_the_bits_in_several_calls_are_those_of_one_program(monkeypatch):
    monkeypatch.setattr(slots, "LONG", 0)
    monkeypatch.setattr(stepwise, "_next_steps", lambda steps, seconds: 5)
    rollout.cache_clear()
    cut = make_stepwise_sampler(MODEL, get_precision("fp16").policy, config(), eos_id=(1, 2), pad_id=0)
    found = cut(parameters("fp16"), *prompts(), jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, found, rollout("fp16"))


def test_sampler_and_scorer_agree():
    """Mean k3 per token; in bfloat16 it was nine times as much on a like model."""
    found, policy = rollout("fp16"), get_precision("fp16").policy
    scored = jax.jit(lambda *given: token_logprobs(MODEL, *given, policy=policy))(
        parameters("fp16"), found.tokens, found.mask)
    assert float(mismatch_metrics(found.logprobs, scored, found.response_mask)["mismatch/kl_k3"]) <= 1e-6
