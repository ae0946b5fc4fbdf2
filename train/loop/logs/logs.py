"""The loggers of a run: what each of them offers, the table of them, and all of them as one.

A new logger is a file beside this one, a line in LOGGERS, and a row in tests/train/loop/test_logs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kdcache.cache.errors import KdcacheError, kind_and_message
from kdcache.train.loop.logs.jsonlines import JsonLines
from kdcache.train.loop.logs.tensorboard import TensorBoard


class Logger(Protocol):
    """Takes the figures of a run."""

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> Logger | None:
        """A logger for the run in `folder`, or None where it cannot be had here, which it then says.

        done: the lines of the epochs that the run goes on from. A run that was killed may have logged one more: that
        epoch is trained and logged again, and must not stand there twice.
        """

    def line(self, line: dict[str, Any]) -> None:
        """Take the figures of one epoch by name, and keep them even if the process ends right after: `epoch`, counted
        from 1, losses, `seconds` and, where it was evaluated, metrics."""

    def close(self) -> None:
        """Let go of files and threads; a second time, do nothing."""


# By the name that a message gives them, in the order in which they take a line.
LOGGERS: dict[str, type[Logger]] = {"metrics.jsonl": JsonLines, "TensorBoard": TensorBoard}


class Logs:
    """All loggers of a run as one. A KdcacheError names the one that fails; OSErrors name their files themselves."""

    def __init__(self, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
        self._folder, self._open = folder, dict[str, Logger]()
        for name, kind in LOGGERS.items():
            with self._named(name):
                if (logger := kind.open(folder, done, say)) is not None:
                    self._open[name] = logger

    def line(self, line: dict[str, Any]) -> None:
        """Give the figures of one epoch to all of them."""
        for name, logger in self._open.items():
            with self._named(name):
                logger.line(line)

    def close(self) -> None:
        """Close all of them, also those after one that fails; a second time, do nothing."""
        loggers, self._open = self._open, {}
        failed: list[KdcacheError | OSError] = []
        for name, logger in loggers.items():
            try:
                with self._named(name):
                    logger.close()
            except (KdcacheError, OSError) as e:
                failed.append(e)
        if failed:
            raise failed[0]

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (KdcacheError, OSError):
            raise
        except Exception as e:  # a logger may call anybody's code
            raise KdcacheError(
                f"{name} cannot log the run in {self._folder} ({kind_and_message(e)}): "
                "once that is mended, --resume goes on from the last epoch that was kept"
            ) from e
