"""What a cache is, for people and programs."""

from __future__ import annotations

from typing import Any

from kdcache.cache.errors import KdcacheError
from kdcache.cache.store import Cache
from kdcache.pipeline.build import teacher_top1
from kdcache.pipeline.progress import size


def summary(cache: Cache) -> dict[str, Any]:
    """The identity and the state of a cache."""
    return {
        "key": cache.key,
        "path": str(cache.path),
        "store": "hdf5" if cache.packed else "zarr",
        "views": len(cache.views),
        "samples": cache.train.samples,
        "bytes": cache.size(),
        "identity": cache.identity.model_dump(mode="json"),
    }


def one_line(cache: Cache) -> str:
    """For ls, and where one is to be chosen."""
    i = cache.identity
    parts = [
        f"{cache.key[:12]}  {i.teacher.architecture} on {i.data.name} ({i.data.samples:,})",
        f"{i.views.policy}{f' (seed {i.views.seed})' if i.views.seed else ''}",
        f"{len(cache.views)} views",
        "dense" if i.record.dense else f"top {i.record.k} of {i.record.classes}",
        i.record.precision + (" with tail-std" if i.record.tail_std else ""),
        *(() if i.record.labels else ("unlabelled",)),
        size(cache.size()),
        *(("packed",) if cache.packed else ()),
    ]
    return ", ".join(parts)


def describe(cache: Cache) -> str:
    """For info: the state, then every field of the identity."""
    complete, committed = cache.views, cache.train.committed()
    under_way = sorted(set(committed) - set(complete))
    lines = [one_line(cache), f"path         {cache.path}", f"key          {cache.key}"]
    lines.append(f"views        {len(complete)} complete" + (f", under way: {under_way}" if under_way else ""))
    records = len(complete) * cache.train.samples
    if records:
        lines.append(
            f"size         {size(cache.size())}, {cache.size() / records:.1f} bytes a record, all files counted"
        )
    try:
        top1 = teacher_top1(cache)
        lines.append(
            "teacher      " + ("no labels" if top1 is None else f"top-1 {100 * top1:.2f} on the evaluation split")
        )
    except KdcacheError as e:
        lines.append(f"teacher      evaluation split not readable: {e}")
    if complete and not cache.identity.record.dense:
        records_of_view = cache.read(complete[0])
        for t in cache.identity.record.temperatures:
            lines.append(f"head mass    {float(records_of_view.softened(t).head_mass.mean()):.3f} at temperature {t:g}")
    for group, fields in cache.identity.model_dump(mode="json").items():
        if isinstance(fields, dict):
            lines += [f"{group}.{name} = {value}" for name, value in fields.items()]
        else:
            lines.append(f"{group} = {fields}")
    return "\n".join(lines)
