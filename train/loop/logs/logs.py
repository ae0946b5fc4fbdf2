"""The loggers of a run: what each of them offers, the table of them, and all of them as one.

A new logger is a file beside this one, a line in LOGGERS, and a row in tests/train/loop/test_logs.py. One that a run
has only if it is asked for also has a row in CHOICES and a name in train/config.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from kdcache.cache.errors import InputError, KdcacheError, kind_and_message
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train.loop.logs.csvfile import Csv
from kdcache.train.loop.logs.jsonlines import JsonLines
from kdcache.train.loop.logs.mlflow import MLflow
from kdcache.train.loop.logs.services import Findings, Picture, reason_of
from kdcache.train.loop.logs.tensorboard import TensorBoard
from kdcache.train.loop.logs.wandb import WandB


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


@runtime_checkable
class TakesSettings(Protocol):
    """A logger that has a place for what was asked for."""

    def settings(self, facts: Mapping[str, Any]) -> None:
        """Take the run's settings, its cache and its provenance, right after it was opened, also by a resumed run."""


@runtime_checkable
class TakesPictures(Protocol):
    """A logger that has a place for images."""

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Take some views with what teacher and student say of them, at the end of a run."""


@runtime_checkable
class TakesFindings(Protocol):
    """A logger that has a place for tables."""

    def findings(self, findings: Findings) -> None:
        """Take what the student's answers tell class by class, at the end of a run."""


class Ending(Protocol):
    """The last evaluation of a run, which tells more than the others."""

    def evaluate(self, model: Classifier) -> dict[str, float]:
        """Measure the student, in the place of the trainer's `evaluate`; all ranks call it together."""

    def findings(self) -> Findings | None:
        """What the answers of `evaluate` told beside its figures, on the first rank; None where that is nothing."""


# By the name that a message gives them, in the order in which they take a line.
LOGGERS: dict[str, type[Logger]] = {
    "metrics.jsonl": JsonLines,
    "TensorBoard": TensorBoard,
    "metrics.csv": Csv,
    "wandb": WandB,
    "MLflow": MLflow,
}


class Choice(NamedTuple):
    """A logger that --log names. module, package: what it needs, as it is imported and as pip knows it."""

    logger: str
    module: str = ""
    package: str = ""


CHOICES = {
    "tensorboard": Choice("TensorBoard", "tensorboard", "tensorboard"),
    "csv": Choice("metrics.csv"),
    "wandb": Choice("wandb", "wandb", "wandb"),
    "mlflow": Choice("MLflow", "mlflow", "mlflow"),
}
_USUAL, _NOWHERE = "tensorboard", "none"


@dataclass(frozen=True)
class Logged:
    """What a run logs beside metrics.jsonl. names: as --log has them; None for TensorBoard, where it is installed.

    facts: settings and provenance by name, nested where it helps. pictures: makes some views with what teacher and
    student say of them; it is called after the last epoch, if a logger was asked for that takes images. ending: what
    evaluates the student after the last epoch, if loggers were asked for.
    """

    names: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    pictures: Callable[[Classifier], list[Picture]] | None = None
    ending: Ending | None = None

    @property
    def last(self) -> Ending | None:
        """`ending`, where loggers were asked for."""
        return None if self.names in (None, _NOWHERE) else self.ending

    def has(self, logger: str) -> bool:
        """Whether the run has that row of LOGGERS."""
        by = {choice.logger: name for name, choice in CHOICES.items()}
        return logger not in by or by[logger] in (self.names or _USUAL).split(",")


def require_loggers(names: str | None) -> None:
    """InputError where a logger that is asked for needs a package that is not installed."""
    for name in (names or "").split(","):
        choice = CHOICES.get(name)
        if choice and choice.module and importlib.util.find_spec(choice.module) is None:
            raise InputError(f"--log {name} needs a package that is not installed: pip install {choice.package}")


class Logs:
    """All loggers of a run as one. A KdcacheError names the one that fails; OSErrors name their files themselves."""

    def __init__(
        self, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None], logged: Logged | None = None
    ) -> None:
        self._folder, self._open = folder, dict[str, Logger]()
        self._logged = logged or Logged()
        try:
            for name in LOGGERS:
                if self._logged.has(name):
                    self._begin(name, done, say)
        except BaseException:
            with suppress(KdcacheError, OSError):  # the error to show is the first
                self.close()
            raise

    def _begin(self, name: str, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
        with self._named(name):
            if (logger := LOGGERS[name].open(self._folder, done, say)) is not None:
                self._open[name] = logger
            if self._logged.facts and isinstance(logger, TakesSettings):
                logger.settings(self._logged.facts)

    def line(self, line: dict[str, Any]) -> None:
        """Give the figures of one epoch to all of them."""
        for name, logger in self._open.items():
            with self._named(name):
                logger.line(line)

    def end(self, model: Classifier) -> None:
        """Give what is told at the end of a run to those that take it, if loggers were asked for."""
        self._show(model)
        found = None if self._logged.last is None else self._logged.last.findings()
        if found is None:
            return
        for name, logger in self._open.items():
            if isinstance(logger, TakesFindings):
                with self._named(name):
                    logger.findings(found)

    def _show(self, model: Classifier) -> None:
        """Give some views to those that take images."""
        taking = {name: logger for name, logger in self._open.items() if isinstance(logger, TakesPictures)}
        if not taking or self._logged.names is None or self._logged.pictures is None:
            return
        pictures = self._logged.pictures(model)
        for name, logger in taking.items():
            with self._named(name):
                logger.pictures(pictures)

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
            reason = reason_of(e)
            # An error that holds a server's answer is no part of ours.
            cause = e if reason == kind_and_message(e) else None
            raise KdcacheError(
                f"{name} cannot log the run in {self._folder} ({reason}): "
                "once that is mended, --resume goes on from the last epoch that was kept"
            ) from cause
