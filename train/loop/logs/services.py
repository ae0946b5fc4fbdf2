"""What loggers share whose figures go to a service, which may be away for a while; and what is given to loggers."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import CorruptError, NotFoundError, kind_and_message
from kdcache.cache.files import replace_file
from kdcache.cache.sealed import read_sealed, sealed

PROJECT = "kdcache"
SWEEP = "sweep.json"
_PATIENCE = 60.0  # seconds after a failure until the service is tried again
# Where an error's text goes on with what the server has answered: after the status, or after these words.
_ANSWER = re.compile(
    r"(?i)(?P<status>(?:error|status|code|HTTP(?:/\d(?:\.\d)?)?|HTTPError)[ :=]{1,3}[1-5]\d\d\b)|\W+response body\b"
)


class Picture(NamedTuple):
    """An image uint8 [H, W, 3] with a line of text. name: without spaces, and another one for each picture."""

    name: str
    pixels: NDArray[np.uint8]
    caption: str


class Findings(NamedTuple):
    """What the answers for the evaluation images tell after the last epoch, beside the figures of its line.

    columns, rows: a table with a row for each class, the worst first. pictures: the confusion matrix, unless there are
    too many classes for one.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    pictures: tuple[Picture, ...]


class Service:
    """Sends every line once, in order; those that cannot be sent wait for the next attempt, and training goes on.

    A subclass says how to begin (`_begin`), to send one line (`_send`) and to end (`_end`). `run` is what the service
    knows the run by. How far the service has come stands in a file in the run's folder, so that a run that is resumed
    goes on there; lines that it lacks are sent then. keeps_at_once: whether a line that was sent is safe, even if this
    process is killed right after.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    keeps_at_once: ClassVar[bool] = True

    def __init__(self, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.state = _read(folder / self.file)
        self.run: str | None = self.state.get("run")
        self.epochs: int | None = None  # of the whole run, where that is known
        self._sent: int = self.state.get("epoch", 0)
        self._waiting = [line for line in done if line["epoch"] > self._sent]
        self._failed, self._is_warned, self._is_open = -math.inf, False, True

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> Self:
        """Begin or go on with the run. Whatever is wrong now is an error, since the user is there to mend it."""
        logger = cls(folder, done, say)
        logger._begin()
        logger.keep()
        logger._send_all()
        return logger

    @property
    def group(self) -> str | None:
        """What the runs of a sweep have in common; None for a run by itself."""
        return self.folder.absolute().parent.name if (self.folder.parent / SWEEP).exists() else None

    @property
    def is_whole(self) -> bool:
        """Whether the last epoch of the run has been sent."""
        return self.epochs is None or self._sent >= self.epochs

    def settings(self, facts: Mapping[str, Any]) -> None:
        self.epochs = facts.get("epochs")
        self._attempt(lambda: self._tell(facts))

    def line(self, line: dict[str, Any]) -> None:
        if line["epoch"] > self._sent:  # a run that was killed repeats its last epoch, to the same figures
            self._waiting.append(line)
            self._send_all()

    def pictures(self, pictures: Sequence[Picture]) -> None:
        self._attempt(lambda: self._show(pictures))

    def findings(self, findings: Findings) -> None:
        self._attempt(lambda: self._tabulate(findings))

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._failed = -math.inf
        self._send_all()
        if self._waiting:
            self.say(
                f"warning: {self.name} lacks {len(self._waiting)} epochs of {self.folder}: metrics.jsonl has them, and "
                "--resume sends them"
            )
        self._attempt(self._end)
        self.keep()

    def keep(self) -> None:
        """Write down how far the service has come, and what else stands in `state`."""
        self.state |= {"run": self.run, "epoch": self._sent}
        replace_file(self.folder / self.file, sealed(self.state))

    def skip(self, epoch: int) -> None:
        """The service has the lines up to this epoch already."""
        self._sent = max(self._sent, epoch)
        self._waiting = [line for line in self._waiting if line["epoch"] > self._sent]

    def _send_all(self) -> None:
        if time.monotonic() - self._failed >= _PATIENCE:
            self._attempt(self._send_waiting)

    def _send_waiting(self) -> None:
        while self._waiting:
            self._send(self._waiting[0])
            self._sent = self._waiting.pop(0)["epoch"]
            if self.keeps_at_once:
                self.keep()

    def _attempt(self, work: Callable[[], object]) -> None:
        """Do it, and if the service fails, say so once until it has caught up."""
        try:
            work()
        except Exception as e:  # the service's own code, and the network
            self._failed = time.monotonic()
            if not self._is_warned:
                self.say(
                    f"warning: {self.name} cannot log the run in {self.folder} ({reason_of(e)}): the training "
                    "goes on, and what it lacks is sent when it is there again"
                )
            self._is_warned = True
        else:
            self._is_warned = self._is_warned and bool(self._waiting)

    def _begin(self) -> None:
        raise NotImplementedError

    def _tell(self, facts: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _send(self, line: dict[str, Any]) -> None:
        raise NotImplementedError

    def _show(self, pictures: Sequence[Picture]) -> None:
        raise NotImplementedError

    def _tabulate(self, findings: Findings) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


def reason_of(error: BaseException) -> str:
    """An error of a service's own code in one line, without what the server answered beside its status."""
    if type(error).__name__ == "RestException":  # MLflow's, whose text is the answer
        return f"RestException: {getattr(error, 'error_code', 'unknown')}"
    text = kind_and_message(error)
    found = _ANSWER.search(text)
    return text if found is None else text[: found.end() if found["status"] else found.start()]


def flat(facts: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as text, one for each; {"loss_options": {"beta": 2}} is loss_options.beta."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", str(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = read_sealed(file, "remove it, and a new run is logged")
        if not isinstance(found["run"], str | None) or not isinstance(found["epoch"], int):
            raise TypeError("run or epoch")
    except NotFoundError:
        return {}
    except (TypeError, KeyError) as e:
        raise CorruptError(f"{file} is not what kdcache writes ({e}): remove it, and a new run is logged") from e
    return dict(found)
