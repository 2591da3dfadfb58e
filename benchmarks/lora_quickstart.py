"""The quickstart's task by adapters and by all weights, each from one warm start, with several seeds.

    JAX_PLATFORMS=cpu python benchmarks/lora_quickstart.py [--ranks 8 32] [--seeds 3] [--steps 240]
        [--times 3] [--precision fp16]

A warm start of configs/quickstart.yaml gives a model folder; from it GRPO by the config as it is, and by adapters with
`--times` its learning rate, alpha / rank 4. `gap`: held-out accuracy, sampled, of all weights less the adapters'.

Writes `results/lora_quickstart.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
import resource
import subprocess
import sys
import tempfile

from record import ROOT, record
from timing import parser_of

CONFIG, RATE, SCALE = ROOT / "configs" / "quickstart.yaml", 5e-4, 4


def run(command, folder, name, *more):
    """The folder of a finished run of the quickstart's config, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    asked = [sys.executable, "-m", "jaxrl_fp16", command, str(CONFIG), "--run.dir", str(folder), "--run.name", name,
             "--run.stamp", "false", *map(str, more)]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(asked[2:])}: {(done.stderr or done.stdout).strip()[-400:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return folder / name, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def accuracies(folder):
    """Held-out accuracies, sampled, of the first and the last evaluation of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["eval/sampled/accuracy"] for line in lines if "eval/sampled/accuracy" in line]
    return found[0], found[-1]


def measure(given, seed, folder):
    common = ["--run.seed", seed, "--precision", given.precision, "--run.compile_cache", folder / "cache"]
    warm, _ = run("warmup", folder, f"warm-{seed}", *common)
    own = [*common, "--sft.steps", 0, "--sft.until_accuracy", "null", "--run.steps", given.steps, "--model.path",
           warm / "model", "--evaluation.every", 0]
    rate = ["--optimizer.learning_rate", given.times * RATE]
    ways = {"all weights": [], **{f"rank {rank}": ["--lora.rank", rank, "--lora.alpha", SCALE * rank, *rate]
                                  for rank in given.ranks}}
    rows = []
    for number, (name, more) in enumerate(ways.items()):
        done, seconds = run("train", folder, f"run-{seed}-{number}", *own, *more)
        first, last = accuracies(done)
        whole = rows[0]["after"] if rows else last
        rows.append({"seed": seed, "program": name, "before": first, "after": last, "gap": whole - last,
                     "cpu_seconds": seconds})
        print(rows[-1], flush=True)
    return rows


def main():
    parser = parser_of(__doc__, seeds=3, steps=240, times=3)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--precision", default="fp16")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for seed in range(given.seeds) for row in measure(given, seed, Path(folder))]
    print(record("lora_quickstart", rows, vars(given)))


if __name__ == "__main__":
    main()
