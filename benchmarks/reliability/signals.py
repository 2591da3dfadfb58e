"""SIGTERM at random moments: out within a step and ten seconds, everything saved, resumed without a trace.

    JAX_PLATFORMS=cpu python benchmarks/reliability/signals.py [--count 50]

Runs get the signal while they start and while they step, and are resumed, until they are done. Once a run has its
handlers, its exit code is 143, at most one more step is recorded, and a checkpoint of the last step of metrics.jsonl
is there; before that the process ends as the system ends it, and nothing was there to be lost. At the end metrics
(times excepted), samples and checkpoints are bitwise those of a run left alone.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time

from runs import (
    EVERY, HARD, PATIENCE, RUNS, arguments, conclude, differences, finished_steps, last_recorded, split, started,
    undisturbed,
)

STEPS_A_SIGNAL = 6
AT_START = 0.2           # share of the signals that come at a random moment from the start to the first step
SECONDS = 10.0


def await_moment(life, number, generator, start_seconds):
    """Returns when it is time for signal `number`: `(whether the process has handlers for it, start_seconds)`."""
    began = time.monotonic()
    elapsed = lambda: time.monotonic() - began
    if number == 0 or generator.random() < AT_START:
        delay = generator.uniform(0, start_seconds)
        life.wait_until(lambda: elapsed() > delay)
        return "memory, about" in life.log.read_text(), start_seconds      # said when they are set
    life.wait_until(lambda: life.last_step() is not None)
    first, ahead = life.last_step(), generator.randint(1, EVERY)
    life.wait_until(lambda: life.last_step() > first)
    start_seconds = elapsed()
    life.wait_until(lambda: life.last_step() >= first + ahead)
    time.sleep(generator.uniform(0, 0.05))
    return True, start_seconds


def one_signal(life, handled):
    """Sends it and waits: `(a row's figures, problems)`."""
    life.process.send_signal(signal.SIGTERM)
    began, seen = time.monotonic(), life.last_step()
    code = life.process.wait(PATIENCE)
    seconds, last, saved = time.monotonic() - began, last_recorded(life.folder), finished_steps(life.folder)
    more = 0 if seen is None or last is None else last - seen
    problems = []
    if code not in ((143,) if handled else (143, -signal.SIGTERM)):
        problems.append(f"ended with {code}: {life.errors()}")
    if seconds > SECONDS:
        problems.append(f"took {seconds:.1f} s to end")
    if more > 1:
        problems.append(f"{more} more steps were recorded")
    if code == 143 and last and (not saved or saved[-1] != last):
        problems.append(f"the last step is {last}, the checkpoints are {saved}")
    return {"code": code, "seconds": seconds, "more": more, "early": seen is None, "saved": bool(saved)}, problems


def signal_and_resume(run, count, steps, seed, work):
    """One run of `steps` through its signals to its end: `(row, problems)`."""
    generator = random.Random(f"{seed} {run}")
    expected, folder = undisturbed(run, work, steps), work / f"{run}-signalled"
    shutil.rmtree(folder, ignore_errors=True)
    problems, seen, start_seconds = [], [], 4.0
    for number in range(count):
        with started(run, folder, work, steps) as life:
            handled, start_seconds = await_moment(life, number, generator, start_seconds)
            if life.process.poll() is not None:
                return {"run": run}, [f"{run}, life {number} ended with {life.process.poll()}: {life.errors()}"]
            figures, found = one_signal(life, handled)
        seen.append(figures)
        problems += [f"{run}, signal {number}: {text}" for text in found]
    with started(run, folder, work, steps) as life:
        code = life.process.wait(600)
    found = [f"the last life ended with {code}: {life.errors()}"] if code else differences(folder, expected)
    row = {
        "run": run, "steps": steps, "signals": count, "exit_143": sum(one["code"] == 143 for one in seen),
        "before_handlers": sum(one["code"] != 143 for one in seen),
        "before_the_first_step": sum(one["early"] for one in seen),
        "longest_seconds": max(one["seconds"] for one in seen), "most_more_steps": max(one["more"] for one in seen),
        "bitwise_equal": not found,
    }
    return row, problems + [f"{run}: {text}" for text in found]


def main():
    parser = arguments(__doc__, 50, "signals")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=HARD)
    parser.add_argument("--steps", type=int, help="of each run; by default enough for its signals")
    given = parser.parse_args()
    began = time.monotonic()
    done = [
        signal_and_resume(run, count, given.steps or STEPS_A_SIGNAL * count + 2 * EVERY, given.seed,
                          given.work.resolve())
        for run, count in split(given.count, given.runs).items() if count
    ]
    rows, problems = [row for row, _ in done], [problem for _, found in done for problem in found]
    facts = {"signals": sum(row.get("signals", 0) for row in rows), "seed": given.seed,
             "seconds": time.monotonic() - began}
    return conclude("signals", rows, facts, problems, given.out)


if __name__ == "__main__":
    sys.exit(main())
