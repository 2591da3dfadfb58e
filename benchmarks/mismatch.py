"""How far sampler and scorer are apart at equal weights, by precision and attention; Transformers' beside ours.

    JAX_PLATFORMS=cpu python benchmarks/mismatch.py [--rows 64] [--tokens 128] [--seeds 3]

Log-probs are compared where the sampler has written them, on the tokens that it
drew. One row a program, precision and kind of attention; the median over seeds, and
the largest.

Transformers' sampler is `generate` with its cache and its scorer a forward over whole
rows, both in PyTorch on the CPU with the same weights and prompts; log-probs are taken in
float32 from the logits of either, with the positions that `generate` gives, as
trainers do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

import jax
import numpy as np
import torch
import transformers

import jaxrl_fp16 as rl
from record import record
from workload import EOS, MODEL, PAD, make_params, make_prompts

# key of the table -> metric
COLUMNS = {
    "kl_k3": "kl_k3", "abs_diff_max": "logprob_abs_diff_max", "prob_diff": "prob_abs_diff_mean",
    "seq_kl": "seq_kl", "exact": "exact_fraction",
}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def ours(kind, precision, params, rows, tokens):
    """`seed -> (sampler's log-probs, scorer's, mask)`."""
    model, policy = MODEL.clone(attention=kind), rl.get_precision(precision).policy
    sampling = rl.SamplingConfig(max_new_tokens=tokens, group_size=1)
    sample = rl.make_sampler(model, policy, sampling, eos_id=EOS, pad_id=PAD)
    score = jax.jit(lambda *arrays: rl.token_logprobs(model, *arrays, policy=policy))

    def run(seed):
        rollout = sample(params, *make_prompts(rows, seed), jax.random.key(seed))
        return rollout.logprobs, score(params, rollout.tokens, rollout.mask), rollout.response_mask

    return run


def theirs(kind, precision, params, rows, tokens):
    """The same of Transformers, arrays [rows,tokens] of the response alone."""
    with tempfile.TemporaryDirectory() as folder:
        rl.save_pretrained(f"{folder}/model", MODEL, params, dtype="float32")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", dtype=TORCH[precision], attn_implementation=kind
        )
    model.eval()
    assert model.dtype == TORCH[precision] and model.config._attn_implementation == kind

    @torch.inference_mode()
    def run(seed):
        torch.manual_seed(seed)
        prompts, mask = (torch.from_numpy(x).long() for x in make_prompts(rows, seed))
        out = model.generate(
            prompts, attention_mask=mask, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=tokens, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, output_logits=True, return_dict_in_generate=True,
        )
        drawn = out.sequences[:, prompts.shape[1]:]
        ended = torch.cumsum(drawn == EOS, 1) - (drawn == EOS).long()
        present = ended == 0
        whole = torch.cat([mask, present.long()], 1)
        positions = (torch.cumsum(whole, 1) - 1).clamp(min=0)
        logits = model(out.sequences, attention_mask=whole, position_ids=positions, use_cache=False).logits
        sampled = logprobs_of(torch.stack(out.logits, 1), drawn)
        return sampled, logprobs_of(logits[:, prompts.shape[1] - 1:-1], drawn), present.numpy()

    return run


def logprobs_of(logits, tokens):
    logprobs = torch.log_softmax(logits.float(), -1)
    return torch.gather(logprobs, -1, tokens[..., None])[..., 0].numpy()


def measure(program, kind, precision, run, seeds):
    """One row of the table."""
    found = [rl.mismatch_metrics(*(np.asarray(x) for x in run(seed))) for seed in range(seeds)]
    values = {key: [float(metrics[f"mismatch/{metric}"]) for metrics in found] for key, metric in COLUMNS.items()}
    return {
        "program": program, "attention": kind, "precision": precision,
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
    todo = [("jaxrl_fp16", ours, kind) for kind in kinds]
    todo += [("transformers", theirs, kind) for kind in ("sdpa", "eager")]
    rows = [
        measure(name, kind, precision, make(kind, precision, params, given.rows, given.tokens), given.seeds)
        for name, make, kind in todo for precision in ("fp16", "bf16", "fp32") if (kind, precision) != ("cudnn", "fp32")
    ]
    print(record("mismatch", rows, vars(given)))


if __name__ == "__main__":
    main()
