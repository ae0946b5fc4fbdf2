"""Times things in turns, so that noise on the machine affects all that is compared alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kdcache.pipeline.process.progress import Progress
from kdcache.train.loop.trainer import Loader


class Clock:
    """Times work on a device. rounds: how often each thing is measured; None for as often as time allows."""

    def __init__(self, device: torch.device, rounds: int | None) -> None:
        self._device, self._rounds = device, rounds

    def repeated(self, work: Callable[[], object]) -> Callable[[], float]:
        """Seconds of one piece of work, from several where the device works behind the program's back."""
        times = 1 if self._device.type == "cpu" else 20

        def several() -> None:
            for _ in range(times):
                work()

        return lambda: self.timed(several) / times

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until the work is done, on the device too."""
        self._synchronise()
        started = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - started

    def _synchronise(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def in_turns(
        self, title: str, cases: Mapping[str, Callable[[], float]], seconds: float, least: int
    ) -> dict[str, list[float]]:
        """What each case gives in every round, after one to warm up; the order changes from round to round."""
        started = time.perf_counter()
        for case in cases.values():
            case()
        once = time.perf_counter() - started
        rounds = self._rounds or min(200, max(least, round(seconds / once)))
        found: dict[str, list[float]] = {name: [] for name in cases}
        order = list(cases)
        with Progress(title, rounds, "rounds") as progress:
            for _ in range(rounds):
                for name in order:
                    found[name].append(cases[name]())
                order.reverse()
                progress.advance(1)
        return found


class Onward:
    """A loader whose epochs go on, view after view, whatever epoch the trainer counts."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._epoch = loader, 0

    def set_epoch(self, epoch: int) -> None:
        self._loader.set_epoch(self._epoch)
        self._epoch += 1

    def __len__(self) -> int:
        return len(self._loader)

    def steps(self, start: int = 0) -> Iterator[Any]:
        return self._loader.steps(start)


def endless(loader: Loader) -> Iterator[Any]:
    """The batches of endless epochs, one epoch after the other."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader.steps()
        epoch += 1
