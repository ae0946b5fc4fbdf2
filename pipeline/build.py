"""Stage 1: the teacher runs once over the evaluation split and V views, and what a student needs is stored."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from kdcache import __version__
from kdcache.cache import arrays
from kdcache.cache.errors import InputError
from kdcache.cache.files import names, replace_file, sha256
from kdcache.cache.home import caches_folder, home
from kdcache.cache.identity import DataIdentity, Identity, RecordIdentity, ViewsIdentity
from kdcache.cache.leases import Leases
from kdcache.cache.records import TEMPERATURES, Precision, Records, default_precision, tail_distribution
from kdcache.cache.store import Cache, SplitStore, require_folder, shard_name
from kdcache.pipeline.classmap import map_labels
from kdcache.pipeline.datasets import Dataset, open_data
from kdcache.pipeline.defaults import DATA, defaults_for, stored_classes
from kdcache.pipeline.progress import Progress, duration, size
from kdcache.pipeline.render import RENDERER, Renderer
from kdcache.pipeline.teachers import Teacher, load_teacher, pick_device
from kdcache.pipeline.views import ViewParameters, check_policy, draw, evaluation_view

PART = 262_144
_PROBE = 512
_SPOOL_SECONDS = 20.0
_LOST_AT_MOST = 60.0
_POLL_SECONDS = 0.5


Shard = tuple[SplitStore, int, range]  # of a view, the rows of a part


@dataclass(frozen=True)
class BuildConfig:
    """What to build. None means the default for the dataset's kind (defaults.py)."""

    teacher: str
    weights: str | None = None
    data: str = DATA
    augment: str | None = None
    views: int | None = None
    topk: int | None = None
    temperatures: tuple[float, ...] = TEMPERATURES
    precision: Precision | None = None
    tail_std: bool = False
    class_map: str | None = None
    unlabelled: bool = False
    out: str | None = None
    seed: int = 0
    batch_size: int | None = None
    device: str | None = None
    amp: str | None = None
    workers: int | None = None
    allow_low_accuracy: bool = False
    full_fingerprint: bool = False
    part: int = PART


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
    teacher = load_teacher(config.teacher, data, device, weights=config.weights, amp=config.amp)
    if teacher.classes < 2:
        raise InputError(f"the teacher has {teacher.classes} classes, at least 2 are needed: is {config.data} right?")
    check_options(config, teacher.classes)
    to_teacher = _class_map(data, config.class_map, teacher)
    labels = [to_teacher[split.labels] for split in (data, evaluation)]
    mapped = not np.array_equal(to_teacher, np.arange(len(to_teacher)))
    policy = check_policy(config.augment or defaults_for(data).augment)
    if data.images is None and "crop" in policy.split(","):
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
        class_map=sha256(to_teacher.astype("<i8").tobytes()) if mapped else None,
        part=config.part,
    )
    largest = max(spec.chunk_bytes for spec in arrays.record_arrays(identity.record, len(data), config.part))
    if largest > arrays.MAX_CHUNK_BYTES:
        raise InputError(
            f"a shard would hold {size(largest)} in one array, the most is {size(arrays.MAX_CHUNK_BYTES)}: "
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


def build(config: BuildConfig, say: Callable[[str], None] = print, source: Source | None = None) -> BuildResult:
    """Build, extend or complete the cache that `config` describes; complete ones are only named.

    Any number of builds of one cache, on machines that share its folder, share the work; each returns when all of it
    is done. Killed at any moment, a later one goes on where it was; on the same machine it loses no more teacher time
    than `_SPOOL_SECONDS` and a batch.
    """
    start = time.monotonic()
    source = source or open_source(config, say)
    views = config.views if config.views is not None else defaults_for(source.train).views
    if views < 1:
        raise InputError(f"--views {views}: at least one view is needed")
    key = source.identity.key
    path = Path(config.out) if config.out else caches_folder() / key
    spool = _spool_folder(path, key)
    todo = _missing(path, source, views)
    if not todo and (cache := Cache(path)).finished:
        for store, data, labels in _splits(cache, source):
            store.require_labels(labels)
            store.require_sizes(data.sizes)
        _clear(spool, cache)
        cache.tidy()
        say(f"cache {key[:12]} has all of {views} views already: nothing to compute ({path})")
        return BuildResult(path, key, views, cache.size(), 0, time.monotonic() - start, teacher_top1(cache))
    _require_place(path)
    batch = config.batch_size or defaults_for(source.train).build_batch
    images = sum(len(rows) for _, _, rows in todo)
    say(
        f"cache {key[:12]}: {source.identity.teacher.architecture} on {source.identity.data.name}, "
        f"{source.identity.views.policy}, {views} views of {len(source.train):,} samples"
    )
    if images:
        rate, record_bytes = _probe(source, config, batch)
        say(
            f"to compute: {images:,} records on {source.teacher.device}, about {duration(images / rate)} at "
            f"{rate:,.0f} images/s and {size(images * record_bytes)} ({record_bytes:.1f} bytes a record), in {path}"
        )
        if batch / rate > _LOST_AT_MOST - _SPOOL_SECONDS:
            say(f"note: a build that is killed loses up to a batch, here {duration(batch / rate)}: lower --batch-size")
    path.mkdir(parents=True, exist_ok=True)
    cache = Cache.create(path, source.identity)
    # From here on in the stores whose scratch folder the lease is for.
    todo = [(cache.train if store.split == "train" else cache.evaluation, view, rows) for store, view, rows in todo]
    writer = _writer(source.teacher)
    with cache.writing(say) as leases:
        if others := leases.others():
            say(f"sharing the work with {', '.join(map(str, others))}")
        for store, data, labels in _splits(cache, source):
            store.write_labels(labels.astype(arrays.id_dtype(source.teacher.classes)), writer)
            store.write_sizes(data.sizes, writer)
        with Progress("build", images, "images") as progress:
            computed = _build_shards(source, config, cache, leases, todo, batch, spool, writer, progress, say)
    _clear(spool, cache)
    top1 = teacher_top1(cache)
    seconds = time.monotonic() - start
    share = f", {computed:,} of {images:,} images by this build" if computed < images else ""
    say(
        f"done in {duration(seconds)}: {size(cache.size())}{share}"
        + (f"; teacher's top-1 on the evaluation split {100 * top1:.2f}" if top1 is not None else "")
    )
    return BuildResult(path, key, views, cache.size(), computed, seconds, top1)


def _splits(cache: Cache, source: Source) -> Iterator[tuple[SplitStore, Dataset, NDArray[np.int64]]]:
    yield cache.train, source.train, source.train_labels
    yield cache.evaluation, source.evaluation, source.evaluation_labels


def teacher_top1(cache: Cache) -> float | None:
    """The teacher's accuracy (0..1) on the evaluation split, from its records; None without labels."""
    records = cache.read_evaluation()
    if not records.labels.shape[1]:
        return None
    return float((records.predictions() == records.labels[:, 0].long()).float().mean())


def view_parameters(data: Dataset, identity: Identity, view: int, rows: range) -> ViewParameters:
    """The parameters of a view's samples, or of the evaluation view where `data` is that split."""
    sizes = data.sizes[rows.start : rows.stop]
    if data.split == "eval":
        return evaluation_view(sizes, whole=data.images is not None)
    return draw(identity.views.policy, identity.views.seed, view, rows, sizes)


def record_batches(
    source: Source, data: Dataset, labels: NDArray[np.int64], view: int, rows: range, batch: int, workers: int | None
) -> Iterator[tuple[Records, torch.Tensor]]:
    """The live teacher's records and logits [B, C] for rows of a view, in the batches that a build takes.

    `rows` starts on a batch boundary of its shard; a short last batch is filled up, because logits of small
    batches can differ in the last bit.
    """
    record, teacher = source.identity.record, source.teacher
    parameters = view_parameters(data, source.identity, view, rows)
    renderer = teacher_renderer(data, source, workers)
    batches = [np.arange(i, min(i + batch, rows.stop)) for i in range(rows.start, rows.stop, batch)]
    full = [np.pad(b, (0, batch - len(b)), mode="edge") for b in batches]
    for index, images in zip(batches, renderer.batches(parameters, full, first=rows.start), strict=True):
        logits = teacher.logits(images)[: len(index)]
        y = torch.from_numpy(labels[index]).to(logits.device)
        yield arrays.encode_as(record, logits, y), logits


def teacher_renderer(data: Dataset, source: Source, workers: int | None = None) -> Renderer:
    """Images as the teacher wants them."""
    identity = source.identity
    return Renderer(data, identity.teacher.input_size, source.teacher.device, identity.views.policy, workers)


def _build_shards(
    source: Source,
    config: BuildConfig,
    cache: Cache,
    leases: Leases,
    todo: list[Shard],
    batch: int,
    spools: Path,
    writer: Mapping[str, str],
    progress: Progress,
    say: Callable[[str], None],
) -> int:
    """See to it that all shards are committed: compute those that nobody else does, then wait for the others.

    How many images the teacher answered for here.
    """
    computed, told = 0, ""
    while True:
        committed = {}
        for store in (cache.train, cache.evaluation):
            store.refresh()
            committed[store.split] = store.committed()
        left = [(s, v, rows) for s, v, rows in todo if rows.start // s.part not in committed[s.split].get(v, ())]
        progress.advance(sum(len(rows) for _, _, rows in todo) - sum(len(rows) for _, _, rows in left))
        todo = left
        cache.write_prior(writer)
        if not todo:
            return computed
        shard = next((s for s in todo if leases.take(_lease(*s))), None)
        if shard is None:
            if (now := _waiting(leases, todo)) not in (told, ""):
                told = now
                say(told)
            time.sleep(_POLL_SECONDS)
            continue
        store, view, rows = shard
        name = shard_name(view, rows.start // store.part)
        try:
            store.finish(name)  # decided by a builder that died before it was committed
            if not store.has(name):
                computed += _build_shard(source, config, store, view, rows, batch, spools, writer, progress, leases)
                todo.remove(shard)
        finally:
            leases.release(_lease(*shard))


def _lease(store: SplitStore, view: int, rows: range) -> str:
    return ("eval-" if store.split == "eval" else "") + shard_name(view, rows.start // store.part)


def _waiting(leases: Leases, todo: list[Shard]) -> str:
    holders = {str(holder) for shard in todo if (holder := leases.holder(_lease(*shard)))}
    return f"waiting for the last {len(todo)} shards, at {', '.join(sorted(holders))}" if holders else ""


def _build_shard(
    source: Source,
    config: BuildConfig,
    store: SplitStore,
    view: int,
    rows: range,
    batch: int,
    spools: Path,
    writer: Mapping[str, str],
    progress: Progress,
    leases: Leases,
) -> int:
    """Compute and commit one shard; how many images the teacher answered for."""
    data, labels = (
        (source.evaluation, source.evaluation_labels) if store.split == "eval" else (source.train, source.train_labels)
    )
    part = rows.start // store.part
    lease, name = _lease(store, view, rows), shard_name(view, part)
    keeps_sums = store.carries_tail_sums(view)
    with Spool(spools / f"{lease}-b{batch}", len(rows)) as spool:
        first = at = rows.start + spool.rows
        progress.advance(spool.rows)
        for records, logits in record_batches(
            source, data, labels, view, range(first, rows.stop), batch, config.workers
        ):
            sums = tail_distribution(logits, records).cpu().numpy() if keeps_sums else None
            spool.add(arrays.as_arrays(records), sums)
            at += len(records)
            progress.advance(len(records), f"(view {view}, {data.split})")
            if leases.lost(lease) and store.has(name):
                break
        if store.has(name):
            progress.advance(rows.stop - at)  # by the build that took over the lease
        else:
            digest = view_parameters(data, source.identity, view, rows).digest()
            store.write_shard(view, part, spool.arrays(), digest, writer, spool.sums)
        spool.remove()
    return at - first


class Spool:
    """Encoded batches of one shard under way, synced to local disk now and then until the shard is committed.

    Of several builders of one shard (one was stopped and woke up), each has a folder of its own. A builder that is
    killed leaves its lock, and with it its folder, to the next. Use with `with`.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self._total = total
        for slot in itertools.count():
            self._folder = folder.with_name(f"{folder.name}-{slot}")
            with suppress(Timeout):
                self._lock = _locked(self._folder)
                break
        self._blocks: list[dict[str, NDArray[Any]]] = []
        self._unsynced: list[dict[str, NDArray[Any]]] = []
        self._synced_at = time.monotonic()
        self.sums: NDArray[np.float64] | None = None
        self.rows = 0
        self._load()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def add(self, block: dict[str, NDArray[Any]], sums: NDArray[np.float64] | None) -> None:
        """Append a batch's arrays by name, and its tail sums [T, C]."""
        self._unsynced.append(block)
        # Summed batch by batch, so that where the spool was cut does not change a bit.
        if sums is not None:
            self.sums = sums if self.sums is None else self.sums + sums
        if time.monotonic() - self._synced_at > _SPOOL_SECONDS:
            self._sync()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All rows by array name."""
        blocks = self._blocks + self._unsynced
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _sync(self) -> None:
        block = {name: np.concatenate([b[name] for b in self._unsynced]) for name in self._unsynced[0]}
        stop = self.rows + len(block["gaps"])
        content = io.BytesIO()
        extra = {} if self.sums is None else {"_sums": self.sums}
        np.savez(content, allow_pickle=False, **block, **extra)
        data = content.getvalue()
        replace_file(self._folder / f"{self.rows:012d}-{stop:012d}.block", sha256(data).encode() + data)
        self._blocks.append(block)
        self._unsynced, self.rows, self._synced_at = [], stop, time.monotonic()

    def _load(self) -> None:
        for path in sorted(self._folder.glob(f"{'[0-9]' * 12}-{'[0-9]' * 12}.block")):
            start, stop = map(int, path.stem.split("-"))
            content = path.read_bytes()
            digest, data = content[:64], content[64:]
            # Damaged, or beyond a damaged one: these rows are computed again.
            if start != self.rows or stop > self._total or sha256(data).encode() != digest:
                continue
            with np.load(io.BytesIO(data), allow_pickle=False) as f:
                block = {name: f[name] for name in f.files}
            self.sums = block.pop("_sums", self.sums)
            self._blocks.append(block)
            self.rows = stop


def _locked(folder: Path) -> FileLock:
    """A lock on a folder that is there, or Timeout."""
    while True:
        with suppress(FileNotFoundError):  # another builder has just cleared the folder away
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock", timeout=0)
            lock.acquire()
            return lock


def _spool_folder(path: Path, key: str) -> Path:
    """For builds of this cache in this place: one of the same key can go on elsewhere."""
    return home() / "spool" / f"{key[:16]}-{sha256(os.fsencode(path.resolve()))[:16]}"


def _clear(spool: Path, cache: Cache) -> None:
    """Remove what builds have left in the spool for shards that are committed, unless one is at work on them."""
    for name in names(spool):
        store = cache.evaluation if name.startswith("eval-") else cache.train
        if store.has(name.removeprefix("eval-").rpartition("-b")[0]):
            with suppress(Timeout, FileNotFoundError), FileLock(spool / name / "lock", timeout=0):
                shutil.rmtree(spool / name, ignore_errors=True)
    with suppress(OSError):  # missing, or not empty
        spool.rmdir()


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
            (store, v, store.rows(p)) for v in range(count) for p in range(store.parts) if p not in done.get(v, ())
        ]
    return todo


def _probe(source: Source, config: BuildConfig, batch: int) -> tuple[float, float]:
    """The teacher's images/s and bytes a record, from up to 512 seeded random images without augmentation.

    InputError where its accuracy on them is near chance: classes in another order are the commonest silent error.
    """
    data, identity = source.train, source.identity
    shuffled = np.argsort(np.random.Philox(key=7).random_raw(len(data)), kind="stable")
    index = np.sort(shuffled[:_PROBE]).astype(np.int64)
    batches = [index[i : i + batch] for i in range(0, len(index), batch)]
    parameters = evaluation_view(data.sizes, whole=data.images is not None)
    rendered = list(teacher_renderer(data, source, config.workers).batches(parameters, batches))
    source.teacher.logits(rendered[0][:2])
    start = time.monotonic()
    logits = torch.cat([source.teacher.logits(images) for images in rendered]).cpu()
    rate = len(index) / (time.monotonic() - start)
    labels = source.train_labels[index]
    record = identity.record
    encoded = arrays.as_arrays(arrays.encode_as(record, logits, torch.from_numpy(labels)))
    specs = arrays.record_arrays(record, len(index), len(index))
    record_bytes = sum(len(arrays.encode_part(spec, 0, encoded[spec.name])) for spec in specs) / len(index)
    if labels.shape[1] and not config.allow_low_accuracy:
        accuracy = float((logits.argmax(1).numpy() == labels[:, 0]).mean())
        chance = 1 / len(np.unique(source.train_labels[:, 0]))
        limit = chance + 4 * (chance * (1 - chance) / len(index)) ** 0.5
        if accuracy < limit:
            raise InputError(
                f"the teacher is right on {100 * accuracy:.1f}% of {len(index)} training images, chance is "
                f"{100 * chance:.1f}%: are its classes in another order (--class-map), or its weights untrained? "
                "--allow-low-accuracy builds all the same"
            )
    return rate, record_bytes


def _class_map(data: Dataset, class_map: str | None, teacher: Teacher) -> NDArray[np.int64]:
    """The teacher's class id for each of the dataset's."""
    own = np.arange(len(data.class_names))
    if class_map and len(own):
        return map_labels(own[:, None], data.class_names, class_map, teacher.class_names, teacher.classes)[:, 0]
    if len(own) not in (0, teacher.classes):
        raise InputError(
            f"the teacher has {teacher.classes} classes, {data.name} has {len(own)}: "
            "give --class-map auto (by class names) or a file"
        )
    return own


def describe_data(data: Dataset, full: bool) -> DataIdentity:
    """What an identity says of one split."""
    return DataIdentity(
        name=data.name,
        split="train" if data.split == "train" else "eval",
        samples=len(data),
        fingerprint=data.fingerprint(full),
        full_contents=full,
        files=data.images is None,
    )


def _writer(teacher: Teacher) -> dict[str, str]:
    return {
        "kdcache": __version__,
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "device": str(teacher.device),
        "host": socket.gethostname(),
        "process": str(os.getpid()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
