"""How far sampler and scorer may be apart at equal weights, on a random model of 5.8M parameters.

Its logits have standard deviation 3. benchmarks/mismatch.py prints the whole table.
"""

import functools

import jax
import numpy as np

from jaxrl_fp16.forward import logits, token_logprobs
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.objectives import mismatch_metrics
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler

ROWS, PROMPT, NEW, VOCAB = 64, 64, 128, 4096
MODEL = Decoder(DecoderConfig(
    family="qwen2", vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_layers=6, num_heads=8,
    num_kv_heads=4, head_dim=32, tie_embeddings=True))


def prompts():
    generator = np.random.default_rng(0)
    mask = np.arange(PROMPT) >= PROMPT - generator.integers(16, PROMPT + 1, ROWS)[:, None]
    return np.where(mask, generator.integers(2, VOCAB, mask.shape), 0).astype(np.int32), mask


@functools.cache
def parameters():
    params = init_params(MODEL, jax.random.key(0))
    tokens, mask = (x[:4] for x in prompts())
    spread = np.asarray(logits(MODEL, params, tokens, mask, get_precision("fp32").policy))[mask].std()
    return {**params, "final_norm": {"scale": 3.0 / spread * params["final_norm"]["scale"]}}


@functools.cache
def token_kl(precision, kind):
    """Mean k3 per token of the sampler's log-probs against the scorer's."""
    model, policy = MODEL.clone(attention=kind), get_precision(precision).policy
    config = SamplingConfig(max_new_tokens=NEW, group_size=1)
    sample = make_sampler(model, policy, config, eos_id=1, pad_id=0)
    score = jax.jit(lambda *args: token_logprobs(model, *args, policy=policy))
    rollout = sample(parameters(), *prompts(), jax.random.key(1))
    scored = score(parameters(), rollout.tokens, rollout.mask)
    found = float(mismatch_metrics(rollout.logprobs, scored, rollout.response_mask)["mismatch/kl_k3"])
    print(f"{kind} {precision}: {found:.2e}")
    return found


def test_fp16_is_within_its_bound_and_below_bf16():
    assert token_kl("fp16", "blockwise") <= 2e-5
    assert token_kl("fp16", "blockwise") < token_kl("bf16", "blockwise")


def test_with_plain_attention_fp16_is_at_most_a_fifth_of_bf16():
    assert token_kl("fp16", "plain") <= 2e-5
    assert token_kl("fp16", "plain") <= token_kl("bf16", "plain") / 5


def test_fp32_agrees_to_rounding():
    assert token_kl("fp32", "blockwise") < 1e-10
