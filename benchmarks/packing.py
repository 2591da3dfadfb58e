"""Tokens per second of CPU time: supervised steps on packed rows against one example a row.

    JAX_PLATFORMS=cpu python benchmarks/packing.py [--examples 48] [--columns 512] [--repeats 3]

The same ragged examples, each once, through forward, backward, clipping by norm
and AdamW: padded to `columns`, and packed into as few rows as hold them all. Only
real tokens count. Loss and gradient norm of the two are compared in the same run.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrl_fp16 as rl
from jaxrl_fp16.packing import pack
from jaxrl_fp16.training.updates.sft_update import SFTRows, make_sft_update
from record import record
from timing import add_ratios, alternate
from workload import MODEL, VOCAB, make_params

LEARNING_RATE, MAX_NORM, PROMPT = 1e-6, 1.0, 8


def make_examples(count, columns):
    """Right-padded tokens, mask, loss_mask [n,T]: lengths log-normal around a fifth of the columns, as texts are."""
    generator = np.random.default_rng(0)
    sizes = np.clip(generator.lognormal(np.log(columns / 5), 0.6, count).astype(int), 2 * PROMPT, columns)
    at = np.arange(columns)
    mask = at < sizes[:, None]
    return generator.integers(2, VOCAB, mask.shape).astype(np.int32), mask, mask & (at >= PROMPT)


def pack_all(examples, multiple):
    """All examples in the fewest rows, a multiple of `multiple`, that hold them."""
    rows = multiple
    while True:
        packed, count = pack(*examples, rows)
        if count == len(examples[0]):
            return packed
        rows += multiple


def make_step(precision, params, pairs, size):
    """A function that takes one step, and the metrics of the last."""
    chosen, metrics = rl.get_precision(precision), {}
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(LEARNING_RATE))
    update = make_sft_update(MODEL, chosen.policy, optimizer, microbatch_size=size)
    state = rl.init_train_state(jax.tree.map(jnp.copy, params), optimizer, chosen.loss_scale, jax.random.key(0))
    pairs = jax.tree.map(jnp.asarray, pairs)

    def step():
        nonlocal state
        state, found = jax.block_until_ready(update(state, pairs))
        metrics.update({name: float(value) for name, value in found.items()})
        assert metrics["skipped"] == 0

    return step, metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--microbatch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    params, examples = make_params(), make_examples(given.examples, given.columns)
    batches = {"padded": SFTRows(*examples), "packed": SFTRows(*pack_all(examples, given.microbatch))}
    made = {f"{how} {precision}": (make_step(precision, params, pairs, given.microbatch), pairs)
            for precision in ("fp32", "fp16") for how, pairs in batches.items()}
    tokens = int(examples[1].sum())
    rows = alternate({name: step for name, ((step, _), _) in made.items()}, given.repeats, tokens)
    for row in rows:
        (_, metrics), pairs = made[row["program"]]
        row |= {"rows": len(pairs.mask), "filled": float(pairs.mask.mean()),
                "loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
    rows = [row for precision in ("fp32", "fp16")
            for row in add_ratios([row for row in rows if row["program"].endswith(precision)], "padded")]
    print(record("packing", rows, vars(given) | {"tokens": tokens}))


if __name__ == "__main__":
    main()
