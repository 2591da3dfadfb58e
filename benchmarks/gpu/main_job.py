"""On a GPU: the quickstart's run, warm start and GRPO, in each precision: does it run, and seconds a step.

    python benchmarks/gpu/main_job.py [--config configs/quickstart.yaml] [--steps 40] [--precisions fp16 bf16]

`--flags` has more flags of `train`.
"""

import json
from pathlib import Path
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

from qwen import Results, arguments, record


def measure(config, precision, steps, limit, flags):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jaxrl_fp16", "train", str(record.ROOT / config), "--precision", precision,
                   "--run.steps", str(steps), "--run.dir", folder, *shlex.split(flags)]
        began = time.perf_counter()
        done = subprocess.run(command, text=True, capture_output=True, timeout=limit)
        took = time.perf_counter() - began
        lines = [json.loads(line) for path in Path(folder).glob("*/metrics.jsonl")
                 for line in path.read_text().splitlines()]
    steps = [line for line in lines if "seconds/learn" in line]
    late = steps[len(steps) // 4:]
    median = lambda key: statistics.median(line[key] for line in late if isinstance(line.get(key), int | float))
    keys = sorted(key for key in (late[-1] if late else {}) if key.startswith(("seconds/", "mismatch/kl", "mismatch/ex",
                  "mismatch/prob")))
    accuracy = {line["step"]: line["eval/sampled/accuracy"] for line in lines if "eval/sampled/accuracy" in line}
    return {"exit": done.returncode, "wall_seconds": took, "steps_done": len(steps), "accuracy": accuracy,
            "skipped": sum(line.get("skipped", 0) for line in steps), **{key: median(key) for key in keys},
            "last_lines": (done.stdout + done.stderr).strip().splitlines()[-6:],
            **({"error": f"exit code {done.returncode}"} if done.returncode else {})}


def main():
    given = arguments(__doc__, config="configs/quickstart.yaml", steps=40, precisions=["fp16", "bf16"], limit=110.0,
                      flags="", name="gpu_main_job")
    results = Results(given.name, vars(given))
    for precision in given.precisions:
        results.add({"config": given.config, "precision": precision},
                    measure, given.config, precision, given.steps, given.limit, given.flags)


if __name__ == "__main__":
    main()
