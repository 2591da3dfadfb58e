"""The figures of docs/engines.md, from the result files: what the page has between its marks.

    python benchmarks/engine_figures.py

A passage is between `<!-- NAME: start -->` and `<!-- NAME: end -->`; the function NAME below writes it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import re
import textwrap

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "engines.md"
ORDER = "jit", "transformers", "vllm", "fp32", "fp16", "bf16"
COLUMNS = {"kl_k3": "token KL (k3)", "abs_diff_mean": "mean abs d", "abs_diff_max": "max abs d",
           "prob_diff": "mean abs dp", "seq_log_ratio_std": "std of sequence log ratio"}


def mismatch():
    """Each engine against our scorer in the same precision, and how many times BF16's KL is FP16's."""
    result = load("engines")
    lines = [[row["engine"], row["precision"], f"{row['rows']} x {row['tokens']}",
              *(small(row[column]) for column in COLUMNS)]
             for row in sorted(result["rows"], key=place)]
    words = ", ".join(f"{value:.0f} ({name})" for name, value in times(result["rows"]).items())
    return (f"{table(['engine', 'precision', 'rows x tokens', *COLUMNS.values()], lines)}\n\n"
            f"Over the first {result['short']} tokens of each row BF16's token KL is as many times FP16's: {words}. "
            f"{made_with(result)}")


def weights():
    """What an engine draws after a `load`, against one that began with those weights."""
    result = load("engine_weights")
    groups = {}
    for row in sorted(result["rows"], key=place):
        groups.setdefault((row["engine"], row["precision"]), []).append(row)
    lines = [[*key, ", ".join(small(change) for change in sorted({row["change"] for row in rows})),
              small(min(row["max_diff_before"] for row in rows)),
              f"{sum(row['ids_equal'] for row in rows)} of {sum(row['prompts'] for row in rows)}",
              small(max(row["max_diff"] for row in rows)), small(rows[0]["bound"])] for key, rows in groups.items()]
    heads = ["engine", "precision", "changed by, relative", "least difference from before", "rows with the same ids",
             "largest difference", "bound"]
    return f"{table(heads, lines)}\n\n{made_with(result)}"


def place(row):
    """By which a table's rows are sorted."""
    return ORDER.index(row["engine"]), ORDER.index(row["precision"])


def times(rows):
    """engine -> how many times its token KL in FP16 that in BF16 is, over as many tokens of each row."""
    found = {(row["engine"], row["precision"]): row["kl_k3_short"] for row in rows}
    return {name: found[name, "bf16"] / found[name, "fp16"] for name, precision in found
            if precision == "fp16" and (name, "bf16") in found}


PASSAGES = {function.__name__: function for function in (mismatch, weights)}


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def made_with(result):
    """The versions of all packages, and the machine."""
    ours = ", ".join(f"{name} {result['versions'][name]}" for name in ("jax", "flax", "numpy"))
    theirs = [f"{name}: " + ", ".join(f"{package} {facts[package]}" for package in ("vllm", "torch", "transformers")
                                      if package in facts) for name, facts in result["engines"].items() if facts]
    return f"Made on {result['date'][:10]} with {'; '.join([ours, *theirs])}; {result['processor']}."


def table(heads, lines):
    """A table in Markdown."""
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)


def small(value):
    """1.5e-5, 0.045, or 0."""
    if value == 0 or 1e-2 <= value < 100:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def filled(text, passages=None):
    """A page's text with its passages, functions by name, written anew; this file's own unless given."""
    passages = passages or PASSAGES

    def fill(match):
        lines = passages[match[2]]().splitlines()
        return "\n".join([match[1], *(line if line.startswith("|") else textwrap.fill(line, 120) for line in lines),
                          match[3]])

    return re.sub(r"(<!-- (\w+): start -->)\n(?:.*?\n)??(<!-- \2: end -->)", fill, text, flags=re.DOTALL)


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
