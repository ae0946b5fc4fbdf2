"""metrics.csv: a row for each epoch, a column for each figure, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdcache.train.loop.logs.appended import AppendedFile

FILE = "metrics.csv"


class Csv:
    """Appends a row, whose cells are empty for figures that the epoch lacks.

    A line with figures that are new, such as those of the first evaluation, has the file written again with more
    columns.
    """

    def __init__(self, folder: Path, done: Sequence[dict[str, Any]]) -> None:
        self._lines, self._columns = list(done), _columns(done)
        self._file = AppendedFile(folder / FILE, _table(self._columns, done) if done else b"")

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> Csv:
        return cls(folder, done)

    def line(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        if line.keys() <= set(self._columns):
            self._file.append(_table(self._columns, [line], heading=False))
        else:
            self._columns = _columns(self._lines)
            self._file.rewrite(_table(self._columns, self._lines))

    def close(self) -> None:
        self._file.close()


def _columns(lines: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _table(columns: Sequence[str], lines: Sequence[dict[str, Any]], heading: bool = True) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if heading:
        writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()
