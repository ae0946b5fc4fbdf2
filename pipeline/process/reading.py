"""What the worker processes of a DataLoader are reading, so that one that was killed is named with its file."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawArray
from typing import Any

_NOTICED_SECONDS = 1.0  # after which the death of a process is noticed at the latest


class Reading:
    """What each of several worker processes is working on, in memory that they share with their parent."""

    def __init__(self, workers: int) -> None:
        # Each worker's process id, and the place that it is working on, or -1.
        self._at = RawArray(ctypes.c_int64, [-1] * (2 * workers))

    def note(self, worker: int, place: int) -> None:
        """Note, in a worker process, that it is working on a place from now on; -1 stands for none."""
        self._at[2 * worker], self._at[2 * worker + 1] = os.getpid(), place

    def places(self, pids: Sequence[int]) -> list[int]:
        """The places that the processes with these ids are working on."""
        found = list(zip(self._at[::2], self._at[1::2], strict=True))
        return [place for pid in pids for process, place in found if process == pid and place >= 0]


def lost_workers(error: str) -> tuple[list[int], str | None] | None:
    """The ids of the processes that are gone by torch's error, and the signal if it says one; None for other errors."""
    found = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.*?)\.( |$))?", error)
    return found and ([int(pid) for pid in found[1].split(",")], found[2])


@contextmanager
def deaths_first() -> Iterator[None]:
    """Have torch's error of a worker's death, which names it, come in the place of an error of the pipe that it broke.

    For blocks that fetch what workers have done, in the main thread: torch raises its error from a signal handler.
    """
    try:
        yield
    except (ConnectionError, EOFError):
        time.sleep(_NOTICED_SECONDS)  # the handler ends it
        raise


def as_it_is(done: Any) -> Any:
    """Return what a worker has done, in place of torch's own collation, which would put arrays into shared memory."""
    return done
