"""Facts about caches, for people and programs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kdcache.cache.errors import KdcacheError
from kdcache.cache.home import caches_folder, list_caches, open_registry, registry_beside, weights_file
from kdcache.cache.registry.registry import KEY, Registry
from kdcache.cache.secrecy import hide
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.commandline.terminal import show
from kdcache.pipeline.process.progress import percent, size

_SAMPLE = 10_000  # records, which are enough for a mean
_THREADS = 8  # for reading commits, which may be far away
_VIEWS = 4  # views that are read, to tell how good the teacher is on them


def summary(cache: Cache) -> dict[str, Any]:
    """The identity and the state of a cache."""
    return {
        "key": cache.key,
        "path": cache.where,
        "store": "hdf5" if cache.packed else "zarr",
        "views": len(cache.views),
        "samples": cache.train.samples,
        "bytes": cache.size(),
        "identity": cache.identity.model_dump(mode="json"),
    }


def one_line(cache: Cache) -> str:
    """One line for ls, and for messages where one of several caches is to be chosen."""
    i = cache.identity
    parts = [
        f"{cache.key[:12]}  {i.teacher.architecture} on {i.data.name} ({i.data.samples:,})",
        f"{i.views.policy}{f' (seed {i.views.seed})' if i.views.seed else ''}",
        *(("spread",) if i.views.sequence == "spread" else ()),
        f"{len(cache.views)} views",
        "dense" if i.record.dense else f"top {i.record.k} of {i.record.classes}",
        i.record.precision + (" with tail-std" if i.record.tail_std else ""),
        *(() if i.record.labels else ("unlabelled",)),
        *((f"lacks {' and '.join(i.record.lacks)}",) if i.record.lacks else ()),
        size(cache.size()),
        *(("packed",) if cache.packed else ()),
    ]
    return ", ".join(parts)


def listing(registry: str | None, as_json: bool) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """What `shared_summaries` returns, of the caches under KDCACHE_HOME and then of those in the registry, if given.

    Lines about the caches here are shown before a registry is asked, unless as_json; only the later ones are returned
    then.
    """
    good, bad = list_caches()
    found, lines = [summary(c) for c in good], [*map(one_line, good)]
    if registry is not None:
        if lines and not as_json:  # whatever the network does
            show([], False, "\n".join(lines))
        shared = open_registry(registry)
        about, lines, also_bad = shared_summaries(shared)
        found += about
        lines = [f"in {shared.url}:", *(lines or ["no caches: see kdcache push --help"])]
        bad += also_bad
    return found, lines, bad


def shared_summaries(registry: Registry) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Summaries of the caches in a registry, lines about them for ls, and a line for each that cannot be read.

    A summary holds the names of the cache there, and who published it last, too.
    """
    found, lines = [], []
    caches, bad = registry.caches()
    teachers = registry.teachers.sizes()
    for cache in caches:
        try:
            found.append(_shared(cache, registry, cache.identity.teacher.weights in teachers))
            lines.append(_shared_line(cache, found[-1]))
        except KdcacheError as e:
            bad.append(str(e))
    return found, lines, bad


def _shared(cache: Cache, registry: Registry, teacher: bool) -> dict[str, Any]:
    """The summary of a cache in a registry; teacher: whether its teacher's weights are there too."""
    published = registry.published(cache.key)
    return {
        **summary(cache),
        "registry": registry.url,
        "names": [name for name, key in registry.names.items() if key == cache.key],
        "teacher_weights": registry.teachers.url(cache.identity.teacher.weights) if teacher else None,
        "published": published and published.model_dump(mode="json", exclude={"format", "key"}),
    }


def _shared_line(cache: Cache, found: dict[str, Any]) -> str:
    """One line for ls: the cache, the teacher's top-1 as published, the names, who published it and when."""
    parts, published = [one_line(cache)], found["published"]
    if published:
        if published["evaluation_top1"] is not None:
            parts.append(f"teacher's top-1 {percent(published['evaluation_top1'])}")
        parts.append(f"by {published['by']} on {published['time'][:10]}")
    if found["teacher_weights"]:
        parts.append("with its teacher")
    return ", ".join([*parts, *found["names"]])


def removed_line(cache: Cache, registry: Registry | None) -> str:
    """One line for rm: the cache, where it is, and who published it."""
    found: dict[str, Any] = {"published": None, "names": [], "teacher_weights": None}
    if registry is not None:
        found = _shared(cache, registry, False)  # which stays for others
    return f"{cache.where} ({_shared_line(cache, found)})"


def removal(result: dict[str, Any], deleted: bool) -> str:
    """Lines for gc: what nothing needs any more, why, and how much space that is or was."""
    lines = []
    for one in result["found"]:
        why = one["why"] if one["kept"] is None else f"stays: {one['kept']}"
        lines.append(f"{size(one['bytes']):>9}  {one['path']}: {why}")
    if lines:
        lines.append(f"{size(result['freed'])} freed" if deleted else f"{size(result['bytes'])} may go: add --delete")
    return "\n".join(lines) or "nothing to remove"


def weights_place(cache: Cache, registry: Registry | None = None) -> str | None:
    """Where its teacher's weights are: in the registry; without one, here or in the registry that the cache lies in."""
    weights = cache.identity.teacher.weights
    if not KEY.fullmatch(weights):
        return None  # somebody may have written it by hand
    if registry is None and (path := weights_file(weights)).exists():
        return str(path)
    shared = registry or registry_beside(cache.where)
    return shared.teachers.url(weights) if shared is not None and shared.teachers.has(weights) else None


def facts(cache: Cache) -> dict[str, Any]:
    """All that info tells: `summary`, views under way, who built it, how faithful it is or why that is unreadable."""
    complete = cache.train.complete_views()
    under_way = sorted(set(cache.train.committed()) - set(complete))
    found = {**summary(cache), "under_way": under_way, "built": [], "fidelity": None}
    found["teacher_weights"] = weights_place(cache)
    try:
        return {**found, "built": built(cache), "fidelity": fidelity(cache)}
    except KdcacheError as e:
        return {**found, "unreadable": str(e)}


def describe(cache: Cache, found: dict[str, Any]) -> str:
    """The facts as text, then every field of the identity."""
    lines = [one_line(cache), f"path         {found['path']}", f"key          {found['key']}"]
    under_way = f", under way: {found['under_way']}" if found["under_way"] else ""
    lines.append(f"views        {found['views']} complete{under_way}")
    for member in cache.identity.members:
        here = "" if (caches_folder() / member.key).exists() else ", not under KDCACHE_HOME"
        lines.append(f"member       {member.key[:12]} with weight {member.weight:g}{here}")
    if not cache.identity.members:
        lines.append(f"weights      {found['teacher_weights'] or 'of the teacher are not here'}")
    if records := found["views"] * found["samples"]:
        each = f"{found['bytes'] / records:.1f} bytes a record, all files counted"
        lines.append(f"size         {size(found['bytes'])}, {each}")
    if (fidelity := found["fidelity"]) is None:
        lines.append(f"fidelity     not readable: {found['unreadable']}")
    else:
        if (top1 := fidelity["evaluation_top1"]) is not None:
            lines.append(f"teacher      top-1 {percent(top1)} on the evaluation split")
        if fidelity["view_top1"]:
            views = ", ".join(f"{percent(top1)} on view {view}" for view, top1 in fidelity["view_top1"].items())
            lines.append(f"teacher      top-1 {views}")
        for t, part in fidelity["mass"].items():
            head, tail = percent(part["head"]), percent(part["tail"])
            lines.append(f"mass         {head} stored, {tail} in the tail, at temperature {t}")
    for one in found["built"]:
        who = {name: value for name, value in one.items() if name not in ("views", "first", "last", "command")}
        times = " to ".join(dict.fromkeys((one["first"], one["last"])))
        lines.append(f"built        {ranges(one['views'])} by {one.get('command', 'a command not known')}, {times}")
        lines.append("             " + ", ".join(f"{name} {value}" for name, value in who.items()))
    for group, fields in found["identity"].items():
        if isinstance(fields, dict):
            lines += [f"{group}.{name} = {value}" for name, value in fields.items()]
        else:
            lines.append(f"{group} = {fields}")
    return "\n".join(lines)


def built(cache: Cache) -> list[dict[str, Any]]:
    """Who built which of the complete views, as their commits say: one entry for each command, machine and version.

    views: those in which the builder had a part. first, last: times of its first and last commit.
    """
    shards = [(view, part) for view in cache.views for part in range(cache.train.parts)]
    with ThreadPoolExecutor(_THREADS) as threads:
        commits = threads.map(lambda shard: cache.train.commit(shard_name(*shard)), shards)
        found: dict[str, dict[str, Any]] = {}
        for (view, _), commit in zip(shards, commits, strict=True):
            who = {name: hide(value) for name, value in commit.writer.items() if name not in ("process", "time")}
            time = commit.writer.get("time", "")
            new = {"views": [], "first": time, "last": time, **who}
            one = found.setdefault(json.dumps(who, sort_keys=True), new)
            if view not in one["views"]:
                one["views"].append(view)
            one["first"], one["last"] = min(one["first"], time), max(one["last"], time)
    return list(found.values())


def ranges(views: list[int]) -> str:
    """Numbers of views as people write them: views 0 to 3 and 7."""
    runs: list[list[int]] = []
    for view in views:
        if runs and view == runs[-1][-1] + 1:
            runs[-1].append(view)
        else:
            runs.append([view])
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"view{'s' if len(views) > 1 else ''} " + " and ".join(texts)


def fidelity(cache: Cache) -> dict[str, Any]:
    """The teacher's top-1 (0..1) on the evaluation split and on some of the views, and what its records hold of it.

    mass: by temperature, the mean probability of the stored classes and labels, and of the tail.
    """
    # Imported here, because ls needs neither and torch takes seconds to import.
    import torch

    from kdcache.pipeline.build.answers import teacher_top1

    views = cache.views
    chosen = sorted({views[i * (len(views) - 1) // (_VIEWS - 1)] for i in range(_VIEWS)} if views else ())
    top1: dict[str, float] = {}
    mass: dict[str, dict[str, float]] = {}
    for view in chosen:
        records = cache.read(view)
        if records.labels.shape[1] and not cache.identity.views.mixed:  # a mixed image has no one answer
            top1[str(view)] = float((records.predictions() == records.labels[:, 0].long()).float().mean())
        if not mass:
            some = records[torch.arange(0, len(records), max(1, len(records) // _SAMPLE))]
            heads = {f"{t:g}": float(some.softened(t).head_mass.mean()) for t in records.temperatures}
            mass = {t: {"head": head, "tail": 1 - head} for t, head in heads.items()}
    return {"evaluation_top1": teacher_top1(cache), "view_top1": top1, "mass": mass}
