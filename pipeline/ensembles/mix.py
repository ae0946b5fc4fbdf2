"""`kdcache mix`: the caches of several teachers become one, which holds the mean of their answers.

Nothing is run: views do not depend on the teacher, so the caches hold answers to the very same pixels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder
from kdcache.cache.identity import (
    MIXED_FORMAT,
    Identity,
    RecordIdentity,
    SplitName,
    TeacherIdentity,
)
from kdcache.cache.records.choices import TEMPERATURES, Precision
from kdcache.cache.records.encoding import default_precision
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.cache.store.leases import Leases
from kdcache.pipeline.build.answers import teacher_top1
from kdcache.pipeline.ensembles.config import MixConfig
from kdcache.pipeline.ensembles.mean import mean_of
from kdcache.pipeline.ensembles.members import Member, common_views, open_members, require_same_pixels
from kdcache.pipeline.process import provenance
from kdcache.pipeline.process.progress import Progress, duration, percent, size

_NUMBERS = 1 << 21  # float64 of one member at once
_POLL_SECONDS = 0.5
_FINER: dict[Precision, int] = {"uint8": 0, "float16": 1, "float32": 2}


@dataclass(frozen=True)
class MemberResult:
    """One member: its key, network and weight; on the evaluation split the share of records whose most probable class
    is that of the mean, and its accuracy (0..1; None without labels)."""

    key: str
    teacher: str
    weight: float
    agreement: float
    top1: float | None


@dataclass(frozen=True)
class MixResult:
    """path, key, views and size (bytes) of the cache; records that this call has written (0: all were there).

    top1: the mean's accuracy on the evaluation split, 0..1; None without labels.
    """

    path: Path
    key: str
    views: int
    bytes: int
    records: int
    top1: float | None
    members: list[MemberResult]
    seconds: float


class _Shard(NamedTuple):
    split: SplitName
    view: int
    part: int

    @property
    def name(self) -> str:
        return shard_name(self.view, self.part)

    @property
    def lease(self) -> str:
        return ("eval-" if self.split == "eval" else "") + self.name


def mix(config: MixConfig, say: Callable[[str], None] = print) -> MixResult:
    """Make the cache of the mean of several caches' answers, or complete it.

    All views that are complete in every one of them are mixed, and the evaluation split. After a kill at any moment, or
    when the members have more views, the same call goes on; several at once divide the shards. Memory holds one shard
    of each member and of the mean. InputError, NotFoundError or MismatchError where the caches cannot be mixed.
    """
    start = time.monotonic()
    members = open_members(config.caches, config.weights, config.registry, config.trust)
    identity = ensemble_identity(members, config)
    views = common_views(members, say)
    require_same_pixels(members, "eval", range(1))
    require_same_pixels(members, "train", views)
    path = Path(config.out) if config.out else caches_folder() / identity.key
    say(
        f"cache {identity.key[:12]}: {identity.teacher.architecture} on {identity.data.name}, {len(views)} views, "
        f"in {path}"
    )
    files.make_folder(path)
    cache, writer = Cache.create(path, identity), provenance.writer()
    total = identity.evaluation.samples + len(views) * identity.data.samples
    with cache.writing(say) as leases, Progress("mix", total, "records") as progress:
        for split in cache.splits:
            first = members[0].cache.split(split.split)
            split.write_labels(first.labels, writer)
            if first.layout.sizes:
                split.write_sizes(first.sizes, writer)
        work = _Mixer(cache, members, leases, writer, progress, say)
        written = work.mix(views)
        cache.write_prior(writer)
    found = _compared(cache, members)
    top1 = teacher_top1(cache)
    seconds = time.monotonic() - start
    for one in found:
        alone = "" if one.top1 is None else f", top-1 {percent(one.top1)}"
        say(
            f"{one.teacher} ({one.key[:12]}, weight {one.weight:.4g}): names the mean's class in "
            f"{percent(one.agreement)} of the evaluation split{alone}"
        )
    whole = "" if top1 is None else f"; the mean's top-1 is {percent(top1)}"
    say(f"done in {duration(seconds)}: {size(cache.size())}, {written:,} of {total:,} records by this mix{whole}")
    return MixResult(path, identity.key, len(views), cache.size(), written, top1, found, seconds)


def ensemble_identity(members: Sequence[Member], config: MixConfig) -> Identity:
    """What the cache of the mean is. InputError for records that cannot be made of the members'."""
    described = tuple(member.described() for member in members)
    first = members[0].identity
    networks = " + ".join(member.identity.teacher.network for member in members)
    named = json.dumps([m.model_dump(mode="json") for m in described], sort_keys=True, separators=(",", ":"))
    return Identity(
        format=MIXED_FORMAT,
        teacher=TeacherIdentity(
            architecture=f"mix ({networks})",
            weights=hashlib.sha256(b"kdcache mix 1\0" + named.encode()).hexdigest(),
            # Its members were shown the images each in its own way, and nothing is ever shown to the mean.
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            # The largest of theirs is what a student is shown unless it is told another size.
            input_size=max(member.identity.teacher.input_size for member in members),
            numeric="float32",
        ),
        data=first.data,
        evaluation=first.evaluation,
        views=first.views,
        record=_record(members, config),
        class_map=first.class_map,
        part=first.part,
        members=described,
    )


def _record(members: Sequence[Member], config: MixConfig) -> RecordIdentity:
    records = [member.identity.record for member in members]
    classes, most = records[0].classes, max(r.k or r.classes for r in records)
    if (k := config.topk or most) > most:
        raise InputError(
            f"--topk {config.topk}: these caches hold up to {most} classes a record, so give {most} or less"
        )
    dense = k == classes
    if dense and not all(r.dense for r in records):
        if config.topk:
            raise InputError(
                f"--topk {config.topk}: a record of all classes needs caches that hold all of them, and some of these "
                "hold fewer"
            )
        k, dense = max(r.k for r in records if r.k), False
    of_members = next((r.temperatures for r in records if not r.dense), TEMPERATURES)
    finest = max((r.precision for r in records if r.dense == dense), key=_FINER.__getitem__)
    precision = config.precision or (finest if all(r.dense == dense for r in records) else default_precision(dense))
    if dense and precision == "uint8":
        raise InputError("--precision uint8 is for top-k records, and these caches are dense: give --topk too")
    return records[0].model_copy(
        update={
            "k": None if dense else k,
            "temperatures": () if dense else config.temperatures or of_members,
            "precision": precision,
            "tail_std": False,  # the deviation of all logits is not known from top-k records
        }
    )


@dataclass(eq=False)
class _Mixer:
    """A mix at work: it takes shards by lease, computes the mean and commits it."""

    cache: Cache
    members: Sequence[Member]
    leases: Leases
    writer: Mapping[str, str]
    progress: Progress
    say: Callable[[str], None]
    _labels: dict[tuple[SplitName, int], NDArray[Any]] = field(default_factory=dict)  # of the view that is mixed

    def mix(self, views: range) -> int:
        """See to it that all shards are committed, and return how many records were written here."""
        written, told = 0, False
        todo = [_Shard("eval", 0, part) for part in range(self.cache.evaluation.parts)]
        todo += [_Shard("train", view, part) for view in views for part in range(self.cache.train.parts)]
        while todo:
            left = []
            for shard in todo:
                store = self.cache.split(shard.split)
                store.finish(shard.name)  # decided by a mix that died before it was committed
                if not store.has(shard.name) and not self.leases.take(shard.lease):
                    left.append(shard)
                    continue
                if not store.has(shard.name):
                    self._write(shard)
                    written += len(store.rows(shard.part))
                self.leases.release(shard.lease)
                self.progress.advance(len(store.rows(shard.part)), f"(view {shard.view}, {shard.split})")
            if left:
                if not told:
                    self.say(f"waiting for {len(left)} shards that another process mixes")
                    told = True
                time.sleep(_POLL_SECONDS)
                for store in self.cache.splits:
                    store.refresh()
            todo = left
        return written

    def _write(self, shard: _Shard) -> None:
        split, view, part = shard
        store, record = self.cache.split(split), self.cache.identity.record_of(split)
        rows, sums = store.rows(part), None
        labels = self._labels_in(split, view)[rows.start : rows.stop]
        stored = []
        for member in self.members:
            theirs = member.cache.split(split)
            arrays = theirs.check_shard(view, part)
            stored.append(chunks.as_records(theirs.layout.record, arrays, labels, member.cache.prior))
        weights = [member.weight for member in self.members]
        carries = store.carries_tail_sums(view)
        if carries:
            sums = np.zeros(store.layout.tail_sums.shape[1:])
        step, found = max(1, _NUMBERS // record.classes), []
        for start in range(0, len(rows), step):
            mean = mean_of([of[start : start + step] for of in stored], weights, record, carries)
            found.append(chunks.as_arrays(mean.records))
            if sums is not None and mean.sums is not None:
                sums += mean.sums.numpy()
        whole = {name: np.concatenate([piece[name] for piece in found]) for name in found[0]}
        parameters = self.members[0].cache.split(split).commit(shard.name).parameters
        assert parameters is not None
        store.write_shard(view, part, whole, parameters, self.writer, sums)

    def _labels_in(self, split: SplitName, view: int) -> NDArray[Any]:
        if (split, view) not in self._labels:
            self._labels = {(split, view): self.members[0].cache.split(split).labels_in(view)}
        return self._labels[split, view]


def _compared(cache: Cache, members: Sequence[Member]) -> list[MemberResult]:
    """How far each member names the mean's class on the evaluation split, and how good it is there alone."""
    mean = cache.read_evaluation().predictions()
    found = []
    for member in members:
        same = torch.eq(member.cache.read_evaluation().predictions(), mean)
        teacher, top1 = member.identity.teacher.network, teacher_top1(member.cache)
        found.append(MemberResult(member.cache.key, teacher, member.weight, float(same.float().mean()), top1))
    return found
