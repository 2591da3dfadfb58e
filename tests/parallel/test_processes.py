"""Whole runs in two processes, one CPU device in each: what becomes of one when the other is not as it should be."""

import os
from pathlib import Path
import socket
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def processes(tiny, quick_environment, tmp_path):
    """processes(flags of 0, flags of 1) -> both, started; killed in the end."""
    started = []

    def start(*flags):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        for index, own in enumerate(flags):
            environment = os.environ | quick_environment | {
                "PYTHONPATH": str(ROOT), "JAXRL_COORDINATOR": f"127.0.0.1:{port}", "JAXRL_NUM_PROCESSES": "2",
                "JAXRL_PROCESS_ID": str(index),
            }
            started.append(subprocess.Popen(
                [sys.executable, "-m", "jaxrl_fp16.cli", "train", str(tiny), "--run.dir", "runs",
                 "--run.stamp", "false", "--run.name", "run",
                 "--run.compile_cache", "null", "--run.heartbeat_seconds", "5", *own],
                cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            ))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def last_line(process, seconds):
    return process.communicate(timeout=seconds)[1].rstrip("\n").split("\n")[-1]


@pytest.mark.fault(30)
def test_processes_with_different_configs_are_refused_in_all(processes, tmp_path):
    for process in processes(("--run.seed", "1"), ("--run.seed", "2")):
        line = last_line(process, 120)
        assert process.returncode == 2
        assert line.startswith("jaxrl-fp16: several processes: their configs differ: run.seed is ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(29)
@pytest.mark.parametrize("victim", [0, 1], ids=["the first", "another"])
def test_when_a_process_is_killed_the_other_one_leaves(processes, tmp_path, victim):
    both = processes((), ())
    folder = tmp_path / "runs" / "run"
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    both[victim].kill()
    line = last_line(both[1 - victim], 120)
    assert both[1 - victim].returncode == 3
    assert line.startswith("jaxrl-fp16: another process of the run ended or does not answer; look at its output, then ")
    assert line.endswith("; there is no checkpoint yet")
