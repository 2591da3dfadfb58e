"""Tokens per second of CPU time: our sampler against Transformers' `generate`, on one core.

    JAX_PLATFORMS=cpu python benchmarks/sampler.py [--rows 64] [--tokens 128] [--repeats 5]

Both draw at temperature 1 from the same weights and the same left-padded prompts,
in turns in one process, and neither may stop before the last token. Ours also
returns the log-prob of each token.
"""

from __future__ import annotations

import tempfile

import jax
import numpy as np
import torch
import transformers

import jaxrl_fp16 as rl
from record import record
from timing import add_ratios, alternate, parser_of, use_one_core
from workload import MODEL, PAD, make_params, make_prompts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHES = "static", "dynamic"


def ours(model, precision, params, prompts, tokens, group=1, max_rows=0, eos=None):
    """A function that samples `group` responses a prompt and returns how many tokens; eos None: no row ends early."""
    sampling = rl.SamplingConfig(max_new_tokens=tokens, group_size=group, max_rows=max_rows)
    end = model.config.vocab_size if eos is None else eos
    sample = rl.make_sampler(model, rl.get_precision(precision).policy, sampling, eos_id=end, pad_id=PAD)
    seeds = iter(range(10**6))

    def run():
        rollout = jax.block_until_ready(sample(params, *prompts, jax.random.key(next(seeds))))
        made = int(rollout.response_mask.sum())
        assert eos is not None or made == len(prompts[0]) * group * tokens
        return made

    return run


def in_torch(model, params, precision="fp32"):
    """Transformers' model of the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        rl.save_pretrained(f"{folder}/model", model, params, dtype="float32")
        return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=DTYPES[precision])


def theirs(model, prompts, tokens, cache, group=1, max_rows=0, eos=None):
    """Likewise by `generate` of a PyTorch model; max_rows: responses of one call, 0: all."""
    at_once = max_rows // group or len(prompts[0])
    parts = [[torch.from_numpy(x[i: i + at_once]).long() for x in prompts]
             for i in range(0, len(prompts[0]), at_once)]
    fewest = {"min_new_tokens": tokens} if eos is None else {}

    @torch.inference_mode()
    def run():
        model.generation_config.eos_token_id = eos  # None: no processor has to see to the fewest tokens
        made = 0
        for ids, mask in parts:
            out = model.generate(
                ids, attention_mask=mask, pad_token_id=PAD, max_new_tokens=tokens, **fewest, do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=group, cache_implementation=cache,
            )
            made += _count(out[:, ids.shape[1]:].numpy(), eos)
        return made

    return run


def _count(responses, eos):
    """Tokens up to and with each row's first end."""
    if eos is None:
        return responses.size
    before = np.cumsum(responses == eos, axis=1) - (responses == eos)
    return int(np.sum(before == 0))


def main():
    given = parser_of(__doc__, rows=64, tokens=128, repeats=5).parse_args()
    use_one_core()
    torch.set_num_threads(1)
    params, prompts = make_params(), make_prompts(given.rows)
    programs = {f"jaxrl_fp16 {name}": ours(MODEL, name, params, prompts, given.tokens)
                for name in ("fp32", "fp16", "bf16")}
    for name in DTYPES:
        model = in_torch(MODEL, params, name)
        programs |= {f"transformers {cache} cache {name}": theirs(model, prompts, given.tokens, cache)
                     for cache in CACHES}
    rows = alternate(programs, given.repeats)
    rows = add_ratios(rows, "transformers static cache fp32")
    print(record("sampler", rows, vars(given)))


if __name__ == "__main__":
    main()
