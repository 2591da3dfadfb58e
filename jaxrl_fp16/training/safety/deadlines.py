"""What ends a run from outside: signals, a stage that takes too long, a process of the run that is gone.

The main thread may be stuck inside a compiled program or a collective, where no line of Python runs: no signal
handler, no exception. So a thread of its own watches, and where nothing else helps it ends the process itself.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time

import psutil

CAUGHT = (signal.SIGTERM, signal.SIGINT)
GRACE = 2.0     # seconds after a second signal until the process is ended from here
STOPPED = 3     # the exit code of a run that a guard stopped


class Interrupted(Exception):
    """A signal came in the middle of a step, which is given up."""


class Signals:
    """SIGTERM and SIGINT, remembered until the step ends; a second one stops at once."""

    received: int | None = None

    def __call__(self, number, frame):
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number


@contextlib.contextmanager
def caught_signals():
    """Gives a `Signals` that SIGTERM and SIGINT set, and puts the handlers back."""
    signals = Signals()
    before = {number: signal.signal(number, signals) for number in CAUGHT}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends the process with exit code 3 when a stage takes too long, and 2 seconds after a second signal.

    A context manager, to be entered by the main thread after `caught_signals`. Nothing runs out
    before the first `start`.

    Args:
      seconds: how long a stage may take; None: as long as it likes.
      key: the config's key for that, to be named.
    """

    def __init__(self, seconds: float | None, key: str):
        self._seconds, self._key = seconds, key
        self._stage = ("", "", time.monotonic())    # name, what is saved, since when
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        # The system's own handler writes a signal's number there, whatever the main thread is doing.
        self._before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        signal.set_wakeup_fd(self._before)
        self._theirs.close()    # which ends the thread
        self._thread.join()
        self._ours.close()

    def start(self, stage: str, saved: str) -> None:
        """A stage begins, and the one before has ended. saved: of the last checkpoint, for the line of a stop."""
        self._stage = stage, saved, time.monotonic()

    @property
    def saved(self) -> str:
        """What the latest stage was told of the last checkpoint."""
        return self._stage[1] or "there is no checkpoint yet"

    def _watch(self) -> None:
        received, last = 0, None
        while True:
            stage, saved, since = self._stage
            limit = since + self._seconds if stage and self._seconds is not None else None
            limits = [moment for moment in (limit, last) if moment is not None]
            # Woken now and then all the same: `start` moves the limit and says nothing.
            wait = min([1.0, *(moment - time.monotonic() for moment in limits)])
            if select.select([self._ours], [], [], max(0.0, wait))[0]:
                numbers = self._ours.recv(64)
                if not numbers:
                    return
                caught = [number for number in numbers if number in CAUGHT]
                received += len(caught)
                if received > 1 and last is None:
                    number, last = caught[-1], time.monotonic() + GRACE
            elif last is not None and time.monotonic() >= last:
                leave(128 + number, f"stopped at once by {signal.Signals(number).name}; {saved}")
            elif limit is not None and time.monotonic() >= limit and self._stage == (stage, saved, since):
                leave(STOPPED, f"{stage} took longer than {self._key} = {self._seconds:g} s; raise it, or look for "
                               f"what hangs; {saved}")


def leave(code: int, line: str) -> None:
    """Ends this process now, whatever its threads are at: one line on stderr, its child processes killed."""
    os.write(2, f"jaxrl-fp16: {' '.join(line.split())}\n".encode())
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        os.write(1, b"\x1b[?25h")       # a live line hides the cursor
    os._exit(code)


@contextlib.contextmanager
def leaving_on_abort(line: Callable[[], str]):
    """While it lasts, an abort of this process ends it with exit code 3 and `line()` on stderr.

    JAX's coordination service aborts each process of a run when one of them is gone, from a thread of its own.
    """
    libc = ctypes.CDLL(None)
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = handler_type(lambda number: leave(STOPPED, line()))
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)
