"""`kill -9` at random moments, then `--resume`: the run ends bitwise as one that was never killed.

    JAX_PLATFORMS=cpu python benchmarks/reliability/kills.py [--count 200] [--lanes 2]

Four runs take a quarter of the kills each: while they start, the first of them before the first step; between and
within steps; and inside saves, at which a third of the kills is aimed and which a quarter must meet. Compared are
metrics (times excepted), samples, the position in the data, and every array of the last checkpoints: parameters,
moments, loss scale, counters, keys.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import random
import resource
import shutil
import sys
import time

from runs import EVERY, HARD, RUNS, arguments, conclude, differences, finished_steps, split, started, undisturbed

STEPS_A_KILL = 7         # a life gets on by fewer on average, so that the last kill still finds a run
IN_SAVES = 0.25
BEFORE_A_CHECKPOINT = 0.25      # at most: to begin again is the easier half
MOMENTS = {"start": 0.15, "step": 0.5, "save": 0.35}


def plan(count, generator):
    """What each kill aims at; the first two fall before the first step and before the first checkpoint."""
    drawn = generator.choices(list(MOMENTS), list(MOMENTS.values()), k=max(0, count - 2))
    return (["start", "early"] + drawn)[:count]


def await_moment(life, moment, generator, start_seconds):
    """Returns when it is time to kill: how long the process took to its first step, `start_seconds` if that is not
    waited for. None if the process ended by itself."""
    began = time.monotonic()
    elapsed = lambda: time.monotonic() - began
    if moment == "start":
        delay = generator.uniform(0, start_seconds)
        life.wait_until(lambda: elapsed() > delay)
    else:
        lives = life.wait_until(lambda: life.last_step() is not None)
        first = life.last_step()
        lives = lives and life.wait_until(lambda: life.last_step() > first)
        start_seconds = elapsed()
        if moment != "early":
            # Saves run beside the steps: the first is surely finished once the second has begun.
            ahead = generator.randint(1, 4 * EVERY)
            lives and life.wait_until(lambda: life.last_step() >= first + ahead)
            moment == "save" and life.wait_until(life.saving)
            time.sleep(generator.uniform(0, 0.05))
    return start_seconds if life.process.poll() is None else None


def kill_and_resume(run, kills, steps, seed, work):
    """One run of `steps` through all its kills to its end: `(row, problems)`."""
    generator = random.Random(f"{seed} {run}")
    expected, folder = undisturbed(run, work, steps), work / f"{run}-killed"
    shutil.rmtree(folder, ignore_errors=True)
    row = {"run": run, "steps": steps, "kills": 0, "at_start": 0, "in_steps": 0, "in_saves": 0,
           "before_a_checkpoint": 0, "last_kill_after_step": 0, "bitwise_equal": False}
    start_seconds = 4.0
    for number, moment in enumerate(plan(kills, generator)):
        with started(run, folder, work, steps) as life:
            start_seconds = await_moment(life, moment, generator, start_seconds)
            if start_seconds is None:
                return row, [f"{run}: life {number} ended with {life.process.wait()}: {life.errors()}"]
            life.process.kill()
            life.process.wait()
        row["kills"] += 1
        row["in_saves" if life.saving() else "at_start" if moment == "start" else "in_steps"] += 1
        row["before_a_checkpoint"] += not finished_steps(folder)
        row["last_kill_after_step"] = max(row["last_kill_after_step"], life.last_step() or 0)
    with started(run, folder, work, steps) as life:
        code = life.process.wait(600)
    found = [f"the last life ended with {code}: {life.errors()}"] if code else differences(folder, expected)
    return row | {"bitwise_equal": not found}, [f"{run}: {text}" for text in found]


def main():
    parser = arguments(__doc__, 200, "kills")
    parser.add_argument("--lanes", type=int, default=1, help="runs side by side")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=HARD)
    parser.add_argument("--steps", type=int, help="of each run; by default enough for its kills")
    given = parser.parse_args()
    shares = split(given.count, given.runs)
    began = time.monotonic()
    with ThreadPoolExecutor(given.lanes) as pool:
        done = list(pool.map(lambda run: kill_and_resume(
            run, shares[run], given.steps or STEPS_A_KILL * shares[run] + 2 * EVERY, given.seed, given.work.resolve(),
        ), shares))
    rows, problems = [row for row, _ in done], [problem for _, found in done for problem in found]
    kills, in_saves = (sum(row[key] for row in rows) for key in ("kills", "in_saves"))
    if kills < given.count:
        problems.append(f"{kills} kills; wanted are {given.count}")
    if in_saves < int(IN_SAVES * kills):
        problems.append(f"{in_saves} of {kills} kills met a save; wanted is a share of {IN_SAVES}")
    early = sum(row["before_a_checkpoint"] for row in rows)
    if early > max(2 * len(rows), BEFORE_A_CHECKPOINT * kills):     # two of each run are meant to
        problems.append(f"{early} of {kills} kills came before any checkpoint; allowed is a share of "
                        f"{BEFORE_A_CHECKPOINT}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = {"kills": kills, "in_saves": in_saves, "before_a_checkpoint": early, "seed": given.seed,
             "seconds": time.monotonic() - began, "cpu_seconds": used.ru_utime + used.ru_stime}
    return conclude("kills", rows, facts, problems, given.out)


if __name__ == "__main__":
    sys.exit(main())
