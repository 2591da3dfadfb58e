"""The worker pool under hanging, crashing and greedy jobs. Jobs are functions of the standard library."""

import contextlib
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from jaxrl_fp16.tasks import BatchDeadline, PoolConfig, WorkerStartError, open_pool

SETUP = '''
import ctypes, os, subprocess, sys, time

def open_jobs(word):
    def job(what, value=None):
        if what == "echo":
            return [word, value]
        if what == "hang":            # in C, holding the interpreter's lock: no signal handler runs
            return len(str(9 ** 387420489))
        if what == "sleep":
            time.sleep(60)
        if what == "crash":
            ctypes.string_at(0)
        if what == "exit":
            sys.exit(3)
        if what == "eat":
            return len(bytearray(10 ** 12))
        if what == "raise":
            raise KeyError("two\\nlines")
        if what == "nan":
            return float("nan")
        if what == "print":
            print("to stdout")
            return os.getpid()
        if what == "spawn":           # a process of its own, which must not outlive the worker
            return subprocess.Popen(["sleep", "60"]).pid
        if what == "modules":
            return [name for name in value if name in sys.modules]
    return job

def fail():
    raise OSError("no such engine")

def hang():
    time.sleep(60)
'''


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    """A folder with the module `pool_setups`, on the path of the workers."""
    folder = tmp_path_factory.mktemp("setups")
    (folder / "pool_setups.py").write_text(SETUP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield folder


@pytest.fixture(scope="module")
def run(setups):
    with open_pool(PoolConfig("pool_setups:open_jobs", ("hello",), workers=2, deadline_seconds=1.0)) as run:
        yield run


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids):
    """Whether all of the processes end; a kill takes a moment to arrive."""
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def test_values_come_back_in_order(run):
    outcomes = run([["echo", {"n": n, "text": "é\ud800\n"}] for n in range(200)])
    assert [outcome.value[1]["n"] for outcome in outcomes] == list(range(200))
    assert outcomes[0].value == ["hello", {"n": 0, "text": "é\ud800\n"}] and outcomes[0].status == "done"
    assert run([]) == []
    long = "x" * 3_000_000
    assert run([["echo", long]])[0].value == ["hello", long]


def test_bad_jobs_cost_themselves_alone(run):
    start = time.perf_counter()
    names = ["hang", "echo", "crash", "raise", "sleep", "exit", "eat", "nan", "echo"]
    outcomes = dict(zip(names, run([[name] for name in names]), strict=False))
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "hang": "timeout", "echo": "done", "crash": "crashed", "raise": "failed", "sleep": "timeout",
        "exit": "failed", "eat": "failed", "nan": "failed"}
    assert outcomes["raise"].error == "KeyError: 'two\\nlines'"
    assert outcomes["eat"].error.startswith("MemoryError")
    assert outcomes["hang"].error == "no answer within 1 s"
    assert time.perf_counter() - start < 8  # two deadlines beside each other, and new workers
    assert [outcome.status for outcome in run([["echo"]] * 4)] == ["done"] * 4


def test_a_worker_that_dies_idle_is_replaced(run):
    pids = {outcome.value for outcome in run([["print"]] * 4)}
    for pid in pids:
        os.kill(pid, 9)
    time.sleep(0.1)
    assert [outcome.status for outcome in run([["echo"]] * 4)] == ["done"] * 4


def test_workers_start_light(run):
    heavy = ["jax", "transformers", "pydantic", "sympy"]
    assert run([["modules", heavy]])[0].value == []


def test_nothing_is_left_after_an_exception(setups):
    pids = []
    with contextlib.suppress(KeyboardInterrupt):
        with open_pool(PoolConfig("pool_setups:open_jobs", ("a",), workers=1)) as run:
            pids += [run([[what]])[0].value for what in ("print", "spawn")]
            assert all(alive(pid) for pid in pids)
            raise KeyboardInterrupt
    assert gone(pids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel for it")
def test_a_killed_parent_takes_hanging_workers_along(setups):
    code = ("import time\nfrom jaxrl_fp16.tasks import PoolConfig, open_pool\n"
            "with open_pool(PoolConfig('pool_setups:open_jobs', ('a',), workers=1)) as run:\n"
            "    print(run([['print']])[0].value, flush=True)\n"
            "    run([['sleep']])\n")
    path = os.pathsep.join([str(Path(__file__).resolve().parents[3]), str(setups)])
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env={**os.environ, "PYTHONPATH": path})
    with parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    assert gone([pid])


@pytest.mark.fault(15)
def test_a_batch_has_a_deadline(setups):
    """Whatever becomes of the workers, here stopped by a signal: each job's own deadline is far away."""
    config = PoolConfig("pool_setups:open_jobs", ("a",), workers=1, deadline_seconds=60, batch_seconds=1.0)
    with open_pool(config) as run:
        (outcome,) = run([["print"]])
        os.kill(outcome.value, signal.SIGSTOP)
        start = time.perf_counter()
        with pytest.raises(BatchDeadline, match="longer than task.batch_seconds = 1 s: 0 of 3 are graded; try more"):
            run([["echo"]] * 3)
        assert time.perf_counter() - start < 5 and gone([outcome.value])


def test_a_setup_that_fails_is_said(setups):
    with pytest.raises(WorkerStartError, match="OSError: no such engine"):
        with open_pool(PoolConfig("pool_setups:fail")):
            pass
    with pytest.raises(WorkerStartError, match="no answer within 2 s"):
        with open_pool(PoolConfig("pool_setups:hang", start_seconds=2)):
            pass
    with pytest.raises(WorkerStartError, match="ModuleNotFoundError"):
        with open_pool(PoolConfig("no_such_module:fail")):
            pass
