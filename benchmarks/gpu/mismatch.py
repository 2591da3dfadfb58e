"""On a GPU: how far sampler, scorer and gradient program are apart at equal weights, by model, precision, attention.

    python benchmarks/gpu/mismatch.py [--models 0.5B 1.5B] [--rows 64] [--columns 64] [--tokens 192]

`sampler_scorer`: k3 of the sampler's log-probs and the scorer's, on the tokens that the sampler drew.
`scorer_gradient`: the same of the scorer's and those that the update's gradient program has. Weights are random:
logits have the standard deviation 3.
"""

import jax
import numpy as np
import optax

import jaxrl_fp16 as rl
from qwen import EOS, PAD, Results, arguments, decoder, params_of, prompts


def measure(model, params, precision, rows, columns, tokens, micro):
    chosen = rl.get_precision(precision)
    sampling = rl.SamplingConfig(max_new_tokens=tokens, group_size=1)
    sample = rl.make_sampler(model, chosen.policy, sampling, eos_id=EOS, pad_id=PAD)
    rollout = sample(params, *prompts(model.config, rows, columns), jax.random.key(1))
    scored = np.concatenate([
        np.asarray(rl.token_logprobs(model, params, rollout.tokens[at:at + micro], rollout.mask[at:at + micro],
                                     policy=chosen.policy)) for at in range(0, rows, micro)
    ])
    seen = np.asarray(rollout.response_mask)
    batch = rl.Batch(
        tokens=rollout.tokens, mask=rollout.mask, response_mask=rollout.response_mask,
        rollout_logprobs=rollout.logprobs, old_logprobs=scored,
        advantages=np.random.default_rng(0).normal(size=rows).astype(np.float32),
    )
    optimizer = optax.sgd(0.0)
    update = rl.make_update(model, chosen.policy, rl.get_algorithm("grpo"), optimizer, microbatch_size=micro,
                            keep_logprobs=True, frozen=True)
    state = rl.init_train_state(jax.tree.map(lambda x: x.copy(), params), optimizer, chosen.loss_scale,
                                jax.random.key(0))
    _, metrics = update(state, batch)
    return {
        **apart("sampler_scorer", rollout.logprobs, scored, seen),
        **apart("scorer_gradient", scored, metrics["logprobs"], seen),
        "entropy": -float(np.asarray(rollout.logprobs)[seen].mean()), "finite": bool(metrics["skipped"] == 0),
    }


def apart(name, first, second, mask):
    found = rl.mismatch_metrics(np.asarray(first), np.asarray(second), mask)
    kept = {"kl": "kl_k3", "exact": "exact_fraction", "largest": "logprob_abs_diff_max", "prob": "prob_abs_diff_mean"}
    return {f"{name}_{key}": float(found[f"mismatch/{metric}"]) for key, metric in kept.items()}


def main():
    given = arguments(__doc__, models=["0.5B", "1.5B"], attention=["cudnn", "blockwise", "plain"],
                      precisions=["fp16", "bf16"], rows=64, columns=64, tokens=192, micro=16, name="gpu_mismatch")
    results = Results(given.name, vars(given))
    for shape in given.models:
        params = params_of(decoder(shape, "plain"))
        for attention in given.attention:
            for precision in given.precisions:
                results.add(
                    {"model": shape, "attention": attention, "precision": precision},
                    measure, decoder(shape, attention), params, precision, given.rows, given.columns, given.tokens,
                    given.micro,
                )


if __name__ == "__main__":
    main()
