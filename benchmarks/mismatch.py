"""How far sampler and scorer are apart at equal weights, by precision and attention.

    python benchmarks/mismatch.py [--rows 64] [--tokens 128] [--seeds 3]

Log-probs are compared where the sampler has written them, on the tokens that it
drew. One row a precision and kind of attention; the median over seeds, and the
largest.
"""

from __future__ import annotations

import argparse
import statistics

import jax

import jaxrl_fp16 as rl
from record import record
from workload import EOS, MODEL, PAD, make_params, make_prompts

# key of the table -> metric
COLUMNS = {
    "kl_k3": "kl_k3", "abs_diff_max": "logprob_abs_diff_max", "prob_diff": "prob_abs_diff_mean",
    "seq_kl": "seq_kl", "exact": "exact_fraction",
}


def measure(kind, precision, params, rows, tokens, seeds):
    """One row of the table."""
    model, policy = MODEL.clone(attention=kind), rl.get_precision(precision).policy
    sampling = rl.SamplingConfig(max_new_tokens=tokens, group_size=1)
    sample = rl.make_sampler(model, policy, sampling, eos_id=EOS, pad_id=PAD)
    score = jax.jit(lambda *arrays: rl.token_logprobs(model, *arrays, policy=policy))
    runs = []
    for seed in range(seeds):
        rollout = sample(params, *make_prompts(rows, seed), jax.random.key(seed))
        scored = score(params, rollout.tokens, rollout.mask)
        runs.append(rl.mismatch_metrics(rollout.logprobs, scored, rollout.response_mask))
    values = {key: [float(run[f"mismatch/{metric}"]) for run in runs] for key, metric in COLUMNS.items()}
    return {
        "attention": kind, "precision": precision,
        **{key: statistics.median(found) for key, found in values.items()},
        "kl_k3_largest": max(values["kl_k3"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--logit-std", type=float, default=3.0)
    given = parser.parse_args()
    params = make_params(given.logit_std)
    kinds = ["blockwise", "plain"] + ["cudnn"] * (jax.default_backend() == "gpu")
    rows = [
        measure(kind, precision, params, given.rows, given.tokens, given.seeds)
        for kind in kinds for precision in ("fp16", "bf16", "fp32") if (kind, precision) != ("cudnn", "fp32")
    ]
    print(record("mismatch", rows, vars(given)))


if __name__ == "__main__":
    main()
