"""Removes caches on purpose, and finds and removes what nothing needs any more.

A cache's commits are removed first and its identity last. So a reader finds fewer views or none, never half of one, and
the next removal finishes one that was stopped. Listing (`leavings`) writes nothing at all. Before a thing is removed,
the locks and leases that its users would hold tell whether it is in use after all.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdcache.cache import files
from kdcache.cache.errors import BusyError, CorruptError, InputError, KdcacheError, MismatchError, NotFoundError
from kdcache.cache.home import (
    caches_folder,
    home,
    list_caches,
    open_cache,
    open_registry,
    teachers_folder,
    weights_file,
)
from kdcache.cache.packing import clear_leaving
from kdcache.cache.registry.leases import LEASES, ObjectLeases
from kdcache.cache.registry.localstore import LOCAL_STORE_BYTES, LocalStore
from kdcache.cache.registry.registry import KEY, Registry, split_url
from kdcache.cache.registry.teachers import weights_among
from kdcache.cache.store.cache import Cache, make_work_folders
from kdcache.cache.store.leases import FolderLeases, Leases

HOUR, DAY = 3600.0, 86400.0
_TEMPORARY = re.compile(r"\.(.+\.)?[0-9a-f]{16}\.tmp|\..+\.packing")
_LAST = "identity.json"
_UNNAMED = "weights of a teacher that no cache names, which were not used for long"
_PARTS = (
    "commits",
    "eval",
    "labels",
    "prior",
    "sizes",
    "tail_sums",
    "views",
    "other",
    "published",
    "signatures",
    "scratch",
)


@dataclass(frozen=True)
class Leaving:
    """A thing that nothing needs any more. `remove` raises KdcacheError or OSError where it has to stay."""

    path: str
    bytes: int
    why: str
    remove: Callable[[], object]


def find(what: str, registry: str | None = None) -> tuple[Cache, Registry | None]:
    """The cache to remove, and the registry if one is named, by `registry` or by an address.

    InputError if it is not ours to remove, MismatchError if it is not the cache that its folder is named after.
    """
    root, wanted = split_url(what) or (registry, what)
    if root is not None:
        shared = open_registry(root).require_writable()
        return shared.open(shared.find(wanted)), shared
    cache = open_cache(what)
    if cache.path.is_symlink():
        raise InputError(f"{cache.path} is a symbolic link, which is not followed: give the path that it leads to")
    named = cache.path.absolute().name.partition(".")[0]
    if KEY.fullmatch(named) and named != cache.key:
        raise MismatchError(f"{cache.path} holds cache {cache.key[:12]}, but is named after another: rename it")
    return cache, None


def remove_name(name: str, registry: str) -> None:
    """Remove a name from a registry, and nothing else."""
    open_registry(registry).require_writable().remove_name(name)


def remove(cache: Cache, shared: Registry | None = None) -> None:
    """Remove a cache, from the registry `shared` if given. The same call finishes a removal that was stopped.

    InputError while a name there points to it, or if its folder holds things that are no part of a cache; BusyError
    while somebody builds it. Nothing behind a symbolic link is touched.
    """
    if shared is not None and (names := sorted(n for n, key in shared.all_names().items() if key == cache.key)):
        raise InputError(
            f"{', '.join(names)} in {shared.url} stands for cache {cache.key[:12]}: first run kdcache rm --name "
            f"{names[0]} --registry {shared.url}, or give that name to another cache (push --move)"
        )
    if cache.packed:
        cache.path.unlink()
    elif shared is None or cache.local:
        _remove_folder(cache)
    else:
        _remove_objects(cache, shared)
    if shared is not None:
        shared.forget(cache.key)


def _remove_objects(cache: Cache, shared: Registry) -> None:
    prefix = f"caches/{cache.key}"
    with ObjectLeases(shared.objects, cache.key, secrets.token_hex(8), lambda _: None) as leases:
        _require_alone(leases, cache.where)
        there, commits = shared.objects.sizes(prefix), _in_order(cache.fresh())
        rest = sorted(there.keys() - {*commits, _LAST})
        # Commits of views go before the prior's, which a reader of views needs.
        shards = [file for file in commits if _is_shard(file)]
        for some in (shards, [file for file in commits if file not in shards], rest, [_LAST]):
            shared.objects.remove([f"{prefix}/{file}" for file in some])
        leases.clear()


def _remove_folder(cache: Cache) -> None:
    path = cache.path.absolute()  # "." cannot be removed by that name
    strays = [name for name in files.names(path) if name.startswith(".") and name.endswith(".tmp")]  # make_folder's
    if foreign := sorted({*files.names(path)} - {*_PARTS, *strays, "leases", _LAST}):
        raise InputError(f"{path} also holds {foreign[0]}, which is no part of a cache: move it elsewhere first")
    make_work_folders(path)
    for name in ("commits", "eval", "eval/commits"):  # before anything in them is looked for
        if (path / name).is_symlink():
            (path / name).unlink()
    with FolderLeases(path, secrets.token_hex(8), lambda _: None) as leases:
        _require_alone(leases, str(path))
        for file in _in_order(cache):
            files.discard(path / file)  # damage may have put a folder there
        for name in ("commits", "eval/commits"):
            if (path / name).is_dir():
                files.sync_folder(path / name)  # before the bytes that they name are removed
        for name in (*_PARTS, *strays):
            files.discard(path / name)
        _require_alone(leases, str(path))
    files.discard(path / "leases")
    files.discard(path / "scratch")
    files.discard(path / _LAST)
    path.rmdir()


def _require_alone(leases: Leases, where: str) -> None:
    if others := leases.others():
        raise BusyError(f"{where} is being built or pushed by {others[0]}: wait for it, or stop it first")


def _is_shard(commit: str) -> bool:
    return commit.rpartition("/")[2].startswith("v")


def _in_order(cache: Cache) -> list[str]:
    """The commits in the order of removal: the last view first, view 0 and what every reader needs at the end."""
    last_first = cache.commits()[::-1]
    return sorted(last_first, key=lambda file: (not _is_shard(file), file.startswith("eval/")))


def leavings(days: float, registry: str | None = None, store_bytes: int | None = None) -> Iterator[Leaving]:
    """Find what may be removed under KDCACHE_HOME (but not in the spool) and in a registry. Nothing is changed.

    days: the grace period of caches without a name in the registry, and of teachers' weights that no cache names.
    store_bytes: the local store's limit.
    """
    before = time.time() - max(days * DAY, HOUR)
    for cache in list_caches()[0]:
        if cache.writable and not cache.packed and not cache.path.is_symlink():
            yield from _of_builders(cache)
    for where, folders, names in os.walk(home()):
        yield from _temporary(Path(where), [*folders, *names])
        if Path(where) == caches_folder():
            folders[:] = [
                name for name in folders if not (Path(where, name) / _LAST).exists()
            ]  # else builders clear up
        elif Path(where) == home() and "spool" in folders:
            folders.remove("spool")
    yield from _teachers(before)
    store = LocalStore(home() / "remote" / "chunks", LOCAL_STORE_BYTES if store_bytes is None else store_bytes)
    beyond = [size for path, size in store.beyond() if not path.name.startswith(".")]
    if beyond:
        yield Leaving(
            str(home() / "remote" / "chunks"),
            sum(beyond),
            f"{len(beyond)} chunks beyond the limit, which were unread for longest",
            store.make_room,
        )
    if registry is not None:
        yield from _in_registry(open_registry(registry).require_writable(), before)


def gc(found: Sequence[Leaving], delete: bool) -> dict[str, Any]:
    """Remove what was found, if `delete`, and return facts about it. kept: why things stayed, which are in use."""
    facts, freed = [], 0
    for one in found:
        kept = None
        if delete:
            try:
                one.remove()
                freed += one.bytes
            except (KdcacheError, OSError) as e:
                kept = str(e)
        facts.append({"path": one.path, "bytes": one.bytes, "why": one.why, "kept": kept})
    return {"found": facts, "bytes": sum(one.bytes for one in found), "freed": freed}


def _of_builders(cache: Cache) -> Iterator[Leaving]:
    yield from _unnamed_folders(cache.path)
    folders = (cache.path / "leases", cache.path / "scratch")
    if any(folder.is_symlink() or not _may_write(folder) for folder in folders):
        return
    # Decided shards are kept: the next builder commits them. Folders alone are nothing to remove.
    left = [folder / name for folder in folders for name in files.names(folder)]
    left = [p for p in left if p != folders[1] / "decided" and _holds_files(p)]
    if left and all(extent(folder)[1] < time.time() - HOUR for folder in [*left, folders[1] / "decided"]):
        yield Leaving(
            f"{cache.path}/{{leases,scratch}}",
            sum(extent(p)[0] for p in left),
            "left by builders that have died",
            cache.tidy,
        )


def _unnamed_folders(cache: Path) -> Iterator[Leaving]:
    """The folders that `files.make_folder` had made and not yet named, as it does only in the folder of a group."""
    if not cache.stat().st_mode & stat.S_ISGID:
        return
    for where, folders, _ in os.walk(cache):
        if Path(where) == cache:
            folders[:] = [name for name in folders if name not in ("leases", "scratch")]  # where builders clear up
        yield from _temporary(Path(where), folders)


def _holds_files(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir() or any(names for _, _, names in os.walk(path))


def _may_write(folder: Path) -> bool:
    """Whether this user may remove what is in a folder; of one that is not there nothing has to be removed."""
    return os.access(folder, os.W_OK) or not folder.exists()


def _temporary(folder: Path, names: list[str]) -> Iterator[Leaving]:
    """Temporary files among these names in a folder, and empty folders that were not yet named."""
    for name in names:
        path = folder / name
        if not _TEMPORARY.fullmatch(name) or path.is_symlink():
            continue
        found = extent(path)
        if found[1] < time.time() - HOUR:
            if path.is_dir():
                if any(path.iterdir()):
                    continue
                remove: Callable[[], object] = path.rmdir
            elif name.endswith(".packing"):
                remove = partial(clear_leaving, path)
            else:
                remove = partial(path.unlink, missing_ok=True)
            yield Leaving(str(path), found[0], "a temporary file of a process that has died", remove)


def _teachers(before: float) -> Iterator[Leaving]:
    """Find local weights that no local cache names and that were not used since `before`."""
    for path, size in sorted(_unneeded(before).items()):
        yield Leaving(str(path), size, _UNNAMED, partial(_remove_weights, path, before))


def _unneeded(before: float) -> dict[Path, int]:
    """Bytes of each local file of weights that no cache names and that was not used since `before`."""
    caches, bad = list_caches()
    if bad:
        return {}  # they may name any weights; ls says what is wrong with them
    needed = {cache.identity.teacher.weights for cache in caches}
    here = dict.fromkeys(files.names(teachers_folder()), 0)
    found = {weights_file(w): weights_file(w).lstat() for w in weights_among(here) if w not in needed}
    return {path: about.st_size for path, about in found.items() if about.st_mtime < before}


def _remove_weights(path: Path, before: float) -> None:
    if path not in _unneeded(before):
        raise BusyError(f"{path} is needed again")
    path.unlink()


def _in_registry(shared: Registry, before: float) -> Iterator[Leaving]:
    objects = shared.objects
    objects.require_there()
    named, keys = set(shared.all_names().values()), shared.keys()
    for key in keys:
        prefix = f"caches/{key}"
        try:
            cache = shared.open(key)
            if key not in named and objects.newest(prefix) < before:
                why = "no name points to it, and nothing was added for long"
                remove = partial(_remove_old, cache, shared, before)
                yield Leaving(f"{shared.url}/{prefix}", cache.size(), why, remove)
            elif cache.local:
                yield from _of_builders(Cache(cache.path))
        except (CorruptError, MismatchError, NotFoundError):
            continue  # what is no cache is not removed; ls says what is wrong with it
    yield from _leases_there(shared)
    for weights, size in _teachers_there(shared, before).items():
        remove = partial(_remove_teacher_there, shared, weights, before)
        yield Leaving(shared.teachers.url(weights), size, _UNNAMED, remove)
    yield from _temporary_there(shared, keys)
    if keys:  # an empty folder may be one that is not mounted
        for mirror in shared.mirrors():
            if mirror.name not in keys:
                why = f"what was known of a cache that is gone from {shared.url}"
                yield Leaving(str(mirror), extent(mirror)[0], why, partial(shared.forget, mirror.name))


def _temporary_there(shared: Registry, keys: Sequence[str]) -> Iterator[Leaving]:
    """What writers that died have left in a folder, outside of its caches and in those without an identity.

    In a bucket there is nothing of the kind: an object is put there in one request.
    """
    top = shared.objects.folder("caches")
    if top is None:
        return
    for folder in (top.parent, *(top.parent / name for name in ("names", "scratch", "teachers", "caches"))):
        if not folder.is_symlink():
            yield from _temporary(folder, files.names(folder))
    for name in sorted({*files.names(top)} - {*keys}):
        if KEY.fullmatch(name) and not (top / name).is_symlink():
            for where, folders, names in os.walk(top / name):
                yield from _temporary(Path(where), [*folders, *names])


def _leases_there(shared: Registry) -> Iterator[Leaving]:
    """What builders that died have left in a bucket, by cache. In a folder it lies with the cache."""
    if shared.objects.folder(LEASES) is not None:
        return
    found, sizes = shared.objects.times(LEASES), shared.objects.sizes(LEASES)
    for name in sorted({path.partition("/")[0] for path in found}):
        of_name = [path for path in found if path.partition("/")[0] == name]
        if max(found[path] for path in of_name) < time.time() - HOUR:
            total = sum(sizes.get(path, 0) for path in of_name)
            remove = partial(_remove_leases_there, shared, name)
            yield Leaving(f"{shared.url}/{LEASES}/{name}", total, "left by builders that have died", remove)


def _remove_leases_there(shared: Registry, name: str) -> None:
    if not KEY.fullmatch(name):  # of a builder that died while it tried out whether objects are overwritten
        return shared.objects.remove([f"{LEASES}/{name}"])
    with ObjectLeases(shared.objects, name, secrets.token_hex(8), lambda _: None) as leases:
        leases.clear()


def _teachers_there(shared: Registry, before: float) -> dict[str, int]:
    """Bytes, by hash, of the registry's weights that no cache there names and that were published before `before`."""
    there = shared.teachers.sizes()
    try:
        needed = {shared.open(key).identity.teacher.weights for key in (shared.keys() if there else ())}
    except (CorruptError, MismatchError, NotFoundError):
        return {}  # it may name any weights; ls says what is wrong with it
    return {w: size for w, size in there.items() if w not in needed and shared.teachers.changed(w) < before}


def _remove_teacher_there(shared: Registry, weights: str, before: float) -> None:
    if weights not in _teachers_there(shared, before):
        raise BusyError(f"{shared.teachers.url(weights)} is needed again")
    shared.teachers.remove(weights)


def _remove_old(cache: Cache, shared: Registry, before: float) -> None:
    if shared.objects.newest(f"caches/{cache.key}") >= before:
        raise BusyError(f"something was added to {cache.where} just now")
    remove(cache, shared)


def extent(path: Path) -> tuple[int, float]:
    """The bytes of a file, or of all files in a folder, and when the latest was changed; no link is followed."""
    size, newest = 0, 0.0
    for where, folders, names in [("", [], [str(path)]), *(() if path.is_symlink() else os.walk(path))]:
        for name in (*folders, *names):
            try:
                found = Path(where, name).lstat()
            except FileNotFoundError:
                continue  # gone just now
            size += 0 if Path(where, name).is_dir() else found.st_size
            newest = max(newest, found.st_mtime)
    return size, newest
