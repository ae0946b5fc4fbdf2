"""TensorBoard's events, where the package is installed: every figure of a line as a scalar, by epoch."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.train.loop.logs.appended import AppendedFile
from kdcache.train.loop.logs.services import Findings, Picture, flat

FOLDER = "tensorboard"
_ROWS = 200  # of a table at most: it is shown as text
_opened = itertools.count()


class TensorBoard:
    """Writes into `tensorboard` in the run's folder. Readers drop what a killed run left there after its last state."""

    def __init__(self, folder: Path, done: int) -> None:
        self._events, self._done = _Events(folder, done + 1), done

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> TensorBoard | None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            say("note: no TensorBoard events are written: pip install tensorboard for them")
            return None
        return cls(folder / FOLDER, len(done))

    def settings(self, facts: Mapping[str, Any]) -> None:
        if not self._done:
            self._text("settings", _markdown(("", ""), flat(facts)), 0)

    def line(self, line: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all figures: an event for each would take several times as long.
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in line.items()]
        self._events.add(line["epoch"], summary=Summary(value=values))
        self._done = line["epoch"]

    def pictures(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            self._image(f"views/{picture.name}", picture)
        self._text("views", "\n".join(f"- {p.name}: {p.caption}" for p in pictures), self._done)

    def findings(self, findings: Findings) -> None:
        for picture in findings.pictures:
            self._image(f"analysis/{picture.name}", picture)
            self._text(f"analysis/{picture.name}", picture.caption, self._done)
        rows = findings.rows[:_ROWS]
        self._text("analysis/classes", _markdown(findings.columns, rows), self._done)

    def close(self) -> None:
        self._events.close()

    def _text(self, name: str, text: str, epoch: int) -> None:
        from torch.utils.tensorboard import summary

        self._events.add(epoch, summary=summary.text(name, text))  # type: ignore[no-untyped-call]

    def _image(self, name: str, picture: Picture) -> None:
        from torch.utils.tensorboard import summary

        shown = summary.image(name, picture.pixels, dataformats="HWC")  # type: ignore[no-untyped-call]
        self._events.add(self._done, summary=shown)


class _Events:
    """A file of events, which is written by the thread that has them.

    TensorBoard's own writer has a thread, in which a full disk ends as a traceback on the screen. first: the epoch from
    which on events of earlier files do not count any more.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # Readers take a run's files by their names, in which the second comes first.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_opened)}"
        self._file = AppendedFile(folder / name, b"")
        begin = _event(first, session_log=SessionLog(status=SessionLog.START))
        self._head = _event(0, file_version="brain.Event:2") + begin  # written with the first event

    def add(self, step: int, **what: Any) -> None:
        """Append an event of one kind, such as a `summary`."""
        self._file.append(self._head + _event(step, **what))
        self._head = b""

    def close(self) -> None:
        self._file.close()


def _event(step: int, **what: Any) -> bytes:
    """An event as it stands in a file: with its length and checksums."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
    return record.getvalue()


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in table)
