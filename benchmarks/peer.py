"""A program of another interpreter that takes turns with ours: a child process, one line of JSON in and one out."""

from __future__ import annotations

import json
import os
from pathlib import Path
import subprocess
import tempfile

from timing import Spent

PEERS = Path(__file__).parent / "peers"
# One thread, no network, no telemetry, no GPU. VLLM's: all in one process, on the core that it inherits.
QUIET = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "disabled",
    "TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1",
}


class Peer:
    """`peers/SCRIPT` under the interpreter `python`; a call is a turn and returns its `Spent`.

    settings: what the script gets as its `Turns.settings`, plain values.
    Raises RuntimeError with the end of its output where it ends early.
    """

    def __init__(self, python, script, **settings):
        self._log = tempfile.TemporaryFile("w+")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._child = subprocess.Popen(
            [python, PEERS / script], env=environment | QUIET, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )
        self._say(json.dumps(settings))

    def __call__(self):
        self._say("turn")
        reply = self._child.stdout.readline()
        return Spent(**json.loads(reply)) if reply else self._fail()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._child.stdin.close()
        try:
            self._child.wait(30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._log.close()

    def _say(self, line):
        try:
            self._child.stdin.write(line + "\n")
        except BrokenPipeError:
            self._fail()

    def _fail(self):
        code = self._child.wait()
        self._log.seek(0)
        raise RuntimeError(f"{self._child.args[1].name} ended with code {code}: {self._log.read()[-2000:]}")


__all__ = ["Peer"]
