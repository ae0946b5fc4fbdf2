"""TensorBoard's events, where the package is installed: every figure of a line as a scalar, by epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorBoard:
    """Writes into `tensorboard` in the run's folder. Readers drop what a killed run left there after its last state."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def open(cls, folder: Path, done: Sequence[dict[str, Any]], say: Callable[[str], None]) -> TensorBoard | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("note: no TensorBoard events are written: pip install tensorboard for them")
            return None
        return cls(SummaryWriter(str(folder / FOLDER), purge_step=len(done) + 1))

    def line(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            self._writer.add_scalar(name, value, line["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
