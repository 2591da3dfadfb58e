"""This checkout against an earlier one, in turns on one core: rows that never end early, where nothing can be saved.

    JAX_PLATFORMS=cpu python benchmarks/earlier.py --earlier FOLDER [--rows 64] [--tokens 128] [--repeats 5]

FOLDER: a checkout of the earlier commit. The sampler's tokens and the update's positions, with remat and without, a CPU
second; `times_earlier` is the median of the ratios of turns that followed one another. `mib_earlier` and `mib_this`:
the most memory that each one's process has held, Python and libraries included.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
import statistics
import subprocess
import sys
import time

from peer import Peer
from record import record
from timing import PAUSE, parser_of, use_one_core

THIS, PARTS = Path(__file__).parents[1], ("sampler", "update", "update_without_remat")


def paired(programs, repeats):
    """Spent of two programs that take turns, after one turn each that compiles: a list of pairs."""
    for program in programs:
        program()
    pairs = []
    for _ in range(repeats):
        time.sleep(PAUSE)
        pairs.append([program() for program in programs])
    return pairs


def row_of(part, precision, pairs):
    rates = [[spent.work / spent.cpu for spent in pair] for pair in pairs]
    ratios = [this / earlier for earlier, this in rates]
    return {"part": part, "precision": precision, "earlier": statistics.median(rate[0] for rate in rates),
            "this": statistics.median(rate[1] for rate in rates), "times_earlier": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios),
            **{f"mib_{name}": pairs[-1][at].peak / 2**20 for at, name in enumerate(("earlier", "this"))},
            "runs": len(pairs)}


def main():
    parser = parser_of(__doc__, rows=64, tokens=128, microbatch=8, repeats=5)
    parser.add_argument("--earlier", required=True, help="a checkout of the earlier commit")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp32", "fp16"])
    given = parser.parse_args()
    use_one_core()
    size, rows = dict(rows=given.rows, tokens=given.tokens, microbatch=given.microbatch), []
    for part in given.parts:
        for precision in given.precisions:
            with ExitStack() as stack:
                programs = [
                    stack.enter_context(Peer(
                        sys.executable, "tree_step.py", tree=str(tree), part=part, precision=precision, **size))
                    for tree in (Path(given.earlier).resolve(), THIS)
                ]
                rows.append(row_of(part, precision, paired(programs, given.repeats)))
    head = subprocess.run(["git", "-C", given.earlier, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    facts = {name: value for name, value in vars(given).items() if name != "earlier"}
    print(record("earlier", rows, facts | {"earlier": head.stdout.strip()}))


if __name__ == "__main__":
    main()
