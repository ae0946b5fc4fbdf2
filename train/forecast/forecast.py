"""`kdcache plan`: hours, bytes, memory, fidelity and break-even of a cache, before anything of it is built."""

from __future__ import annotations

import math
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.identity import RecordIdentity, SplitName, canonical
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import ArraySpec, SplitLayout, record_arrays
from kdcache.pipeline.build.build import compiled
from kdcache.pipeline.build.builder import missing_shards
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.plan import BuildPlan
from kdcache.pipeline.build.source import draft_build
from kdcache.pipeline.build.suspicions import count_of
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.share import open_plan, open_shared
from kdcache.train.forecast.config import ForecastConfig
from kdcache.train.forecast.fidelity import by_classes
from kdcache.train.forecast.probe import Probe, try_out

_ENOUGH = 0.02  # relative error of NKD's gradient that a student does not notice
_COMMIT_BYTES, _CHUNK_BYTES = 480, 210  # of a commit, about, and of each chunk in it
_EPOCHS = (30, 100, 300)


def forecast(
    config: BuildConfig, asked: ForecastConfig, registry: str | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """What a build with this config would take and give; `table` shows it. Nothing is stored.

    InputError where the build would be refused too.
    """
    if this_rank().world > 1:
        raise InputError("plan runs in one process, not under torchrun: --gpus N says what N devices would take")
    started = time.monotonic()
    shared = open_shared(registry, publish=False)
    plan = open_plan(draft_build(config, say), shared, say)
    shards = missing_shards(plan)
    plan = compiled(plan, say)
    opened = time.monotonic() - started
    probe = try_out(plan, asked, say)
    rows = by_classes(plan.identity.record, probe.logits, probe.labels)
    own = next(row for row in rows if row["k"] == plan.identity.record.k)
    beside = _bytes_beside_records(plan)
    for row in rows:
        row["cache_bytes"] = round(beside + _cache_bytes(plan, row["k"], row["bytes"]))
    missing = {split: sum(len(s.rows) for s in shards if s.split.name == split) for split in ("train", "eval")}
    found = {
        "teacher": plan.identity.teacher.architecture, "data": config.data, "policy": plan.identity.views.policy,
        "views": plan.views, "samples": len(plan.source.train), "evaluation": len(plan.source.evaluation),
        "classes": plan.identity.record.classes, "key": plan.key, "device": str(plan.source.teacher.device),
        "in_registry": shared is not None and shared.has(plan.key),
        "probe": _probe_facts(probe), "time": _times(plan, probe, missing, opened, asked.gpus),
        "records": rows, "stored_classes": own["k"], "bytes": own["cache_bytes"], "files": _files(plan),
        "memory": _memory(plan), "break_even": _break_even(plan, probe, asked.epochs),
        "command": _command(config, plan, rows),
    }  # fmt: skip
    return found


def _probe_facts(probe: Probe) -> dict[str, Any]:
    views, images, _ = probe.logits.shape
    return {
        "plain_images": probe.plain, "images": images, "views": views, "seconds": probe.seconds,
        "teacher_top1": probe.top1, "chance": probe.chance, "notes": probe.notes,
        "images_per_second": probe.rates,
    }  # fmt: skip


def _times(plan: BuildPlan, probe: Probe, missing: dict[str, int], opened: float, gpus: int) -> dict[str, Any]:
    """Seconds of the build of what is missing, here and on several devices, and what it waits for."""
    rates = probe.rates
    plain = rates["evaluation"] or rates["build"]
    records = missing["train"] + missing["eval"]
    # A build asks the teacher about some training images first, and about a batch of them twice more.
    probed = count_of(plan.identity.record.classes, records) if records else 0
    first = probed + 2 * min(plan.batch, probed)
    work = missing["train"] / rates["build"] + (missing["eval"] + first) / plain
    alone = rates["teacher"]
    return {
        "records": records, "seconds": opened + work,
        "gpus": gpus, "seconds_on_gpus": opened + work / gpus,
        "limit": "images" if rates["images"] < alone else "teacher",
    }  # fmt: skip


def _bytes_beside_records(plan: BuildPlan) -> int:
    """Bytes of the labels and the image sizes as they are stored, whatever the records hold."""
    total = 0
    for split, _, data, labels in _splits(plan):
        layout = SplitLayout(plan.identity, split)
        total += _encoded(layout.labels, labels) if layout.labels.shape[1] else 0
        total += _encoded(layout.sizes, data.sizes) if layout.sizes else 0
    return total


def _cache_bytes(plan: BuildPlan, k: int | None, record_bytes: float) -> float:
    """Bytes of records as they were weighed, and of the prior, the metadata and the commits, or nearly so."""
    identity = plan.identity.model_copy(update={"record": plan.identity.record.model_copy(update={"k": k})})
    total = float(len(canonical(identity)))
    for split, views, *_ in _splits(plan):
        layout = SplitLayout(identity, split)
        total += views * layout.samples * record_bytes
        if layout.has_prior:
            total += sum(
                math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in (layout.prior, layout.tail_sums)
            )
        metadata: dict[str, Callable[[], bytes]] = {}
        for name in _commits(layout, views):
            found = layout.chunks(name)
            metadata |= dict(file for chunk in found for file in chunks.metadata_files(chunk))
            total += _COMMIT_BYTES + len(found) * _CHUNK_BYTES if found else 0
        total += sum(len(make()) for make in metadata.values())
    return total


def _encoded(spec: ArraySpec, rows: NDArray[Any]) -> int:
    """Bytes of rows as they are stored."""
    total = 0
    for part in range(-(-spec.shape[0] // spec.rows)):
        total += len(chunks.encode_part(spec, part, rows[spec.interval(part)].astype(spec.dtype)))
    return total


def _splits(plan: BuildPlan) -> Iterator[tuple[SplitName, int, Dataset, NDArray[np.int64]]]:
    """Each split's name, the number of its views, its data and its labels."""
    yield "train", plan.views, plan.source.train, plan.source.train_labels
    yield "eval", 1, plan.source.evaluation, plan.source.evaluation_labels


def _commits(layout: SplitLayout, views: int) -> list[str]:
    """The names of all commits of a split; some name nothing and are not made."""
    return ["labels", "sizes", "prior", *layout.shards(range(views))]


def _files(plan: BuildPlan) -> int:
    """How many files the cache has."""
    names = {"identity.json"}
    for split, views, *_ in _splits(plan):
        layout = SplitLayout(plan.identity, split)
        for name in _commits(layout, views):
            found = layout.chunks(name)
            names |= {layout.prefix + chunk.file for chunk in found}
            names |= {layout.prefix + file for chunk in found for file, _ in chunks.metadata_files(chunk)}
            names |= {layout.commit_file(name)} if found else set()
    return len(names)


def _memory(plan: BuildPlan) -> dict[str, int]:
    """Bytes at the peak: of this process and its workers, with what a build's shards add; and of a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    part = min(plan.identity.part, len(plan.source.train))
    raw = sum(spec.chunk_bytes for spec in record_arrays(plan.identity.record, part, part))
    found = {"host": here + 2 * raw * plan.views_together} | (
        {} if plan.source.train.in_memory else {"a_worker": largest}
    )
    device = plan.source.teacher.device
    return found | ({"gpu": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})


def _break_even(plan: BuildPlan, probe: Probe, epochs: int | None) -> list[dict[str, Any]]:
    """By a student's epochs: seconds that a live teacher adds, and after how many students the cache has paid."""
    own = epochs or plan.source.defaults.epochs
    built = plan.views * len(plan.source.train) / probe.rates["build"]
    rows = []
    for count in sorted({own, *(() if epochs else _EPOCHS)}):
        live = count * len(plan.source.train) / probe.rates["teacher"]
        rows.append({"epochs": count, "live_teacher_seconds": live, "students": built / live})
    return rows


def _command(config: BuildConfig, plan: BuildPlan, rows: list[dict[str, Any]]) -> str:
    """The build that is worth it: as asked, with the fewest classes that keep NKD's gradient where none were named."""
    words = ["kdcache", "build"]
    for field in fields(BuildConfig):
        value = getattr(config, field.name)
        if value == field.default and field.default is not MISSING:
            continue
        words += _typed(field.name.replace("_", "-"), value)
    best = suggested(plan.identity.record, rows)
    if config.topk is None and best["k"] != plan.identity.record.k:
        words += ["--topk", str(best["k"] or plan.identity.record.classes)]
    return shlex.join(words)


def _typed(flag: str, value: Any) -> list[str]:
    """An option as it is typed."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)]


def suggested(record: RecordIdentity, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the fewest classes that keep NKD's gradient, and that is no larger than dense records."""
    good = [row for row in rows if row["gradient_error"] <= _ENOUGH] or rows[-1:]
    best = min(good, key=lambda row: row["bytes"])
    own = next(row for row in rows if row["k"] == record.k)
    return own if own in good and own["bytes"] <= 1.5 * best["bytes"] else best
