"""The table of figures in docs/reliability.md, from the result files.

    python benchmarks/reliability/figures.py
"""

from __future__ import annotations

import json
from pathlib import Path
import statistics

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- figures: start -->\n", "<!-- figures: end -->\n"


def total(result, key):
    return sum(row[key] for row in result["rows"])


# script -> (what is promised, what its result says)
LINES = {
}


def table(folder):
    """The lines of the table, for the results that are in `folder`; one that missed its bound says so."""
    lines = ["| promise | found | script |", "|---|---|---|"]
    for script, (promise, describe) in LINES.items():
        path = folder / f"reliability_{script}.json"
        result = json.loads(path.read_text()) if path.exists() else None
        found = "not run yet" if result is None else describe(result)
        if result is not None and not result["passed"]:
            found += f"; MISSED: {result['problems'][0]}"
        lines.append(f"| {promise} | {found} | `{script}.py` |")
    return "\n".join(lines) + "\n"


def main():
    text = PAGE.read_text()
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(before + MARKS[0] + table(ROOT / "benchmarks" / "results") + MARKS[1] + after)


if __name__ == "__main__":
    main()
