"""What a user sees of a training: a bar's figures while it lasts, and lines for some of the epochs or for all."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from kdcache.pipeline.process.progress import percent, size
from kdcache.pipeline.process.screen import Detail

PARTNER = "teacher"  # in the names of its metrics and files
_LINES = 4  # a run, after the first one
_PATIENCE = 30.0  # seconds, after which the next epoch is told of in any case
_BY_CHANCE = 1.5  # times as many right as by chance, at most, where a network guesses


class Glance:
    """Figures of the epoch under way, for a bar. It never waits for the device: on a GPU the loss is a glance old."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._loss = device, math.nan
        self._asked: tuple[Tensor, torch.cuda.Event, int] | None = None  # what comes, when it is there, of how many

    def __call__(self, total: Tensor, batches: int, rate: float) -> str:
        """total []: the sum of the losses of so many batches, on the device. rate: the learning rate."""
        if batches:
            self._look(total, batches)
        loss = "" if math.isnan(self._loss) else f"loss {self._loss:.4f}, "
        memory = ""
        if self._device.type == "cuda":
            memory = f", {size(torch.cuda.memory_reserved(self._device))} of GPU memory"
        return f"{loss}lr {rate:.3g}{memory}"

    def _look(self, total: Tensor, batches: int) -> None:
        if self._device.type != "cuda":
            self._loss = float(total) / batches
            return
        if self._asked is not None:
            there, event, count = self._asked
            if not event.query():  # type: ignore[no-untyped-call]
                return
            self._loss = float(there) / count
        there = torch.empty((), pin_memory=True)
        there.copy_(total, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._asked = there, event, batches


class EpochLines:
    """Makes a line of each epoch's figures. Those that only --verbose shows are Details.

    The others are the first line, the last of each quarter of the run, and one after half a minute without any.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs, self._every, self._told = epochs, math.ceil(epochs / _LINES), -math.inf

    def __call__(self, line: dict[str, Any]) -> str:
        text, now, epoch = _described(line, self._epochs), time.monotonic(), line["epoch"]
        if epoch != self._epochs and epoch % self._every and now - self._told < _PATIENCE:
            return Detail(text)
        self._told = now
        return text


def guesses(line: dict[str, Any], classes: int, rate: float) -> str | None:
    """What helps where a network guesses after its last epoch; None where it has learnt something.

    line: its metrics. It guesses where it is hardly right more often than by chance, and less sure of the right class
    than who thinks all equally probable. rate: the highest learning rate that it was trained with.
    """
    if "top1" not in line or line["top1"] > _BY_CHANCE / classes or line["nll"] < math.log(classes):
        return None
    right = f"{percent(line['top1'])} of its answers are right, and {percent(1 / classes)} are by chance"
    return f"note: it guesses ({right}): lower --lr (now {rate:g}), or train it for more --epochs"


def of_partner(line: dict[str, Any]) -> dict[str, Any]:
    """The partner's part of a line of metrics, under the names that a student's has."""
    mark = f"{PARTNER}_"
    return {k.removeprefix(mark): v for k, v in line.items() if k.startswith(mark)}


def _described(line: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {line['epoch']}/{epochs}", f"loss {line['loss']:.4f}"]
    parts += [
        f"{name} {percent(line[key])}" for name, key in (("top-1", "top1"), ("agreement", "agreement")) if key in line
    ]
    if "nll" in line:
        parts.append(f"nll {line['nll']:.4f}")
    if "validation_top1" in line:
        parts.append(f"validation top-1 {percent(line['validation_top1'])}")
    if theirs := of_partner(line):
        parts += [f"ece {line['ece']:.4f}"] if "ece" in line else []
        parts.append(f"teacher: loss {theirs['loss']:.4f}")
        if "top1" in theirs:
            parts.append(f"top-1 {percent(theirs['top1'])}  nll {theirs['nll']:.4f}  ece {theirs['ece']:.4f}")
    return "  ".join([*parts, f"{line['seconds']:.1f} s"])
