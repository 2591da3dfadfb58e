"""The figures of docs/speed.md and docs/lora.md, from the result files: what a page has between its marks.

    python benchmarks/speed_figures.py

A passage is between `<!-- NAME: start -->` and `<!-- NAME: end -->`; NAME is that of a result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import re
import textwrap

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("speed.md", "lora.md")]
# Columns of a row, as they are headed; those that no row of a result has are left out.
COLUMNS = {
    "workload": "workload", "program": "program", "part": "part", "precision": "precision",
    "run": "run", "policy": "policy", "remat": "remat",
    "tokens_per_cpu_second": "tokens a CPU second", "positions_per_cpu_second": "positions a CPU second",
    "earlier": "earlier", "this": "this", "times_earlier": "times earlier", "mib_earlier": "MiB, earlier",
    "mib_this": "MiB, this",
    "of_endless": "of the same without ends", "of_matmul": "of the matmul's rate",
    "times_baseline": "times the first peer", "times_transformers": "times Transformers", "times_vllm": "times vLLM",
    "times_pytorch": "times PyTorch", "times_trl": "times TRL",
    "steps": "steps", "compiled": "programs compiled", "seconds": "seconds of it",
    "of_whole": "CPU seconds, of all weights'", "mib": "MiB", "peak_of_whole": "of all weights'",
    "changed": "weights changed", "of": "of", "drift": "moved, of their size", "kl_k3": "token KL (k3)",
    "prob_abs_diff_mean": "mean abs dp", "kl_of_merged": "times the merged one's",
    "before": "accuracy before", "after": "after", "gap": "less than all weights by",
    "seed": "seed", "by_length": "by length", "full_width": "full width", "of_full_width": "ratio",
}

def passage(name):
    """A table of a result's rows, and how it was made."""
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    columns = [column for column in COLUMNS if any(column in row for row in result["rows"])]
    lines = [[COLUMNS[column] for column in columns], ["---"] * len(columns)]
    lines += [[cell(row[column]) if column in row else "" for column in columns] for row in result["rows"]]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items()
                         if package in ("jax", "torch", "transformers"))
    turns = f", {result['repeats']} turns" if "repeats" in result else ""
    made = (f"Made on {result['date'][:10]}, commit {result['commit']}, {versions}; {result['processor']}, load "
            f"{result['load_average']:.1f}{turns}.")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{textwrap.fill(made, 120)}"


def cell(value):
    """A text as it is; 3,155, 0.917, 2.3e-8."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (str, int)) or not value:
        return f"{value:,.0f}" if not isinstance(value, str) and value >= 1e4 else str(value)
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-3 else f"{value:.1e}"


def filled(text):
    """The page's text with its passages written anew."""
    return re.sub(r"(<!-- (\w+): start -->)\n(?:.*?\n)??(<!-- \2: end -->)",
                  lambda match: f"{match[1]}\n{passage(match[2])}\n{match[3]}", text, flags=re.DOTALL)


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
