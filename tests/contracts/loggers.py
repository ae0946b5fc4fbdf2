"""What every logger of a run must do. A logger's tests are a subclass with its name and with what reads it back."""

from pathlib import Path
from typing import Any

import pytest

from kdcache.cache import KdcacheError
from kdcache.train.loop.logs.logs import LOGGERS, Logger, Logs

Line = dict[str, Any]


def lines(*epochs: int, loss: float = 0.5) -> list[Line]:
    """Lines as the trainer gives them; the second epoch was not evaluated. All numbers are exact in float32."""
    figures = [{"epoch": e, "loss": loss * e, "seconds": 1.5, "top1": 0.25, "teacher_top1": 0.75} for e in epochs]
    return [line if line["epoch"] != 2 else {k: v for k, v in line.items() if "top1" not in k} for line in figures]


class LoggerContract:
    """name: that in LOGGERS."""

    name: str

    def read(self, folder: Path) -> list[Line]:
        """The lines that stand in the run's folder, in order of their epochs."""
        raise NotImplementedError

    def opened(self, folder: Path, done: list[Line]) -> Logger:
        said: list[str] = []
        logger = LOGGERS[self.name].open(folder, done, said.append)
        assert logger is not None and not said
        return logger

    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for other in [name for name in LOGGERS if name != self.name]:
            monkeypatch.delitem(LOGGERS, other)

    def test_a_line_is_there_before_the_next_and_without_a_close(self, tmp_path: Path) -> None:
        logger = self.opened(tmp_path, [])
        for count, line in enumerate(lines(1, 2, 3), start=1):
            logger.line(line)
            assert self.read(tmp_path) == lines(1, 2, 3)[:count]
        logger.close()
        assert self.read(tmp_path) == lines(1, 2, 3)

    def test_a_resumed_run_has_each_epoch_once(self, tmp_path: Path) -> None:
        """The third epoch was logged, and the state of it was not kept: it is trained again."""
        killed = self.opened(tmp_path, [])
        for line in lines(1, 2, 3):
            killed.line(line)
        resumed = self.opened(tmp_path, lines(1, 2))
        for line in lines(3, 4, loss=8.0):
            resumed.line(line)
        assert self.read(tmp_path) == [*lines(1, 2), *lines(3, 4, loss=8.0)]
        resumed.close()
        killed.close()

    def test_it_can_be_closed_twice_and_unused(self, tmp_path: Path) -> None:
        logger = self.opened(tmp_path, lines(1))
        logger.close()
        logger.close()

    def test_what_it_cannot_take_is_one_clear_error(self, tmp_path: Path) -> None:
        logs = Logs(tmp_path, [], pytest.fail)
        with pytest.raises(KdcacheError, match=r"cannot log the run in .*: once .*, --resume goes on") as caught:
            logs.line({"epoch": 1, "loss": Unloggable()})
        assert str(caught.value).startswith(f"{self.name} cannot") and "\n" not in str(caught.value)
        logs.close()


class Unloggable:
    """A figure that is no number, nor anything that can be written down."""

    def __str__(self) -> str:
        raise ValueError("no\nfigure")

    __repr__ = __str__
