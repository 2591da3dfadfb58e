"""What each remedy of `NumericsConfig` buys against the mismatch of sampler and scorer, and what it costs.

n: prompts.  P: prompt columns.
"""

from __future__ import annotations

import dataclasses
from functools import partial
import time

import jax

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models.attention import PACKABLE
from jaxrl_fp16.objectives import mismatch_metrics
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import make_sampler

# One at a time, all else as it is by default.
REMEDIES = {
    "none": {}, "excess_precision off": {"excess_precision": False}, "float32_head": {"float32_head": True},
    "float32_weights": {"float32_weights": True}, "float32_residual": {"float32_residual": True},
    "float32_cache": {"float32_cache": True}, "decode_rows 64": {"decode_rows": 64},
}


def measure_remedies(model, params, prompts, mask, key, policy, sampling, *, eos_id, pad_id, remedies=None, repeats=2):
    """What each remedy does to the difference of sampler and scorer, and what it costs.

    prompts int32 [n,P] and their mask, left-padded; sampling: a `SamplingConfig` of whole distributions;
    remedies: fields of NumericsConfig by name, REMEDIES where None. Each samples with
    the same key and scores what it drew. Returns one dict each: name, `token_kl` (k3),
    `abs_diff_max`, `float32_kl` of the sampler against the float32 scorer on the same tokens,
    `sampler_seconds` and `scorer_seconds` of CPU time, the least of `repeats` after the compile.
    """
    exact, rows = get_precision("fp32").policy, []
    # A vendor's kernel computes in half precision alone.
    reference = model if model.attention in PACKABLE else model.clone(attention="blockwise")
    for name, fields in (REMEDIES if remedies is None else remedies).items():
        changed = model.clone(numerics=dataclasses.replace(model.numerics, **fields))
        sample = make_sampler(changed, policy, sampling, eos_id=eos_id, pad_id=pad_id)
        rollout, sampler_seconds = _timed(partial(sample, params, prompts, mask, key), repeats)
        score = partial(token_logprobs, changed, params, rollout.tokens, rollout.mask, policy=policy,
                        temperature=sampling.temperature)
        scored, scorer_seconds = _timed(score, repeats)
        true = token_logprobs(reference, params, rollout.tokens, rollout.mask, policy=exact,
                              temperature=sampling.temperature)
        found = mismatch_metrics(rollout.logprobs, scored, rollout.response_mask)
        distance = mismatch_metrics(rollout.logprobs, true, rollout.response_mask)
        rows.append({
            "remedy": name, "token_kl": float(found["mismatch/kl_k3"]),
            "abs_diff_max": float(found["mismatch/logprob_abs_diff_max"]),
            "float32_kl": float(distance["mismatch/kl_k3"]),
            "sampler_seconds": sampler_seconds, "scorer_seconds": scorer_seconds,
        })
    return rows


def _timed(call, repeats):
    """(its result, least CPU seconds of a call after the first)."""
    result, seconds = jax.block_until_ready(call()), []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(call())
        seconds.append(time.process_time() - start)
    return result, min(seconds)
