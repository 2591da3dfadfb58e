"""What is refused before a start: one line, and the place that it names."""

from collections.abc import Iterator
import contextlib
from typing import ContextManager, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that is refused; one line with the key, the value, what is allowed, the file."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
    """Turns a ValueError into a refusal that names the section of the config."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(section) else f"{section}: {text}") from error


@contextlib.contextmanager
def naming_at_entry(section: str, context: ContextManager[T]) -> Iterator[T]:
    """`context`, with ValueErrors of its opening, and no later ones, turned into refusals."""
    with contextlib.ExitStack() as stack:
        with naming(section):
            entered = stack.enter_context(context)
        yield entered
