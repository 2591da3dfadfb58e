"""The figures of docs/plan.md, from results/aot.json: what the page has between its marks.

    python benchmarks/aot_figures.py

A passage is between `<!-- NAME: start -->` and `<!-- NAME: end -->`; the function NAME below writes it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from engine_figures import ROOT, filled, table

PAGE = ROOT / "docs" / "plan.md"
RESULTS = ROOT / "benchmarks" / "results" / "aot.json"


def wires():
    """What crosses the wires of an update."""
    lines = [[row["mesh"], row["rows at once"], f"{row['TB']:.3f}", f"{row['temporary GiB']:.1f}",
              f"{row['seconds']:.0f}"] for row in rows_of("wires")]
    return table(["data x fsdp x tensor", "rows at once", "TB a device and step", "temporary memory, GiB",
                  "CPU s to compile"], lines)


def decode():
    """A decode step."""
    (row,) = rows_of("decode")
    copies = {row["microbatches"]: row["GB over data"] for row in rows_of("copies")}
    said = " and ".join(f"{size:.2f} GB with {count} microbatch{'es' * (count > 1)}" for count, size in copies.items())
    return (f"A decode step of its sampler on {row['mesh']}, 256 rows, moves {row['MiB a step']:.1f} MiB a device, the "
            f"largest array {row['largest array MiB']:.1f} MiB; it starts {row['kernels a step']:,.0f} kernels, which "
            f"touch {row['GiB a step']:.1f} GiB where {row['least GiB a step']:.1f} are the least (compiled with "
            f"{row['layers compiled']} layers and carried on). Along `data`, gradients take {said} (4 layers, 2x64x1).")


def tpu():
    """Qwen2.5-1.5B on slices of TPUs."""
    lines = [[row["program"], row["target"], row["refused"], "-", "-"] if "refused" in row else
             [row["program"], row["target"], f"{row['GiB a device']:.1f} of {row['of GiB']:.1f}",
              row["cache made anew"], f"{row['seconds']:.0f}"] for row in rows_of("tpu")]
    return table(["program", "slice", "GiB a device", "caches made anew a decode step", "CPU s to compile"], lines)


def estimate():
    """What a run prints against what compilers say."""
    lines = [[row["shape"], row["target"], f"{row['estimate GiB']:.1f}", f"{row['compilers GiB']:.1f}",
              row["largest program"], f"{row['ratio']:.2f}"] for row in rows_of("estimate")]
    return table(["shape", "target", "printed, GiB", "compilers, GiB", "of the", "ratio"], lines)


PASSAGES = {function.__name__: function for function in (wires, decode, tpu, estimate)}


def rows_of(part):
    return [row for row in json.loads(Path(RESULTS).read_text())["rows"] if row["part"] == part]


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text(), PASSAGES))


if __name__ == "__main__":
    main()
