"""Stage 1: the teacher runs once over the evaluation split and V views, and what a student needs is stored."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from kdcache.cache.errors import InputError, MismatchError
from kdcache.cache.files import make_folder
from kdcache.cache.identity import id_dtype
from kdcache.cache.registry.bucket import BucketCache
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache, restore_identity
from kdcache.cache.store.layout import record_arrays
from kdcache.cache.store.publish import require_folder
from kdcache.pipeline.build import suspicions
from kdcache.pipeline.build.answers import teacher_renderer, teacher_top1
from kdcache.pipeline.build.builder import Builder, Shard, missing_shards
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.plan import BuildPlan, plan_build
from kdcache.pipeline.build.source import Say, Source, open_source
from kdcache.pipeline.build.spool import SPOOL_SECONDS, WAITING_SECONDS, clear, spool_folder
from kdcache.pipeline.process import provenance
from kdcache.pipeline.process.progress import Progress, duration, percent, size
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.views.render import Renderer

_TIMED = 512  # images of the probe, at most
_LOST_AT_MOST = 60.0


@dataclass(frozen=True)
class BuildResult:
    """path, key and size (bytes) of the cache; images the teacher answered for in this build (0: none had to be).

    where: the address at which all views are read, if they do not all lie at the path.
    """

    path: Path
    key: str
    views: int
    bytes: int
    teacher_images: int
    seconds: float
    teacher_top1: float | None
    where: str | None = None


def build(config: BuildConfig, say: Say = print, source: Source | None = None) -> BuildResult:
    """Build, extend or complete the cache that `config` describes, from `source` where that is open already."""
    return carry_out(plan_build(config, source or open_source(config, say)), say)


def carry_out(
    plan: BuildPlan,
    say: Say = print,
    begun: Callable[[], object] = lambda: None,
    bucket: BucketCache | None = None,
) -> BuildResult:
    """Build, extend or complete the cache of a plan; a complete one is only named.

    begun: called once the cache is there, before anything is computed for it. bucket: the same cache in a bucket, where
    it is built instead of in the plan's folder.

    Any number of builds of one cache, on machines that share its folder or a bucket, share the work; each returns when
    all of it is done. Killed at any moment, a later one goes on where it was; on the same machine it loses no more
    teacher time than `SPOOL_SECONDS` and a batch, and `WAITING_SECONDS` while the disk does not keep up.

    Memory does not depend on how many samples and views there are: beside the dataset and the teacher, it is the
    records of one part (twice, while they are compressed) for each view under way, one for in-memory data and
    `views_per_decode` for files, `WAITING_JOBS` batches of records, and the pixels that `Renderer` states.
    """
    start = time.monotonic()
    if bucket is None and restore_identity(plan.path, plan.identity):
        say(f"note: the identity in {plan.path} was missing or damaged, and is written again")
    todo = missing_shards(plan, bucket)
    spools, where = spool_folder(plan.path, plan.key), str(plan.path) if bucket is None else bucket.where
    if not todo and (cache := bucket or Cache(plan.path)).finished:
        _require_same_data(plan, cache)
        clear(spools, cache)
        cache.tidy()
        begun()
        say(f"cache {plan.key[:12]} has all of {plan.views} views already: nothing to compute ({where})")
        return _result(plan, cache, 0, start)
    _require_buildable(plan)
    source, images = plan.source, sum(len(shard.rows) for shard in todo)
    say(
        f"cache {plan.key[:12]}: {plan.identity.teacher.architecture} on {plan.identity.data.name}, "
        f"{plan.identity.views.policy}, {plan.views} views of {len(source.train):,} samples"
    )
    renderer = None if plan.elsewhere else teacher_renderer(source.train, source, plan.workers)
    if images:
        _foretell(plan, images, len(todo), renderer, where, say)
        plan = plan if plan.elsewhere else compiled(plan, say)
    cache = _made(plan) if bucket is None else bucket.begin()
    begun()
    computed = _fill(plan, cache, todo, images, spools, renderer, say)
    clear(spools, cache)
    result = _result(plan, cache, computed, start)
    share = f", {computed:,} of {images:,} images by this build" if computed < images else ""
    top1 = result.teacher_top1
    told = "" if top1 is None else f"; teacher's top-1 on the evaluation split {percent(top1)}"
    say(f"done in {duration(result.seconds)}: {size(result.bytes)}{share}{told}")
    return result


def _made(plan: BuildPlan) -> Cache:
    make_folder(plan.path)
    return Cache.create(plan.path, plan.identity)


def _fill(
    plan: BuildPlan, cache: Cache, todo: list[Shard], images: int, spools: Path, renderer: Renderer | None, say: Say
) -> int:
    """Commit labels, sizes and the shards that are missing, as one of the builders; how many images were computed."""
    teacher = plan.source.teacher
    writer = provenance.writer(str(teacher.device), teacher.compiled is not None)
    with cache.writing(say) as leases:
        if others := leases.others():
            say(f"sharing the work with {', '.join(map(str, others))}")
        for split in plan.source.splits(cache):
            split.store.write_labels(split.labels.astype(id_dtype(teacher.classes)), writer)
            split.store.write_sizes(split.data.sizes, writer)
        with Progress("build", images, "images") as progress:
            if plan.elsewhere:
                return plan.elsewhere.builder(plan, cache, leases, spools, writer, progress, say).build(todo)
            renderers = {"train": renderer} if renderer else {}
            return Builder(plan, cache, leases, spools, writer, progress, say, renderers).build(todo)


def _result(plan: BuildPlan, cache: Cache, computed: int, start: float) -> BuildResult:
    top1 = teacher_top1(cache)
    seconds = time.monotonic() - start
    return BuildResult(plan.path, plan.key, plan.views, cache.size(), computed, seconds, top1)


def _require_same_data(plan: BuildPlan, cache: Cache) -> None:
    """MismatchError unless the cache has the labels and the image sizes of the plan's data."""
    for split in plan.source.splits(cache):
        split.store.require_labels(split.labels)
        split.store.require_sizes(split.data.sizes)


def _require_buildable(plan: BuildPlan) -> None:
    """MismatchError or InputError where the build cannot be done, before the teacher is asked for anything."""
    if found := plan.identity.teacher.differences(plan.source.teacher.identity, theirs="this teacher has"):
        raise MismatchError(f"cache {plan.key[:12]} is another teacher's: {'; '.join(found)}")
    _require_place(plan.path)
    samples = len(plan.source.train)
    if plan.batch > samples:
        raise InputError(f"--batch-size {plan.batch} is larger than the data, {samples:,} images: lower it")


def _require_place(path: Path) -> None:
    """InputError where no cache can be made or gone on with."""
    require_folder(path)
    folder = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not folder.is_dir():
        raise InputError(f"{folder} is a file where a folder is needed: give another --out or KDCACHE_HOME")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written: give another --out or KDCACHE_HOME")
    if folder == path and not (path / "identity.json").exists() and any(p.name != "scratch" for p in path.iterdir()):
        raise InputError(f"{path} is not empty and is no cache: give another --out")


def _foretell(plan: BuildPlan, images: int, shards: int, renderer: Renderer | None, where: str, say: Say) -> None:
    """Try the teacher out and say what the build will take; InputError where its answers are suspicious."""
    if plan.elsewhere:
        (rate, record_bytes), device = plan.elsewhere.probe(plan, images, say), plan.elsewhere.where
    else:
        renderer = renderer or teacher_renderer(plan.source.train, plan.source, plan.workers)
        (rate, record_bytes), device = probe(plan, images, renderer, say), str(plan.source.teacher.device)
    say(
        f"to compute: {images:,} records on {device}, about {duration(images / rate)} at "
        f"{rate:,.0f} images/s and {size(images * record_bytes)} ({record_bytes:.1f} bytes a record), in {where}"
    )
    if plan.batch / rate > _LOST_AT_MOST - SPOOL_SECONDS - WAITING_SECONDS:
        lost = duration(plan.batch / rate)
        say(f"note: a build that is killed loses up to a batch, here {lost}: lower --batch-size")
    if (world := this_rank().world) > shards:
        say(f"note: {world} processes for {shards} shards: {world - shards} of them have nothing to compute")


def compiled(plan: BuildPlan, say: Say) -> BuildPlan:
    """The same plan with a compiled teacher, where that is planned and can be done."""
    if plan.compile == "no":
        return plan
    say(f"compiling {plan.identity.teacher.architecture}")
    try:
        teacher = plan.source.teacher.compile(plan.batch)
    except InputError as e:
        if plan.compile == "must":
            raise
        say(f"note: {e}")
        return plan
    return replace(plan, source=replace(plan.source, teacher=teacher))


def probe(plan: BuildPlan, images: int, renderer: Renderer, say: Say) -> tuple[float, float]:
    """The teacher's images/s and the bytes of a record, from seeded images without augmentation.

    InputError where the teacher's answers give away that the cache would be wrong (suspicions.py).
    """
    source, teacher, batch = plan.source, plan.source.teacher, plan.batch
    trial = suspicions.choose_trial(source, lambda classes: suspicions.count_of(classes, images))
    index, rendered = trial.samples, trial.rendered(source, renderer, batch)
    timed = list(islice(rendered, -(-_TIMED // batch)))
    suspicions.require_steady(teacher.logits, teacher.model, timed[0], plan.identity.teacher.numeric)
    start = time.monotonic()
    answered = [teacher.logits(pixels) for pixels in timed]
    answered = [logits.cpu() for logits in answered]
    rate = sum(map(len, answered)) / (time.monotonic() - start)
    with Progress("probe", len(index) - sum(map(len, answered)), "images") as progress:
        for pixels in rendered:
            answered.append(teacher.logits(pixels).cpu())
            progress.advance(len(pixels))
    logits = torch.cat(answered)
    for note in suspicions.examine(logits, index, trial.labels, trial.names, plan.allow_low_accuracy):
        say(f"note: {note}")
    some = slice(None, None, -(-len(index) // _TIMED))
    return rate, _record_bytes(source, logits[some], torch.from_numpy(source.train_labels[index][some]))


def _record_bytes(source: Source, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The bytes of a record as it is stored, from some logits [B, C] with labels [B, L]."""
    record = source.identity.record
    encoded = chunks.as_arrays(chunks.encode_as(record, logits, labels))
    specs = record_arrays(record, len(labels), len(labels))
    return sum(len(chunks.encode_part(spec, 0, encoded[spec.name])) for spec in specs) / len(labels)
