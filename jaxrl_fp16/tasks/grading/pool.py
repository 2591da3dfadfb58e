"""A pool of worker processes that can be killed at any moment.

Grading runs code that may hang in C, eat memory or crash: symbolic algebra on a hostile answer, or a user's
own reward function. Each job goes to a process of its own session with a memory limit; at the job's deadline
the process group gets SIGKILL, which needs no cooperation, and another takes its place. Messages are JSON
lines over a socket, so nothing that a worker sends is ever unpickled. Workers start from a bare interpreter,
not from a copy of the caller's main module, and import no JAX.
"""

import collections
import contextlib
import dataclasses
import json
import math
from multiprocessing import connection
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time
from typing import Any, Callable, Iterator, Literal, Sequence


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """What the workers run, and within which bounds."""

    setup: str                      # "module:function", called once in each worker; gives the jobs' function
    arguments: tuple = ()           # of `setup`; JSON
    workers: int = 4                # started as jobs need them
    deadline_seconds: float = 10.0  # for one job
    batch_seconds: float = 1800.0   # for all jobs of one `run`
    memory_mb: int = 2048           # address space of a worker
    start_seconds: float = 120.0    # until a worker has run `setup`


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one job."""

    status: Literal["done", "failed", "timeout", "crashed"]
    value: Any = None              # what the function returned, when done
    error: str = ""                # one line, when not


class WorkerStartError(RuntimeError):
    """A worker could not run its `setup`."""


class BatchDeadline(RuntimeError):
    """The jobs of one `run` took too long together."""


Run = Callable[[Sequence[Sequence[Any]]], list[Outcome]]
START_ATTEMPTS = 3


@contextlib.contextmanager
def open_pool(config: PoolConfig) -> Iterator[Run]:
    """Gives `run(jobs) -> outcomes`; a job is the list of the function's arguments, as JSON.

    Returns once a first worker is ready, so that a `setup` that fails raises `WorkerStartError` here. No
    process outlives the context, nor a killed parent.
    """
    workers: list[_Worker] = []
    try:
        workers.append(_start(config))
        while not workers[0].ready:
            for worker, message in _events(workers):
                if message["status"] != "ready":
                    raise WorkerStartError(message["error"])
                worker.ready = True
        yield lambda jobs: _run(jobs, workers, config)
    finally:
        _stop_all(workers)


@dataclasses.dataclass
class _Worker:
    """A process; unlike everything else here it is state, and lives in the pool's list alone."""

    process: subprocess.Popen
    channel: socket.socket
    limit: float                   # seconds after `since` at which it must have sent something
    since: float                   # monotonic time
    ready: bool = False
    job: int | None = None
    received: bytes = b""


def _start(config: PoolConfig) -> _Worker:
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).resolve().parents[3])
    # -P keeps the current folder off the path: a stray json.py there would hide the standard library's.
    code = ("import sys; sys.path.append(sys.argv[1]); "
            "from jaxrl_fp16.tasks.grading.worker import serve; serve(*sys.argv[2:])")
    plan = json.dumps([config.setup, list(config.arguments), config.memory_mb])
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, root, str(theirs.fileno()), str(os.getpid()), plan],
            stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True,
            # One thread each, or the linear algebra of several workers fights over the cores. A reward that
            # uses JAX must not take the accelerator that is training.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"},
        )
    return _Worker(process, ours, limit=config.start_seconds, since=time.monotonic())


def _stop(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)  # with the processes that a reward started itself
    worker.process.wait()
    worker.channel.close()


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        _stop(workers.pop())


def _retire(worker: _Worker, workers: list[_Worker]) -> None:
    workers.remove(worker)
    _stop(worker)


def _run(jobs: Sequence[Sequence[Any]], workers: list[_Worker], config: PoolConfig) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    waiting = collections.deque(range(len(jobs)))
    failed_starts, until = 0, time.monotonic() + config.batch_seconds
    try:
        while len(outcomes) < len(jobs):
            if time.monotonic() >= until:
                raise BatchDeadline(f"grading took longer than task.batch_seconds = {config.batch_seconds:g} s: "
                                    f"{len(outcomes)} of {len(jobs)} are graded; try more task.workers or a shorter "
                                    "task.deadline_seconds")
            while len(workers) < min(config.workers, len(jobs) - len(outcomes)):
                workers.append(_start(config))
            _hand_out(waiting, jobs, workers, config)
            for worker, message in _events(workers, until):
                if worker.ready:
                    outcomes[worker.job], worker.job = _outcome(message), None
                    fit = message["status"] in ("done", "failed")
                else:
                    fit = worker.ready = message["status"] == "ready"
                    failed_starts = 0 if fit else failed_starts + 1
                if not fit:
                    _retire(worker, workers)
                if failed_starts == START_ATTEMPTS:
                    raise WorkerStartError(message["error"])
    except BaseException:
        _stop_all(workers)  # a late reply must not be taken for that of a later job
        raise
    return [outcomes[index] for index in range(len(jobs))]


def _hand_out(waiting: collections.deque, jobs: Sequence[Sequence[Any]], workers: list[_Worker],
              config: PoolConfig) -> None:
    """Gives each idle worker a job."""
    for worker in [worker for worker in workers if worker.ready and worker.job is None]:
        if not waiting:
            return
        message = json.dumps(jobs[waiting[0]], default=str).encode() + b"\n"
        worker.channel.settimeout(config.deadline_seconds)
        try:
            worker.channel.sendall(message)
        except OSError:  # it died while idle: another gets this job
            _retire(worker, workers)
        else:
            worker.job = waiting.popleft()
            worker.limit, worker.since = config.deadline_seconds, time.monotonic()


def _events(workers: list[_Worker], until: float = math.inf) -> Iterator[tuple[_Worker, dict]]:
    """Waits for the workers that start or work, `until` then: what arrived, or that one is dead or overdue."""
    active = {worker.channel: worker for worker in workers if not worker.ready or worker.job is not None}
    now = time.monotonic()
    soonest = min((worker.since + worker.limit for worker in active.values()), default=now)
    readable = connection.wait(list(active), max(0.0, min(soonest, until) - now))
    now = time.monotonic()
    for channel, worker in active.items():
        message = _receive(worker) if channel in readable else None
        if message is None and now >= worker.since + worker.limit:
            message = {"status": "timeout", "error": f"no answer within {worker.limit:g} s"}
        if message is not None:
            yield worker, message


def _receive(worker: _Worker) -> dict | None:
    """The worker's message; None while it is incomplete."""
    try:
        chunk = worker.channel.recv(1 << 16)
    except ConnectionError:
        chunk = b""
    if not chunk:
        return {"status": "crashed", "error": "the process ended"}
    worker.received += chunk
    if not worker.received.endswith(b"\n"):
        return None
    message, worker.received = json.loads(worker.received), b""
    return message


def _outcome(message: dict) -> Outcome:
    status = "failed" if message["status"] == "spent" else message["status"]
    return Outcome(status, message.get("value"), message.get("error", ""))
