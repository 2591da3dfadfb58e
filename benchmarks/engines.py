"""How far engines and our scorer are apart at equal weights: each samples in a precision, and we score in the same.

    JAX_PLATFORMS=cpu python benchmarks/engines.py --model FOLDER --data FILE.jsonl [--vllm-python PATH]
        [--prompts 32] [--tokens 128] [--fp16-tokens 24] [--engines jit transformers vllm] [--seed 0]

FOLDER: a Hugging Face folder with a tokenizer and a chat template. FILE: JSON lines with a `problem`, which the
template makes a prompt of. Responses are drawn at temperature 1, one a prompt, and no row ends early. fp16-tokens: of
Transformers and vLLM in fp16, which PyTorch multiplies slowly on a CPU; `kl_k3_short` is of that many tokens in every
row, so that like is compared with like. Rows of an earlier run that are not measured again stay.
"""

from __future__ import annotations

from contextlib import closing
import json
from pathlib import Path
import sys
import time

import jax
import numpy as np

import jaxrl_fp16 as rl
from engine_figures import times
from engine_runs import NAMES, open_engine, padded, put
from record import circumstances, print_table
from timing import parser_of

PRECISIONS = "bf16", "fp16", "fp32"
FEWEST = 20     # times that BF16's token KL is to be FP16's
AT_ONCE = 8     # rows that the scorer takes
COLUMNS = {     # of the table -> metric
    "kl_k3": "kl_k3", "abs_diff_mean": "logprob_abs_diff_mean", "abs_diff_max": "logprob_abs_diff_max",
    "prob_diff": "prob_abs_diff_mean", "seq_log_ratio_std": "seq_log_ratio_std",
}


def read_prompts(tokenizer, path, count):
    """Left-padded chat prompts of the file's first problems."""
    with Path(path).open(encoding="utf-8") as lines:
        problems = [json.loads(next(lines))["problem"] for _ in range(count)]
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": problem}], tokenize=False,
                                           add_generation_prompt=True) for problem in problems]
    return padded(tokenizer(texts, add_special_tokens=False)["input_ids"])


def scorer(model, params, precision):
    """`rollout -> log-probs [B,T]`, a few rows at a time."""
    policy = rl.get_precision(precision).policy
    score = jax.jit(lambda *arrays: rl.token_logprobs(model, *arrays, policy=policy))

    def run(rollout):
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
        parts = [score(params, tokens[at: at + AT_ONCE], mask[at: at + AT_ONCE])
                 for at in range(0, len(tokens), AT_ONCE)]
        return np.concatenate([np.asarray(part) for part in parts])

    return run


def measure(rollout, scored, short):
    """The columns of a row: over all response tokens, and the KL of the first `short` ones."""
    response = np.asarray(rollout.response_mask)
    mu, first = np.asarray(rollout.logprobs), response & (np.cumsum(response, axis=1) <= short)
    found = {name: float(value) for name, value in rl.mismatch_metrics(mu, scored, response, prefix="all").items()}
    brief = float(rl.mismatch_metrics(mu, scored, first, prefix="short")["short/kl_k3"])
    return {name: found[f"all/{metric}"] for name, metric in COLUMNS.items()} | {"kl_k3_short": brief}


def main():
    parser = parser_of(__doc__, prompts=32, tokens=128, fp16_tokens=24, seed=0)
    parser.add_argument("--model", required=True, help="a Hugging Face folder with a tokenizer and a chat template")
    parser.add_argument("--data", required=True, help="JSON lines with a field `problem`")
    parser.add_argument("--vllm-python", help="an interpreter with vLLM; without it vLLM is left out")
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    given = parser.parse_args()
    model, params = rl.load_pretrained(given.model)
    prompts = read_prompts(rl.load_tokenizer(given.model), given.data, given.prompts)
    facts = {"model": Path(given.model).name, "data": Path(given.data).name, "seed": given.seed,
             "short": given.fp16_tokens, "engines": {}}
    rows, facts = [], circumstances() | facts
    for precision in given.precisions:
        score = scorer(model, params, precision)
        for name in given.engines:
            if name == "vllm" and not given.vllm_python:
                continue
            tokens = given.fp16_tokens if precision == "fp16" and name != "jit" else given.tokens
            sampling, began = rl.SamplingConfig(tokens, group_size=1), time.perf_counter()
            length = prompts[0].shape[1] + tokens
            with closing(open_engine(name, given.vllm_python, precision, model, given.prompts, length)) as engine:
                rollout = engine.sample(params, *prompts, sampling, given.seed)
                facts["engines"][name] = engine.facts
            took = time.perf_counter() - began
            rows.append({"engine": name, "precision": precision, "rows": given.prompts, "tokens": tokens,
                         **measure(rollout, score(rollout), given.fp16_tokens), "seconds": round(took)})
            every = put("engines", rows, facts, ("engine", "precision"))
    print_table("engines", every)
    print(found := times(every))
    return 1 if min(found.values(), default=FEWEST) < FEWEST else 0


if __name__ == "__main__":
    sys.exit(main())
