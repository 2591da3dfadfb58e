"""What ends a process whose main thread is stuck, in Python or in C, or that JAX aborts."""

import json
import os
from pathlib import Path
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).parents[3]

# The cases run side by side, each in a process forked from one that has imported what they need.
CASES = """if True:
    import hashlib, json, os, signal, subprocess, sys, threading, time
    from jaxrl_fp16.training.safety.deadlines import Watchdog, caught_signals, leaving_on_abort

    def restarts():
        with caught_signals(), Watchdog(1.5, "training.stage_seconds") as watchdog:
            for step in range(4):
                watchdog.start(f"step {step}", "nothing")
                time.sleep(0.6)

    def hangs():
        with caught_signals(), Watchdog(1, "training.stage_seconds") as watchdog:
            print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
            watchdog.start("step 3: learning", "the last checkpoint is runs/2")
            time.sleep(60)

    def signals(count):
        with caught_signals(), Watchdog(None, "training.stage_seconds") as watchdog:
            watchdog.start("step 3: learning", "the last checkpoint is runs/2")
            def send():
                for _ in range(count):
                    time.sleep(0.2)
                    os.kill(os.getpid(), signal.SIGTERM)
                if count == 1:
                    time.sleep(4)
                    os._exit(0)     # one signal is remembered, and no more
            threading.Thread(target=send, daemon=True).start()
            hashlib.pbkdf2_hmac("sha512", b"a", b"b", 10**9)    # minutes in C, where no handler of Python's runs

    def twice(): signals(2)

    def once(): signals(1)

    def aborts():
        with leaving_on_abort(lambda: "another process is gone"):
            os.abort()

    cases = dict(restarts=restarts, hangs=hangs, twice=twice, once=once, aborts=aborts)
    running, began = {}, time.monotonic()
    for name, case in cases.items():
        if not (pid := os.fork()):
            for number, ending in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{sys.argv[1]}/{name}.{ending}", os.O_CREAT | os.O_WRONLY), number)
            case()
            os._exit(0)
        running[pid] = name
    found = {}
    while running:
        pid, status = os.wait()
        name = running.pop(pid)
        texts = [open(f"{sys.argv[1]}/{name}.{ending}").read() for ending in ("out", "err")]
        found[name] = [os.waitstatus_to_exitcode(status), *texts, time.monotonic() - began]
    print(json.dumps(found))
    """


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """case -> [exit code, stdout, stderr, seconds]."""
    done = subprocess.run(
        [sys.executable, "-c", CASES, str(tmp_path_factory.mktemp("cases"))], capture_output=True, text=True,
        timeout=90, env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_gone(pid):
    for _ in range(100):
        try:
            if open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_stage_that_takes_too_long_ends_the_process_and_its_workers(ends):
    code, out, err, seconds = ends["hangs"]
    assert code == 3 and 1 <= seconds < 20
    assert err == ("jaxrl-fp16: step 3: learning took longer than training.stage_seconds = 1 s; raise it, or look for "
                   "what hangs; the last checkpoint is runs/2\n")
    assert is_gone(int(out))


def test_each_stage_has_the_time_for_itself(ends):
    assert ends["restarts"][:3] == [0, "", ""]


@pytest.mark.fault(23)
def test_a_second_signal_ends_a_process_that_is_stuck(ends):
    code, _, err, seconds = ends["twice"]
    assert code == 143 and seconds < 20
    assert err == "jaxrl-fp16: stopped at once by SIGTERM; the last checkpoint is runs/2\n"
    assert ends["once"][0] == 0 and ends["once"][3] > 4


def test_an_abort_of_jax_is_exit_code_3(ends):
    assert ends["aborts"][0] == 3 and ends["aborts"][2] == "jaxrl-fp16: another process is gone\n"
