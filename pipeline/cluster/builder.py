"""A build whose teacher answers on a Ray cluster: shards are taken, spooled and committed here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import InputError, kind_and_message
from kdcache.cache.home import home
from kdcache.cache.identity import SplitName
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.leases import Leases
from kdcache.pipeline.build.builder import LOOK_SECONDS, Builder, Lot, Shard
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.plan import BuildPlan, plan_build
from kdcache.pipeline.build.source import Say
from kdcache.pipeline.build.spool import Writer
from kdcache.pipeline.cluster import session
from kdcache.pipeline.cluster.layout import Layout, lay_out
from kdcache.pipeline.cluster.place import Place, versions
from kdcache.pipeline.cluster.pool import Hand, LostError, Pool, outcome
from kdcache.pipeline.cluster.worker import Block, Job, Work
from kdcache.pipeline.data import memory
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.process.screen import Detail

_POLL_SECONDS = 0.5
_PATIENCE = 30.0  # seconds without a worker, after which that is said
_WAITING = 4  # answers of a worker that may wait to be fetched; it makes one a second


@contextmanager
def on_cluster(plan: BuildPlan, config: BuildConfig, address: str) -> Iterator[BuildPlan]:
    """The same plan, of a build whose teacher answers on the Ray cluster at an address; see `session.joined`.

    config: what was asked for, of which `device` and `workers` are meant for the cluster.
    """
    weights = sum(t.numel() * t.element_size() for t in plan.source.teacher.model.state_dict().values())
    with session.joined(address, weights):
        layout = lay_out(session.nodes(), config.device, config.workers, not plan.source.train.in_memory)
        cluster = Cluster(layout, config)
        try:
            yield plan_build(config, plan.source, cluster)
        finally:
            cluster.close()


class Cluster:
    """A Ray cluster as the place where a teacher answers (`Elsewhere`)."""

    def __init__(self, layout: Layout, config: BuildConfig) -> None:
        self._layout, self._config = layout, config
        self._pool: Pool | None = None

    @property
    def device(self) -> str:
        return self._layout.device

    @property
    def where(self) -> str:
        count = self._layout.capacity
        if count > 1:
            return f"{count} Ray workers with {self._layout} each"
        return f"a Ray worker with {self._layout}"

    def probe(self, plan: BuildPlan, images: int, say: Say) -> tuple[float, float]:
        """See `Elsewhere`. One worker is tried out, and the others are taken to be as fast."""
        pool = self._workers(plan)
        pool.want(max(1, self._layout.capacity))
        while True:
            hand = _first(pool, say)
            try:
                rate, record_bytes, said = outcome(hand.actor.probe.remote(images))
            except LostError:
                pool.lost(hand)
                continue
            pool.free(hand)
            for line in said:
                say(line)
            return rate * max(1, self._layout.capacity), record_bytes

    def builder(
        self, plan: BuildPlan, cache: Cache, leases: Leases, spools: Path, writer: Mapping[str, str],
        progress: Progress, say: Callable[[str], None],
    ) -> ClusterBuilder:  # fmt: skip
        return ClusterBuilder(self._workers(plan), plan, cache, leases, spools, writer, progress, say)

    def close(self) -> None:
        """Let the workers go."""
        if self._pool is not None:
            self._pool.close()

    def _workers(self, plan: BuildPlan) -> Pool:
        if self._pool is None:
            self._pool = Pool(self._layout, *given(plan, self._config, self._layout))
        return self._pool


def given(plan: BuildPlan, config: BuildConfig, layout: Layout) -> tuple[Any, Any]:
    """What workers are given, as Ray's objects. InputError for a teacher that cannot be sent."""
    import ray

    source = plan.source
    prints: dict[SplitName, str] = {
        "train": source.train.fingerprint(False),
        "eval": source.evaluation.fingerprint(False),
    }
    place = ray.put(
        Place(
            config.data, config.unlabelled, plan.identity, prints, memory.used(), str(home()), str(Path.cwd()),
            tuple(sys.path), versions(),
        )
    )  # fmt: skip
    try:
        teacher = ray.cloudpickle.dumps(source.teacher)
    except Exception as e:  # other people's networks may hold anything
        raise InputError(f"the teacher's network cannot be sent to other processes: {kind_and_message(e)}") from e
    labels: dict[SplitName, NDArray[np.int64]] = {"train": source.train_labels, "eval": source.evaluation_labels}
    left = {"source", "elsewhere", "folder", "workers"}
    settings = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in left}
    settings |= {"folder": None, "workers": layout.processes}
    job = Job(place, teacher, labels, settings, source.defaults, layout.device, layout.cpus, layout.decoders)
    return ray.put(job), place


def _first(pool: Pool, say: Say) -> Hand:
    """The first worker that is ready."""
    import ray

    start: float | None = time.monotonic()
    while (hand := pool.take()) is None:
        done, _ = ray.wait(pool.waits, num_returns=1, timeout=_POLL_SECONDS)
        for reference in done:
            pool.ready(reference)
        if start is not None and time.monotonic() - start > _PATIENCE:
            say(f"waiting for the first Ray worker, with {pool.layout}")
            start = None
    assert hand.opened is not None
    say(Detail(f"the first worker is ready on node {hand.opened.node}"))
    return hand


@dataclass(eq=False)
class _Stream:
    """Shards that a worker answers for, and up to which row it has, by the shard's place."""

    hand: Hand
    lots: list[Lot]
    reached: list[int]


class ClusterBuilder(Builder):
    """A builder whose shards are answered for by the workers of a pool, each of them some shards at a time."""

    def __init__(
        self, pool: Pool, plan: BuildPlan, cache: Cache, leases: Leases, spools: Path, writer: Mapping[str, str],
        progress: Progress, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        super().__init__(plan, cache, leases, spools, writer, progress, say, {})
        self._pool = pool
        self._streams: dict[Any, _Stream] = {}

    def _busy(self) -> bool:
        return bool(self._streams)

    def _builders(self) -> int:
        """How many are to share a part: each worker shall have some shards, and decode for as many views as it can."""
        workers = super()._builders() - 1 + max(1, self._pool.layout.capacity, self._pool.size)
        parts = {(shard.split.name, shard.rows) for shard in self._todo}
        return -(-workers // max(1, len(parts)))

    def _work(self, thread: Writer) -> bool:
        """Have workers answer and take their answers for some seconds, or as long as there is something to do."""
        until = time.monotonic() + LOOK_SECONDS
        while (self._todo or self._streams) and time.monotonic() < until:
            groups = -(-len(self._todo) // self.plan.views_together)
            self._pool.want(groups + len(self._streams))
            while self._pool.idle and (shards := self._take()):
                self._start(shards)
            if self._pool.idle and not self._streams:
                return False  # others have the rest
            self._attend(thread)
        return True

    def _start(self, shards: list[Shard]) -> None:
        hand, split, rows = self._pool.take(), shards[0].split, shards[0].rows
        assert hand is not None and hand.opened is not None
        lots = [lot for shard in shards if (lot := self._begin(shard, hand.opened.way))]
        if not lots:
            self._pool.free(hand)
            return
        for lot in lots:
            lot.writer = {**hand.opened.writer, "command": self.writer["command"]}
        views, starts = [lot.shard.view for lot in lots], [lot.start for lot in lots]
        sums = [split.store.carries_tail_sums(view) for view in views]
        answer = hand.actor.answer.options(num_returns="streaming", _generator_backpressure_num_objects=_WAITING)
        self._streams[answer.remote(Work(split.store.split, rows, views, starts, sums))] = _Stream(hand, lots, starts)

    def _attend(self, thread: Writer) -> None:
        """Wait a moment for workers, and take what is there of each."""
        import ray

        waits = [*self._streams, *self._pool.waits]
        done, _ = ray.wait(waits, num_returns=1, timeout=_POLL_SECONDS)
        if done:  # those at the front shall not keep the others waiting
            done, _ = ray.wait(waits, num_returns=len(waits), timeout=0)
        for one in done:
            if one in self._streams:
                self._advance(one, thread)
            else:
                self._pool.ready(one)

    def _advance(self, answers: Any, thread: Writer) -> None:
        """Take the next answers of a worker, or see that it is done or lost."""
        stream = self._streams[answers]
        try:
            blocks: list[Block] = outcome(next(answers))
        except StopIteration:
            del self._streams[answers]
            self._pool.free(stream.hand)
            for lot in stream.lots:
                thread.do(partial(self._commit, lot))
            return
        except LostError:
            del self._streams[answers]
            self._give_back(stream, thread)
            self._pool.lost(stream.hand)
            return
        if blocks:
            self._pool.answered()
        for block in blocks:
            lot = stream.lots[block.place]
            if not lot.gone:
                stream.reached[block.place] = block.rows.stop
                self._receive(lot, block.rows, block, thread)

    def _give_back(self, stream: _Stream, thread: Writer) -> None:
        """Keep what a lost worker has answered, so that another goes on from there."""
        hand = stream.hand
        if hand.opened is not None:
            views = ", ".join(str(lot.shard.view) for lot in stream.lots)
            self.say(Detail(f"a worker on node {hand.opened.node} is gone: another one goes on with view {views}"))
        for lot in stream.lots:
            thread.do(partial(self._keep, lot))
        thread.finish()
        for lot, reached in zip(stream.lots, stream.reached, strict=True):
            if not lot.gone:
                self.progress.advance(lot.shard.rows.start - reached)
        self._todo[:0] = [lot.shard for lot in stream.lots if not lot.gone]

    def _keep(self, lot: Lot) -> None:
        lot.spool.keep()
        self._open.remove(lot.spool)
