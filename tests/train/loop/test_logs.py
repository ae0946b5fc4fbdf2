"""The loggers: each of them by the contract, all of them as one, and one that somebody adds."""

import csv
import json
import sys
import time
from ast import literal_eval

import pytest
import torch
from torch import nn

from kdcache.cache import KdcacheError
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.tests.contracts.loggers import LoggerContract, lines
from kdcache.tests.helpers.training import Same
from kdcache.train.loop.logs.logs import LOGGERS, Logs
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.runfolder import RunFolder
from kdcache.train.loop.trainer import fit
from kdcache.train.losses import CE


class TestJsonLines(LoggerContract):
    name = "metrics.jsonl"

    def read(self, folder):
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TestTensorBoard(LoggerContract):
    name = "TensorBoard"

    def read(self, folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        found = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                assert tag not in found.setdefault(event.step, {})
                found[event.step][tag] = event.value
        return [found[step] for step in sorted(found)]


class TestCsv(LoggerContract):
    name = "metrics.csv"

    def read(self, folder):
        rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
        return [{k: literal_eval(v) for k, v in row.items() if v} for row in rows]


class Toy:
    """A logger such as anybody may add: a line of text an epoch."""

    def __init__(self, file, done):
        self._file, self._lines = file, [str(line) for line in done]

    @classmethod
    def open(cls, folder, done, say):
        return cls(folder / "toy.txt", done)

    def line(self, line):
        self._lines.append(str(line))
        self._file.write_text("\n".join(self._lines))

    def close(self):
        pass


@pytest.fixture
def _toy(monkeypatch):
    monkeypatch.setitem(LOGGERS, "toy", Toy)


def read_toy(folder):
    return [literal_eval(line) for line in (folder / "toy.txt").read_text().splitlines()]


@pytest.mark.usefixtures("_toy")
class TestToy(LoggerContract):
    name = "toy"

    def read(self, folder):
        return read_toy(folder)


def train(folder, epochs, resume=False, say=lambda _: None):
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), (0.5,) * 3, (0.25,) * 3)
    loader = Same([(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), None)])
    run = RunFolder(folder, {}, resume)
    return fit(model, CE(), loader, Recipe(epochs, 0.1), lambda m: {"top1": 0.5}, run, NOTES, say)


NOTES = {"input_size": 4, "mean": [0.5] * 3, "std": [0.25] * 3, "class_names": []}


@pytest.mark.usefixtures("_toy")
def test_a_new_line_in_the_table_is_all_that_a_logger_takes(tmp_path):
    """A run that stops after two epochs and goes on: the new logger gets what the others get, each epoch once."""

    def stop(text):
        if text.startswith("epoch 3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 3, say=stop)
    time.sleep(1.01)  # TensorBoard orders a run's files by the second, and those of one second by a name that may not
    history = train(tmp_path, 3, resume=True)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history == read_toy(tmp_path) == TestJsonLines().read(tmp_path)
    assert [line["loss"] for line in TestTensorBoard().read(tmp_path)] == pytest.approx([x["loss"] for x in history])


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = []
    train(tmp_path, 1, say=said.append)
    assert said[0] == "note: no TensorBoard events are written: pip install tensorboard for them"
    assert len(said) == 2 and not (tmp_path / "tensorboard").exists()
    assert len(TestJsonLines().read(tmp_path)) == 1


class Failing(Toy):
    """A logger whose service is not there in the call that `at` names."""

    at = ""

    def __init__(self):
        pass

    @classmethod
    def open(cls, folder, done, say):
        return cls()._call("open")

    def line(self, line):
        self._call("line")

    def close(self):
        self._call("close")

    def _call(self, name):
        if self.at == name:
            raise RuntimeError(f"no service\nat {name}")
        return self


@pytest.mark.parametrize("at", ["open", "line", "close"])
def test_a_logger_that_fails_is_named_in_one_line(tmp_path, monkeypatch, at):
    monkeypatch.setattr(Failing, "at", at)
    monkeypatch.setitem(LOGGERS, "the service", Failing)
    with pytest.raises(KdcacheError, match=r"^the service cannot log the run in .*\(RuntimeError: no service at \w+\)"):
        train(tmp_path / "run", 1)
    monkeypatch.delitem(LOGGERS, "the service")
    train(tmp_path / "run", 1, resume=True)
    assert len(TestJsonLines().read(tmp_path / "run")) == 1


def test_a_logger_that_fails_to_close_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Failing, "at", "close")
    monkeypatch.setitem(LOGGERS, "the service", Failing)
    said = []

    def stop(text):
        said.append(text)
        if text.startswith("epoch 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 2, say=stop)
    assert said[-1].startswith("warning: the service cannot log the run")


def test_all_are_closed_where_one_of_them_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(Failing, "at", "close")
    monkeypatch.setattr(Toy, "close", lambda self: closed.append(self))
    monkeypatch.setattr("kdcache.train.loop.logs.logs.LOGGERS", {"first": Failing, "second": Toy})
    logs = Logs(tmp_path, lines(1), pytest.fail)
    with pytest.raises(KdcacheError, match="first cannot log"):
        logs.close()
    assert len(closed) == 1
    logs.close()
    assert len(closed) == 1
