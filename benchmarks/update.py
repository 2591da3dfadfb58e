"""Positions per second of CPU time: our update against the same one in plain PyTorch, on one core.

    JAX_PLATFORMS=cpu python benchmarks/update.py [--rows 64] [--tokens 128] [--repeats 5]

One optimizer step of GRPO's clipped loss on the same weights and rows, without padding: forward, backward, clipping by
norm, AdamW. PyTorch runs Transformers' model as it comes, without rematerialisation; of its microbatch sizes the
fastest counts. Ours runs without rematerialisation as well, there also with half of the microbatch, as PyTorch does.
bf16 of PyTorch is autocast over float32 weights. `of_matmul`: 6 FLOP a parameter and position over the rate of a
float32 matmul of 2,048 cubed, measured in the same turns.
"""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jaxrl_fp16 as rl
from record import record
from sampler import DTYPES, in_torch
from timing import add_ratios, alternate, parser_of, use_one_core
from workload import MODEL, make_full_batch, make_params

CLIP, LEARNING_RATE, MAX_NORM = 0.2, 1e-6, 1.0
SIDE = 2048


def bound(rows, positions, width):
    """`make_update`'s arguments that bound a microbatch: at most `rows` rows and `positions` positions.

    A commit whose update knows rows alone takes as many of the full `width` as the positions allow.
    """
    if "microbatch_tokens" in inspect.signature(rl.make_update).parameters:
        return {"microbatch_size": rows, "microbatch_tokens": positions}
    return {"microbatch_size": max(positions // width, 1)}


def make_step(model, precision, params, loss_scale=None, **bounds):
    """`(update, state)` of one optimizer step of GRPO; loss_scale: a LossScaleConfig, None: the usual one."""
    chosen = rl.get_precision(precision, loss_scale or rl.LossScaleConfig())
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0))
    update = rl.make_update(model, chosen.policy, rl.get_algorithm("grpo"), optimizer, **bounds)
    return update, rl.init_train_state(params, optimizer, chosen.loss_scale, jax.random.key(0))


def ours(model, precision, params, batch, **settings):
    """A function that takes a step and returns the batch's real positions; settings: of `make_step`."""
    update, state = make_step(model, precision, params, **settings)
    positions, batch = int(batch.mask.sum()), jax.tree.map(jnp.asarray, batch)

    def run():
        nonlocal state
        state, metrics = jax.block_until_ready(update(state, batch))
        assert float(metrics["skipped"]) == 0
        return positions

    return run


def score_in_torch(model, tokens, mask):
    """Log-probs [B,T-1] of the tokens after the first."""
    logits = model(tokens, attention_mask=mask.long(), use_cache=False).logits[:, :-1].float()
    return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def theirs(model, precision, batch, size):
    """Likewise of a PyTorch model of float32 weights; `precision` is that of autocast."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    tokens, mask, response, old, advantages = (
        torch.from_numpy(np.ascontiguousarray(x)) for x in
        (batch.tokens.astype(np.int64), batch.mask, batch.response_mask, batch.old_logprobs, batch.advantages)
    )
    count, positions = len(tokens), int(batch.mask.sum())

    def share(rows):
        """This microbatch's share of the loss: `sequence_mean` of the clipped surrogate."""
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logprobs = score_in_torch(model, tokens[rows], mask[rows])
        ratio, scale = torch.exp(logprobs - old[rows, 1:]), advantages[rows, None]
        loss = -torch.minimum(ratio * scale, ratio.clamp(1 - CLIP, 1 + CLIP) * scale)
        seen = response[rows, 1:]
        return ((loss * seen).sum(1) / seen.sum(1)).sum() / count

    def run():
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, count, size):
            share(slice(start, start + size)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return positions

    return run


def matmul():
    """A function that multiplies two float32 matrices of 2,048 squared, and returns its FLOP."""
    a, b = (jax.random.normal(jax.random.key(seed), (SIDE, SIDE)) for seed in (0, 1))
    run = jax.jit(jnp.dot)

    def multiply():
        run(a, b).block_until_ready()
        return 2 * SIDE**3

    return multiply


def of_matmul(rows, parameters):
    """The rows without that of `matmul`, and what share of its rate each reaches."""
    rate = next(row["positions_per_cpu_second"] for row in rows if row["program"] == "matmul")
    return [{**row, "of_matmul": 6 * parameters * row["positions_per_cpu_second"] / rate}
            for row in rows if row["program"] != "matmul"], {"matmul_flop_per_cpu_second": rate}


def main():
    given = parser_of(__doc__, rows=64, tokens=128, repeats=5, microbatch=8).parse_args()
    use_one_core()
    torch.set_num_threads(1)
    params = make_params()
    batch = make_full_batch(given.rows, given.tokens)
    programs = {"matmul": matmul()}
    half = max(given.microbatch // 2, 1)
    settings = {"": (True, given.microbatch), ", no remat": (False, given.microbatch),
                f", no remat, microbatch {half}": (False, half)}
    for told, (remat, size) in settings.items():
        programs |= {f"jaxrl_fp16 {name}{told}": ours(MODEL.clone(remat=remat), name, params, batch,
                                                      microbatch_size=size) for name in ("fp32", "fp16", "bf16")}
    sizes = sorted({half, given.microbatch, 2 * given.microbatch, given.rows})
    programs |= {f"pytorch {name}, microbatch {size}": theirs(in_torch(MODEL, params), name, batch, size)
                 for name in DTYPES for size in sizes}
    rows, facts = of_matmul(alternate(programs, given.repeats, unit="positions"), count(params))
    print(record("update", add_ratios(rows, "pytorch fp32", "positions"), vars(given) | facts))


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
