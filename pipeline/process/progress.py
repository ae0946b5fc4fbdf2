"""Progress of long work: one line that changes on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO

from kdcache.pipeline.process.rank import this_rank


class Progress:
    """Counts towards `total` units; shows rate and time left, on torchrun's first rank. Use with `with`."""

    def __init__(self, title: str, total: int, unit: str, stream: TextIO | None = None) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._every = math.inf if this_rank().rank else 0.2 if self._tty else 15.0
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._tty and self.done and not this_rank().rank:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def advance(self, n: int, note: str = "") -> None:
        """n more units are done; `note` says where."""
        self.done += n
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        rate = self.done / (now - self._start)
        left = duration((self.total - self.done) / rate) if rate else "?"
        speed = f"{rate:,.{int(rate < 10)}f}/s" if rate >= 1 else f"{duration(1 / rate)} each" if rate else "0/s"
        line = f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {speed}, {left} left {note}".rstrip()
        self._stream.write(f"\r\033[K{line}" if self._tty else f"{line}\n")
        self._stream.flush()


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
