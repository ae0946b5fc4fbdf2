"""A cache in a bucket as those see it who build it there, on any number of machines that share nothing else.

Each of them divides the work by leases (leases.py), and publishes a shard as soon as it is computed: its chunks first,
then the commit that names them, each created once. Whoever comes second finds the commit and keeps nothing of his own,
so that the bucket holds one answer, and readers can use each view as soon as it is complete.

What a builder has published it keeps in the local store too, where a reader on this machine finds it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, MismatchError, UnreadableError
from kdcache.cache.files import Content
from kdcache.cache.identity import Identity, SplitName, canonical, parse
from kdcache.cache.registry.kinds.network import Remote, other
from kdcache.cache.registry.leases import LEASES, PAUSE, ObjectLeases
from kdcache.cache.registry.localstore import LocalStore
from kdcache.cache.registry.objects import Objects, RemoteObjects
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.chunks import metadata_files
from kdcache.cache.store.layout import Chunk, Commit, StoredFile
from kdcache.cache.store.leases import Leases
from kdcache.cache.store.publish import SplitStore
from kdcache.cache.store.split import THREADS

LONGEST_PAUSE = 30.0  # seconds between two lists, while nothing changes

Each = Callable[[Callable[[Chunk], None], list[Chunk]], Any]


def require_create_only(objects: Objects) -> None:
    """InputError for a bucket that overwrites objects although it is asked not to. Nothing is left there."""
    if objects.folder(LEASES) is not None:
        return
    path = f"{LEASES}/{secrets.token_hex(8)}"
    objects.create(path, b"kdcache")
    try:
        objects.require_create_only(path)
    finally:
        with suppress(UnreadableError):  # without the right to remove objects it stays
            objects.remove([path])


def put_commit(
    objects: Objects, prefix: str, store: SplitStore, commit: Commit, content: bytes, contents: Mapping[str, Content],
    each: Each = map,
) -> bool:  # fmt: skip
    """Create the chunks that a commit names, and then the commit. Returns whether that is the one that is there now.

    store: of a cache that lies below `prefix`, or is copied to there. content: the commit's bytes. contents: those of
    the chunks, by their sha256. each: what calls a function for every chunk.
    """

    def put(chunk: Chunk) -> None:
        stored = commit.files[chunk.file]
        data, elsewhere = contents[stored.sha256], f"{prefix}/{other(stored)}"
        # If another publisher's bytes lie there uncommitted, ours go elsewhere, since neither may change.
        if not objects.create(f"{prefix}/{store.prefix}{chunk.file}", data) and not objects.create(elsewhere, data):
            raise CorruptError(f"{objects.url}/{elsewhere} does not have the digest that it is named by")

    list(each(put, store.chunks(commit.name)))
    return objects.create(f"{prefix}/{store.layout.commit_file(commit.name)}", content)


class Building(Remote):
    """A cache below `prefix` of objects over a network while it is built there: it asks again what is committed.

    What it knows to be committed stays so while it gives signs of life. Lists are made no more often than every few
    seconds, and more rarely while nothing changes.
    """

    def __init__(
        self, objects: RemoteObjects, prefix: str, identity: Identity, mirror: Path, store: LocalStore
    ) -> None:
        super().__init__(objects, prefix, identity, mirror, store)
        self.objects, self.prefix = objects, prefix
        self._committed: set[str] = set()
        self._listed, self._pause = float("-inf"), PAUSE

    def has(self, file: str) -> bool:
        return file == "identity.json" or file in self._seen()

    def names(self, folder: str) -> list[str]:
        prefix = f"{folder}/"
        return [name.removeprefix(prefix) for name in self._seen() if name.startswith(prefix)]

    def _seen(self) -> set[str]:
        if self._listed < 0:
            self.look()
        return self._committed

    def forget(self) -> None:
        """Ask anew what is committed: until this builder gave a sign of life, the cache could be removed."""
        self._committed.clear()
        self._listed, self._pause = float("-inf"), PAUSE

    def look(self) -> None:
        """List what is committed, unless that was done a short time ago."""
        if time.monotonic() - self._listed < self._pause:
            return
        found = {f"{at}/{name}" for at in ("commits", "eval/commits") for name in self.objects.sizes(self._at(at))}
        self._pause = PAUSE if found - self._committed else min(2 * self._pause, LONGEST_PAUSE)
        self._committed |= found
        self._listed = time.monotonic()

    def ask(self, file: str) -> bool:
        """Whether a commit is there now."""
        if file not in self._committed and self.objects.size(self._at(file)) is not None:
            self._committed.add(file)
        return file in self._committed

    def note(self, file: str, content: bytes | None) -> None:
        """Know that a commit is there. content: its bytes, if it was made here."""
        if content is not None:
            # One that was removed from the bucket may still lie here.
            files.publish(self._mirror / file, content, self._mirror / "scratch", replace=True)
        self._committed.add(file)

    def keep(self, chunks: list[tuple[StoredFile, Content]]) -> None:
        """Keep chunks here too."""
        for stored, data in chunks:
            self._store.keep(stored, data)

    def drop(self, chunks: Iterable[StoredFile]) -> None:
        """Remove chunks from the local store, since they lie in a folder here too."""
        for stored in chunks:
            self._store.drop(stored)

    def at_hand(self, stored: Iterable[StoredFile]) -> bool:
        """Whether these chunks can be read here without the network."""
        return all(map(self._store.has, stored))

    def _at(self, file: str) -> str:
        return f"{self.prefix}/{file}"


class BucketStore(SplitStore):
    """One split of a cache that is built in a bucket. What is written is committed there, if nothing is yet."""

    def __init__(self, place: Building, split: SplitName, identity: Identity, token: str) -> None:
        super().__init__(place, split, identity, token)
        self._building = place
        self._described: set[str] = set()

    def refresh(self) -> None:
        self._building.look()

    def decided(self) -> list[str]:
        return []  # the commit itself is the decision

    def finish(self, name: str, just_written: bool = False) -> None:
        """Look whether `name` was committed just now, by a builder that has given its lease back since."""
        self._building.ask(self.layout.commit_file(name))

    def _describe(self, chunk: Chunk) -> None:
        for file, metadata in metadata_files(chunk):
            if file not in self._described:
                # What another version of zarr has written will do too.
                self._building.objects.create(f"{self._building.prefix}/{self.prefix}{file}", metadata())
                self._described.add(file)

    def _publish(self, name: str, contents: Mapping[str, Content]) -> None:
        self._commit(name, contents, keep=True)

    def adopt(self, name: str, commit: bytes, contents: Mapping[str, Content]) -> None:
        """Publish what a folder on this machine has committed as `name`, unless there is such a commit already."""
        for chunk in self.chunks(name):
            self._describe(chunk)
        self._commit(name, {"commit.json": commit, **contents}, keep=False)

    def _commit(self, name: str, contents: Mapping[str, Content], keep: bool) -> None:
        place, file = self._building, self.layout.commit_file(name)
        if place.ask(file):
            return
        content = bytes(contents["commit.json"])
        commit = parse(Commit, content, place.locate(file), place.remedy(file))
        stored = list(commit.files.values()) if keep else []
        place.keep([(one, contents[one.sha256]) for one in stored])  # before others see that all of it is there
        with ThreadPoolExecutor(THREADS, thread_name_prefix="kdcache-put") as threads:
            first = put_commit(place.objects, place.prefix, self, commit, content, contents, threads.map)
        place.note(file, content if first else None)
        if not first:
            place.drop(stored)


class BucketCache(Cache):
    """A cache in a bucket as one of its builders, which need not exist yet.

    mirror: a local folder that keeps identity and commits. store: keeps chunks.
    """

    def __init__(self, objects: RemoteObjects, identity: Identity, mirror: Path, store: LocalStore) -> None:
        self._building = Building(objects, f"caches/{identity.key}", identity, mirror, store)
        super().__init__(self._building)
        self.train = BucketStore(self._building, "train", identity, self._token)
        self.evaluation = BucketStore(self._building, "eval", identity, self._token)

    def begin(self) -> BucketCache:
        """Create its identity there, before anything else; MismatchError if another one is there."""
        objects, file = self._building.objects, f"{self._building.prefix}/identity.json"
        if not objects.create(file, canonical(self.identity)):
            raise MismatchError(f"{objects.url}/{file} is not what this kdcache writes for cache {self.key[:12]}")
        return self

    @contextmanager
    def writing(self, say: Callable[[str], None] = lambda _: None) -> Iterator[Leases]:
        """Join the builders of this cache, which nobody removes meanwhile. What dead builders left is cleared away."""
        with ObjectLeases(self._building.objects, self.key, self._token, say) as leases:
            leases.clear()
            self._building.forget()
            self.begin()
            self._building.look()
            yield leases
            leases.clear()

    def tidy(self) -> None:
        """Nothing to do: whoever builds the cache clears up."""

    def at_hand(self, names: Iterable[str]) -> bool:
        """Whether the records of these shards of the training split can be read here without the network."""
        return all(self._building.at_hand(self.train.commit(name).files.values()) for name in names)

    def drop(self, names: Iterable[str]) -> None:
        """Remove these shards of the training split from the local store, since they lie in a folder here too."""
        for name in names:
            self._building.drop(self.train.commit(name).files.values())
