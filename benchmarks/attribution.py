"""Where sampler and scorer come to differ, by module, and what each remedy buys alone.

    python benchmarks/attribution.py [--rows 64] [--tokens 128] [--share-rows 32] [--share-tokens 64] [--logit-std 3]

One row a precision, kind of attention and remedy; the file also holds every module's
differences and share for both precisions and kinds, of fewer and shorter rows.
"""

from __future__ import annotations

import argparse

import jax

import jaxrl_fp16 as rl
from jaxrl_fp16.lab.mismatch.attribution import attribute, shares_by
from record import record
from remedies import measure_remedies
from workload import EOS, MODEL, PAD, make_params, make_prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--share-rows", type=int, default=32)
    parser.add_argument("--share-tokens", type=int, default=64)
    parser.add_argument("--logit-std", type=float, default=3.0)
    given = parser.parse_args()
    params, key = make_params(given.logit_std), jax.random.key(1)
    rows, modules = [], {}
    for kind in ("blockwise", "plain"):
        model = MODEL.clone(attention=kind)
        for name in ("fp16", "bf16"):
            policy = rl.get_precision(name).policy
            measured = measure_remedies(
                model, params, *make_prompts(given.rows), key, policy, sampling_of(given.tokens), eos_id=EOS, pad_id=PAD
            )
            rows += [{"precision": name, "attention": kind, **row} for row in measured]
            modules[f"{name} {kind}"] = shares(model, params, policy, key, given.share_rows, given.share_tokens)
            print(record("attribution", rows, {**vars(given), "modules": modules}))


def sampling_of(tokens):
    return rl.SamplingConfig(max_new_tokens=tokens, group_size=1)


def shares(model, params, policy, key, rows, tokens):
    """What `attribute` finds, with its squared shares summed up by kind of module and by layer."""
    sample = rl.make_sampler(model, policy, sampling_of(tokens), eos_id=EOS, pad_id=PAD)
    found = attribute(model, params, sample(params, *make_prompts(rows), key), policy, literal=True)
    by_layer = {str(layer): part for layer, part in shares_by(found, "layer").items()}
    return {**found, "by_kind": shares_by(found, "kind"), "by_layer": by_layer}


if __name__ == "__main__":
    main()
