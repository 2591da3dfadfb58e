"""Adapters as they are against adapters merged for sampling: the token KL of sampler and scorer.

    JAX_PLATFORMS=cpu python benchmarks/lora_mismatch.py --model FOLDER --adapter RUN/adapter
        [--prompts 32] [--tokens 128] [--precisions fp16 bf16]

FOLDER: the model that the adapters of a run of configs/smollm2_lora.yaml belong to. Each policy draws one response to
each of the task's held-out prompts, with the same keys, and is scored:

- unmerged: sampler and scorer compute `x W + (x A) B scale`, as a run does;
- merged: both with the sum, made in float32 and rounded once;
- merged to sample: the sampler with the sum, the scorer without, as where an engine is sent merged weights.

No response ends early. Writes `results/lora_mismatch.json`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxrl_fp16 as rl
from record import record
from timing import parser_of

NO_END = -1


def prompts_of(tokenizer, count):
    """Sums of two numbers, as the runs of the config are asked for them: tokens and mask [n,P]."""
    generator = np.random.default_rng(0)
    texts = [f"{a}+{b}=" for a, b in generator.integers(10, 100, (count, 2))]
    return rl.encode_prompts(tokenizer, texts, 8)[:2]


def kl(policy, sampled_by, scored_by, prompts, tokens):
    """Metrics of `sampled_by`'s responses under `scored_by`, each `(model, params)`."""
    sample = rl.make_sampler(sampled_by[0], policy, rl.SamplingConfig(max_new_tokens=tokens, group_size=1),
                             eos_id=NO_END, pad_id=0)
    rollout = sample(sampled_by[1], *map(jnp.asarray, prompts), jax.random.key(0))
    logprobs = rl.token_logprobs(scored_by[0], scored_by[1], rollout.tokens, rollout.mask, policy=policy)
    found = rl.mismatch_metrics(rollout.logprobs, logprobs, rollout.response_mask)
    return {name: float(found[f"mismatch/{name}"]) for name in ("kl_k3", "prob_abs_diff_mean", "exact")
            if f"mismatch/{name}" in found}


def measure(given, precision):
    policy = rl.get_precision(precision).policy
    lora = rl.read_adapter(given.adapter)
    model, base = rl.load_pretrained(given.model, lora=lora)
    own = model, rl.load_adapter(given.adapter, model, base, policy=policy)
    merged = rl.merge_lora(model, own[1], base)
    prompts = prompts_of(rl.load_tokenizer(given.model), given.prompts)
    pairs = {"unmerged": (own, own), "merged": (merged, merged), "merged to sample": (merged, own)}
    rows = [{"precision": precision, "policy": name, **kl(policy, *pair, prompts, given.tokens)}
            for name, pair in pairs.items()]
    return [{**row, "kl_of_merged": row["kl_k3"] / rows[1]["kl_k3"]} for row in rows]


def main():
    parser = parser_of(__doc__, prompts=32, tokens=128)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--adapter", required=True, help="a folder in PEFT's format")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16"])
    given = parser.parse_args()
    rows = [row for precision in given.precisions for row in measure(given, precision)]
    facts = {name: value for name, value in vars(given).items() if name not in ("model", "adapter")}
    print(record("lora_mismatch", rows, facts | {"rank": rl.read_adapter(given.adapter).rank}))


if __name__ == "__main__":
    main()
