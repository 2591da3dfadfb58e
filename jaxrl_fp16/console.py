"""The console of a run: single lines, tables, and one live line of progress."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import os
import sys
import threading
import time
from typing import Any
import unicodedata

import rich.console
import rich.live
import rich.table
from rich.text import Text

# (label, metric, format): what the live line shows of a step, where the step has that metric
LINE = (
    ("reward", "reward", ".3f"),
    ("length", "response_length", ".0f"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("KL", "mismatch/kl_k3", ".1e"),
    ("scale", "loss_scale", ",g"),
)
PATIENCE = 30.0     # seconds without a line of progress where there is no live one
TURNS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"   # what turns the direction of a text


def printable(text: str) -> str:
    """A text without what would steer a terminal: control characters but tab and newline, and turns of direction.

    A surrogate that stands alone, which no encoding holds, becomes U+FFFD.
    """
    def shown(character):
        kind = unicodedata.category(character)
        if kind == "Cs":
            return "\ufffd"
        return "" if (kind == "Cc" and character not in "\t\n") or character in TURNS else character

    return text if text.isascii() and text.isprintable() else "".join(map(shown, text))


class Console:
    """Where a person reads. Output that fails (a closed pipe, a full disk) silences it and raises nothing.

    Args:
      steps: iterations in all, for the time left.
      every: where the output is no terminal, steps between progress lines; None: they come by time alone.
      line: rows like those of `LINE`.
      quiet: prints nothing at all, as in every process of a run but the first.
    """

    def __init__(self, *, steps: int = 0, every: int | None = None, line: Sequence[tuple[str, str, str]] = LINE,
                 quiet: bool = False, console: rich.console.Console | None = None):
        self._console = console or _RichConsole(width=None if sys.stdout.isatty() else 120)
        self._console.quiet = quiet
        self._steps, self._every, self._line = steps, every, line
        self._live: rich.live.Live | None = None
        self._ends: collections.deque[float] = collections.deque(maxlen=20)     # when the latest steps ended
        self._done: int | None = None       # the latest of these steps
        self._said = self._counted = time.monotonic()       # when status or progress, and progress, last took a line

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._live is not None:
            self._guarded(self._live.stop)

    def say(self, text: str) -> None:
        """One line, above the live one."""
        self._guarded(self._console.print, printable(text), markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table whose first column is text and whose others are aligned as numbers."""
        table = rich.table.Table(title=Text(printable(title)), title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(Text(printable(column)), justify="right" if index else "left")
        for row in rows:
            table.add_row(*(Text(printable(str(cell))) for cell in row))
        self._guarded(self._console.print, table)

    @contextlib.contextmanager
    def announce(self, text: str, after: float = 2.0) -> Iterator[None]:
        """Says `text` once the block has lasted `after` seconds, and at its end how long it took."""
        began, said = time.monotonic(), threading.Event()

        def speak():
            said.set()
            self.say(f"{text} ...")

        timer = threading.Timer(after, speak)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
        if said.is_set():
            self.say(f"{text}: {time.monotonic() - began:.1f} s")

    def progress(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows that `step` iterations are done: redraws the live line; where there is none, prints one for the first
        and the last, one where PATIENCE has passed since, and one for each `every` of them."""
        self._ends.append(time.monotonic())
        self._done = step
        text = self._describe(step, numbers)
        if self._is_live():
            self._redraw(text)
        elif (len(self._ends) == 1 or step == self._steps or (self._every and step % self._every == 0)
              or self._ends[-1] - self._counted >= PATIENCE):
            self._said = self._counted = self._ends[-1]
            self.say(text)

    def status(self, text: str, seconds: float = PATIENCE) -> None:
        """What goes on now, in the live line; where there is none, a line every `seconds` at most."""
        if self._is_live():
            self._redraw(text)
        elif time.monotonic() - self._said >= seconds:
            self._said = time.monotonic()
            self.say(text)

    def stage(self, text: str) -> None:
        """What a long step is at now, and since when; a line where there is no live one, and neither a line nor a
        step's end came within PATIENCE. Shorter steps are told by their progress alone."""
        spent = time.monotonic() - (self._ends[-1] if self._ends else self._said)
        if not self._is_live() and spent >= PATIENCE:
            self.status(text if self._done is None else f"{text}, {spent:.0f} s after step {self._done}")

    def _is_live(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _redraw(self, text: str) -> None:
        if self._live is None:
            # Drawn by us alone: rich's own refreshing takes a thread, and workers are started beside it.
            self._live = rich.live.Live(console=self._console, auto_refresh=False)
            self._guarded(self._live.start)
        line = Text(printable(text), style="bold", no_wrap=True, overflow="ellipsis")
        self._guarded(self._live.update, line, refresh=True)

    def _describe(self, step: int, numbers: Mapping[str, float]) -> str:
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        parts += [f"{label} {numbers[key]:{form}}" for label, key, form in self._line if key in numbers]
        if len(self._ends) > 1 and step < self._steps:      # the first step's time includes compiling
            seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            parts.append(f"left {clock((self._steps - step) * seconds)}")
        return "  ".join(parts)

    def _guarded(self, call: Callable, *arguments, **options) -> None:
        try:
            call(*arguments, **options)
        except (OSError, ValueError):       # a full disk or pipe behind stdout, or a stdout that is closed
            self._console.quiet = True


class _RichConsole(rich.console.Console):
    """Rich's own ends the program when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):      # or the interpreter's last flush would fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
