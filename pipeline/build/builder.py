"""A build at work: shards are taken by lease, answered by the teacher, spooled and committed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.records import require_std, tail_distribution
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.cache.store.leases import Leases
from kdcache.cache.store.place import Folder
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.build.answers import FINITE, SUMS, Copy, answers, teacher_renderer, view_parameters
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Source
from kdcache.pipeline.build.spool import Spool, Writer
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.views.policy import ViewParameters
from kdcache.pipeline.views.render import Renderer

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 5.0
_AHEAD = 8  # batches that the GPU has still to do


class Shard(NamedTuple):
    """The rows of a part in one view."""

    store: SplitStore
    view: int
    rows: range

    @property
    def part(self) -> int:
        return self.rows.start // self.store.part

    @property
    def name(self) -> str:
        return shard_name(self.view, self.part)

    @property
    def lease(self) -> str:
        return ("eval-" if self.store.split == "eval" else "") + self.name


def missing_shards(path: Path, source: Source, views: int) -> list[Shard]:
    """The shards still to compute: the evaluation split first, then view after view."""
    if (path / "identity.json").exists():
        cache = Cache(path)
        cache.identity.require(source.identity, str(path))
        stores = cache.train, cache.evaluation
    else:
        identity = source.identity
        stores = (
            SplitStore(Folder(path), "train", identity),
            SplitStore(Folder(path), "eval", identity),
        )
    train, evaluation = stores
    todo = []
    for store, count in ((evaluation, 1), (train, views)):
        done = store.committed()
        todo += [
            Shard(store, v, store.rows(p)) for v in range(count) for p in range(store.parts) if p not in done.get(v, ())
        ]
    return todo


@dataclass(eq=False)
class _Lot:
    """A shard under way: where it is spooled, its view parameters, and whether another build has committed it."""

    shard: Shard
    spool: Spool
    start: int
    parameters: ViewParameters
    gone: bool = False


@dataclass(eq=False)
class Builder:
    """One build at work: the teacher here, and a thread that writes what it has answered."""

    source: Source
    config: BuildConfig
    cache: Cache
    leases: Leases
    batch: int
    spools: Path
    writer: Mapping[str, str]
    progress: Progress
    say: Callable[[str], None]
    renderers: dict[str, Renderer]
    computed: int = 0
    _todo: list[Shard] = field(default_factory=list)  # neither committed nor under way here
    _open: set[Spool] = field(default_factory=set)
    _looked: float = -_LOOK_SECONDS

    def build(self, todo: list[Shard]) -> int:
        """See to it that all shards are committed: compute those that nobody else does, then wait for the others.

        How many images the teacher answered for here.
        """
        self._todo, told = todo, ""
        try:
            with Writer() as thread:
                while True:
                    self._look()
                    if not self._todo:
                        thread.finish()
                        self._look()
                        self.cache.write_prior(self.writer)
                        return self.computed
                    if shards := self._take():
                        self._compute(shards, thread)
                        continue
                    thread.finish()  # also because an error of its would else be told only at the end
                    if (now := self._waiting()) not in (told, ""):
                        told = now
                        self.say(told)
                    time.sleep(_POLL_SECONDS)
        finally:
            for spool in self._open:
                spool.close()

    def _look(self) -> None:
        """Strike off what other builds have committed."""
        self._looked = time.monotonic()
        committed = {}
        for store in (self.cache.train, self.cache.evaluation):
            store.refresh()
            committed[store.split] = store.committed()
        left = [s for s in self._todo if s.part not in committed[s.store.split].get(s.view, ())]
        self.progress.advance(sum(len(s.rows) for s in self._todo) - sum(len(s.rows) for s in left))
        self._todo = left

    def _take(self) -> list[Shard]:
        """Lease the first shard that can be, and of image files the same part of as many views as are cut together.

        But leave the other builders as much of it.
        """
        taken: list[Shard] = []
        most = 1
        for shard in list(self._todo):
            if taken and (shard.store, shard.rows) != (taken[0].store, taken[0].rows):
                continue
            if not self.leases.take(shard.lease):
                continue
            if not taken and not self._data(shard)[0].in_memory:
                alike = sum((s.store, s.rows) == (shard.store, shard.rows) for s in self._todo)
                builders = max(this_rank().world, 1 + len(self.leases.others()))
                most = min(self.config.views_per_decode, -(-alike // builders))
            taken.append(shard)
            self._todo.remove(shard)
            if len(taken) == most:
                break
        return taken

    def _waiting(self) -> str:
        holders = {str(holder) for shard in self._todo if (holder := self.leases.holder(shard.lease))}
        return f"waiting for the last {len(self._todo)} shards, at {', '.join(sorted(holders))}" if holders else ""

    def _data(self, shard: Shard) -> tuple[Dataset, NDArray[np.int64]]:
        if shard.store.split == "eval":
            return self.source.evaluation, self.source.evaluation_labels
        return self.source.train, self.source.train_labels

    def _renderer(self, data: Dataset) -> Renderer:
        if data.split == "train":
            self.renderers.pop("eval", None)  # and its worker processes
        if data.split not in self.renderers:
            self.renderers[data.split] = teacher_renderer(data, self.source, self.config.workers)
        return self.renderers[data.split]

    def _compute(self, shards: list[Shard], thread: Writer) -> None:
        """Have the teacher answer for shards of one part, and the thread write them."""
        data, labels = self._data(shards[0])
        lots = [lot for shard in shards if (lot := self._begin(shard, data))]
        if not lots:
            return
        under_way: deque[Copy] = deque()
        for place, at, records, logits in answers(
            self.source, self._renderer(data), labels, [lot.parameters for lot in lots], [lot.start for lot in lots],
            shards[0].rows, self.batch, lambda place: lots[place].gone,
        ):  # fmt: skip
            lot = lots[place]
            sums = lot.shard.store.carries_tail_sums(lot.shard.view)
            copy = Copy(records, logits, tail_distribution(logits, records) if sums else None)
            under_way.append(copy)
            if len(under_way) > _AHEAD:
                under_way.popleft().wait()
            thread.do(partial(self._spool, lot, at, copy))
            self.computed += len(at)
            self.progress.advance(len(at), f"(view {lot.shard.view}, {data.split})")
            if self.leases.lost(lot.shard.lease) and lot.shard.store.has(lot.shard.name):
                lot.gone = True
                self.progress.advance(lot.shard.rows.stop - at.stop)  # by the build that took over the lease
                if all(lot.gone for lot in lots):
                    break
            if time.monotonic() - self._looked > _LOOK_SECONDS:
                self._look()
        for lot in lots:
            thread.do(partial(self._commit, lot))

    def _begin(self, shard: Shard, data: Dataset) -> _Lot | None:
        """Open its spool; None where it is committed."""
        shard.store.finish(shard.name)  # decided by a builder that died before it was committed
        if shard.store.has(shard.name):
            self.leases.release(shard.lease)
            self.progress.advance(len(shard.rows))
            return None
        # Rows that were computed otherwise would differ in their last bits.
        spool = Spool(self.spools / f"{shard.lease}-b{self.batch}-{_way(self.source.teacher)}", len(shard.rows))
        self._open.add(spool)
        self.progress.advance(spool.rows)
        parameters = view_parameters(data, self.source.identity, shard.view, shard.rows)
        return _Lot(shard, spool, shard.rows.start + spool.rows, parameters)

    def _spool(self, lot: _Lot, at: range, copy: Copy) -> None:
        found = copy.arrays()
        finite, sums = found.pop(FINITE), found.pop(SUMS, None)
        if not finite.all():
            split, sample = lot.shard.store.split, at[int(finite.argmin())]
            raise InputError(f"the teacher's logits are not finite: view {lot.shard.view}, sample {sample} of {split}")
        if "tail_std" in found:
            require_std(torch.from_numpy(found["tail_std"]), self.source.identity.record.classes)
        lot.spool.add(found, sums)

    def _commit(self, lot: _Lot) -> None:
        shard, spool = lot.shard, lot.spool
        if not shard.store.has(shard.name):
            digest = lot.parameters.digest()
            shard.store.write_shard(shard.view, shard.part, spool.arrays(), digest, self.writer, spool.sums)
        self.cache.write_prior(self.writer)
        spool.remove()
        spool.close()
        self._open.remove(spool)
        self.leases.release(shard.lease)


def _way(teacher: Teacher) -> str:
    """How logits are computed, as far as that changes their last bits."""
    return teacher.device.type + ("" if teacher.compiled is None else "-compiled")
