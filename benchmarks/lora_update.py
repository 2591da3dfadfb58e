"""A real model's update with adapters against one of all its weights: CPU seconds on one core, and memory.

    JAX_PLATFORMS=cpu python benchmarks/lora_update.py --model FOLDER [--rank 16] [--rows 32] [--tokens 64]
        [--microbatch 8] [--repeats 3] [--precisions fp16 bf16 fp32]

FOLDER: a Hugging Face folder of SmolLM2-135M. One optimizer step of GRPO on the same rows, each of 64 tokens of prompt
and `--tokens` of response, by both programs in turns. `of_whole`: CPU seconds of the step over those of the whole
model's with the same remat. `peak_of_whole`: likewise the most memory that a process of its own held while it took two
step, over what it held before it read the model.

Writes `results/lora_update.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
import subprocess
import sys

import jax

import jaxrl_fp16 as rl
from record import record
from timing import alternate, parser_of, use_one_core
import update
from workload import make_full_batch

SCALE = 256.0


def load(folder, precision, rank, remat):
    """`(model, parameters)`: all of them float32, or with a rank {"base", "lora"}, the base in the compute dtype."""
    policy = rl.get_precision(precision).policy
    lora = rl.LoraConfig(rank=rank) if rank else None
    dtype = policy.compute_dtype.name if rank else "float32"
    model, params = rl.load_pretrained(folder, remat=remat, lora=lora, dtype=dtype)
    return model, rl.init_lora(model, params, jax.random.key(1), policy=policy) if rank else params


def step_of(given, precision, rank, remat):
    """A function that takes one step and returns its positions."""
    model, params = load(given.model, precision, rank, remat)
    batch = make_full_batch(given.rows, given.tokens, model.config.vocab_size)
    # Ratios of 1: those of log-probs made up would overflow FP16's gradients, and the step be skipped.
    policy = rl.get_precision(precision).policy
    old = rl.token_logprobs(model, params, batch.tokens, batch.mask, policy=policy) * batch.response_mask
    batch = batch.replace(old_logprobs=old, rollout_logprobs=old)
    return update.ours(model, precision, params, batch, microbatch_size=given.microbatch,
                       loss_scale=rl.LossScaleConfig(initial=SCALE))


def measure_speed(given, precision, remat):
    """Rows of both programs in one precision, in turns."""
    names = {"all weights": 0, f"rank {given.rank}": given.rank}
    rows = alternate({name: step_of(given, precision, rank, remat) for name, rank in names.items()}, given.repeats,
                     unit="positions")
    whole = rows[0]["positions_per_cpu_second"]
    return [{**row, "precision": precision, "remat": remat, "of_whole": whole / row["positions_per_cpu_second"]}
            for row in rows]


def measure_memory(given, precision, remat):
    """Bytes that each program's process held at most, by its name."""
    found = {}
    for name, rank in (("all weights", 0), (f"rank {given.rank}", given.rank)):
        asked = [sys.executable, __file__, "--model", given.model, "--memory-of", json.dumps([precision, rank, remat])]
        for key in ("rows", "tokens", "microbatch", "rank"):
            asked += [f"--{key}", str(getattr(given, key))]
        found[name] = int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def peak():
    """Bytes that this process has held at most. `getrusage` would begin with what its parent held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def show_memory(given, precision, rank, remat):
    jax.numpy.zeros(1).block_until_ready()
    before = peak()
    step = step_of(given, precision, rank, remat)
    step()
    print(peak() - before)


def main():
    parser = parser_of(__doc__, rank=16, rows=32, tokens=64, microbatch=8, repeats=3)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16", "fp32"])
    parser.add_argument("--memory-of", help="prints the memory of one program: [precision, rank, remat] as JSON")
    given = parser.parse_args()
    use_one_core()
    if given.memory_of:
        return show_memory(given, *json.loads(given.memory_of))
    rows = []
    for precision in given.precisions:
        for remat in (True, False):
            memory = measure_memory(given, precision, remat)
            for row in measure_speed(given, precision, remat):
                held = memory[row["program"]]
                rows.append({**row, "mib": round(held / 2**20), "peak_of_whole": held / memory["all weights"]})
                print(rows[-1], flush=True)
    facts = {name: value for name, value in vars(given).items() if name not in ("model", "memory_of")}
    print(record("lora_update", rows, facts))


if __name__ == "__main__":
    main()
