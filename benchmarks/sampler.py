"""Tokens per second of CPU time: our sampler against Transformers' `generate` with a static cache.

    JAX_PLATFORMS=cpu python benchmarks/sampler.py [--rows 64] [--tokens 128] [--repeats 5]

Both draw at temperature 1 from the same weights and the same left-padded prompts,
in turns in one process, and neither may stop before the last token. Ours also
returns the log-prob of each token.
"""

from __future__ import annotations

import os
import tempfile

# PyTorch's idle threads sleep: their spinning at barriers would count as its CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import torch
import transformers

import jaxrl_fp16 as rl
from record import record
from timing import add_ratios, alternate, arguments
from workload import MODEL, PAD, VOCAB, make_params, make_prompts

NO_END = VOCAB  # an id that no model draws


def ours(precision, params, rows, tokens):
    """A function that samples once and checks that every row went to the end."""
    sampling = rl.SamplingConfig(max_new_tokens=tokens, group_size=1)
    sample = rl.make_sampler(MODEL, rl.get_precision(precision).policy, sampling, eos_id=NO_END, pad_id=PAD)
    prompts = make_prompts(rows)

    def run():
        rollout = jax.block_until_ready(sample(params, *prompts, jax.random.key(0)))
        assert int(rollout.response_mask.sum()) == rows * tokens

    return run


def theirs(params, rows, tokens):
    with tempfile.TemporaryDirectory() as folder:
        rl.save_pretrained(f"{folder}/model", MODEL, params, dtype="float32")
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    model.generation_config.eos_token_id = None  # nothing ends a row, and no processor has to see to it
    prompts, mask = (torch.from_numpy(x).long() for x in make_prompts(rows))

    @torch.inference_mode()
    def run():
        out = model.generate(
            prompts, attention_mask=mask, pad_token_id=PAD, max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, cache_implementation="static",
        )
        assert out.shape == (rows, prompts.shape[1] + tokens)

    return run


def main():
    given = arguments(__doc__, torch.get_num_threads())
    torch.set_num_threads(given.torch_threads)
    params = make_params()
    size = given.rows, given.tokens
    programs = {f"jaxrl_fp16 {name}": ours(name, params, *size) for name in ("fp32", "fp16", "bf16")}
    programs["transformers static cache fp32"] = theirs(params, *size)
    rows = alternate(programs, given.repeats, given.rows * given.tokens)
    print(record("sampler", add_ratios(rows, "transformers"), vars(given)))


if __name__ == "__main__":
    main()
