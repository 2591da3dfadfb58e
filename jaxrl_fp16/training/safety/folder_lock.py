"""One writer a run folder: a lock that the system takes back however its holder ends."""

import contextlib
import fcntl
import os
from pathlib import Path

from jaxrl_fp16.config import ConfigError

NAME = ".lock"


@contextlib.contextmanager
def only_writer(folder):
    """Holds `folder` for this process; the file stays, empty but for the holder's process id.

    Gives the lock's descriptor: a process that inherits it holds the folder too, until both have ended.

    Raises ConfigError where another process holds it, on this machine or, where the file
    system passes locks on, on another.
    """
    path = Path(folder) / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"resume: {folder} is being written by process {holder}; allowed: a folder that no other run writes"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)  # which gives the lock back
