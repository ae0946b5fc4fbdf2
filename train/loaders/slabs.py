"""Keeps the slabs that epochs take their batches from: those of this epoch and, read ahead in threads, of the next.

A process alone holds whole views. Each of several ranks holds those records alone that stand in its own parts of the
epoch's batches, so that all ranks together hold a view once, on whatever devices and machines they are. Where views are
large, the first batch of a run has its records before the views are decompressed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.records.records import Records
from kdcache.pipeline.views.parameters import Parameters
from kdcache.train.loaders.order import gathered


class Wanted(NamedTuple):
    """What a slab holds: the records of a view, all of them, or with an epoch those that this rank uses in it.

    Where epochs make rounds, it is the first epoch of a round, and the records are those of all its epochs.
    """

    view: int
    epoch: int | None = None


class Held(NamedTuple):
    """Records on the device, and the samples that they belong to, int64 in ascending order; None: all of them."""

    records: Records
    samples: NDArray[np.int64] | None = None


class _Views(NamedTuple):
    """A view's parameters, once they are drawn, and None, once they were compared with those of the build."""

    drawn: Future[Parameters]
    compared: Future[None]


# Gives an epoch's batches of samples. It is given what gives the parameters of its first view.
Order = Callable[[Callable[[], Parameters]], Sequence[NDArray[np.int64]]]


@dataclass(frozen=True, eq=False)
class Slab:
    """The records of a view, and the parameters by which its pixels are rendered. Who asks waits for what is not there.

    Pixels can so be rendered while records are still read and parameters compared with those of the build.
    """

    _drawn: Future[Parameters]
    _compared: Future[None]
    _held: Future[Held]

    @property
    def parameters(self) -> Parameters:
        """Those of all samples."""
        return self._drawn.result()

    @property
    def held(self) -> Held:
        """The records, once they are read and it is known that they belong to the parameters."""
        self._compared.result()
        return self._held.result()

    @property
    def done(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(part.done() for part in self._parts)

    @property
    def failed(self) -> bool:
        """Whether something could not be read."""
        return any(part.done() and part.exception() is not None for part in self._parts)

    def settle(self) -> None:
        """Wait until it is there or has failed."""
        for part in self._parts:
            part.exception()

    def gathered(self, batches: Sequence[NDArray[np.int64]], *others: Slab) -> Iterator[tuple[Tensor, Records]]:
        """Labels and records of each batch of samples. The first one is waited for.

        others: slabs of the same samples in other views. The records of a sample then follow each other.
        """
        records, samples = self.held
        if samples is not None:
            rows = np.empty(samples[-1] + 1, np.int32)
            rows[samples] = np.arange(len(samples))
            batches = [rows[batch] for batch in batches]
        yield from gathered(records, batches, *(other.held.records for other in others))

    @property
    def _parts(self) -> tuple[Future[Parameters], Future[None], Future[Held]]:
        return self._drawn, self._compared, self._held


@dataclass(frozen=True, eq=False)
class Taken:
    """What an epoch takes its batches from. slabs: one for each view that its samples are in. batches: samples."""

    slabs: Sequence[Slab]
    batches: Sequence[NDArray[np.int64]]
    _first: Sequence[Slab]  # of the samples of the first batch alone, if these are read before

    def gathered(self) -> Iterator[tuple[Tensor, Records]]:
        """Labels and records of each batch. The first one is waited for.

        Where there are several slabs, the records of a sample follow each other.
        """
        batches = self.batches
        if self._first:
            for slab in self._first:
                slab.settle()
            if any(slab.failed for slab in self._first):  # then the whole ones fail too, and are not taken again
                for slab in self.slabs:
                    slab.settle()
            yield from self._first[0].gathered(batches[:1], *self._first[1:])
            batches = batches[1:]
        yield from self.slabs[0].gathered(batches, *self.slabs[1:])


class Reader(Protocol):
    """What reads slabs."""

    def draw(self, view: int) -> Parameters:
        """The parameters of a view."""

    def compare(self, view: int, drawn: Parameters, hurry: bool) -> None:
        """MismatchError unless the view was built with these parameters. hurry: whether somebody waits."""

    def read(
        self, wanted: Wanted, drawn: Callable[[], Parameters], spare: Records | None, hurry: bool,
        samples: NDArray[np.int64] | None = None,
    ) -> Held:  # fmt: skip
        """The records of a view.

        drawn: gives the view's parameters, which may have to be waited for. spare: records that nobody needs any more,
        whose memory is to be used again. hurry: whether somebody waits. samples: ascending, to read these alone.
        """


class Slabs:
    """Reads slabs, one after the other in threads, and keeps those that were asked for last.

    reuse: whether memory of slabs that nobody needs any more is to be used again, as on a CPU. large: whether an epoch
    that would have to wait for its slabs is given the records of its first batch before.
    """

    def __init__(self, reader: Reader, reuse: bool, large: bool = False) -> None:
        self._reader, self._reuse, self._large = reader, reuse, large
        self._drawing, self._reading = (
            ThreadPoolExecutor(1, thread_name_prefix=f"kdcache-{name}") for name in ("views", "slab")
        )
        self._slabs: dict[Wanted, Slab] = {}
        self._in_use = Counter[Wanted]()

    @contextmanager
    def taken(self, now: Sequence[Wanted], after: Sequence[Wanted], order: Order) -> Iterator[Taken]:
        """The slabs `now`, perhaps still to be waited for, with the epoch's batches. They are in use until the end.

        Those `after` are read as soon as these are there. All others are forgotten.
        """
        spare = self._forget_others({*now, *after})
        begun = {wanted: self._views(wanted, ()) for wanted in now if wanted not in self._slabs}
        batches = order(begun[now[0]].drawn.result if now[0] in begun else lambda: self._slabs[now[0]].parameters)
        alone = begun if self._large and len(batches) > 1 and len(begun) == len(now) else {}
        first = [self._first(wanted, views, batches[0]) for wanted, views in alone.items()]
        for wanted, views in begun.items():
            self._slabs[wanted] = self._read(wanted, views, (), spare)
        slabs = [self._slabs[wanted] for wanted in now]
        for wanted in after:
            if wanted not in self._slabs:
                self._slabs[wanted] = self._read(wanted, self._views(wanted, slabs), slabs, spare)
        self._in_use.update(now)
        try:
            yield Taken(slabs, batches, first)
        finally:
            self._in_use.subtract(now)

    def _views(self, wanted: Wanted, before: Sequence[Slab]) -> _Views:
        """The parameters of a view, which are being drawn from now on. before: slabs that are read before."""

        def draw() -> Parameters:
            for other in before:
                other.settle()
            return self._reader.draw(wanted.view)

        drawn = self._drawing.submit(draw)
        hurry = not before
        return _Views(drawn, self._drawing.submit(lambda: self._reader.compare(wanted.view, drawn.result(), hurry)))

    def _read(self, wanted: Wanted, views: _Views, before: Sequence[Slab], spare: list[Records]) -> Slab:
        """The slab, which is being read from now on."""
        memory = spare.pop() if spare else None

        def read() -> Held:
            for other in before:
                other.settle()
            return self._reader.read(wanted, views.drawn.result, memory, not before)

        return Slab(*views, self._reading.submit(read))

    def _first(self, wanted: Wanted, views: _Views, batch: NDArray[np.int64]) -> Slab:
        """The records of the first batch, which are being read from now on."""
        samples = np.sort(batch)
        return Slab(*views, self._reading.submit(self._reader.read, wanted, views.drawn.result, None, True, samples))

    def _forget_others(self, wanted: set[Wanted]) -> list[Records]:
        """Forget all other slabs and those that could not be read; return the records whose memory can be reused."""
        spare = []
        for key, slab in list(self._slabs.items()):
            if key not in wanted or slab.failed:
                del self._slabs[key]
                # Not while an earlier iterator, which may go on, takes batches from it.
                if self._reuse and slab.done and not slab.failed and not self._in_use[key]:
                    spare.append(slab.held.records)
        return spare
