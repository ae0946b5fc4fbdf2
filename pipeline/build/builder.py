"""A build at work: it takes shards by lease, has the teacher answer for them, and spools and commits the records."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kdcache.cache.records.encoding import tail_distribution
from kdcache.cache.records.pairs import VIEWS_A_PAIRING
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.cache.store.leases import Leases
from kdcache.cache.store.place import Folder
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.build.answers import (
    Answer,
    Arriving,
    Copy,
    answers,
    require_sound,
    teacher_renderer,
    view_parameters,
)
from kdcache.pipeline.build.plan import BuildPlan
from kdcache.pipeline.build.spool import Spool, Writer
from kdcache.pipeline.data.split import Split
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.views.parameters import ViewParameters
from kdcache.pipeline.views.render import Renderer

_POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0
AHEAD = 8  # batches that the GPU has still to do


class Shard(NamedTuple):
    """The rows of a part in one view of a split."""

    split: Split
    view: int
    rows: range

    @property
    def store(self) -> SplitStore:
        return self.split.store

    @property
    def part(self) -> int:
        return self.rows.start // self.store.part

    @property
    def name(self) -> str:
        return shard_name(self.view, self.part)

    @property
    def lease(self) -> str:
        """The name of its lease, and of its spool."""
        return ("eval-" if self.split.name == "eval" else "") + self.name


def missing_shards(plan: BuildPlan, cache: Cache | None = None) -> list[Shard]:
    """The shards that are still to be computed: those of the evaluation split first, then view after view.

    cache: the one that is built, where that is not the one in the plan's folder. MismatchError where another cache lies
    in that folder.
    """
    path, identity = plan.path, plan.identity
    if cache is not None:
        train, evaluation = plan.source.splits(cache)
    elif (path / "identity.json").exists():
        cache = Cache(path)
        cache.identity.require(identity, str(path))
        train, evaluation = plan.source.splits(cache)
    else:
        train = plan.source.split(SplitStore(Folder(path), "train", identity))
        evaluation = plan.source.split(SplitStore(Folder(path), "eval", identity))
    missing = []
    for split, views in ((evaluation, 1), (train, plan.views)):
        store, done = split.store, split.store.committed()
        missing += [
            Shard(split, view, store.rows(part))
            for view in range(views)
            for part in range(store.parts)
            if part not in done.get(view, ())
        ]
    return missing


@dataclass(eq=False)
class Lot:
    """A shard under way: where it is spooled, its view parameters, and whether another build has committed it.

    start: the first row that was not found in the spool. writer: what its commit says of who answered, where that is
    not this process.
    """

    shard: Shard
    spool: Spool
    start: int
    parameters: ViewParameters
    gone: bool = False
    writer: Mapping[str, str] | None = None


@dataclass(eq=False)
class Builder:
    """One build at work: the teacher here, and a thread that writes what it has answered.

    spools: the folder of its spools. writer: what commits say of who built them. renderers: by the name of the split.
    computed: images that the teacher has answered for here.
    """

    plan: BuildPlan
    cache: Cache
    leases: Leases
    spools: Path
    writer: Mapping[str, str]
    progress: Progress
    say: Callable[[str], None]
    renderers: dict[str, Renderer]
    computed: int = 0
    _todo: list[Shard] = field(default_factory=list)  # neither committed nor under way here
    _open: set[Spool] = field(default_factory=set)
    _looked: float = -LOOK_SECONDS

    def build(self, todo: list[Shard]) -> int:
        """See to it that all shards are committed: compute those that nobody else does, then wait for the others.

        Returns how many images the teacher answered for here.
        """
        # These splits write into the scratch folder that this builder's leases protect.
        splits = {split.name: split for split in self.plan.source.splits(self.cache)}
        self._todo, told = [shard._replace(split=splits[shard.split.name]) for shard in todo], ""
        try:
            with Writer() as thread:
                while True:
                    self._look()
                    if not self._todo and not self._busy():
                        thread.finish()
                        self._look()
                        self.cache.write_prior(self.writer)
                        return self.computed
                    if self._work(thread):
                        continue
                    thread.finish()  # here too, because an error of the thread would else be told only at the end
                    if (now := self._waiting()) not in (told, ""):
                        told = now
                        self.say(told)
                    time.sleep(_POLL_SECONDS)
        finally:
            for spool in self._open:
                spool.close()

    def _busy(self) -> bool:
        """Whether shards are under way between two calls of `_work`."""
        return False

    def _work(self, thread: Writer) -> bool:
        """Go on with the work. Returns False where there is nothing to do but to wait for other builds."""
        shards = self._take()
        if shards:
            self._compute(shards, thread)
        return bool(shards)

    def _builders(self) -> int:
        """How many share the work, this one among them."""
        return max(this_rank().world, 1 + len(self.leases.others()))

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
        """Lease the first shard that is free and, of image files, the same part of the views that are cut with it.

        As many shards are left to each of the other builders.
        """
        taken: list[Shard] = []
        most = 1
        for shard in list(self._todo):
            if taken and not self._together(taken[0], shard):
                continue
            if not self.leases.take(shard.lease):
                continue
            if not taken and not shard.split.data.in_memory:
                alike = sum(self._together(shard, other) for other in self._todo)
                most = min(self.plan.views_per_decode, -(-alike // self._builders()))
            taken.append(shard)
            self._todo.remove(shard)
            if len(taken) == most:
                break
        return taken

    def _together(self, a: Shard, b: Shard) -> bool:
        """Whether two shards can be cut from the same decoded images."""
        paired = not self.plan.identity.views.mixed or a.view // VIEWS_A_PAIRING == b.view // VIEWS_A_PAIRING
        return paired and (a.split, a.rows) == (b.split, b.rows)

    def _waiting(self) -> str:
        """For whom the build waits; empty where nobody holds a lease."""
        holders = {str(holder) for shard in self._todo if (holder := self.leases.holder(shard.lease))}
        return f"waiting for the last {len(self._todo)} shards, at {', '.join(sorted(holders))}" if holders else ""

    def _renderer(self, split: Split) -> Renderer:
        if split.name == "train":
            self.renderers.pop("eval", None)  # its worker processes end with it
        if split.name not in self.renderers:
            self.renderers[split.name] = teacher_renderer(split.data, self.plan.source, self.plan.workers)
        return self.renderers[split.name]

    def _compute(self, shards: list[Shard], thread: Writer) -> None:
        """Have the teacher answer for shards of one part, and the thread write the answers."""
        split, rows = shards[0].split, shards[0].rows
        lots = [lot for shard in shards if (lot := self._begin(shard, way_of(self.plan.source.teacher)))]
        if not lots:
            return
        under_way: deque[Copy] = deque()
        for answer in answers(
            self.plan.source, self._renderer(split), split.labels, [lot.parameters for lot in lots],
            [lot.start for lot in lots], rows, self.plan.batch, lambda place: lots[place].gone,
        ):  # fmt: skip
            lot = lots[answer.place]
            copy = _copy(lot, answer)
            under_way.append(copy)
            if len(under_way) > AHEAD:
                under_way.popleft().wait()
            self._receive(lot, answer.rows, copy, thread)
            if all(lot.gone for lot in lots):
                break
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._look()
        for lot in lots:
            thread.do(partial(self._commit, lot))

    def _receive(self, lot: Lot, rows: range, records: Arriving, thread: Writer) -> None:
        """Have the next rows of a lot spooled, and find out whether another build has committed it meanwhile."""
        thread.do(partial(self._spool, lot, rows, records))
        self.computed += len(rows)
        self.progress.advance(len(rows), f"(view {lot.shard.view}, {lot.shard.split.data.split})")
        if self.leases.lost(lot.shard.lease) and lot.shard.store.has(lot.shard.name):
            lot.gone = True
            self.progress.advance(lot.shard.rows.stop - rows.stop)  # by the build that took over the lease

    def _begin(self, shard: Shard, way: str) -> Lot | None:
        """Open the shard's spool; None where the shard is committed. way: how its logits are computed."""
        shard.store.finish(shard.name)  # decided by a builder that died before it was committed
        if shard.store.has(shard.name):
            self.leases.release(shard.lease)
            self.progress.advance(len(shard.rows))
            return None
        # Rows that were computed in another way would differ in their last bits.
        spool = Spool(self.spools / f"{shard.lease}-b{self.plan.batch}-{way}", len(shard.rows))
        self._open.add(spool)
        self.progress.advance(spool.rows)
        parameters = view_parameters(shard.split.data, self.plan.identity, shard.view, shard.rows)
        return Lot(shard, spool, shard.rows.start + spool.rows, parameters)

    def _spool(self, lot: Lot, rows: range, records: Arriving) -> None:
        arrays, finite, sums = records.arrive()
        shard, classes = lot.shard, self.plan.identity.record.classes
        require_sound(arrays, finite, f"view {shard.view}, sample {{}} of {shard.split.name}", rows, classes)
        lot.spool.add(arrays, sums)

    def _commit(self, lot: Lot) -> None:
        shard, spool = lot.shard, lot.spool
        if not shard.store.has(shard.name):
            digest, writer = lot.parameters.digest(), lot.writer or self.writer
            shard.store.write_shard(shard.view, shard.part, spool.arrays(), digest, writer, spool.sums)
        self.cache.write_prior(self.writer)
        spool.remove()
        spool.close()
        self._open.remove(spool)
        self.leases.release(shard.lease)


def _copy(lot: Lot, answer: Answer) -> Copy:
    """Send a batch's records to the host, with its share of the prior where the shard carries that."""
    sums = lot.shard.store.carries_tail_sums(lot.shard.view)
    return Copy(answer, tail_distribution(answer.logits, answer.records) if sums else None)


def way_of(teacher: Teacher) -> str:
    """How logits are computed, as far as that changes their last bits."""
    return teacher.device.type + ("" if teacher.compiled is None else "-compiled")
