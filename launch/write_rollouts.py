#!/usr/bin/env python3
"""Rollouts of another engine, as a file that `jaxrl-fp16 mismatch CONFIG --rollouts FILE` scores (docs/rollouts.md).

It needs no jaxrl_fp16. As a command, in an interpreter with Transformers, it samples and writes:

    python launch/write_rollouts.py MODEL PROMPTS OUT.jsonl --dtype bfloat16 --max-new-tokens 128

MODEL is a Hugging Face folder. PROMPTS is JSONL whose rows have `prompt`: a list of ids, as in files of this format, or
a text, which is encoded as it is, without a chat template. Or it is a file of `mismatch`, such as
RUN/rollouts/fp16.npz, for the prompts of its rows. As a module it writes what any engine drew (`write_rollouts`), and
takes what it needs out of vLLM's results (`rows_of_vllm`).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from pathlib import Path
import sys

FORMAT = "jaxrl_fp16 engine rollouts 1"
DTYPES = ("float16", "bfloat16", "float32")


def write_rollouts(path, rows, *, engine, version, dtype, temperature, vocab_size, model=None):
    """Writes the file in one piece; gives the number of rows.

    Args:
      rows: of each response `(prompt ids, response ids, log-probs of those, whether it ended by itself)`. A log-prob is
        the natural logarithm of the probability with which the engine drew the id: at `temperature`, of all ids.
      engine, version: of the program that drew them, such as "vllm" and "0.32.0".
      dtype: float16, bfloat16 or float32, in which the engine computed.
      vocab_size: of the model's `config.json`.
      model: which model it was, for people who read the file.

    Raises ValueError for a row without an id, with another number of log-probs, or with one that is not finite.
    """
    head = {"format": FORMAT, "engine": engine, "version": version, "dtype": dtype, "temperature": temperature,
            "vocab_size": vocab_size}
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    lines = [json.dumps(head | ({} if model is None else {"model": model}))]
    for number, row in enumerate(rows):
        prompt, response, logprobs, finished = row
        prompt, response, logprobs = [*map(int, prompt)], [*map(int, response)], [*map(float, logprobs)]
        if not prompt or not response or len(response) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise ValueError(f"row {number} has {len(prompt)} ids of a prompt, {len(response)} of a response and "
                             f"{sum(map(math.isfinite, logprobs))} finite log-probs; allowed: one or more, and a "
                             "finite log-prob for each id of the response")
        lines.append(json.dumps({"prompt": prompt, "response": response, "logprobs": logprobs,
                                 "finished": bool(finished)}))
    if len(lines) == 1:
        raise ValueError("there are no rows; allowed: one or more")
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    os.replace(temporary, path)
    return len(lines) - 1


def rows_of_vllm(outputs):
    """The rows of what `LLM.generate` gave: a list of vLLM's RequestOutput, with or without flat log-probs.

    They are right only with `LLM(logprobs_mode="processed_logprobs", generation_config="vllm")` and
    `SamplingParams(logprobs=0, top_k=0, top_p=1.0)`: vLLM's default log-probs are those at temperature 1.
    """
    for output in outputs:
        for one in output.outputs:
            if one.logprobs is None:
                raise ValueError("vLLM gave no log-probs; allowed: SamplingParams(logprobs=0)")
            logprobs = [ids[token].logprob for ids, token in zip(one.logprobs, one.token_ids, strict=True)]
            yield output.prompt_token_ids, one.token_ids, logprobs, one.finish_reason == "stop"


def vocab_size_of(folder):
    """`vocab_size` of a model folder's `config.json`."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]


# -- sampling with Transformers ----------------------------------------------------------------------


def read_prompts(path, encode):
    """A list of lists of ids. `encode` turns a text into ids."""
    if str(path).endswith(".npz"):
        import numpy as np

        with np.load(path, allow_pickle=False) as file:
            tokens, prompt = file["tokens"], file["mask"] & ~file["response_mask"]
        return [row[real].tolist() for row, real in zip(tokens, prompt)]
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    prompts = [row["prompt"] for row in rows if "format" not in row]
    return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def sample_with_transformers(folder, prompts, *, dtype, samples, max_new_tokens, temperature, seed, rows_at_once):
    """Rows as `write_rollouts` takes them, `samples` of each of `prompts`, by `generate` of Transformers."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).eval()
    given = model.generation_config
    ends = given.eos_token_id if given.eos_token_id is not None else model.config.eos_token_id
    ends = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    pad = given.pad_token_id if given.pad_token_id is not None else min(ends, default=0)
    # The folder's own defaults, such as a top_k, would change what is sampled.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None, pad_token_id=pad, return_dict_in_generate=True, output_scores=True,
    )
    torch.manual_seed(seed)
    todo = [prompt for prompt in prompts for _ in range(samples)]
    for start in range(0, len(todo), rows_at_once):
        some = todo[start:start + rows_at_once]
        width = max(map(len, some))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in some])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in some])
        with torch.no_grad():
            found = model.generate(ids, attention_mask=mask)
        drawn = found.sequences[:, width:]
        # Scores are logits after the temperature; with top_k 0 and top_p 1 those of all ids.
        logprobs = torch.stack([scores.float().log_softmax(-1).gather(-1, drawn[:, at, None])[:, 0]
                                for at, scores in enumerate(found.scores)], 1)
        for prompt, response, values in zip(some, drawn.tolist(), logprobs.tolist()):
            length = next((at + 1 for at, token in enumerate(response) if token in ends), len(response))
            yield prompt, response[:length], values[:length], response[length - 1] in ends


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("prompts", help="JSONL whose rows have `prompt`, or a .npz of `mismatch`")
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-at-once", type=int, default=8)
    asked = parser.parse_args(argv)

    import transformers

    @functools.cache
    def tokenizer():    # not AutoTokenizer, which changes what some folders' tokenizer.json says
        return transformers.PreTrainedTokenizerFast.from_pretrained(asked.model, local_files_only=True)

    def encode(text):
        return tokenizer().encode(text, add_special_tokens=False)

    rows = sample_with_transformers(
        asked.model, read_prompts(asked.prompts, encode), dtype=asked.dtype, samples=asked.samples,
        max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, seed=asked.seed,
        rows_at_once=asked.rows_at_once,
    )
    count = write_rollouts(
        asked.output, rows, engine="transformers", version=transformers.__version__, dtype=asked.dtype,
        temperature=asked.temperature, vocab_size=vocab_size_of(asked.model), model=asked.model,
    )
    print(f"{asked.output}: {count} responses in {asked.dtype}")


if __name__ == "__main__":
    main(sys.argv[1:])
