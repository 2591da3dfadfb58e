"""One engine, whichever it is, for benchmarks: our sampler in this process, or a process of its own with weights."""

from __future__ import annotations

from functools import lru_cache
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxrl_fp16 as rl
from jaxrl_fp16.engines import KINDS, Engine, RolloutConfig, make_rollout
from record import ROOT, save

NAMES = "jit", *KINDS
PAD = 0
RESULTS = ROOT / "benchmarks" / "results"


class Direct(Engine):
    """An engine whose first weights are those that it is given: no other ones to see a synchronisation act."""

    def _see_it_act(self, params):
        self._acts = True


@lru_cache
def sampler(precision, model, sampling):
    """Our own, compiled once: it is a function that keeps nothing."""
    end = model.config.vocab_size  # which no row draws
    return rl.make_sampler(model, rl.get_precision(precision).policy, sampling, eos_id=end, pad_id=PAD)


class Jit:
    """Our own sampler."""

    def __init__(self, precision, model):
        self.precision, self.model, self.facts = precision, model, {}

    def sample(self, params, tokens, mask, sampling, seed=0):
        run = sampler(self.precision, self.model, sampling)
        return run(params, jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(seed))

    def close(self):
        """There is no process to end."""


class Other:
    """One of KINDS under the interpreter `python`."""

    def __init__(self, name, python, precision, model, rows, length):
        settings = {"dtype": rl.get_precision(precision).policy.compute_dtype.name, "device": "cpu", "seed": 0,
                    "memory_fraction": 0.4, "max_length": length, "max_rows": rows}
        self.engine = Direct(RolloutConfig(engine=name, deadline_seconds=3600), python, model, settings, print)

    @property
    def facts(self):
        return self.engine.facts

    def sample(self, params, tokens, mask, sampling, seed=0):
        prompts = [row[real].tolist() for row, real in zip(tokens, mask)]
        return make_rollout(tokens, mask, self.engine.draw(params, prompts, sampling, seed, ()), PAD)

    def close(self):
        self.engine.close()


def open_engine(name, vllm_python, precision, model, rows, length):
    """An engine of `NAMES`: `sample(params, tokens, mask, sampling, seed) -> Rollout`, `facts`, `close()`.

    Prompts are left-padded, int32 [n,P] with their mask; no row ends before `max_new_tokens`.
    rows: that are drawn at once. length: of the longest prompt with its response, in tokens.
    """
    if name == "jit":
        return Jit(precision, model)
    return Other(name, vllm_python if name == "vllm" else sys.executable, precision, model, rows, length)


def put(name, rows, facts, keys):
    """Writes `rows` and `facts` as a result, and returns all its rows: those of an earlier run with other values of
    `keys` stay, with the facts of its engines."""
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {"rows": [], "engines": {}}
    own = {tuple(row[key] for key in keys) for row in rows}
    rows = [row for row in earlier["rows"] if tuple(row[key] for key in keys) not in own] + rows
    save(name, rows, facts | {"engines": earlier["engines"] | facts["engines"]})
    return rows


def padded(prompts):
    """Lists of ids left-padded: int32 [n,P] and their mask."""
    width = max(map(len, prompts))
    tokens = np.array([[PAD] * (width - len(ids)) + list(ids) for ids in prompts], np.int32)
    return tokens, np.arange(width) >= width - np.array(list(map(len, prompts)))[:, None]


__all__ = ["NAMES", "open_engine", "padded", "put"]
