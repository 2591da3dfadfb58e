"""Processes of their own, some beside each other: started, pinned to their cores, ended in order, accounted for."""

import collections
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    command: Sequence[str]
    output: Path             # a file's stem: takes stdout and stderr, as .stdout and .stderr


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended and what it took, its own workers included where it waited for them."""

    code: int                # 128 + the signal for one that a signal killed
    error: str               # the last line of its stderr, or the signal's name; "" after code 0
    seconds: float           # of a clock on the wall
    cpu_seconds: float       # user and system
    peak_bytes: int          # the largest resident memory of any one of its processes
    cores: int | None        # that it could use; None: not pinned


@dataclasses.dataclass(frozen=True)
class _Running:
    process: subprocess.Popen
    began: float
    share: Sequence[int] | None


def shares_of_cores(slots: int) -> list[tuple[int, ...] | None]:
    """As many cores for each of `slots` processes, different ones; None for each where the system pins none."""
    if not hasattr(os, "sched_setaffinity"):
        return [None] * slots
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // slots
    return [tuple(cores[slot * size:(slot + 1) * size]) if size else None for slot in range(slots)]


def core_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], shares: Sequence, signals, *, ended: Callable[[Job, Ended], None],
             tick: Callable[[Sequence[str]], None] = lambda names: None, keep_open: Sequence[int] = ()) -> None:
    """Runs `jobs` in their order, as many at a time as there are `shares`; returns when none is left.

    Args:
      shares: of each place, the cores of the process there, or None.
      signals: with `received`, the number of a signal that asks to end or None. It is passed on,
        once, to every process that runs; no other is started, and those are waited for.
      ended: called as each job ends.
      tick: called between looks with the names of those that run.
      keep_open: file descriptors that the processes inherit, such as a lock's.

    However this function is left, no process stays behind.
    """
    waiting, running, free, told = collections.deque(jobs), {}, list(shares), False
    try:
        while running or (waiting and signals.received is None):
            while waiting and free and signals.received is None:
                job = waiting.popleft()
                running[job] = _start(job, free.pop(0), keep_open)
            if signals.received is not None and not told:
                told = True
                for one in running.values():
                    one.process.send_signal(signals.received)
            for job in [job for job in running if _has_ended(running[job])]:
                free.append(running[job].share)
                ended(job, _account(job, running.pop(job)))
            tick([job.name for job in running])
            time.sleep(POLL_SECONDS)
    finally:
        for one in running.values():
            one.process.kill()
            one.process.wait()


def _start(job, share, keep_open):
    # A session of its own: Ctrl-C at a terminal reaches this process alone, which passes it on once.
    with _pinned(share), open(f"{job.output}.stdout", "ab") as out, open(f"{job.output}.stderr", "wb") as err:
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, pass_fds=keep_open
        )
    return _Running(process, time.monotonic(), share)


@contextlib.contextmanager
def _pinned(share):
    """A process started inside inherits these cores, and with them the number of threads that XLA makes."""
    if share is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _has_ended(one):
    """Whether it has, leaving it to be waited for."""
    return os.waitid(os.P_PID, one.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _account(job, one):
    _, status, usage = os.wait4(one.process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    one.process.returncode = code       # Popen has nothing left to wait for
    unit = 1 if sys.platform == "darwin" else 1024
    if code < 0:
        error = f"killed by {signal.Signals(-code).name}"
    else:
        error = last_line(f"{job.output}.stderr") if code else ""
    return Ended(
        code=128 - code if code < 0 else code, error=error, seconds=time.monotonic() - one.began,
        cpu_seconds=usage.ru_utime + usage.ru_stime, peak_bytes=usage.ru_maxrss * unit,
        cores=None if one.share is None else len(one.share),
    )


def last_line(path: str | os.PathLike) -> str:
    """The last line of a text file that holds anything."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return next((line for line in reversed(file.read().splitlines()) if line.strip()), "").strip()
