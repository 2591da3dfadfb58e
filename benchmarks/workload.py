"""The model and the prompts that every benchmark here runs on: a Qwen2 shape of 5.8 million parameters."""

from __future__ import annotations

import jax
import numpy as np

import jaxrl_fp16 as rl

VOCAB, PROMPT, PAD, EOS = 4096, 64, 0, 1
MODEL = rl.Decoder(rl.DecoderConfig(
    family="qwen2", vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_layers=6, num_heads=8,
    num_kv_heads=4, head_dim=32, tie_embeddings=True,
))


def make_prompts(rows, seed=0):
    """Left-padded prompts of 16 to 64 tokens: int32 [rows,64] and their mask."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(16, PROMPT + 1, rows)
    mask = np.arange(PROMPT) >= PROMPT - lengths[:, None]
    return np.where(mask, generator.integers(2, VOCAB, mask.shape), PAD).astype(np.int32), mask


def make_params(logit_std=None, seed=0):
    """Random parameters; the last norm is scaled so that logits have standard deviation `logit_std`."""
    params = rl.init_params(MODEL, jax.random.key(seed))
    if logit_std is None:
        return params
    tokens, mask = make_prompts(8)
    logits = rl.logits(MODEL, params, tokens, mask, rl.get_precision("fp32").policy)
    factor = logit_std / float(np.std(np.asarray(logits)[mask]))
    return {**params, "final_norm": {"scale": factor * params["final_norm"]["scale"]}}


__all__ = ["VOCAB", "PROMPT", "PAD", "EOS", "MODEL", "make_prompts", "make_params"]
