"""Where sampler and scorer come to differ, by module, and what each remedy buys alone.

    python benchmarks/attribution.py [--rows 16] [--tokens 64] [--logit-std 3]

One row a precision, kind of attention and remedy; the file also holds every module's
differences and share for both precisions and kinds.
"""

from __future__ import annotations

import argparse

import jax

import jaxrl_fp16 as rl
from jaxrl_fp16.lab.attribution import attribute, shares_by
from jaxrl_fp16.lab.remedies import measure_remedies
from record import record
from workload import EOS, MODEL, PAD, make_params, make_prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--logit-std", type=float, default=3.0)
    given = parser.parse_args()
    params, (prompts, mask) = make_params(given.logit_std), make_prompts(given.rows)
    sampling, key = rl.SamplingConfig(max_new_tokens=given.tokens, group_size=1), jax.random.key(1)
    rows, modules = [], {}
    for kind in ("blockwise", "plain"):
        model = MODEL.clone(attention=kind)
        for name in ("fp16", "bf16"):
            policy = rl.get_precision(name).policy
            rollout = rl.make_sampler(model, policy, sampling, eos_id=EOS, pad_id=PAD)(params, prompts, mask, key)
            found = attribute(model, params, rollout, policy, literal=True)
            modules[f"{name} {kind}"] = {
                **found, "by_kind": shares_by(found, "kind"),
                "by_layer": {str(layer): part for layer, part in shares_by(found, "layer").items()},
            }
            measured = measure_remedies(model, params, prompts, mask, key, policy, sampling, eos_id=EOS, pad_id=PAD)
            rows += [{"precision": name, "attention": kind, **row} for row in measured]
            print(record("attribution", rows, {**vars(given), "modules": modules}))


if __name__ == "__main__":
    main()
