"""What the GPU's benchmarks run on: the shapes of Qwen2.5 with seeded random weights, and where results go.

Shapes: the config.json of Qwen/Qwen2.5-0.5B and Qwen/Qwen2.5-1.5B. `tiny` serves to try the scripts on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import statistics
import sys
import time

import jax
import numpy as np

import jaxrl_fp16 as rl

sys.path.insert(0, str(Path(__file__).parents[1]))

import record  # noqa: E402  benchmarks are scripts, no package

SHAPES = {
    "0.5B": dict(vocab_size=151_936, hidden_size=896, intermediate_size=4_864, num_layers=24, num_heads=14,
                 num_kv_heads=2, head_dim=64, rope_theta=1e6),
    "1.5B": dict(vocab_size=151_936, hidden_size=1_536, intermediate_size=8_960, num_layers=28, num_heads=12,
                 num_kv_heads=2, head_dim=128, rope_theta=1e6),
    "tiny": dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
                 head_dim=16),
}
PAD, EOS = 0, 1


def decoder(shape, attention, remat=True):
    config = rl.DecoderConfig(family="qwen2", tie_embeddings=True, norm_eps=1e-6, **SHAPES[shape])
    return rl.Decoder(config, attention=attention, remat=remat)


def sizes(config):
    """(weights of the layers, weights of the head): what a token is multiplied with."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * kv_heads + 3 * config.intermediate_size)
    return config.num_layers * layer, config.vocab_size * config.hidden_size


def prompts(config, rows, columns, seed=0):
    """Left-padded prompts, a quarter of the columns long or more: int32 [rows,columns] and their mask."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(columns // 4, columns + 1, rows)
    mask = np.arange(columns) >= columns - lengths[:, None]
    return np.where(mask, generator.integers(2, config.vocab_size, mask.shape), PAD).astype(np.int32), mask


def params_of(model, logit_std=3.0, seed=0):
    """Random parameters; the last norm is scaled so that logits have the standard deviation `logit_std`."""
    params = rl.init_params(model, jax.random.key(seed))
    tokens, mask = prompts(model.config, 2, 64)
    policy = rl.get_precision("fp32").policy
    plain = model.clone(attention="plain")
    factor = logit_std / float(np.std(np.asarray(rl.logits(plain, params, tokens, mask, policy))[mask]))
    return {**params, "final_norm": {"scale": factor * params["final_norm"]["scale"]}}


def seconds(run, repeats):
    """Median wall seconds of `run`, which waits for its device itself, after one run that compiles; fewer repeats
    once 15 seconds are spent."""
    began = time.perf_counter()
    run()
    first, spent = time.perf_counter() - began, []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
        if sum(spent) > 15:
            break
    return {"seconds": statistics.median(spent), "least": min(spent), "most": max(spent), "first": first}


class Results:
    """Rows of one file; each is on disk as soon as it is known, failures too."""

    def __init__(self, name, facts=None):
        self.name, self.rows = name, []
        self.folder = record.folder_of_results()
        self.facts = {**record.circumstances(), **(facts or {})}

    def add(self, row, measure=dict, *args):
        """`row` and what `measure(*args)` finds, or the first lines of its error."""
        print("...", row, flush=True)
        try:
            row = {**row, **measure(*args)}
        except Exception as error:  # a kernel that fails is a result
            row = {**row, "error": f"{type(error).__name__}: {error}"[:600]}
        self.rows.append(row)
        record.save(self.name, self.rows, self.facts, self.folder)
        print("   ", row, flush=True)


def arguments(doc, **flags):
    """Flags with a default each: a list takes several values."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    for name, default in flags.items():
        several = isinstance(default, list)
        kind = type(default[0] if several else default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, nargs="*" if several else None)
    return parser.parse_args()


__all__ = ["EOS", "PAD", "SHAPES", "Results", "arguments", "decoder", "params_of", "prompts", "seconds", "sizes"]
