"""CPU time of programs that take turns on one core, so that a machine's ups and downs affect all of them alike."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import NamedTuple

PAUSE = 0.3  # seconds: OpenMP's threads spin for a while after their work, and the next program would pay


class Spent(NamedTuple):
    """What one run of a program took: its work in the benchmark's unit, seconds of CPU time and of wall time, and the
    bytes that its process has held at most so far, where that is one of its own."""

    work: float
    cpu: float
    wall: float
    peak: int = 0


def use_one_core():
    """Keeps this process, its threads and its children on the last core that it may use, where it can be chosen.

    To be called before a device of JAX or a thread of PyTorch is there: both count the cores when they start.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def alternate(programs, repeats, work=None, unit="tokens"):
    """`programs`, name -> function without arguments, run A B A B after one run each that compiles.

    A function returns the work that it did, or None where it is always `work`, or a `Spent` of another process.
    Returns a row a program: its work per second of CPU time (median, least, most) and of wall time (median).
    """
    for program in programs.values():
        program()
    spent = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            time.sleep(PAUSE)
            spent[name].append(measure(program, work))
    return [_row(name, times, unit) for name, times in spent.items()]


def measure(program, work=None):
    """A `Spent` of one run of `program`, which is as in `alternate`."""
    cpu, wall = time.process_time(), time.perf_counter()
    done = program()
    if isinstance(done, Spent):
        return done
    return Spent(work if done is None else done, time.process_time() - cpu, time.perf_counter() - wall)


def _row(name, times, unit):
    rates = [spent.work / spent.cpu for spent in times]
    return {
        "program": name,
        f"{unit}_per_cpu_second": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        f"{unit}_per_second": statistics.median(spent.work / spent.wall for spent in times),
        "runs": len(times),
    }


def parser_of(doc, **numbers):
    """A parser with a flag of an integer for each of `numbers`, its default; `doc`'s first line is the help."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser


def add_ratios(rows, baseline, unit="tokens", name="times_baseline"):
    """Each row's speed as a multiple of the fastest whose program's name starts with `baseline`, as column `name`.

    Without such a program the rows are as they were.
    """
    speeds = [row[f"{unit}_per_cpu_second"] for row in rows if row["program"].startswith(baseline)]
    return [{**row, name: row[f"{unit}_per_cpu_second"] / max(speeds)} for row in rows] if speeds else rows


__all__ = ["Spent", "add_ratios", "alternate", "measure", "parser_of", "use_one_core"]
