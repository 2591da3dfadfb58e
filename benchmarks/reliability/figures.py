"""The table of figures in docs/reliability.md, from the result files.

    python benchmarks/reliability/figures.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- figures: start -->\n", "<!-- figures: end -->\n"


def total(result, key):
    return sum(row.get(key, 0) for row in result["rows"])


def largest(result, key):
    return max(row.get(key, 0) for row in result["rows"])


def kills(result):
    return (f"{result['kills']} kills, {result['in_saves']} of them inside a save, {result['before_a_checkpoint']} "
            f"before the first checkpoint; {total(result, 'bitwise_equal')} of {len(result['rows'])} runs bitwise")


def corruption(result):
    return (f"{result['cases']} checkpoints, {total(result, 'noticed_and_fell_back')} noticed and the one before "
            "restored bitwise")


def signals(result):
    return (f"{result['signals']} signals, longest end {largest(result, 'longest_seconds'):.1f} s, at most "
            f"{largest(result, 'most_more_steps')} more step, {total(result, 'bitwise_equal')} of "
            f"{len(result['rows'])} runs bitwise in the end; {total(result, 'before_handlers')} came before there was "
            "anything to save")


def disk_full(result):
    return (f"{total(result, 'fillings')} fillings, {total(result, 'in_a_save')} in a save; "
            f"{total(result, 'checkpoints_restored')} older checkpoints restored bitwise")


def loss_scale(result):
    return f"{result['steps']:,} steps, {result['skipped']:,} of them skipped; equal at each"


def hostile_answers(result):
    return (f"{total(result, 'answers')} answers, {result['cut_off']} cut off, the longest after "
            f"{result['longest_answer_seconds']:.2f} s; the parent grew by {result['parent_growth_mb']:.1f} MB, "
            f"{result['orphans']} processes left; {result['ordinary_a_second']:.0f} ordinary answers a second at load "
            f"{result['load_average_before']:.1f}")


def meshes(result):
    return (f"{len(result['rows'])} shapes on {result['devices']} virtual devices, "
            f"{total(result, 'restored_from_meshes')} of {len(result['rows']) ** 2} pairs bitwise")


def bad_input(result):
    return (f"{result['cases']} cases, {result['failed']} failed, the slowest refused after "
            f"{result['slowest_seconds']:.1f} s")


def earlier_commit(result):
    return (f"{total(result, 'bitwise_equal')} of {len(result['rows'])} kinds (policy, with a critic, preferences), "
            f"written by commit {result['earlier']}")


# What is promised, and what a script's result says of it.
LINES = {
    kills: "`kill -9` at a random moment, a quarter of them inside a save: resumed bitwise as a run never killed",
    corruption: "a flipped bit, a file cut short, emptied or deleted: noticed, the checkpoint before is used",
    signals: "SIGTERM: out within a step and 10 s, no step lost",
    disk_full: "a disk that fills up at a random offset: one line, older checkpoints restore",
    loss_scale: "the loss scale follows its rule; a skipped step changes nothing else",
    hostile_answers: "hostile answers in groups of 8: none beyond its deadline of 2 s and 1 s more, less than 100 MB",
    meshes: "a checkpoint of one mesh restored on another: bitwise",
    bad_input: "bad input: refused in one line within 10 s, nothing written",
    earlier_commit: "run folders of an earlier commit: resumed bitwise, exported and evaluated alike",
}


def table(folder):
    """The lines of the table, for the results that are in `folder`; one that missed its bound says so."""
    lines = ["| promise | found | script |", "|---|---|---|"]
    for describe, promise in LINES.items():
        path = folder / f"reliability_{describe.__name__}.json"
        result = json.loads(path.read_text()) if path.exists() else None
        found = "not run yet" if result is None else describe(result)
        if result is not None and result.get("problems"):
            found += f"; MISSED: {result['problems'][0]}"
        lines.append(f"| {promise} | {found} | `{describe.__name__}.py` |")
    return "\n".join(lines) + "\n"


def main():
    before, rest = PAGE.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(before + MARKS[0] + table(RESULTS) + MARKS[1] + after)


if __name__ == "__main__":
    main()
