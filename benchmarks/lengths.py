"""Real lengths: what sampler, update and a whole GRPO step make of rows that end early, on one core.

    JAX_PLATFORMS=cpu python benchmarks/lengths.py [--parts sampler update step compiles mismatch]
        [--workloads 32 128 log-normal] [--precisions fp32 fp16] [--repeats 3] [--trl-python PATH]

The model of `workload.py`, prompts of 16 to 64 tokens, 4 responses to each of at most 256 tokens, 32 rows at once.
Each token ends its row with chance 1/48 (workloads `32` and `128`, which are the number of prompts), or lengths are
spread as log-normal ones are, with a few rows at the limit (`log-normal`, 128 prompts). Programs take turns.

- sampler: tokens; `of_endless`: against the same where no row ends. Beside it Transformers' `generate`.
- update: positions that hold a token; `of_endless`: against a batch of full responses under the same bound of a
  microbatch, the positions of 8 full rows.
- step: tokens of whole steps (sampling, rewards, scoring, update) beside those of TRL, each at the best of its
  microbatches, after a few steps in which ours meets most widths. TRL runs under `--trl-python`, in an environment of
  its own with trl==1.16.
- compiles: programs that XLA compiled in 50 updates of random lengths, and the seconds that took.
- mismatch: token KL (k3) of the sampler against the scorer on rollouts of three seeds, by rows of like length
  (`by_length`) and at the full width (`full_width`).

Each part writes `results/lengths_PART.json`.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
import tempfile

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
import torch
import transformers

import jaxrl_fp16 as rl
from peer import Peer
from record import record
import sampler
from timing import add_ratios, alternate, measure, parser_of, use_one_core
import update
from workload import EOS, MODEL, PAD, PROMPT, VOCAB, draw_lengths, make_batch, make_ending_params, make_prompts

WORKLOADS = {"32": ("geometric", 32), "128": ("geometric", 128), "log-normal": ("log-normal", 128)}
PARTS = "sampler", "update", "step", "compiles", "mismatch"
SEEDS = 3
FIRST_STEPS = 4
GROUP, ROWS_OF_BUDGET, MOST_ROWS = 4, 8, 32
TRAINED = MODEL.clone(remat=False)  # it fits
COMPILED = "/jax/core/compile/backend_compile_duration"


def of_endless(rows, unit):
    """The rows, those that ended with their speed as a share of the same program's without ends."""
    speed = {row["program"]: row[f"{unit}_per_cpu_second"] for row in rows}
    return [{**row, "of_endless": speed[row["program"]] / speed[f"{row['program']}, endless"]}
            if f"{row['program']}, endless" in speed else row for row in rows]


def measure_sampler(given, lengths, count):
    params, prompts = make_ending_params(lengths), make_prompts(count)
    size = prompts, given.tokens, GROUP, given.rows
    programs = {}
    for name in given.precisions:
        programs[f"jaxrl_fp16 {name}"] = sampler.ours(MODEL, name, params, *size, eos=EOS)
        programs[f"jaxrl_fp16 {name}, endless"] = sampler.ours(MODEL, name, params, *size)
    model = sampler.in_torch(MODEL, params)
    programs |= {f"transformers {cache} cache fp32": sampler.theirs(model, prompts, given.tokens, cache, *size[2:], EOS)
                 for cache in sampler.CACHES}
    return add_ratios(of_endless(alternate(programs, given.repeats), "tokens"), "transformers")


def batch_of(lengths, count, most, seed=0):
    """Rows of `count` prompts x GROUP; lengths None: all run to the limit."""
    prompts, mask = (np.repeat(x, GROUP, axis=0) for x in make_prompts(count, seed))
    drawn = np.full(len(prompts), most) if lengths is None else draw_lengths(lengths, len(prompts), most, seed)
    return make_batch(prompts, mask, drawn, most, seed=seed)


def bounds(given, count, rows=ROWS_OF_BUDGET):
    """At most the positions of `rows` full rows in a microbatch, of `count` prompts in all."""
    width = PROMPT + given.tokens
    return update.bound(min(max(MOST_ROWS, rows), count * GROUP), rows * width, width)


def measure_update(given, lengths, count):
    params, programs = make_ending_params(lengths), {}
    for name in given.precisions:
        for ending, of in (("", lengths), (", endless", None)):
            batch = batch_of(of, count, given.tokens)
            programs[f"jaxrl_fp16 {name}{ending}"] = update.ours(TRAINED, name, params, batch, **bounds(given, count))
    return of_endless(alternate(programs, given.repeats, unit="positions"), "positions")


def our_step(given, precision, params, prompts, rows):
    """A function that takes a whole step and returns the tokens it sampled."""
    policy, sampling = rl.get_precision(precision).policy, rl.SamplingConfig(
        max_new_tokens=given.tokens, group_size=GROUP, max_rows=given.rows)
    sample = rl.make_sampler(MODEL, policy, sampling, eos_id=EOS, pad_id=PAD)
    learn, state = update.make_step(TRAINED, precision, params, **bounds(given, len(prompts[0]), rows))
    seeds = iter(range(10**6))

    def run():
        nonlocal state
        rollout = sample(state.params, *prompts, jax.random.key(next(seeds)))
        tokens, made = np.asarray(rollout.tokens), np.asarray(rollout.response_mask)
        rewards = np.where(made, tokens, 0).sum(axis=1) % 2
        old = rl.token_logprobs(TRAINED, state.params, rollout.tokens, rollout.mask, policy=policy)
        batch = rl.Batch(tokens=rollout.tokens, mask=rollout.mask, response_mask=rollout.response_mask,
                         rollout_logprobs=rollout.logprobs, old_logprobs=old,
                         advantages=rl.group_advantages(rewards, GROUP))
        state, metrics = jax.block_until_ready(learn(state, batch))
        assert float(metrics["skipped"]) == 0
        return int(made.sum())

    for _ in range(FIRST_STEPS):  # each may meet a width that none before had, and compile
        run()
    return run


def save_for_trl(folder, params):
    """A model folder whose tokenizer reads numbers: the text `7 12` is the tokens 7 and 12."""
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token=str(PAD)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=str(EOS), pad_token=str(PAD), padding_side="left")
    rl.save_pretrained(folder, MODEL, params, dtype="float32", tokenizer=tokenizer)
    return folder


def best_of(programs):
    """`(name, program)` of the most work per CPU second, of one run each after one that compiles."""
    rates = {}
    for name, program in programs.items():
        program()
        spent = measure(program)
        rates[name] = spent.work / spent.cpu
        print(f"{name}: {rates[name]:.0f} tokens a CPU second", flush=True)
    best = max(rates, key=rates.get)
    return best, programs[best]


def measure_step(given, lengths, count):
    params, prompts = make_ending_params(lengths), make_prompts(count)
    texts = [" ".join(map(str, row[real])) for row, real in zip(*prompts)]
    with ExitStack() as stack:
        folder = save_for_trl(stack.enter_context(tempfile.TemporaryDirectory()) + "/model", params)

        def trl(name, microbatch):
            return stack.enter_context(Peer(
                given.trl_python, "trl_step.py", folder=folder, prompts=texts, group=GROUP, new_tokens=given.tokens,
                microbatch=microbatch, bf16=name == "bf16", learning_rate=update.LEARNING_RATE,
                max_norm=update.MAX_NORM, clip=update.CLIP,
            ))

        programs = {}
        for name in given.precisions:
            tried = {f"jaxrl_fp16 {name}, microbatch {size}": our_step(given, name, params, prompts, size)
                     for size in given.microbatches}
            programs.update([best_of(tried)])
            if given.trl_python and name in sampler.DTYPES:
                tried = {f"trl {name}, microbatch {size}": trl(name, size) for size in given.microbatches}
                programs.update([best_of(tried)])
        rows = alternate(programs, given.repeats)
    return [row for name in given.precisions
            for row in add_ratios([row for row in rows if f" {name}," in row["program"]], "trl", name="times_trl")]


def measure_compiles(given, lengths, count):
    batches = [batch_of(lengths, count, given.tokens, seed) for seed in range(given.steps)]
    learn, state = update.make_step(TRAINED, given.precisions[0], make_ending_params(lengths), **bounds(given, count))
    jax.block_until_ready(state)
    spent = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: spent.append(seconds) if name == COMPILED else None)
    first = 0
    for number, batch in enumerate(batches):
        state, _ = jax.block_until_ready(learn(state, batch))
        first = first or len(spent)
    return [{"program": f"jaxrl_fp16 {given.precisions[0]}", "steps": given.steps, "compiled": len(spent),
             "in_the_first_step": first, "of_more_than_half_a_second": sum(x > 0.5 for x in spent),
             "seconds": sum(spent)}]


def token_kl(rollout, logprobs):
    """k3 of the sampler against the scorer, a mean over response tokens, nats."""
    d = np.asarray(logprobs, np.float64) - np.asarray(rollout.logprobs, np.float64)
    return float(np.mean((np.expm1(d) - d)[np.asarray(rollout.response_mask)]))


def measure_mismatch(given, lengths, count):
    params, rows = make_ending_params(lengths), []
    for name in given.precisions:
        policy, sampling = rl.get_precision(name).policy, rl.SamplingConfig(
            max_new_tokens=given.tokens, group_size=GROUP, max_rows=given.rows)
        sample = rl.make_sampler(MODEL, policy, sampling, eos_id=EOS, pad_id=PAD)
        by_length = partial(rl.token_logprobs, MODEL, policy=policy)
        full_width = jax.jit(by_length)  # under tracing no mask can be looked at
        for seed in range(SEEDS):
            rollout = sample(params, *make_prompts(count, seed), jax.random.key(seed))
            found = {scorer: token_kl(rollout, score(params, rollout.tokens, rollout.mask))
                     for scorer, score in (("by_length", by_length), ("full_width", full_width))}
            ratio = found["by_length"] / found["full_width"]
            rows.append({"program": f"jaxrl_fp16 {name}", "seed": seed, **found, "of_full_width": ratio})
    return rows


def main():
    parser = parser_of(__doc__, rows=32, tokens=256, repeats=3, steps=50)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--prompts", type=int, help="prompts of every workload, to try the script")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp32", "fp16"])
    parser.add_argument("--microbatches", nargs="+", type=int, default=[8, 16, 32], help="of part step")
    parser.add_argument("--trl-python", help="an interpreter with trl==1.16; without it part step leaves TRL out")
    given = parser.parse_args()
    use_one_core()
    torch.set_num_threads(1)
    measures = dict(zip(PARTS, (measure_sampler, measure_update, measure_step, measure_compiles, measure_mismatch)))
    for part in given.parts:
        rows = []
        for name in given.workloads:
            lengths, count = WORKLOADS[name]
            rows += [{"workload": name, **row} for row in measures[part](given, lengths, given.prompts or count)]
        facts = {name: value for name, value in vars(given).items() if name not in ("parts", "trl_python")}
        if part == "step" and not given.trl_python:
            facts["left_out"] = "TRL: no --trl-python was given"
        print(record(f"lengths_{part}", rows, facts))


if __name__ == "__main__":
    main()
