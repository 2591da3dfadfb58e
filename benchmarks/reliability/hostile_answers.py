"""Answers made to stall, exhaust or take over their grader, through the math task's own.

    JAX_PLATFORMS=cpu python benchmarks/reliability/hostile_answers.py [--count 300] [--data FOLDER]

Generated answers of many kinds, in groups of 8 for 8 workers. Each is settled within its deadline and a second; the
parent grows by less than 100 MB and no worker beyond its limit; nothing in an answer runs; no process is left.
Beside that, ordinary answers a second on 2 workers: those of `math500.jsonl` in the folder of --data where it is
given, generated ones otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path
import random
import statistics
import sys
import threading
import time

import psutil

from jaxrl_fp16.tasks import Example, TaskConfig, load_examples, open_task
from jaxrl_fp16.tasks.grading import pool as grading
from jaxrl_fp16.tasks.grading.answers import gold_answers
from runs import arguments, conclude

GROUP, MEMORY_MB = 8, 2048
LATE, GROWTH_MB, A_SECOND = 1.0, 100, 200
QUIET = 0.5     # load average above which other work shares the cores, and a rate is shown without being judged
MIB = 2**20


def kinds(canary):
    """kind -> a function of a random generator that gives an answer. `canary` is a folder that code would make."""
    code = f"__import__('os').mkdir('{canary}')"
    nest = lambda start, middle, end: lambda g: start * (n := g.randint(20, 900)) + middle + end * n
    return {
        "huge powers": lambda g: f"{g.randint(2, 99)}^{{{g.randint(10**6, 10**9)}}}",
        "towers of powers": lambda g: "9^{" * (n := g.randint(2, 9)) + "9" + "}" * n,
        "factorials": lambda g: f"{g.randint(10**4, 10**7)}" + "!" * g.randint(1, 4),
        "nested braces": nest("{", "7", "}"),
        "nested parentheses": nest("(", "7", ")"),
        "unclosed": lambda g: g.choice("({[\\") * g.randint(100, 999),
        "deep fractions": lambda g: "\\frac{1}{1+" * (n := g.randint(10, 80)) + "1" + "}" * n,
        "deep roots": lambda g: "\\sqrt{2+" * (n := g.randint(10, 100)) + "2" + "}" * n,
        "a million digits": lambda g: str(g.randint(1, 9)) * g.randint(500, 10**6),
        "decimals": lambda g: "0." + "".join(g.choices("0123456789", k=g.randint(90, 990))),
        "exponents": lambda g: f"{g.randint(1, 9)}e{g.choice('+-')}{g.randint(10**3, 10**9)}",
        "long sums": lambda g: "+".join(f"x_{{{g.randint(0, 99)}}}^{{{g.randint(2, 40)}}}" for _ in range(60)),
        "products to expand": lambda g: "".join(f"(x+{g.randint(1, 99)}y+z)^{{{g.randint(20, 200)}}}"
                                                for _ in range(g.randint(1, 8))),
        "integrals and limits": lambda g: f"\\int_0^\\infty \\sum_{{n=1}}^{{{10**g.randint(3, 9)}}} "
                                          f"\\frac{{x^{{{g.randint(9, 99)}}}}}{{n!}} dx",
        "matrices": lambda g: "\\begin{pmatrix}" + "1&" * g.randint(50, 400) + "1\\end{pmatrix}",
        "intervals and sets": lambda g: "\\cup".join(f"({n},{n + 1}]" for n in range(g.randint(20, 80))),
        "text that backtracks": lambda g: g.choice(["a" * 900 + "!", "1," * 480, "\\text{" * 150, " " * 990 + "x",
                                                    "1 " * 490, "\\left(" * 160, "-" * 990 + "1", "$" * 999]),
        "python": lambda g: g.choice([code, f"\\text{{{code}}}", f"5; {code}", f"eval(\"{code}\")", f"[{code}]",
                                      f"{code}=5", f"x={code}", f"lambda: {code}"]),
        "shell": lambda g: g.choice([f"$(mkdir {canary})", f"`mkdir {canary}`", f"5; mkdir {canary}",
                                     f"\\write18{{mkdir {canary}}}", f"\\input{{|mkdir {canary}}}"]),
        "unicode": lambda g: "".join(chr(g.choice([g.randint(0x300, 0x36F), g.randint(0x202A, 0x202E), 0x1D7D9,
                                                   g.randint(0x660, 0x669), 0xFFFD, 0xD800])) for _ in range(300)),
        "control characters": lambda g: "".join(chr(g.randint(0, 31)) for _ in range(300)) + "\0 7",
        "noise": lambda g: "".join(g.choices("\\{}^_&$%#~0123456789xy+-*/=()[]|<>,.!", k=g.randint(50, 900))),
    }


def grade(task, answers, gold):
    """Rewards of one group: a response to the same problem for each answer."""
    responses = [f"So \\boxed{{{answer}}}." for answer in answers]
    return task.rewards(["What is it?"], [responses], [Example("What is it?", gold)])


class Timed:
    """While entered, how long the pool had each job, in `seconds`: from handing it over to what became of it."""

    def __init__(self):
        self.seconds = []

    def __enter__(self):
        self._events = grading._events
        grading._events = self._timed
        return self

    def __exit__(self, *exception):
        grading._events = self._events

    def _timed(self, *arguments):
        for worker, message in self._events(*arguments):
            if worker.ready:
                self.seconds.append(time.monotonic() - worker.since)
            yield worker, message


class Watched:
    """While entered, every new descendant of this process by its id, and the largest memory of one, in bytes."""

    def __enter__(self):
        self._known = set(psutil.Process().children(recursive=True))
        self.processes, self.largest, self._done = {}, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        self._thread.join()

    def _watch(self):
        own = psutil.Process()
        while not self._done.wait(0.1):
            for process in set(own.children(recursive=True)) - self._known:
                self.processes[process.pid] = process
                try:
                    # Until it starts its own program, a new process shows the memory of its parent.
                    if process.cmdline() != own.cmdline():
                        self.largest = max(self.largest, process.memory_info().rss)
                except psutil.Error:
                    continue

    def left(self, patience=5.0):
        """The processes that are still there; a kill takes a moment."""
        _, alive = psutil.wait_procs(list(self.processes.values()), timeout=patience)
        return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def grade_hostile(task, count, seed, canary, deadline):
    """`(rows, facts, problems)` of `count` answers."""
    generator, makers = random.Random(seed), kinds(canary)
    names = [name for index in range(count) for name in [list(makers)[index % len(makers)]]]
    generator.shuffle(names)
    rows = {name: {"kind": name, "answers": 0, "right": 0} for name in sorted(names)}
    problems, groups = [], []
    with Timed() as timed:
        for start in range(0, count, GROUP):
            group = names[start:start + GROUP]
            began, before = time.monotonic(), len(timed.seconds)
            rewards = grade(task, [makers[name](generator) for name in group], generator.choice(["5", "x^2-1"]))
            groups.append({"seconds": time.monotonic() - began, "cut_off": rewards.timeouts})
            for name, value in zip(group, rewards.values[0]):
                rows[name]["answers"] += 1
                rows[name]["right"] += int(value)
            problems += [f"group {start // GROUP}: an answer took {seconds:.1f} s; its deadline is {deadline:g} s"
                         for seconds in timed.seconds[before:] if seconds > deadline + LATE]
            if not rewards.valid.all():
                problems.append(f"group {start // GROUP}: a reward is not valid")
            if canary.exists():
                problems.append(f"group {start // GROUP}, {group}: the text of an answer was executed")
                canary.rmdir()
    problems += [f"{row['kind']}: {row['right']} scored 1" for row in rows.values() if row["right"]]
    facts = {"groups": len(groups), "cut_off": sum(group["cut_off"] for group in groups),
             "longest_answer_seconds": max(timed.seconds, default=0.0), "sent_to_workers": len(timed.seconds),
             "longest_group_seconds": max(group["seconds"] for group in groups)}
    return list(rows.values()), facts, problems


def ordinary_pairs(data, count, generator):
    """`(gold, answer)`: right ones, wrong ones, and ones that algebra must settle."""
    if data is not None:
        golds = [example.answer for example in load_examples(data / "math500.jsonl")]
    else:
        shapes = lambda n: [f"{n}", f"\\frac{{{n}}}{{{n + 1}}}", f"{n}\\sqrt{{{n + 2}}}", f"x^2-{n}", f"({n},2)"]
        golds = [generator.choice(shapes(generator.randint(2, 99))) for _ in range(count)]
    change = lambda gold: generator.choice([gold, f"1+({gold})", f"({gold})", f"{generator.randint(2, 999)}"])
    return [(gold, change(gold_answers(gold)[0])) for gold in (golds[n % len(golds)] for n in range(count))]


def ordinary_rate(path, data, seed, count):
    """Ordinary answers graded by two workers that are up: `(a second, a second of the pool's CPU time)`."""
    generator, rates, used = random.Random(seed), [], [0.0]
    with open_task(task_config(path, workers=2, deadline=10.0)) as task:
        for part in range(4):        # the first starts the second worker and is not counted
            pairs = ordinary_pairs(data, count // 3, generator)
            began = time.monotonic()
            task.rewards([""] * len(pairs), [[f"\\boxed{{{answer}}}"] for _, answer in pairs],
                         [Example("", gold) for gold, _ in pairs])
            rates.append(len(pairs) / (time.monotonic() - began))
            own = psutil.Process()
            used.append(sum(sum(process.cpu_times()[:2]) for process in (own, *own.children())))
    return statistics.median(rates[1:]), 3 * (count // 3) / (used[-1] - used[1])


def task_config(path, workers, deadline):
    return TaskConfig(name="math", path=str(path), template="qwen3", deadline_seconds=deadline, workers=workers,
                      memory_mb=MEMORY_MB)


def main():
    parser = arguments(__doc__, 300, "hostile_answers")
    parser.add_argument("--data", type=Path, default=os.environ.get("JAXRL_FP16_DATA"), help="has math500.jsonl")
    parser.add_argument("--ordinary", type=int, default=600, help="ordinary answers that are timed")
    parser.add_argument("--workers", type=int, default=GROUP)
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    path, canary = work / "problems.jsonl", work / "canary"
    path.write_text('{"problem": "1?", "answer": "1"}\n')
    data = given.data if given.data and (given.data / "math500.jsonl").is_file() else None

    began, load = time.monotonic(), os.getloadavg()[0]
    rate, rate_of_cpu = ordinary_rate(path, data, given.seed, given.ordinary)
    with Watched() as watched:
        with open_task(task_config(path, given.workers, given.deadline)) as task:
            grade(task, ["\\sqrt{25}"] * 2, "5")
            before = psutil.Process().memory_info().rss
            rows, facts, problems = grade_hostile(task, given.count, given.seed, canary, given.deadline)
            growth = (psutil.Process().memory_info().rss - before) / MIB
            if grade(task, ["\\sqrt{25}"], "5").values.sum() != 1:
                problems.append("after all of them a right answer does not score 1")
    orphans = watched.left()
    problems += [f"{len(orphans)} processes are left"] if orphans else []
    problems += [f"the parent grew by {growth:.0f} MB; allowed: {GROWTH_MB}"] if growth > GROWTH_MB else []
    if watched.largest > MEMORY_MB * MIB:
        problems.append(f"a worker took {watched.largest / MIB:.0f} MB; its limit is {MEMORY_MB}")
    if rate < A_SECOND and load < QUIET:
        problems.append(f"{rate:.0f} ordinary answers a second; wanted are {A_SECOND}")
    facts |= {"workers": given.workers, "deadline_seconds": given.deadline,
              "parent_growth_mb": growth, "largest_worker_mb": watched.largest / MIB,
              "processes_seen": len(watched.processes), "orphans": len(orphans), "ordinary_a_second": rate,
              "ordinary_a_cpu_second": rate_of_cpu, "ordinary_answers": "math500" if data else "generated",
              "load_average_before": load, "seed": given.seed, "seconds": time.monotonic() - began}
    return conclude("hostile_answers", rows, facts, problems, given.out)


if __name__ == "__main__":
    sys.exit(main())
