"""Stage 1: the teacher runs once over the evaluation split and V views, and what a student needs is stored."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError, MismatchError
from kdcache.cache.files import make_folder
from kdcache.cache.home import caches_folder
from kdcache.cache.identity import DataIdentity, Identity, RecordIdentity, ViewsIdentity
from kdcache.cache.records import Records, default_precision, require_std, tail_distribution
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache, SplitStore, require_folder, shard_name
from kdcache.cache.store.leases import Leases
from kdcache.pipeline.build import provenance, suspicions
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.spool import SPOOL_SECONDS, WAITING_SECONDS, Spool, Writer, clear, spool_folder
from kdcache.pipeline.data import classmap
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.defaults import defaults_for, stored_classes
from kdcache.pipeline.process.progress import Progress, duration, percent, size
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import Teacher, load_teacher, pick_device
from kdcache.pipeline.views.policy import ViewParameters, check_policy, draw, evaluation_view
from kdcache.pipeline.views.render import RENDERER, Renderer

_TIMED = 512  # images of the probe, at most
_LOST_AT_MOST = 60.0
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 5.0
_AHEAD = 8  # batches that the GPU has still to do
_WORTH_COMPILING = 1_000_000  # records of a cache


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


@dataclass(frozen=True)
class BuildResult:
    """path, key and size (bytes) of the cache; images the teacher answered for in this build (0: none had to be)."""

    path: Path
    key: str
    views: int
    bytes: int
    teacher_images: int
    seconds: float
    teacher_top1: float | None


@dataclass(frozen=True, eq=False)
class Source:
    """Both splits of a dataset with labels in the teacher's classes, the teacher, and the identity they give."""

    train: Dataset
    evaluation: Dataset
    train_labels: NDArray[np.int64]
    evaluation_labels: NDArray[np.int64]
    teacher: Teacher
    identity: Identity


def open_source(config: BuildConfig, say: Callable[[str], None] = lambda _: None) -> Source:
    """Open the data and the teacher and describe what a build of them is. Writes nothing."""
    device = pick_device(config.device)
    data = open_data(config.data, "train", unlabelled=config.unlabelled)
    evaluation = open_data(config.data, "eval", unlabelled=config.unlabelled)
    for note in filter(None, (data.note, evaluation.note)):
        say(note)
    wanted = Wanted(config.teacher_size, config.teacher_mean, config.teacher_std, config.teacher_interpolation)
    teacher = load_teacher(config.teacher, data, device, weights=config.weights, amp=config.amp, wanted=wanted)
    say(f"teacher: {teacher.about}")
    if not config.class_map and teacher.class_names is None and data.class_names:
        say(
            "note: nothing tells the names of the teacher's classes: its class i is taken for the data's class i "
            "(--class-map FILE says otherwise)"
        )
    teacher, to_teacher, class_map = _class_map(data, config.class_map, teacher, say)
    if teacher.classes < 2:
        raise InputError(f"the teacher has {teacher.classes} classes, at least 2 are needed: is {config.data} right?")
    check_options(config, teacher.classes)
    labels = [to_teacher[split.labels] for split in (data, evaluation)]
    policy = check_policy(config.augment or defaults_for(data).augment)
    if not data.in_memory and "crop" in policy.split(","):
        say(f"note: {policy} keeps each image's own frame; rrc,flip is usual for image files")
    k = stored_classes(teacher.classes) if config.topk is None else config.topk
    dense = k is None or k == teacher.classes
    if dense and config.precision == "uint8":
        raise InputError("--precision uint8 is for top-k records (--topk): dense ones take float16 or float32")
    precision = config.precision or default_precision(dense)
    if precision == "uint8" and min(config.temperatures) < 1:
        raise InputError(
            f"temperature {min(config.temperatures):g} asks for finer gaps than uint8 has: give --precision float16"
        )
    identity = Identity(
        teacher=teacher.identity,
        data=describe_data(data, config.full_fingerprint),
        evaluation=describe_data(evaluation, config.full_fingerprint),
        views=ViewsIdentity(policy=policy, seed=config.seed, renderer=RENDERER),
        record=RecordIdentity(
            classes=teacher.classes,
            k=None if dense else k,
            temperatures=() if dense else config.temperatures,
            precision=precision,
            tail_std=config.tail_std and not dense,
            labels=labels[0].shape[1],
        ),
        class_map=class_map,
        part=config.part,
    )
    largest = max(spec.chunk_bytes for spec in chunks.record_arrays(identity.record, len(data), config.part))
    if largest > chunks.MAX_CHUNK_BYTES:
        raise InputError(
            f"a shard would hold {size(largest)} in one array, the most is {size(chunks.MAX_CHUNK_BYTES)}: "
            f"{identity.record.k or teacher.classes} classes a record are too many, lower --topk"
        )
    return Source(data, evaluation, labels[0], labels[1], teacher, identity)


def check_options(config: BuildConfig, classes: int) -> None:
    """InputError for what no data can make good, before a teacher of so many classes is taught or asked."""
    if config.augment:
        check_policy(config.augment)
    if config.topk is not None and not 1 <= config.topk <= classes:
        raise InputError(f"--topk {config.topk} does not fit the teacher's {classes} classes")
    if config.out and "://" in config.out:
        raise InputError(f"--out {config.out}: caches are built in folders; --registry URL --push publishes them")


def build(
    config: BuildConfig,
    say: Callable[[str], None] = print,
    source: Source | None = None,
    begun: Callable[[], object] = lambda: None,
) -> BuildResult:
    """Build, extend or complete the cache that `config` describes; complete ones are only named.

    begun: called once the cache is there, before anything is computed for it.

    Any number of builds of one cache, on machines that share its folder, share the work; each returns when all of it
    is done. Killed at any moment, a later one goes on where it was; on the same machine it loses no more teacher time
    than `SPOOL_SECONDS` and a batch, and `WAITING_SECONDS` while the disk does not keep up.

    Memory does not depend on how many samples and views there are: beside the dataset and the teacher, it is the
    records of one part (twice, while they are compressed) for each view under way, one for in-memory data and
    `views_per_decode` for files, `WAITING_JOBS` batches of records, and the pixels that `Renderer` states.
    """
    start = time.monotonic()
    source = source or open_source(config, say)
    views = config.views if config.views is not None else defaults_for(source.train).views
    if views < 1:
        raise InputError(f"--views {views}: at least one view is needed")
    key = source.identity.key
    path = Path(config.out) if config.out else caches_folder() / key
    spool = spool_folder(path, key)
    todo = _missing(path, source, views)
    if not todo and (cache := Cache(path)).finished:
        for store, data, labels in _splits(cache, source):
            store.require_labels(labels)
            store.require_sizes(data.sizes)
        clear(spool, cache)
        cache.tidy()
        begun()
        say(f"cache {key[:12]} has all of {views} views already: nothing to compute ({path})")
        return BuildResult(path, key, views, cache.size(), 0, time.monotonic() - start, teacher_top1(cache))
    if found := source.identity.teacher.differences(source.teacher.identity, theirs="this teacher has"):
        raise MismatchError(f"cache {key[:12]} is another teacher's: {'; '.join(found)}")
    _require_place(path)
    teacher = source.teacher
    batch = config.batch_size or defaults_for(source.train).batch_for(
        teacher.device.type, teacher.input_size, len(source.train)
    )
    if batch > len(source.train):
        raise InputError(f"--batch-size {batch} is larger than the data, {len(source.train):,} images: lower it")
    images = sum(len(shard.rows) for shard in todo)
    say(
        f"cache {key[:12]}: {source.identity.teacher.architecture} on {source.identity.data.name}, "
        f"{source.identity.views.policy}, {views} views of {len(source.train):,} samples"
    )
    renderer = teacher_renderer(source.train, source, config.workers)
    if images:
        rate, record_bytes = _probe(source, config, batch, images, renderer, say)
        say(
            f"to compute: {images:,} records on {source.teacher.device}, about {duration(images / rate)} at "
            f"{rate:,.0f} images/s and {size(images * record_bytes)} ({record_bytes:.1f} bytes a record), in {path}"
        )
        if batch / rate > _LOST_AT_MOST - SPOOL_SECONDS - WAITING_SECONDS:
            say(f"note: a build that is killed loses up to a batch, here {duration(batch / rate)}: lower --batch-size")
        if (world := this_rank().world) > len(todo):
            say(f"note: {world} processes for {len(todo)} shards: {world - len(todo)} of them have nothing to compute")
        source = _compiled(source, config, batch, say)
    make_folder(path)
    cache = Cache.create(path, source.identity)
    begun()
    # From here on in the stores whose scratch folder the lease is for.
    todo = [s._replace(store=cache.train if s.store.split == "train" else cache.evaluation) for s in todo]
    writer = provenance.writer(source.teacher)
    with cache.writing(say) as leases:
        if others := leases.others():
            say(f"sharing the work with {', '.join(map(str, others))}")
        for store, data, labels in _splits(cache, source):
            store.write_labels(labels.astype(chunks.id_dtype(source.teacher.classes)), writer)
            store.write_sizes(data.sizes, writer)
        with Progress("build", images, "images") as progress:
            builder = _Builder(source, config, cache, leases, batch, spool, writer, progress, say, {"train": renderer})
            computed = builder.build(todo)
    clear(spool, cache)
    top1 = teacher_top1(cache)
    seconds = time.monotonic() - start
    share = f", {computed:,} of {images:,} images by this build" if computed < images else ""
    say(
        f"done in {duration(seconds)}: {size(cache.size())}{share}"
        + (f"; teacher's top-1 on the evaluation split {percent(top1)}" if top1 is not None else "")
    )
    return BuildResult(path, key, views, cache.size(), computed, seconds, top1)


def _splits(cache: Cache, source: Source) -> Iterator[tuple[SplitStore, Dataset, NDArray[np.int64]]]:
    yield cache.train, source.train, source.train_labels
    yield cache.evaluation, source.evaluation, source.evaluation_labels


def teacher_top1(cache: Cache) -> float | None:
    """The teacher's accuracy (0..1) on the evaluation split, from its records; None without records or labels."""
    if not cache.evaluation_views:
        return None
    records = cache.read_evaluation()
    if not records.labels.shape[1]:
        return None
    return float((records.predictions() == records.labels[:, 0].long()).float().mean())


def view_parameters(data: Dataset, identity: Identity, view: int, rows: range) -> ViewParameters:
    """The parameters of a view's samples, or of the evaluation view where `data` is that split."""
    sizes = data.sizes[rows.start : rows.stop]
    if data.split == "eval":
        return evaluation_view(sizes, whole=data.in_memory)
    return draw(identity.views.policy, identity.views.seed, view, rows, sizes)


def record_batches(
    source: Source, data: Dataset, labels: NDArray[np.int64], view: int, rows: range, batch: int, workers: int | None
) -> Iterator[tuple[Records, torch.Tensor]]:
    """The live teacher's records and logits [B, C] for rows of a view, in the batches that a build takes.

    `rows` starts on a batch boundary of its shard.
    """
    parameters = view_parameters(data, source.identity, view, rows)
    renderer = teacher_renderer(data, source, workers)
    for _, _, records, logits in answers(source, renderer, labels, [parameters], [rows.start], rows, batch):
        yield records, logits


def answers(
    source: Source,
    renderer: Renderer,
    labels: NDArray[np.int64],
    views: Sequence[ViewParameters],
    starts: Sequence[int],
    rows: range,
    batch: int,
    skip: Callable[[int], bool] = lambda _: False,
) -> Iterator[tuple[int, range, Records, torch.Tensor]]:
    """The teacher's answers for rows of several views, each from its own start, which is a batch boundary, on.

    The place in `views`, the rows of the batch, their records and logits [B, C], unchecked. skip: whether a view, by
    its place, is no longer wanted. A short last batch is filled up, because logits of small batches can differ in the
    last bit.
    """
    bounds = [range(i, min(i + batch, rows.stop)) for i in range(rows.start, rows.stop, batch)]
    # A view that lacks nothing starts at the very end, which is inside of a short last batch.
    bounds = [b for b in bounds if min(starts) <= b.start]
    filled = [np.pad(np.arange(b.start, b.stop), (0, batch - len(b)), mode="edge") for b in bounds]
    wanted = [[place for place, start in enumerate(starts) if start <= b.start] for b in bounds]
    y = torch.from_numpy(labels[rows.start : rows.stop]).to(source.teacher.device)
    for number, place, images in renderer.views(views, list(zip(filled, wanted, strict=True)), rows.start):
        if skip(place):
            continue
        at = bounds[number]
        logits = source.teacher.logits(images)[: len(at)]
        of = y[at.start - rows.start : at.stop - rows.start]
        yield place, at, chunks.encode_as(source.identity.record, logits, of, check=False), logits


def teacher_renderer(data: Dataset, source: Source, workers: int | None = None) -> Renderer:
    """Images as the teacher wants them."""
    identity = source.identity
    shown, device = identity.teacher, source.teacher.device
    return Renderer(data, shown.input_size, device, identity.views.policy, workers, shown.interpolation)


@dataclass(eq=False)
class _Lot:
    """A shard under way: where it is spooled, its view parameters, and whether another build has committed it."""

    shard: Shard
    spool: Spool
    start: int
    parameters: ViewParameters
    gone: bool = False


@dataclass(eq=False)
class _Builder:
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
        under_way: deque[_Copy] = deque()
        for place, at, records, logits in answers(
            self.source, self._renderer(data), labels, [lot.parameters for lot in lots], [lot.start for lot in lots],
            shards[0].rows, self.batch, lambda place: lots[place].gone,
        ):  # fmt: skip
            lot = lots[place]
            sums = lot.shard.store.carries_tail_sums(lot.shard.view)
            copy = _Copy(records, logits, tail_distribution(logits, records) if sums else None)
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

    def _spool(self, lot: _Lot, at: range, copy: _Copy) -> None:
        found = copy.arrays()
        finite, sums = found.pop(_FINITE), found.pop(_SUMS, None)
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


_FINITE, _SUMS = "_finite", "_sums"


class _Copy:
    """A batch's answers on their way to the host: only records cross the bus, and nobody waits for them yet."""

    def __init__(self, records: Records, logits: torch.Tensor, sums: torch.Tensor | None) -> None:
        found = {**chunks.as_tensors(records), _FINITE: torch.isfinite(logits).all(1)}
        if sums is not None:
            found[_SUMS] = sums
        self._event = torch.cuda.Event() if logits.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is None:
            self._host = {name: tensor.cpu() for name, tensor in found.items()}
        else:
            self._host = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in found.items()
            }
            self._event.record()

    def wait(self) -> None:
        """Until it is there."""
        if self._event is not None:
            self._event.synchronize()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By name, once it is there."""
        self.wait()
        # Pinned memory is for the way only.
        return {name: t.numpy() if self._event is None else t.numpy().copy() for name, t in self._host.items()}


def _require_place(path: Path) -> None:
    """InputError where no cache can be made or gone on with, before the teacher is asked for anything."""
    require_folder(path)
    folder = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not folder.is_dir():
        raise InputError(f"{folder} is a file where a folder is needed: give another --out or KDCACHE_HOME")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written: give another --out or KDCACHE_HOME")
    if folder == path and not (path / "identity.json").exists() and any(p.name != "scratch" for p in path.iterdir()):
        raise InputError(f"{path} is not empty and no cache: give another --out")


def _missing(path: Path, source: Source, views: int) -> list[Shard]:
    """The shards still to compute: the evaluation split first, then view after view."""
    if (path / "identity.json").exists():
        cache = Cache(path)
        cache.identity.require(source.identity, str(path))
        stores = cache.train, cache.evaluation
    else:
        identity = source.identity
        stores = (
            SplitStore(path, "train", identity),
            SplitStore(path, "eval", identity),
        )
    train, evaluation = stores
    todo = []
    for store, count in ((evaluation, 1), (train, views)):
        done = store.committed()
        todo += [
            Shard(store, v, store.rows(p)) for v in range(count) for p in range(store.parts) if p not in done.get(v, ())
        ]
    return todo


def _compiled(source: Source, config: BuildConfig, batch: int, say: Callable[[str], None]) -> Source:
    """With a compiled teacher where that was asked for, or on CUDA for so many records.

    Of the data's usual number of views, not of what is left: its logits differ from others in their last bits, so
    ranks, and builds that go on with a cache, have to choose alike.
    """
    records = len(source.train) * defaults_for(source.train).views
    by_default = source.teacher.device.type == "cuda" and records >= _WORTH_COMPILING
    if not (by_default if config.compile is None else config.compile):
        return source
    say(f"compiling {source.identity.teacher.architecture}")
    try:
        return replace(source, teacher=source.teacher.compile(batch))
    except InputError as e:
        if config.compile:
            raise
        say(f"note: {e}")
        return source


def _probe(
    source: Source, config: BuildConfig, batch: int, images: int, renderer: Renderer, say: Callable[[str], None]
) -> tuple[float, float]:
    """The teacher's images/s and bytes a record, from seeded images without augmentation.

    InputError where its answers give away that the cache would be wrong, as suspicions.py has it.
    """
    data, teacher, record = source.train, source.teacher, source.identity.record
    labels = source.train_labels[:, :1].ravel()
    ids, first = np.unique(labels, return_index=True)
    index = suspicions.choose(labels, len(data), suspicions.count_of(len(ids), images))
    batches = [index[i : i + batch] for i in range(0, len(index), batch)]
    rendered = renderer.batches(evaluation_view(data.sizes, whole=data.in_memory), batches)
    timed = list(islice(rendered, -(-_TIMED // batch)))
    suspicions.require_steady(teacher.logits, teacher.model, timed[0], source.identity.teacher.numeric)
    start = time.monotonic()
    answered = [teacher.logits(pixels) for pixels in timed]
    answered = [logits.cpu() for logits in answered]
    rate = sum(map(len, answered)) / (time.monotonic() - start)
    with Progress("probe", len(index) - sum(map(len, answered)), "images") as progress:
        for pixels in rendered:
            answered.append(teacher.logits(pixels).cpu())
            progress.advance(len(pixels))
    logits = torch.cat(answered)
    names = {int(i): data.class_names[at] for i, at in zip(ids, data.labels[first, :1].ravel(), strict=True)}
    for note in suspicions.examine(logits, index, labels[index] if names else labels, names, config.allow_low_accuracy):
        say(f"note: {note}")
    some = slice(None, None, -(-len(index) // _TIMED))
    few = torch.from_numpy(source.train_labels[index][some])
    encoded = chunks.as_arrays(chunks.encode_as(record, logits[some], few))
    specs = chunks.record_arrays(record, len(few), len(few))
    record_bytes = sum(len(chunks.encode_part(spec, 0, encoded[spec.name])) for spec in specs) / len(few)
    return rate, record_bytes


def _class_map(
    data: Dataset, class_map: str | None, teacher: Teacher, say: Callable[[str], None]
) -> tuple[Teacher, NDArray[np.int64], str | None]:
    """The teacher that answers for the data's labels; its class id for each of the dataset's; the map's digest."""
    own = np.arange(len(data.class_names))
    if class_map and len(own):
        groups = classmap.map_classes(data.class_names, class_map, teacher.class_names, teacher.classes)
        if classmap.is_merged(groups):
            say(
                f"note: {class_map} makes one class of several of the teacher's, so students have the data's {len(own)}"
            )
            teacher.model.register_forward_hook(lambda _, __, logits: classmap.merged(logits, groups))
            return replace(teacher, classes=len(own), class_names=data.class_names), own, classmap.digest(groups)
        if both := classmap.shared(data.class_names, groups):
            say(f"note: by {class_map}, {', '.join(both)} are one class of the teacher's, and so of the students'")
        return teacher, np.array(groups, np.int64).reshape(-1), classmap.digest(groups)
    if len(own) not in (0, teacher.classes):
        raise InputError(
            f"the teacher has {teacher.classes} classes, {data.name} has {len(own)}: "
            "give --class-map auto (by class names) or a file"
        )
    return teacher, own, None


def describe_data(data: Dataset, full: bool) -> DataIdentity:
    """What an identity says of one split."""
    return DataIdentity(
        name=data.name,
        split="train" if data.split == "train" else "eval",
        samples=len(data),
        fingerprint=data.fingerprint(full),
        full_contents=full,
        files=not data.in_memory,
    )


def _way(teacher: Teacher) -> str:
    """How logits are computed, as far as that changes their last bits."""
    return teacher.device.type + ("" if teacher.compiled is None else "-compiled")
