"""Where a small trained model comes near the paper's mismatch: models by depth and width, precision and attention.

    JAX_PLATFORMS=cpu python benchmarks/sanity_settings.py [--models 4x128x420 ...] [--attention plain blockwise]

A model, LAYERSxWIDTHxSTEPS, is the one of `configs/sanity_mini_warm.yaml` in another shape, trained there in FP32
for so many supervised steps. Its own samples of training problems are scored twice in each precision: the tokens that
the sampler drew in that precision (`same`: one numerics), and those that it drew in FP32 (`fp32`: the sampler rounds
otherwise, so that the whole of the scorer's rounding shows).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxrl_fp16.config import load_config
import jaxrl_fp16 as rl
from jaxrl_fp16.tasks import open_task
from jaxrl_fp16.tokenizer import decode_responses, encode_prompts, end_ids, load_tokenizer, pad_id
from jaxrl_fp16.training.runs.run_config import Config
from presets import command, newest
from record import ROOT, record

CONFIG = ROOT / "configs" / "sanity_mini_warm.yaml"
HEAD_DIM = 16
COLUMNS = {
    "prob_diff": "prob_abs_diff_mean", "kl_k3": "kl_k3", "seq_std": "seq_log_ratio_std", "exact": "exact_fraction",
}


def trained(text, work):
    """The exported model of `text`, e.g. 4x128x420; trained where it is not there yet."""
    layers, width, steps = map(int, text.split("x"))
    folder = newest(work, text)
    if folder is None or not (folder / "model").is_dir():
        print(f"training {text}", flush=True)
        code, error = command("sft", CONFIG, work / f"{text}.log", **{
            "run.dir": work, "run.name": text, "sft.steps": steps, "model.num_layers": layers,
            "model.hidden_size": width, "model.intermediate_size": 4 * width, "model.num_heads": width // HEAD_DIM,
            "model.num_kv_heads": width // HEAD_DIM, "evaluation.every": 0, "logging.tensorboard": "false",
        })
        if code:
            raise SystemExit(f"training of {text} ended with {code}: {error}")
        folder = newest(work, text)
    return folder / "model"


def measure(folder, config, attention, prompts):
    """One row a precision and sampler, of the model in `folder`: two samples of each of the first problems."""
    model, params = rl.load_pretrained(folder, attention=attention, remat=False)
    tokenizer = load_tokenizer(folder)
    sampling = rl.SamplingConfig(max_new_tokens=config.sampling.max_new_tokens, group_size=2)
    ends = dict(eos_id=end_ids(tokenizer), pad_id=pad_id(tokenizer))
    with open_task(config.task) as task:
        examples = task.train[:prompts]
        tokens, mask, _ = encode_prompts(
            tokenizer, [example.problem for example in examples], config.training.max_prompt_tokens
        )
        rows, drawn = [], {}
        for precision in ("fp32", "bf16", "fp16"):
            policy = rl.get_precision(precision).policy
            drawn[precision] = rl.make_sampler(model, policy, sampling, **ends)(params, tokens, mask, jax.random.key(0))
            score = jax.jit(partial(rl.token_logprobs, model, policy=policy))
            for sampler in dict.fromkeys((precision, "fp32")):
                rollout = drawn[sampler]
                scored = score(params, rollout.tokens, rollout.mask)
                found = rl.mismatch_metrics(rollout.logprobs, scored, rollout.response_mask)
                rows.append({
                    "attention": attention, "scorer": precision, "sampler": sampler,
                    **{column: float(found[f"mismatch/{metric}"]) for column, metric in COLUMNS.items()},
                })
        rollout = drawn["fp32"]
        texts = decode_responses(tokenizer, rollout.tokens, rollout.response_mask)
        groups = [texts[i:i + 2] for i in range(0, len(texts), 2)]
        rewards = task.rewards([example.problem for example in examples], groups, examples)
    facts = {
        "accuracy": float(np.mean(rewards.values)),
        "nats_a_token": -float(np.sum(rollout.logprobs) / np.sum(rollout.response_mask)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    return [facts | row for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["2x128x400", "4x128x250", "4x128x420", "16x64x400"])
    parser.add_argument("--attention", nargs="+", choices=["plain", "blockwise"], default=["plain", "blockwise"])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "sanity_settings", help="trained models, logs")
    given = parser.parse_args()
    config = load_config(Config, CONFIG)
    given.work.mkdir(parents=True, exist_ok=True)
    rows = [
        {"model": text, **row}
        for text in given.models for attention in given.attention
        for row in measure(trained(text, given.work), config, attention, given.prompts)
    ]
    print(record("sanity_settings", rows, {"prompts": given.prompts}))


if __name__ == "__main__":
    main()
