"""Do weights that are sent to an engine act, all of them? After a `load` it is held against one that began with them.

    JAX_PLATFORMS=cpu python benchmarks/engine_weights.py --model FOLDER [--vllm-python PATH]
        [--models tied untied] [--engines jit transformers vllm] [--precisions fp32 fp16 bf16]

Two models: FOLDER's, whose head is its embedding, and a random one of family qwen3 with a head of its own. An engine
draws with a model's weights, greedily; then every weight is changed by a random share, and it draws with those. The
draws must differ, and the second must be that of an engine that began with the changed weights: same ids, and log-probs
within `BOUNDS`. The last prompt is longer than a block of vLLM's prefix cache. Rows of an earlier run that are not
measured again stay.
"""

from __future__ import annotations

from contextlib import closing
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxrl_fp16 as rl
from engine_runs import NAMES, open_engine, padded, put
from record import circumstances, print_table
from timing import parser_of

BOUNDS = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.6}          # of the largest difference of log-probs
CHANGES = {"fp32": (1e-6, 0.05), "fp16": (0.01, 0.05), "bf16": (0.01, 0.05)}   # standard deviations, relative
LENGTHS = 5, 20, 60, 200                                     # of the prompts
UNTIED = rl.DecoderConfig(family="qwen3", vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=3,
                          num_heads=4, num_kv_heads=2, head_dim=32, tie_embeddings=False, max_positions=512)


def models(folder):
    """name -> (model, float32 parameters)."""
    tied, params = rl.load_pretrained(folder)
    assert tied.config.tie_embeddings, f"{folder} has a head of its own; a tied one is needed"
    untied = rl.Decoder(UNTIED)
    return {"tied": (tied, params), "untied": (untied, rl.init_params(untied, jax.random.key(0)))}


def change(params, share, seed=1):
    """Each weight times 1 + `share` times a normal number of its own."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x * (1 + share * generator.standard_normal(x.shape)), x.dtype), params)


def make_prompts(vocab_size):
    generator = np.random.default_rng(0)
    return padded([generator.integers(3, vocab_size, length).tolist() for length in LENGTHS])


def measure(engine, python, precision, model, params, tokens):
    """A row for each change, and the engine's facts."""
    prompts, greedy = make_prompts(model.config.vocab_size), rl.SamplingConfig(tokens, temperature=0.0, group_size=1)
    versions = [params, *(change(params, share) for share in CHANGES[precision])]

    def draws(*versions):
        with closing(open_engine(engine, python, precision, model, len(LENGTHS), max(LENGTHS) + tokens)) as one:
            return [one.sample(version, *prompts, greedy) for version in versions], one.facts

    (before, *loaded), facts = draws(*versions)
    rows = []
    for share, weights, old, new in zip(CHANGES[precision], versions[1:], [before, *loaded], loaded):
        (fresh,), _ = draws(weights)
        same, gap = compare(new, fresh)
        same_before, gap_before = compare(old, fresh)
        rows.append({"change": share, "prompts": len(LENGTHS), "ids_equal_before": same_before,
                     "max_diff_before": gap_before, "ids_equal": same, "max_diff": gap, "bound": BOUNDS[precision],
                     "right": gap_before > 0 and same == len(LENGTHS) and gap <= BOUNDS[precision]})
    return rows, facts


def compare(one, other):
    """How many rows have the same ids in both, and the largest difference of log-probs, column by column."""
    same = np.all(np.asarray(one.tokens) == np.asarray(other.tokens), axis=1)
    return int(same.sum()), float(np.max(np.abs(np.asarray(one.logprobs) - np.asarray(other.logprobs))))


def main():
    parser = parser_of(__doc__, tokens=16)
    parser.add_argument("--model", required=True, help="a Hugging Face folder with tied embeddings")
    parser.add_argument("--vllm-python", help="an interpreter with vLLM; without it vLLM is left out")
    parser.add_argument("--models", nargs="+", choices=("tied", "untied"), default=("tied", "untied"))
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--precisions", nargs="+", choices=tuple(BOUNDS), default=tuple(BOUNDS))
    given = parser.parse_args()
    engines = [name for name in given.engines if name != "vllm" or given.vllm_python]
    facts = {"tokens": given.tokens, "prompt_lengths": LENGTHS, "engines": {}}
    rows, facts = [], circumstances() | facts
    for kind, (model, params) in models(given.model).items():
        if kind not in given.models:
            continue
        for engine in engines:
            for precision in given.precisions:
                found, about = measure(engine, given.vllm_python, precision, model, params, given.tokens)
                facts["engines"][engine] = about
                rows += [{"model": kind, "engine": engine, "precision": precision, **row} for row in found]
                every = put("engine_weights", rows, facts, ("model", "engine", "precision"))
    print_table("engine_weights", every)
    return 0 if all(row["right"] for row in every) else 1


if __name__ == "__main__":
    sys.exit(main())
