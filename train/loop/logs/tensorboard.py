"""TensorBoard's events, where the package is installed: every figure of a line as a scalar, by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.train.loop.logs.services import Findings, Picture, flat

FOLDER = "tensorboard"
_ROWS = 200  # of a table at most: it is shown as text


class TensorBoard:
    """Writes into `tensorboard` in the run's folder. Readers drop what a killed run left there after its last state."""

    def __init__(self, writer: Any, done: int) -> None:
        self._writer, self._done = writer, done

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> TensorBoard | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("note: no TensorBoard events are written: pip install tensorboard for them")
            return None
        return cls(SummaryWriter(str(folder / FOLDER), purge_step=len(done) + 1), len(done))

    def settings(self, facts: Mapping[str, Any]) -> None:
        if not self._done:
            self._writer.add_text("settings", _markdown(("", ""), flat(facts)), 0)

    def line(self, line: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all figures: an event for each would take several times as long.
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in line.items()]
        self._writer.file_writer.add_summary(Summary(value=values), line["epoch"])
        self._done = line["epoch"]
        self._writer.flush()

    def pictures(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            self._writer.add_image(f"views/{picture.name}", picture.pixels, self._done, dataformats="HWC")
        self._writer.add_text("views", "\n".join(f"- {p.name}: {p.caption}" for p in pictures), self._done)
        self._writer.flush()

    def findings(self, findings: Findings) -> None:
        for picture in findings.pictures:
            self._writer.add_image(f"analysis/{picture.name}", picture.pixels, self._done, dataformats="HWC")
            self._writer.add_text(f"analysis/{picture.name}", picture.caption, self._done)
        rows = findings.rows[:_ROWS]
        self._writer.add_text("analysis/classes", _markdown(findings.columns, rows), self._done)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in table)
