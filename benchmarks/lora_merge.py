"""What merging adapters into half precision for sampling, and taking them out again, does to the weights.

    JAX_PLATFORMS=cpu python benchmarks/lora_merge.py [--steps 1000] [--precisions fp16 bf16 fp32]

A tiny model is trained by GRPO and sampled from after every step, with adapters beside frozen weights, as this library
does. Beside it the weights of another run: in it each sampling adds the same adapters' product to the weights, in the
weights' dtype, and takes it off again. `changed`: frozen weights with another value than at the start.
`drift`: mean of what they moved over the mean of their sizes. `kl_k3`: of a policy of the moved weights and the same
adapters, against the one of the weights as they were, on the last rollout.

Writes `results/lora_merge.json`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrl_fp16 as rl
from record import record
from timing import parser_of

CONFIG = rl.DecoderConfig(family="qwen2", vocab_size=32, hidden_size=64, intermediate_size=128, num_layers=2,
                          num_heads=4, num_kv_heads=2, head_dim=16, tie_embeddings=True)
MODEL = rl.Decoder(CONFIG, lora=rl.LoraConfig(rank=8, alpha=16))
ROWS, GROUP, PROMPT, TOKENS = 8, 4, 4, 8
WANTED = 7  # the token that earns a reward


@jax.jit
def merged_and_back(base, lora):
    """`base` after its kernels' adapters were added in its dtype and taken off again."""
    _, product = rl.merge_lora(MODEL, {"base": base, "lora": lora}, jax.tree.map(jnp.zeros_like, base))

    def both(weights, part):
        part = part.astype(weights.dtype)
        return (weights + part) - part if part.ndim > 2 else weights

    return jax.tree.map(both, base, product)


def train(precision, steps):
    """`(parameters at the start, at the end, the other run's base, the last rollout)`."""
    chosen = rl.get_precision(precision)
    optimizer, algorithm = optax.adamw(3e-3, weight_decay=0.0), rl.get_algorithm("grpo")
    params = rl.init_lora(MODEL, rl.init_params(MODEL, jax.random.key(0)), jax.random.key(1), policy=chosen.policy)
    first = jax.tree.map(np.array, params["base"])
    state = rl.init_train_state(params, optimizer, chosen.loss_scale, jax.random.key(2))
    update = rl.make_update(MODEL, chosen.policy, algorithm, optimizer, microbatch_size=ROWS * GROUP)
    sample = rl.make_sampler(MODEL, chosen.policy, rl.SamplingConfig(max_new_tokens=TOKENS, group_size=GROUP),
                             eos_id=-1, pad_id=0)
    other = state.params["base"]
    for step in range(steps):
        keys = jax.random.split(jax.random.key(step), 2)
        prompts = jax.random.randint(keys[0], (ROWS, PROMPT), 2, CONFIG.vocab_size)
        rollout = sample(state.params, prompts, jnp.ones(prompts.shape, bool), keys[1])
        other = merged_and_back(other, state.params["lora"])
        rewards = jnp.mean((rollout.tokens == WANTED) & rollout.response_mask.astype(bool), axis=1)
        batch = rl.Batch(
            tokens=rollout.tokens, mask=rollout.mask, response_mask=rollout.response_mask,
            rollout_logprobs=rollout.logprobs, old_logprobs=rollout.logprobs,
            advantages=rl.group_advantages(rewards, group_size=GROUP, kind="group_std"),
        )
        state, _ = update(state, batch)
    return first, state.params, other, rollout


def measure(precision, steps):
    first, params, other, rollout = train(precision, steps)
    policy = rl.get_precision(precision).policy
    score = lambda params: rl.token_logprobs(MODEL, params, rollout.tokens, rollout.mask, policy=policy)
    rows = []
    for name, base in (("never merged", params["base"]), ("merged at every step", other)):
        moved, size, changed, count = 0.0, 0.0, 0, 0
        for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(base)):
            before, after = np.float64(before), np.float64(np.asarray(after))
            if before.ndim > 2:
                moved, size = moved + np.abs(after - before).sum(), size + np.abs(before).sum()
            changed, count = changed + int((after != before).sum()), count + before.size
        found = rl.mismatch_metrics(score(params), score({**params, "base": base}), rollout.response_mask)
        rows.append({"precision": precision, "run": name, "steps": steps, "changed": changed, "of": count,
                     "drift": moved / size, "kl_k3": float(found["mismatch/kl_k3"])})
    return rows


def main():
    parser = parser_of(__doc__, steps=1000)
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16", "fp32"])
    given = parser.parse_args()
    print(record("lora_merge", [row for name in given.precisions for row in measure(name, given.steps)], vars(given)))


if __name__ == "__main__":
    main()
