"""Stage 1: the teacher runs once over the evaluation split and V views, and what a student needs is stored."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError, MismatchError
from kdcache.cache.files import make_folder
from kdcache.cache.home import caches_folder
from kdcache.cache.identity import id_dtype
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import record_arrays
from kdcache.cache.store.publish import SplitStore, require_folder
from kdcache.pipeline.build import suspicions
from kdcache.pipeline.build.answers import teacher_renderer, teacher_top1
from kdcache.pipeline.build.builder import Builder, missing_shards
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Source, open_source
from kdcache.pipeline.build.spool import SPOOL_SECONDS, WAITING_SECONDS, clear, spool_folder
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.data.defaults import defaults_for
from kdcache.pipeline.process import provenance
from kdcache.pipeline.process.progress import Progress, duration, percent, size
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.views.policy import evaluation_view
from kdcache.pipeline.views.render import Renderer

_TIMED = 512  # images of the probe, at most
_LOST_AT_MOST = 60.0
_WORTH_COMPILING = 1_000_000  # records of a cache


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
    todo = missing_shards(path, source, views)
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
    writer = provenance.writer(str(source.teacher.device), source.teacher.compiled is not None)
    with cache.writing(say) as leases:
        if others := leases.others():
            say(f"sharing the work with {', '.join(map(str, others))}")
        for store, data, labels in _splits(cache, source):
            store.write_labels(labels.astype(id_dtype(source.teacher.classes)), writer)
            store.write_sizes(data.sizes, writer)
        with Progress("build", images, "images") as progress:
            builder = Builder(source, config, cache, leases, batch, spool, writer, progress, say, {"train": renderer})
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
    specs = record_arrays(record, len(few), len(few))
    record_bytes = sum(len(chunks.encode_part(spec, 0, encoded[spec.name])) for spec in specs) / len(few)
    return rate, record_bytes
