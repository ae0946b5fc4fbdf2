"""Reads run folders and sweeps as they are found: finished, under way, failed, or without a single epoch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.cache.errors import CorruptError
from kdcache.train.loop.runfolder import config_of
from kdcache.train.sweep import FILE as SWEEP

CONFIG, SUMMARY, METRICS = "config.json", "summary.json", "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """A run folder as it was found. lines: its epochs. failed: why it ended without a result, if that is known."""

    path: Path
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any] | None
    failed: str | None = None

    @property
    def seed(self) -> int:
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else 0

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the last epoch that was evaluated, and the median of an epoch's seconds."""
        found: dict[str, float] = {}
        for line in self.lines:
            if "top1" in line or "agreement" in line:
                found = {k: v for k, v in line.items() if k not in ("epoch", "seconds")}
        seconds = sorted(line["seconds"] for line in self.lines if "seconds" in line)
        return {**found, "seconds_an_epoch": seconds[len(seconds) // 2]} if seconds else found

    @property
    def state(self) -> str:
        """How far it has come, for people."""
        if self.failed:
            return f"failed: {self.failed}"
        epochs = self.settings.get("epochs")
        if self.summary is not None:
            return f"finished, {len(self.lines)} epochs"
        return f"{len(self.lines)} of {epochs} epochs" if self.lines else "no epoch is finished"


def is_run(path: Path) -> bool:
    """Whether it is the folder of a run."""
    return (path / CONFIG).is_file()


def runs_in(path: Path) -> list[Run]:
    """The run in a folder, those of a sweep, or those that lie in a folder beside each other; [] if there are none."""
    if is_run(path):
        return [read_run(path)]
    failed = _failures(path / SWEEP) if (path / SWEEP).is_file() else {}
    folders = [one for one in sorted(path.iterdir()) if is_run(one)] if path.is_dir() else []
    return [read_run(one, failed.get(one.name)) for one in folders]


def read_run(path: Path, failed: str | None = None) -> Run:
    """Read a run folder; CorruptError for a file that is not what kdcache writes."""
    lines = []
    file, summary = path / METRICS, path / SUMMARY
    texts = file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []
    if texts and not texts[-1].endswith("\n") and not summary.exists():
        texts.pop()  # the run is just writing it, or was stopped by a full disk
    for number, text in enumerate(texts, 1):
        line = _object(text, f"line {number} of {file}")
        if not isinstance(line.get("epoch"), int):
            raise CorruptError(f"line {number} of {file} names no epoch: leave this run out")
        lines.append({k: v for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)})
    found = _object(summary.read_text(errors="replace"), str(summary)) if summary.exists() else None
    return Run(path, config_of(path), lines, found, failed)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CorruptError(f"{where} is not valid JSON ({e}): leave this run out") from e
    if not isinstance(found, dict):
        raise CorruptError(f"{where} is not what kdcache writes: leave this run out")
    return found


def _failures(file: Path) -> dict[str, str]:
    """Why runs of a sweep failed, by their folders' names."""
    runs = _object(file.read_text(errors="replace"), str(file)).get("runs")
    try:
        return {Path(run["run"]).name: str(run["error"]) for run in runs or () if "error" in run}
    except (TypeError, KeyError) as e:
        raise CorruptError(f"{file} is not what kdcache writes ({e}): give its run folders") from e
