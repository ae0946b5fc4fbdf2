"""metrics.jsonl: one JSON object a line, one line an epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdcache.cache.files import replace_file

FILE = "metrics.jsonl"


class JsonLines:
    """Writes the whole file again for every line, in one step, so that a reader never sees half a line."""

    def __init__(self, folder: Path, done: Sequence[dict[str, Any]]) -> None:
        self._file = folder / FILE
        self._lines = [_encoded(line) for line in done]

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> JsonLines:
        return cls(folder, done)

    def line(self, line: dict[str, Any]) -> None:
        self._lines.append(_encoded(line))
        replace_file(self._file, b"".join(self._lines))

    def close(self) -> None:
        """Nothing is left open between two lines."""


def _encoded(line: dict[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()
