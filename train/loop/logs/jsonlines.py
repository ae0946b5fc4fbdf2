"""metrics.jsonl: one JSON object a line, one line an epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdcache.train.loop.logs.appended import AppendedFile

FILE = "metrics.jsonl"


class JsonLines:
    """Appends a line. Readers leave out a last line without its end, which is being written."""

    def __init__(self, folder: Path, done: Sequence[dict[str, Any]]) -> None:
        self._file = AppendedFile(folder / FILE, b"".join(map(_encoded, done)))

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> JsonLines:
        return cls(folder, done)

    def line(self, line: dict[str, Any]) -> None:
        self._file.append(_encoded(line))

    def close(self) -> None:
        self._file.close()


def _encoded(line: dict[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()
