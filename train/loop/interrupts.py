"""Ctrl-C and SIGTERM while training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """While `waiting`, the first one only sets `asked`, so that a step ends whole; otherwise KeyboardInterrupt at once.

    Use with `with`. In a thread, where Python delivers no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.waiting = self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):  # as under nohup, or in the background
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that can be broken off anywhere: within it, an interrupt does not wait."""
        self.check()
        waiting, self.waiting = self.waiting, False
        try:
            yield
        finally:
            self.waiting = waiting

    def check(self) -> None:
        """Raise KeyboardInterrupt if an interrupt has waited."""
        if self.asked:
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.waiting:
            raise KeyboardInterrupt
        self.asked = True
