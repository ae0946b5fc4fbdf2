"""What every logger of a run must do. A logger's tests are a subclass with its name and with what reads it back."""

from pathlib import Path
from typing import Any

import pytest

from kdcache.cache import KdcacheError
from kdcache.train.loop.logs.logs import CHOICES, LOGGERS, Logged, Logger, Logs
from kdcache.train.loop.logs.services import Service

Line = dict[str, Any]


def lines(*epochs: int, loss: float = 0.5) -> list[Line]:
    """Lines as the trainer gives them; the second epoch was not evaluated. All numbers are exact in float32."""
    figures = [{"epoch": e, "loss": loss * e, "seconds": 1.5, "top1": 0.25, "teacher_top1": 0.75} for e in epochs]
    return [line if line["epoch"] != 2 else {k: v for k, v in line.items() if "top1" not in k} for line in figures]


class LoggerContract:
    """name: that in LOGGERS."""

    name: str

    @property
    def logged(self) -> Logged:
        """What has this logger opened."""
        return Logged(next((flag for flag, choice in CHOICES.items() if choice.logger == self.name), None))

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
        logs = Logs(tmp_path, [], pytest.fail, self.logged)
        with pytest.raises(KdcacheError, match=r"cannot log the run in .*: once .*, --resume goes on") as caught:
            logs.line({"epoch": 1, "loss": Unloggable()})
        assert str(caught.value).startswith(f"{self.name} cannot") and "\n" not in str(caught.value)
        logs.close()


class ServiceContract(LoggerContract):
    """What every logger must do whose figures go to a service: the training goes on without it, and it catches up."""

    def test_a_resumed_run_has_each_epoch_once(self, tmp_path: Path) -> None:
        """Trained again, an epoch has the same figures: those that the service had first stay."""
        first = self.opened(tmp_path, [])
        for line in lines(1, 2, 3):
            first.line(line)
        first.close()
        resumed = self.opened(tmp_path, lines(1, 2))
        for line in lines(3, 4, loss=8.0):
            resumed.line(line)
        resumed.close()
        assert self.read(tmp_path) == [*lines(1, 2, 3), *lines(4, loss=8.0)]

    def test_what_it_cannot_take_is_one_clear_error(self, tmp_path: Path) -> None:
        said: list[str] = []
        logs = Logs(tmp_path, [], said.append, self.logged)
        for epoch in (1, 2):
            logs.line({"epoch": epoch, "loss": Unloggable()})
        assert len(said) == 1 and "\n" not in said[0]
        assert said[0].startswith(f"warning: {self.name} cannot log the run in {tmp_path} (")
        logs.close()
        assert len(said) == 2 and said[1].startswith(f"warning: {self.name} lacks 2 epochs of {tmp_path}: ")

    def test_it_catches_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Away for two epochs, at the end of a run, and until the run is resumed."""
        monkeypatch.setattr("kdcache.train.loop.logs.services._PATIENCE", 0.0)
        said: list[str] = []
        logger = LOGGERS[self.name].open(tmp_path, [], said.append)
        assert isinstance(logger, Service)
        logger.line(lines(1)[0])
        with monkeypatch.context() as away:
            away.setattr(logger, "_send", self.refuse)
            logger.line(lines(2)[0])
            logger.line(lines(3)[0])
        assert len(said) == 1 and "(ConnectionError: nobody there): the training goes on" in said[0]
        logger.line(lines(4)[0])
        with monkeypatch.context() as away:
            away.setattr(logger, "_send", self.refuse)
            logger.line(lines(5)[0])
            logger.close()
        assert [text.partition(" cannot")[0].partition(" lacks 1")[0] for text in said[1:]] == [
            f"warning: {self.name}"
        ] * 2
        assert self.read(tmp_path) == lines(1, 2, 3, 4)
        self.opened(tmp_path, lines(1, 2, 3, 4, 5)).close()
        assert self.read(tmp_path) == lines(1, 2, 3, 4, 5)

    @staticmethod
    def refuse(line: Line) -> None:
        raise ConnectionError("nobody there")


class Unloggable:
    """A figure that is no number, nor anything that can be written down."""

    def __str__(self) -> str:
        raise ValueError("no\nfigure")

    __repr__ = __str__
