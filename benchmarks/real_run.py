"""What came of a real model's runs, out of the folder of `compare`: a result, a picture and the README's table.

    python benchmarks/real_run.py runs/smollm2_sums-compare-...
    python benchmarks/real_run.py                                  # the README's table anew, from the result

The runs are those of configs/smollm2_sums.yaml; any other config's with evaluation sets `sampled` and `greedy` do too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import re
import statistics
import textwrap

import matplotlib
import matplotlib.pyplot as plt

from jaxrl_fp16.lab.figures import ACCENT, SECOND
from record import ROOT, record

README, PICTURE = ROOT / "README.md", ROOT / "docs" / "real_run.png"
RESULT = ROOT / "benchmarks" / "results" / "real_run.json"
PANELS = {
    "reward": ("reward, mean of 5 steps", "linear"),
    "mismatch/kl_k3": ("token KL, engine | scorer", "log"),
    "mismatch/seq_log_ratio_std": ("std of sequence log ratio", "log"),
}
COLORS = {"fp16": ACCENT, "bf16": SECOND}     # as in the reports
SMOOTH = 5      # steps
HEADS = {
    "run": "run", "reward_first": "reward, first 10 steps", "reward_last": "last 10",
    "sampled_before": "held out before", "sampled_after": "after",
    "greedy_before": "greedy before", "greedy_after": "after",
    "kl_k3": "token KL, mean", "seq_log_ratio_std": "std of sequence log ratio", "skipped": "steps skipped",
    "cpu_seconds": "CPU seconds",
}


def rows_of(report):
    """A row for each run of a report.json."""
    found = []
    for run in report["runs"]:
        series = report["series"][run["name"]]
        values = {name: series[name]["values"] for name in series}
        evaluated = {f"{which}_{when}": values[f"eval/{which}/accuracy"][at] for which in ("sampled", "greedy")
                     for when, at in (("before", 0), ("after", -1)) if f"eval/{which}/accuracy" in values}
        found.append({
            "run": f"{run['label']}, seed {run['seed']}", "precision": run["precision"], "engine": run["engine"],
            "steps": run["last_step"], "ending": run["ending"],
            "reward_first": statistics.mean(values["reward"][:10]),
            "reward_last": statistics.mean(values["reward"][-10:]), **evaluated,
            "kl_k3": statistics.mean(values["mismatch/kl_k3"]),
            "seq_log_ratio_std": statistics.mean(values["mismatch/seq_log_ratio_std"]),
            "skipped": int(sum(values["skipped"])), "cpu_seconds": run["cpu_seconds"],
            "peak_mib": run["peak_bytes"] / 2**20,
        })
    return found


def apart(report):
    """How many times FP16's token KL that of BF16 is, by the means of all steps, and least at one step of a seed."""
    series = {(run["precision"], run["seed"]): report["series"][run["name"]]["mismatch/kl_k3"]["values"]
              for run in report["runs"]}
    means = {name: statistics.mean(x for (other, _), values in series.items() if other == name for x in values)
             for name in COLORS}
    pairs = [(series["bf16", seed], values) for (name, seed), values in series.items() if name == "fp16"]
    return {"times": means["bf16"] / means["fp16"],
            "least_times": min(b / a for bf16, fp16 in pairs for b, a in zip(bf16, fp16, strict=True))}


def draw(report):
    """`docs/real_run.png`: a line a run."""
    matplotlib.use("agg")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.4), layout="constrained")
    for axis, (name, (title, scale)) in zip(axes, PANELS.items()):
        for number, run in enumerate(report["runs"]):
            series = report["series"][run["name"]][name]
            values, steps = series["values"], series["steps"]
            if name == "reward":
                values = [statistics.mean(values[at - SMOOTH:at]) for at in range(SMOOTH, len(values) + 1)]
                steps = steps[SMOOTH - 1:]
            axis.plot(steps, values, color=COLORS.get(run["precision"], "gray"), lw=1.4,
                      ls="-" if run["seed"] == report["runs"][0]["seed"] else "--",
                      label=f"{run['label']}, seed {run['seed']}")
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center", ncol=2)    # between the lines
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def passage():
    """The README's table."""
    result = json.loads(RESULT.read_text())
    columns = [name for name in HEADS if any(name in row for row in result["rows"])]
    lines = [[HEADS[name] for name in columns], ["---"] * len(columns)]
    lines += [[cell(name, row[name]) for name in columns] for row in result["rows"]]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("jax", "torch", "transformers"))
    said = (f"BF16's token KL is {result['times']:.0f} times FP16's, and at no step of a seed less than "
            f"{result['least_times']:.0f} times. Made on {result['date'][:10]} with {versions}; {result['processor']}, "
            f"one core.")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{textwrap.fill(said, 120)}"


def cell(name, value):
    if isinstance(value, str):
        return value
    if name in ("kl_k3", "seq_log_ratio_std"):
        return f"{value:.1e}" if value < 1e-2 else f"{value:.2g}"
    return f"{value:,.0f}" if name in ("skipped", "cpu_seconds") else f"{value:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of `compare`; none: what was recorded last")
    given = parser.parse_args()
    if given.folder:
        report = json.loads((given.folder / "report.json").read_text())
        draw(report)
        print(record("real_run", rows_of(report), apart(report)))
    README.write_text(filled(README.read_text()))


def filled(text):
    """The README's text with the table written anew."""
    return re.sub(r"(<!-- real_run: start -->)\n.*?(<!-- real_run: end -->)",
                  lambda match: f"{match[1]}\n{passage()}\n{match[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
