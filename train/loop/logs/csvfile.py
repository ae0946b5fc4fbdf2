"""metrics.csv: a row for each epoch, a column for each figure, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdcache.cache.files import replace_file

FILE = "metrics.csv"


class Csv:
    """Writes the whole file again for every line, in one step; a figure that an epoch lacks leaves its cell empty."""

    def __init__(self, folder: Path, done: Sequence[dict[str, Any]]) -> None:
        self._file, self._lines = folder / FILE, list(done)

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> Csv:
        return cls(folder, done)

    def line(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        columns = dict.fromkeys(name for one in self._lines for name in one)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._lines)
        replace_file(self._file, text.getvalue().encode())

    def close(self) -> None:
        """Nothing is left open between two lines."""
