"""Tokens per second of CPU time: our update against the same one in plain PyTorch.

    JAX_PLATFORMS=cpu python benchmarks/update.py [--rows 64] [--tokens 128] [--repeats 5]

One optimizer step of GRPO's clipped loss on the same weights and rows: forward,
backward, clipping by norm, AdamW. PyTorch runs Transformers' model as it comes,
without rematerialisation; of its microbatch sizes the fastest counts.
"""

from __future__ import annotations

import os
import tempfile

# PyTorch's idle threads sleep: their spinning at barriers would count as its CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

import jaxrl_fp16 as rl
from record import record
from timing import add_ratios, alternate, arguments
from workload import MODEL, PROMPT, VOCAB, make_params, make_prompts

CLIP, LEARNING_RATE, MAX_NORM = 0.2, 1e-6, 1.0


def make_batch(rows, tokens):
    """A `Batch` of NumPy arrays: ragged prompts on the left, whole responses."""
    generator = np.random.default_rng(0)
    prompts, mask = make_prompts(rows)
    response = np.arange(PROMPT + tokens) >= PROMPT
    drawn = generator.integers(2, VOCAB, (rows, tokens))
    logprobs = np.full((rows, PROMPT + tokens), -np.log(VOCAB), np.float32)
    return rl.Batch(
        tokens=np.concatenate([prompts, drawn], axis=1).astype(np.int32),
        mask=np.pad(mask, ((0, 0), (0, tokens)), constant_values=True),
        response_mask=np.broadcast_to(response, logprobs.shape), rollout_logprobs=logprobs, old_logprobs=logprobs,
        advantages=generator.normal(size=rows).astype(np.float32),
    )


def ours(precision, params, batch, size, remat=True):
    chosen = rl.get_precision(precision)
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0))
    update = rl.make_update(MODEL.clone(remat=remat), chosen.policy, rl.get_algorithm("grpo"), optimizer,
                            microbatch_size=size)
    state = rl.init_train_state(params, optimizer, chosen.loss_scale, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, batch)

    def run():
        nonlocal state
        state, metrics = jax.block_until_ready(update(state, batch))
        assert float(metrics["skipped"]) == 0

    return run


def theirs(params, batch, size):
    with tempfile.TemporaryDirectory() as folder:
        rl.save_pretrained(f"{folder}/model", MODEL, params, dtype="float32")
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    tokens, mask, response, old, advantages = (
        torch.from_numpy(np.ascontiguousarray(x)) for x in
        (batch.tokens.astype(np.int64), batch.mask, batch.response_mask, batch.old_logprobs, batch.advantages)
    )
    count = len(tokens)

    def share(rows):
        """This microbatch's share of the loss: `sequence_mean` of the clipped surrogate."""
        logits = model(tokens[rows], attention_mask=mask[rows].long(), use_cache=False).logits[:, :-1]
        targets, seen = tokens[rows, 1:], response[rows, 1:]
        logprobs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        ratio, scale = torch.exp(logprobs - old[rows, 1:]), advantages[rows, None]
        loss = -torch.minimum(ratio * scale, ratio.clamp(1 - CLIP, 1 + CLIP) * scale)
        return ((loss * seen).sum(1) / seen.sum(1)).sum() / count

    def run():
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, count, size):
            share(slice(start, start + size)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return run


def main():
    given = arguments(__doc__, torch.get_num_threads())
    torch.set_num_threads(given.torch_threads)
    params, batch = make_params(), make_batch(given.rows, given.tokens)
    programs = {f"jaxrl_fp16 {name}": ours(name, params, batch, 8) for name in ("fp32", "fp16", "bf16")}
    programs["jaxrl_fp16 fp32, no remat"] = ours("fp32", params, batch, 8, remat=False)
    sizes = (8, 16, given.rows)
    programs |= {f"pytorch fp32, microbatch {size}": theirs(params, batch, size) for size in sizes}
    rows = alternate(programs, given.repeats, batch.tokens.size)
    print(record("update", add_ratios(rows, "pytorch"), vars(given)))


if __name__ == "__main__":
    main()
