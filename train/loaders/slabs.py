"""Keeps the slabs that epochs take their batches from: those of this epoch and, read ahead in threads, of the next.

A process alone holds whole views. Each of several ranks holds those records alone that stand in its own parts of the
epoch's batches, so that all ranks together hold a view once, on whatever devices and machines they are.
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


class Reader(Protocol):
    """What reads slabs."""

    def draw(self, view: int) -> Parameters:
        """The parameters of a view."""

    def compare(self, view: int, drawn: Parameters, hurry: bool) -> None:
        """MismatchError unless the view was built with these parameters. hurry: whether somebody waits."""

    def read(self, wanted: Wanted, drawn: Callable[[], Parameters], spare: Records | None, hurry: bool) -> Held:
        """The records of a view.

        drawn: gives the view's parameters, which may have to be waited for. spare: records that nobody needs any more,
        whose memory is to be used again. hurry: whether somebody waits.
        """


class Slabs:
    """Reads slabs, one after the other in threads, and keeps those that were asked for last.

    reuse: whether memory of slabs that nobody needs any more is to be used again, as on a CPU.
    """

    def __init__(self, reader: Reader, reuse: bool) -> None:
        self._reader, self._reuse = reader, reuse
        self._drawing, self._reading = (
            ThreadPoolExecutor(1, thread_name_prefix=f"kdcache-{name}") for name in ("views", "slab")
        )
        self._slabs: dict[Wanted, Slab] = {}
        self._in_use = Counter[Wanted]()

    @contextmanager
    def taken(self, now: Sequence[Wanted], after: Sequence[Wanted]) -> Iterator[list[Slab]]:
        """The slabs `now`, perhaps still to be waited for. They are in use until the end of the block.

        Those `after` are read as soon as these are there. All others are forgotten.
        """
        spare = self._forget_others({*now, *after})
        first = [self._get(wanted, (), spare) for wanted in now]
        for wanted in after:
            self._get(wanted, first, spare)
        self._in_use.update(now)
        try:
            yield first
        finally:
            self._in_use.subtract(now)

    def _get(self, wanted: Wanted, first: Sequence[Slab], spare: list[Records]) -> Slab:
        """The slab, which is being read from now on if it was not yet. first: those that are read before."""
        if wanted in self._slabs:
            return self._slabs[wanted]
        reader, memory = self._reader, spare.pop() if spare else None

        def draw() -> Parameters:
            for other in first:
                other.settle()
            return reader.draw(wanted.view)

        def read() -> Held:
            for other in first:
                other.settle()
            return reader.read(wanted, drawn.result, memory, hurry=not first)

        drawn = self._drawing.submit(draw)
        compared = self._drawing.submit(lambda: reader.compare(wanted.view, drawn.result(), hurry=not first))
        slab = self._slabs[wanted] = Slab(drawn, compared, self._reading.submit(read))
        return slab

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
