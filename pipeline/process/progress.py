"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.process.screen import Verbosity, is_live, safe, take_screen, verbosity

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_FIRST, _EVERY = 0.5, 0.2  # seconds until a bar is first drawn, and between two drawings
_AFTER_CTRL_C = 0.05  # seconds: a terminal drops what is written while it handles that
_SHARE = 0.004  # of a core's time, at most, that goes into drawing
_LINES_EVERY, _LINES_SHARE = 15.0, 0.05  # seconds between two plain lines, or this share of the time so far if longer
_NARROWEST, _WIDEST = 8, 32  # columns of the bar; where there is less room than that, only the text is shown


class Progress:
    """Counts towards `total` units; shows rate and time left, on torchrun's first rank. Use with `with`.

    done: how many units were done before. facts: what else the bar tells, which is asked for only when it is drawn.
    With --quiet, and within another bar, nothing is shown. The title may be changed on the way.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        stream: TextIO | None = None,
        *,
        done: int = 0,
        facts: Callable[[], str] | None = None,
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._stream = sys.stderr if stream is None else stream
        self._facts, self._before = facts, done
        self._bar: _Bar | None = None
        self._live = is_live(self._stream)
        shows = verbosity() > Verbosity.QUIET and not this_rank().rank
        self._wait = (_FIRST if self._live else _LINES_EVERY) if shows else math.inf
        self._start = self._drawn = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._bar is not None:
            take_screen(None)
            if kind is KeyboardInterrupt:
                time.sleep(_AFTER_CTRL_C)
            self._bar.hide()

    def advance(self, n: int, note: str = "") -> None:
        """n more units are done; `note` says where."""
        self.done += n
        if (now := time.monotonic()) - self._drawn >= self._wait:
            self._draw(now, note)

    def _draw(self, now: float, note: str) -> None:
        rate = (self.done - self._before) / (now - self._start)
        text = safe(", ".join([*self._counted(rate), *([note] if note else [])]))
        if not self._live:
            self._drawn, self._wait = now, max(_LINES_EVERY, _LINES_SHARE * (now - self._start))
            self._stream.write(f"{safe(self.title)}: {text}\n")
            self._stream.flush()
            return
        if self._bar is None:
            bar = _Bar(self._stream)
            if not take_screen(bar):
                self._wait = math.inf
                return
            self._bar = bar
        started = time.thread_time()
        if self._facts is not None and (more := self._facts()):
            text += f", {safe(more)}"
        self._bar.draw(safe(self.title), text, self.done / self.total if self.total else 1.0)
        self._drawn, self._wait = now, max(_EVERY, (time.thread_time() - started) / _SHARE)

    def _counted(self, rate: float) -> list[str]:
        done, total = (size(n) if self.unit == "bytes" else f"{n:,}" for n in (self.done, self.total))
        if self.unit == "bytes":
            speed = f"{size(rate)}/s"
        else:
            speed = f"{rate:,.{int(rate < 10)}f}/s" if rate >= 1 else f"{duration(1 / rate)} each" if rate else "0/s"
        left = duration((self.total - self.done) / rate) if rate else "?"
        return [f"{done} of {total}{'' if self.unit == 'bytes' else f' {self.unit}'}", speed, f"{left} left"]


class _Bar:
    """One line of a terminal: a title, a bar, and text. rich draws it, and is imported only for that."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._title, self._text, self._part = "", "", 0.0
        self._is_hidden = False
        self._console = Console(file=stream, highlight=False)
        # What others write to standard output stays there. The cursor is left visible, for a process that is killed.
        self._line = Live(
            get_renderable=self._row,
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            vertical_overflow="crop",
        )

    def draw(self, title: str, text: str, part: float) -> None:
        self._title, self._text, self._part = title, text, part
        if self._line.is_started:
            with _ctrl_c_held_back():
                self._line.refresh()
        elif not self._is_hidden:
            self.show()

    def show(self) -> None:
        self._is_hidden = False
        with _ctrl_c_held_back():
            self._line.start(refresh=True)
            self._console.show_cursor(True)

    def hide(self) -> None:
        self._is_hidden = True
        with _ctrl_c_held_back():
            self._line.stop()

    def _row(self) -> Table | Text:
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._console.width - 1  # a terminal may break a line that fills its last column
        room = width - cell_len(self._title) - cell_len(self._text) - 2
        if room < _NARROWEST:
            line = Text(f"{self._title}: {self._text}", no_wrap=True)
            line.truncate(width, overflow="ellipsis")
            return line
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=self._part, width=min(room, _WIDEST))
        grid.add_row(Text(self._title), bar, Text(self._text))
        return grid


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Within, Ctrl-C waits for the end: a frame that it breaks off is written again, and one of the two stays."""
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *of: pressed.append(of))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if pressed:
            usual(*pressed[0])


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min 20 s, 2 h 5 min."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"


def percent(rate: float) -> str:
    """A rate in 0..1, such as the share of right answers, for people: 97.75%. Programs get the fraction itself."""
    return f"{100 * rate:.2f}%"


def size(count: float) -> str:
    """Bytes in decimal units: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
