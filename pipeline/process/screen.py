"""What standard error shows: how much is asked for, in colours or not, one bar, and names that do no harm there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Protocol, TextIO

CLEAR = "\r\033[K"  # back to the start of the line, and clear it


class Verbosity(IntEnum):
    """How much a command says: results, warnings and errors; what is usual; everything."""

    QUIET = 0
    USUAL = 1
    VERBOSE = 2


class Detail(str):
    """A line that is said to everybody who asks for lines, and shown to a user only with --verbose."""

    __slots__ = ()


class Shown(Protocol):
    """What stands on the terminal now and has to make room for a line."""

    def hide(self) -> None: ...

    def show(self) -> None: ...


_asked = Verbosity.USUAL
_shown: Shown | None = None


def verbosity() -> Verbosity:
    return _asked


def set_verbosity(asked: Verbosity) -> None:
    """Set how much is said from now on, in this process."""
    global _asked
    _asked = asked


def is_wanted(text: str) -> bool:
    """Whether the user asked for such a line. A warning is always wanted."""
    if isinstance(text, Detail):
        return _asked == Verbosity.VERBOSE
    return _asked > Verbosity.QUIET or text.lstrip().startswith("warning: ")


def is_live(stream: TextIO | None) -> bool:
    """Whether a line on the stream can be written anew, as a bar is. A stream that a shell has closed is None."""
    return stream is not None and stream.isatty() and not _is_dumb()


def has_colours(stream: TextIO | None) -> bool:
    """Whether to write colours, by the rules that rich has too: NO_COLOR, TERM, FORCE_COLOR, and the stream itself."""
    if os.environ.get("NO_COLOR") or _is_dumb():
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream is not None and stream.isatty())


def _is_dumb() -> bool:
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def safe(text: str) -> str:
    """Escape what a terminal would obey and not show, since others have written the names that are printed here."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def take_screen(shown: Shown | None) -> bool:
    """Put something on the screen that makes room for lines, or take it away again with None.

    False where something else is there already.
    """
    global _shown
    if shown is not None and _shown is not None:
        return False
    _shown = shown
    return True


@contextmanager
def room_for_lines() -> Iterator[None]:
    """Within, lines can be written to the terminal; what is shown there comes back below them."""
    global _shown
    if (shown := _shown) is None:
        yield
        return
    _shown = None
    shown.hide()
    try:
        yield
    finally:
        _shown = shown
        shown.show()


def with_room(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same function, which may write to the terminal at any time."""

    def said(text: str) -> None:
        with room_for_lines():
            say(text)

    return said


class WorkerStream:
    """Standard error of a worker process. Whatever it writes first clears the line, where the parent may show a bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._starts_line = stream, True

    def write(self, text: str) -> int:
        clear = CLEAR if self._starts_line and text else ""
        self._starts_line = text.endswith("\n") if text else self._starts_line
        self._stream.write(clear + text)
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def begin_worker() -> None:
    """Have this process, a worker of one that may show a bar, write to standard error without breaking the bar."""
    if sys.__stderr__ is not None and is_live(sys.__stderr__):
        sys.stderr = WorkerStream(sys.__stderr__)
