"""CPU time of programs that take turns, so that a machine's ups and downs affect all of them alike."""

from __future__ import annotations

import argparse
import statistics
import time

PAUSE = 0.3  # seconds: OpenMP's threads spin for a while after their work, and the next program would pay


def alternate(programs, repeats, tokens):
    """`programs`, name -> function without arguments, run A B A B after one run each that compiles.

    Returns a row a program: tokens per second of CPU time (median, least, most) and of wall time (median).
    """
    for program in programs.values():
        program()
    spent = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            time.sleep(PAUSE)
            cpu, wall = time.process_time(), time.perf_counter()
            program()
            spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return [_row(name, times, tokens) for name, times in spent.items()]


def _row(name, times, tokens):
    cpu, wall = zip(*times)
    return {
        "program": name,
        "tokens_per_cpu_second": tokens / statistics.median(cpu),
        "least": tokens / max(cpu),
        "most": tokens / min(cpu),
        "tokens_per_second": tokens / statistics.median(wall),
        "runs": len(times),
    }


def arguments(doc, threads):
    """The flags of a speed benchmark against PyTorch, whose default is `threads`; `doc`'s first line is their help."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch-threads", type=int, default=threads)
    return parser.parse_args()


def add_ratios(rows, baseline):
    """Each row's speed as a multiple of the fastest whose name starts with `baseline`."""
    reference = max(row["tokens_per_cpu_second"] for row in rows if row["program"].startswith(baseline))
    return [{**row, "times_baseline": row["tokens_per_cpu_second"] / reference} for row in rows]


__all__ = ["alternate", "arguments", "add_ratios"]
