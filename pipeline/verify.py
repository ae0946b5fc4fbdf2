"""Is a cache what it says it is? Complete, undamaged, and what the live teacher answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import arrays
from kdcache.cache.errors import InputError, KdcacheError, MismatchError, NotFoundError
from kdcache.cache.records import TEMPERATURES, Records
from kdcache.cache.store import Cache, SplitStore, shard_name
from kdcache.pipeline.build import (
    BuildConfig,
    Source,
    describe_data,
    open_source,
    teacher_renderer,
    view_parameters,
)
from kdcache.pipeline.datasets import Dataset, open_data
from kdcache.pipeline.progress import Progress

# Mean total variation between stored and replayed distributions, by the teacher's numeric type.
TOLERANCE = {"float32": 0.002, "bf16": 0.02}
_BATCH = 128


@dataclass
class Report:
    """What was looked at, and every problem found: no problem is a pass."""

    views: tuple[int, ...] = ()
    shards: int = 0
    replayed: int = 0
    total_variation: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def verify(
    cache: Cache, source: Source | None = None, replay: int = 512, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Read every committed shard, check digests and values, and replay `replay` seeded random records a split.

    Without a source (data and live teacher) the contents are checked but not replayed.
    """
    cache = Cache(cache.path)  # with nothing in memory that was read before
    report = Report(views=cache.views)
    _try(report, cache.check_rest)
    _try(report, lambda: cache.prior)
    for store in (cache.evaluation, cache.train):
        committed = store.committed()
        _try(report, lambda s=store: s.labels)  # type: ignore[misc]
        if not committed:
            report.problems.append(f"{store.root}: nothing is committed: run kdcache build again")
        for view, parts in sorted(committed.items()):
            if missing := set(range(store.parts)) - parts:
                report.problems.append(
                    f"{store.root}: view {view} lacks parts {sorted(missing)}: run kdcache build again"
                )
            for part in sorted(parts):
                report.shards += 1
                _try(report, lambda s=store, v=view, p=part: s.check_shard(v, p))  # type: ignore[misc]
    if report.problems or source is None or not replay:
        return report
    try:
        _replay(cache, source, replay, report)
    except MismatchError as e:
        report.problems.append(str(e))
    return report


def _try(report: Report, check: Callable[[], object]) -> None:
    try:
        check()
    except KdcacheError as e:
        report.problems.append(str(e))


def _replay(cache: Cache, source: Source, count: int, report: Report) -> None:
    cache.identity.require(source.identity, str(cache.path))
    limit = TOLERANCE[cache.identity.teacher.numeric]
    distances = []
    plan = [(cache.evaluation, source.evaluation, source.evaluation_labels, 0)]
    chosen_views = sorted({cache.views[0], cache.views[len(cache.views) // 2], cache.views[-1]})
    plan += [(cache.train, source.train, source.train_labels, view) for view in chosen_views]
    total = sum(min(count, len(data)) for _, data, _, _ in plan)
    with Progress("replay", total, "records") as progress:
        for store, data, labels, view in plan:
            store.require_labels(labels)
            _same_parameters(store, data, source, view)
            raw = np.random.Philox(key=11 + view).random_raw(len(data))
            index = np.sort(np.argsort(raw, kind="stable")[:count]).astype(np.int64)
            stored = store.read(view, cache.prior)[torch.from_numpy(index)]
            live = _answer(source, data, labels, view, index, progress)
            distance = _total_variation(stored, live, cache.prior)
            distances.append(distance)
            report.replayed += len(index)
            if not distance <= limit:
                report.problems.append(
                    f"{store.root}: view {view} is not what the teacher answers now: mean total variation "
                    f"{distance:.4f}, at most {limit} is allowed"
                )
    report.total_variation = max(distances)


def _same_parameters(store: SplitStore, data: Dataset, source: Source, view: int) -> None:
    for part in range(store.parts):
        digest = view_parameters(data, source.identity, view, store.rows(part)).digest()
        if store.commit(shard_name(view, part)).parameters != digest:
            raise MismatchError(f"{store.root}: view {view}, part {part} was built with other view parameters")


def _answer(
    source: Source,
    data: Dataset,
    labels: NDArray[np.int64],
    view: int,
    index: NDArray[np.int64],
    progress: Progress,
) -> Records:
    """The live teacher's records of single samples, in full batches."""
    record = source.identity.record
    parameters = view_parameters(data, source.identity, view, range(len(data)))
    renderer = teacher_renderer(data, source)
    batches = [np.resize(index[i : i + _BATCH], _BATCH) for i in range(0, len(index), _BATCH)]
    logits = []
    for images in renderer.batches(parameters, batches):
        logits.append(source.teacher.logits(images).cpu())
        progress.advance(min(_BATCH, len(index) - _BATCH * (len(logits) - 1)))
    answered = torch.cat(logits)[: len(index)]
    return arrays.encode_as(record, answered, torch.from_numpy(labels[index]))


def _total_variation(a: Records, b: Records, prior: torch.Tensor | None) -> float:
    """Mean over records of half the L1 distance between the two distributions at temperature 1 (or the lowest)."""
    t = 1.0 if a.classes is None or 1.0 in a.temperatures else min(a.temperatures)
    p, q = (r.dense(t, "prior", prior) for r in (a, b))
    return float((p - q).abs().sum(1).mean() / 2)


def source_of(
    cache: Cache,
    data: str | None = None,
    weights: str | None = None,
    class_map: str | None = None,
    device: str | None = None,
) -> Source:
    """The data and the live teacher that the cache names; what differs from it is for verify to find.

    InputError, NotFoundError or MismatchError where there is no such teacher or data to ask.
    """
    i = cache.identity
    if data is None and i.data.name in ("imagenet", "imagefolder"):
        raise InputError(f"where are the images? give --data {i.data.name}:PATH, or --replay 0 to do without them")
    config = BuildConfig(
        teacher=i.teacher.network,
        weights=weights,
        data=data or i.data.name,
        augment=i.views.policy,
        topk=i.record.k,
        temperatures=i.record.temperatures or TEMPERATURES,
        precision=i.record.precision,
        tail_std=i.record.tail_std,
        class_map=class_map,
        unlabelled=i.record.labels == 0,
        seed=i.views.seed,
        device=device,
        amp="bf16" if i.teacher.numeric == "bf16" else None,
        full_fingerprint=i.data.full_contents,
        part=i.part,
    )
    try:
        return open_source(config)
    except NotFoundError:
        # Teachers are filed by their data: it is the data that is wrong where they differ from the cache's.
        found = describe_data(open_data(config.data, "train", unlabelled=config.unlabelled), i.data.full_contents)
        i.require(i.model_copy(update={"data": found}), str(cache.path))
        raise
