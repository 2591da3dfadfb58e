"""What runs inside a process of the grading pool; imports no JAX, so that it starts fast."""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
from typing import Callable


def serve(descriptor: str, parent: str, plan: str) -> None:
    """A worker's life: run `setup`, say so, then answer one job a line until the parent hangs up.

    `plan` is JSON: `"module:function"` of the setup, its arguments, and the memory limit in MiB.
    """
    setup, arguments, memory_mb = json.loads(plan)
    channel = socket.socket(fileno=int(descriptor))
    channel.set_inheritable(False)
    _die_with(int(parent))
    _limit_memory(memory_mb)

    def send(message: dict) -> None:
        channel.sendall(json.dumps(message, allow_nan=False).encode() + b"\n")

    try:
        module, _, name = setup.partition(":")
        function = getattr(importlib.import_module(module), name)(*arguments)
    except BaseException as error:
        send({"status": "failed", "error": one_line(error)})
        return
    send({"status": "ready"})
    for line in channel.makefile("rb"):
        send(_answer(function, line))


def _answer(function: Callable, line: bytes) -> dict:
    try:
        value = function(*json.loads(line))
        json.dumps(value, allow_nan=False)  # a value that cannot be sent is this job's failure
        return {"status": "done", "value": value}
    except MemoryError as error:
        return {"status": "spent", "error": one_line(error)}  # what it holds may never come back: replaced
    except BaseException as error:  # SystemExit too
        return {"status": "failed", "error": one_line(error)}


def one_line(error: BaseException) -> str:
    """`Kind: text` of an exception, on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _die_with(parent: int) -> None:
    """Asks Linux to kill this process with its parent, which may itself be killed while a job hangs here."""
    if sys.platform.startswith("linux"):
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _limit_memory(memory_mb: int) -> None:
    import resource  # absent on Windows, where this pool does not run

    limit = memory_mb * 2**20
    with contextlib.suppress(ValueError, OSError):  # a lower hard limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
