"""On a GPU: the sanity test of arXiv 2510.26788, shortened: a warm start, then RL from it in each precision.

    python benchmarks/gpu/paper_test.py [--terms 48] [--tokens 384] [--warm-seconds 200] [--seconds 130]

`configs/sanity_gpu_warm.yaml` and `sanity_gpu.yaml` with fewer additions; each command is ended by SIGTERM when its
time is over, and saves what it has. The warm start is in FP16 here, which is many times faster than FP32.
`--warm-flags` and `--flags` have more flags of `sft` and `train`.
"""

import json
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import tempfile
import time

from qwen import Results, arguments, record

KEPT = ("reward", "mismatch/kl_k3", "mismatch/prob_abs_diff_mean", "mismatch/logprob_abs_diff_max",
        "mismatch/exact_fraction", "mismatch_grad/kl_k3", "grad_norm", "seconds/sample", "seconds/learn", "skipped",
        "response_length", "truncated")
ENDED = 128 + signal.SIGTERM  # the exit code of a run that was told to end, and saved


def run(command, config, folder, limit, flags):
    """`(row, run's folder)` of one command that is ended after `limit` seconds; no folder where there is no metric."""
    words = [sys.executable, "-m", "jaxrl_fp16", command, str(config), "--run.dir", str(folder), *flags]
    began = time.perf_counter()
    with subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=60)
    took = time.perf_counter() - began
    found = [*folder.glob("*/metrics.jsonl")]
    lines = [json.loads(line) for path in found for line in path.read_text().splitlines()]
    curve = [{"step": line["step"], **{key: line[key] for key in KEPT if key in line}} for line in lines]
    curve = [entry for entry in curve if len(entry) > 1][:: max(len(curve) // 100, 1)]
    evaluated = {line["step"]: {key: value for key, value in line.items() if key.startswith("eval/")
                                and key.endswith("accuracy")} for line in lines}
    row = {"exit": process.returncode, "wall_seconds": took, "last_step": lines[-1]["step"] if lines else 0,
           "evaluated": {step: found for step, found in evaluated.items() if found}, "curve": curve,
           "last_lines": out.strip().splitlines()[-8:]}
    if process.returncode not in (0, ENDED):
        row["error"] = f"exit code {process.returncode}"
    return row, found[0].parent if found else None


def main():
    given = arguments(__doc__, terms=48, tokens=384, warm_seconds=200.0, seconds=130.0, precisions=["fp16", "bf16"],
                      accuracy=0.45, config="configs/sanity_gpu", every=10, warm_steps=5000, steps=240, warm_flags="",
                      flags="", name="gpu_paper_test")
    results, configs = Results(given.name, vars(given)), record.ROOT / given.config
    lengths = ["--task.arithmetic.terms", str(given.terms), "--sampling.max_new_tokens", str(given.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        row, warm = run("sft", f"{configs}_warm.yaml", folder / "warm", given.warm_seconds, [
            *lengths, "--precision", "fp16", "--sft.max_length", str(given.tokens + 16), "--evaluation.every", "100",
            "--sft.until_accuracy", str(given.accuracy), "--sft.steps", str(given.warm_steps),
            *shlex.split(given.warm_flags),
        ])
        results.add({"what": "warm start", "precision": "fp16"}, dict, row)
        if warm is None:
            sys.exit("the warm start left nothing to go on from")
        export = [sys.executable, "-m", "jaxrl_fp16", "export", str(warm / "config.yaml"), "--resume", str(warm)]
        subprocess.run(export, check=True)
        for precision in given.precisions:
            row, _ = run("train", f"{configs}.yaml", folder / precision, given.seconds, [
                *lengths, "--model.path", str(warm / "model"), "--precision", precision, "--evaluation.every",
                str(given.every), "--run.steps", str(given.steps), *shlex.split(given.flags),
            ])
            results.add({"what": "train", "precision": precision}, dict, row)


if __name__ == "__main__":
    main()
