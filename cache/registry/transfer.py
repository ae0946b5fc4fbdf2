"""Copies a cache, or some views of it, from one place to another: into a folder or a bucket, for push and for pull.

Data come before the commit that names them, and what every reader needs (labels, sizes, prior, evaluation split) comes
before the views. Each file is compared with its digest before it is passed on. What is committed there already stays:
equal rows are skipped, others counted. So a copy can be stopped at any time and done again, by any number of people at
once.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kdcache.cache.errors import CorruptError, InputError, MismatchError
from kdcache.cache.files import Content, sha256
from kdcache.cache.identity import MAX_JSON_BYTES, canonical, parse
from kdcache.cache.registry.bucket import BucketCache, put_commit
from kdcache.cache.registry.leases import ObjectLeases
from kdcache.cache.registry.objects import Objects, read_checked
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.chunks import metadata_files
from kdcache.cache.store.layout import Commit, parse_shard_name
from kdcache.cache.store.publish import SplitStore

Advance = Callable[[int], object]
Begun = Callable[[], object]
_Item = tuple[SplitStore, str]

_THREADS = 16
_MEMORY = 1 << 30  # bytes of chunks that are on their way at once, at most


@dataclass
class Moved:
    """What a copy did. bytes: of data that went. new, there: how many commits were new, and were there already.

    kept: the commits that were there already with other rows. theirs: of all commits that were there and are not the
    source's own, byte for byte, the sha256 by file; None for those that name other bytes or other parameters.
    """

    bytes: int = 0
    new: int = 0
    there: int = 0
    kept: list[str] = field(default_factory=list)
    theirs: dict[str, str | None] = field(default_factory=dict)


def into_folder(
    source: Cache,
    folder: Path,
    views: Sequence[int],
    advance: Advance = lambda n: None,
    begun: Begun = lambda: None,
) -> Moved:
    """Copy complete views of `source`, and all that belongs to them, into the cache in `folder`, made if there is none.

    advance: is called with numbers of commits. begun: is called once the identity is there. MismatchError if another
    cache is there.
    """
    if folder.is_dir():
        for where, folders, _ in os.walk(folder):
            for name in folders:
                if Path(where, name).is_symlink():
                    raise CorruptError(f"{Path(where, name)} is a symbolic link, which is not followed: remove it")
    target = Cache.create(folder, source.identity)
    begun()
    with target.writing():
        # A commit that came over a network has no digest of its own, and is not to stay here if it came wrong.
        adopted = partial(_adopted, target, decode=not source.local)
        return _all(list(source.contents(views)), adopted, advance)


def into_bucket(source: Cache, target: BucketCache, views: Sequence[int]) -> Moved:
    """Copy what `source` has of these views, whole or not, and of what belongs to them, into a bucket."""
    with target.writing():
        items = [(store, name) for store, name in source.contents(views) if store.has(name)]
        return _all(items, partial(_adopted, target))


def _adopted(target: Cache, item: _Item, decode: bool = False) -> Moved:
    """Have the target adopt a commit, if it has none of that name. decode: see `files_of`."""
    store, name = item
    into = target.split(store.split)
    if into.has(name):
        return _compared(into.commit(name), store, name)
    contents = store.files_of(name, decode)
    into.adopt(name, store.commit_bytes(name), contents)
    return Moved(sum(map(len, contents.values())), 1)


def into_objects(
    source: Cache,
    objects: Objects,
    prefix: str,
    views: Sequence[int],
    advance: Advance = lambda n: None,
    begun: Begun = lambda: None,
) -> Moved:
    """Copy complete views of `source` as `into_folder` does, into the objects below `prefix`."""
    if folder := objects.folder(prefix):
        return into_folder(source, folder, views, advance, begun)
    with ObjectLeases(objects, source.key, secrets.token_hex(8), lambda _: None):  # so that nobody removes it meanwhile
        return _into_objects(source, objects, prefix, views, advance, begun)


def _into_objects(
    source: Cache, objects: Objects, prefix: str, views: Sequence[int], advance: Advance, begun: Begun
) -> Moved:
    identity = canonical(source.identity)
    if not objects.create(f"{prefix}/identity.json", identity):
        raise MismatchError(f"{objects.url}/{prefix}/identity.json differs from that of {source.where}")
    objects.require_create_only(f"{prefix}/identity.json")
    begun()
    there = objects.sizes(prefix)

    def put(file: str, content: Content) -> bool:
        return objects.create(f"{prefix}/{file}", content)

    def move(item: _Item) -> Moved:
        store, name = item
        commit = store.layout.commit_file(name)
        if commit not in there:
            mine, contents = store.commit(name), store.files_of(name)
            for chunk in store.chunks(name):
                for file, metadata in metadata_files(chunk):
                    if store.prefix + file not in there:
                        put(store.prefix + file, metadata())  # what another version of zarr wrote will do too
            if put_commit(objects, prefix, store, mine, store.commit_bytes(name), contents):
                return Moved(sum(map(len, contents.values())), 1)
        where = f"{objects.url}/{prefix}/{commit}"
        advice = "ask whoever keeps the registry to remove it"
        theirs = read_checked(
            objects, f"{prefix}/{commit}", MAX_JSON_BYTES, lambda content: parse(Commit, content, where, advice)
        )
        return _compared(theirs, store, name)

    return _all(list(source.contents(views)), move, advance)


def _compared(theirs: Commit, store: SplitStore, name: str) -> Moved:
    mine = store.commit(name)
    if (theirs.key, theirs.name) != (mine.key, mine.name):
        raise CorruptError(f"the commit {name} of {store.where} and the one at the destination name different things")
    if theirs == mine:
        return Moved(there=1)
    equal = (theirs.files, theirs.parameters) == (mine.files, mine.parameters)  # by another writer
    digests = {store.layout.commit_file(name): sha256(canonical(theirs)) if equal else None}
    return Moved(there=1, kept=[] if theirs.content() == mine.content() else [name], theirs=digests)


def _all(items: list[_Item], move: Callable[[_Item], Moved], advance: Advance = lambda n: None) -> Moved:
    """Move commits; the shards of training views come after all others, which their readers need too."""
    shards = [(store, name) for store, name in items if store.split == "train" and parse_shard_name(name)]
    first = [item for item in items if item not in shards]
    largest = max((sum(chunk.spec.max_file_bytes for chunk in store.chunks(name)) for store, name in items), default=1)
    moved = Moved()
    with ThreadPoolExecutor(max(1, min(_THREADS, _MEMORY // largest)), thread_name_prefix="kdcache-move") as threads:
        for some in (first, shards):
            for one in threads.map(move, some):
                moved.bytes += one.bytes
                moved.new += one.new
                moved.there += one.there
                moved.kept += one.kept
                moved.theirs |= one.theirs
                advance(1)
    return moved


def count(source: Cache, views: Sequence[int]) -> int:
    """How many commits make up these views and what belongs to them."""
    return sum(1 for _ in source.contents(views))


def require_movable(cache: Cache) -> None:
    """InputError for a packed file, whose chunks are of another kind."""
    if cache.packed:
        raise InputError(
            f"{cache.where} is packed, and only folders are shared: run kdcache unpack {cache.where} first"
        )
