"""The parent's end of an engine: starts the child process, asks it, and kills it at a deadline.

Frames and their limits are `child.py`'s. The child is a session of its own: a Ctrl-C in a terminal is the parent's to
deal with, and a kill takes what the engine started too.
"""

import contextlib
import os
from pathlib import Path
import selectors
import signal
import subprocess
import threading
import time

from jaxrl_fp16.engines.child import LENGTHS, FrameError, lengths_of, pack, unpack

CHILD = Path(__file__).with_name("child.py")
CHUNK = 1 << 20     # bytes read or written at once
KEPT = 4096         # last bytes of the child's stderr
PACE = 2.0          # seconds between looks at what the caller has to say, while an answer is awaited


class EngineError(RuntimeError):
    """An engine failed: it died, hung, ran out of memory or gave what is no answer. One line."""


class EngineRefused(ValueError):
    """An engine cannot do what is asked of it, and would not a second time. One line."""


class Pipe:
    """A child process that is asked one thing at a time. State, and closed by its owner; it ends with this process.

    Args:
      python: path of the interpreter.
      environment: variables beside this process's own.
      seconds: how long an answer may take.
    """

    def __init__(self, python, environment, seconds):
        self._seconds, self._tail, self._closed = seconds, b"", False
        try:
            self._process = subprocess.Popen(
                [python, "-I", "-u", str(CHILD), str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, bufsize=0, start_new_session=True, env={**os.environ, **environment},
            )
        except OSError as error:
            raise EngineRefused(f"{python} does not run ({error.strerror})") from error
        for stream in (self._process.stdin, self._process.stdout):
            os.set_blocking(stream.fileno(), False)
        self._listener = threading.Thread(target=self._listen, name="engine stderr", daemon=True)
        self._listener.start()

    @property
    def pid(self):
        """The child's process id."""
        return self._process.pid

    def ask(self, header, meanwhile=None, **arrays):
        """`(header, {name: memoryview})` of the answer to a request. Raises EngineError, EngineRefused.

        meanwhile: called every `PACE` seconds until the answer is there; what it raises ends the waiting.
        """
        try:
            self._until, self._meanwhile = time.monotonic() + self._seconds, meanwhile
            self._send(pack(header, **arrays))
            found, more = unpack(*map(self._receive, lengths_of(self._receive(LENGTHS.size))))
        except FrameError as error:
            raise EngineError(f"the engine's answer is damaged: {error}") from error
        if found.get("op") != header["op"]:
            raise EngineError(f"the engine answered {found.get('op')!r} to {header['op']!r}")
        if "error" in found:
            text, short = str(found["error"])[:400], " (out of memory)" if found.get("kind") == "memory" else ""
            raise (EngineRefused if found.get("kind") == "refused" else EngineError)(f"the engine says{short}: {text}")
        return found, more

    def close(self):
        """Kills the child with all that it started; it has nothing to save."""
        if self._closed:    # its number may be another's by now
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(timeout=5)      # ends with the last writer of that stream
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()

    def _listen(self):
        with self._process.stderr as stream:
            while chunk := stream.read(CHUNK):
                self._tail = (self._tail + chunk)[-KEPT:]

    def _send(self, pieces):
        descriptor = self._process.stdin.fileno()
        for piece in pieces:
            view = memoryview(piece)
            while view:
                self._wait(descriptor, selectors.EVENT_WRITE)
                try:
                    view = view[os.write(descriptor, view[:CHUNK]):]
                except BrokenPipeError:
                    raise self._died() from None

    def _receive(self, size):
        """Exactly that many bytes of the child's answers."""
        descriptor, found = self._process.stdout.fileno(), bytearray()
        while len(found) < size:
            self._wait(descriptor, selectors.EVENT_READ)
            chunk = os.read(descriptor, min(CHUNK, size - len(found)))
            if not chunk:
                raise self._died()
            found += chunk
        return bytes(found)

    def _wait(self, descriptor, event):
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            while not selector.select(min(PACE, left := max(0.0, self._until - time.monotonic()))):
                if not left:
                    raise EngineError(
                        f"the engine gave no answer within rollout.deadline_seconds = {self._seconds:g} s")
                if self._meanwhile is not None:
                    self._meanwhile()

    def _died(self):
        """What became of a child that hung up."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._listener.join(timeout=1)
        code, lines = self._process.returncode, self._tail.decode(errors="replace").split("\n")
        last = next((" ".join(line.split())[:200] for line in reversed(lines) if line.strip()), "")
        how = "hung up" if code is None else f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += ", as the system does where memory is short" if code == -signal.SIGKILL else ""
        return EngineError(f"the engine's process {how}{f'; its last line: {last}' if last else ''}")
