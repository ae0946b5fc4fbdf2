"""Keeps the slabs that epochs take their batches from: those of this epoch and, read ahead in a thread, of the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.records.records import Records
from kdcache.pipeline.views.parameters import Parameters
from kdcache.pipeline.views.table import Table
from kdcache.train.loaders.order import gathered


@dataclass(frozen=True, eq=False)
class Slab:
    """The records of one view, on the device, and the parameters by which its pixels are rendered."""

    records: Records
    parameters: Parameters

    @cached_property
    def table(self) -> Table:
        """The parameters as a renderer takes them."""
        return Table(self.parameters, 0)

    def gathered(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Records]]:
        """Labels and records of each batch of samples."""
        return gathered(self.records, batches)


Read = Callable[[int, Records | None], Slab]  # a view, and records whose memory may be used again


class Slabs:
    """Reads the slabs of views, one after the other in a thread, and keeps those that were asked for last.

    read: reads a view. It is given the records of another view that nobody needs any more, so that their memory is used
    again, or None. reuse: whether there is such memory, as on a CPU.
    """

    def __init__(self, read: Read, reuse: bool) -> None:
        self._read, self._reuse = read, reuse
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdcache-slab")
        self._slabs: dict[int, Future[Slab]] = {}
        self._in_use = Counter[int]()

    @contextmanager
    def taken(self, now: Sequence[int], after: Sequence[int]) -> Iterator[list[Slab]]:
        """The slabs of the views `now`, once they are there. They are in use until the end of the block.

        Those of the views `after` are read meanwhile. Those of all other views are forgotten.
        """
        spare = self._forget_others({*now, *after})
        for view in (*now, *after):
            if view not in self._slabs:
                self._slabs[view] = self._thread.submit(self._read, view, spare.pop() if spare else None)
        slabs = [self._slabs[view].result() for view in now]
        self._in_use.update(now)
        try:
            yield slabs
        finally:
            self._in_use.subtract(now)

    def held(self) -> list[Slab]:
        """The slabs in memory, once those that are being read are there."""
        return [slab.result() for slab in self._slabs.values()]

    def _forget_others(self, wanted: set[int]) -> list[Records]:
        """Forget the slabs of other views and those that could not be read; return those that can be reused."""
        spare = []
        for view, slab in list(self._slabs.items()):
            sound = slab.done() and slab.exception() is None
            if view not in wanted or (slab.done() and not sound):
                del self._slabs[view]
                # Not while an earlier iterator, which may go on, takes batches from it.
                if sound and self._reuse and not self._in_use[view]:
                    spare.append(slab.result().records)
        return spare
