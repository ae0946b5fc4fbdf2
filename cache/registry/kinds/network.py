"""A registry in a bucket or on a web server: its objects, and reading a cache there by way of a local store.

Both are reached over a network, which may fail at any time: so each request is repeated, after longer and longer waits,
for up to `PATIENCE` seconds.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import obstore
from obstore import exceptions as oe
from obstore.store import ObjectStore

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, MismatchError, NotFoundError, UnreadableError
from kdcache.cache.files import Content
from kdcache.cache.identity import MAX_JSON_BYTES, Identity, canonical, parse
from kdcache.cache.registry.kinds.client import first_process
from kdcache.cache.registry.kinds.client import store as _store
from kdcache.cache.registry.kinds.failures import Failure, failure
from kdcache.cache.registry.localstore import LocalStore
from kdcache.cache.registry.objects import RemoteObjects
from kdcache.cache.store.layout import Chunk, Commit, SplitLayout, StoredFile
from kdcache.cache.store.place import ZarrChunks

T = TypeVar("T")
MOST_VIEWS = 100_000
# Seconds for which one request is repeated: after the place has answered any request, and before.
PATIENCE, AT_FIRST = 90.0, 15.0
_LONGEST_WAIT = 10.0
_WRONG_AT_MOST = 3  # how often wrong bytes are fetched before they count as damaged there
_AT_ONCE = 32  # simultaneous requests that ask what there is
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NetworkObjects:
    """Objects in a bucket, or on a web server, which can only be read and cannot be listed. May be pickled.

    Objects describes the methods. Each raises UnreadableError when it has been tried for long enough.
    """

    def __init__(self, url: str, bucket: bool) -> None:
        self.url, self.address, self.listable, self.writable = url, url, bucket, bucket
        self._reached = False
        self.sealed = url.startswith("https://")  # TLS covers what is on its way

    def require_there(self) -> None:
        """Nothing to do: the first request for an object finds that out."""

    def folder(self, path: str) -> None:
        return None

    def place(self, prefix: str, identity: Identity, mirror: Path, store: LocalStore) -> Remote:
        return Remote(self, prefix, identity, mirror, store)

    def read(self, path: str, limit: int) -> bytes:
        return bytes(self._read(path, limit, None))

    def fetch(self, path: str, size: int, sha256: str) -> Content:
        """The object's bytes; CorruptError if their digest is another, or if they are more than `size`."""
        return self._read(path, size, sha256)

    def _read(self, path: str, limit: int, sha256: str | None) -> Content:
        wrong = 0
        while True:
            content, tag = self._try(path, lambda: self._get(path, limit))
            if sha256 is not None:
                right = files.sha256(content) == sha256
            else:
                # In most buckets the tag is the content's MD5. One that is something else does not agree by chance.
                right = self.sealed or (tag is not None and tag[1] == _md5(content))
                # If nothing protects these bytes on their way, two answers must agree.
                right = right or content == self._try(path, lambda: self._get(path, limit))[0]
            if right:
                return content
            wrong += 1
            if wrong == _WRONG_AT_MOST:
                raise CorruptError(f"{self.url}/{path} is not what was committed")

    def _get(self, path: str, limit: int) -> tuple[memoryview, re.Match[str] | None]:
        """The object, and its tag if that may be an MD5."""
        found = obstore.get(self._store, path)
        size, tag = found.meta["size"], _MD5.fullmatch(found.meta["e_tag"] or "")
        if size > limit:
            raise CorruptError(f"{self.url}/{path} has {size} bytes, more than the {limit} allowed")
        content = memoryview(found.bytes())  # no copy
        if len(content) != size:
            raise oe.GenericError(f"{len(content)} of {size} bytes came")
        return content, tag

    def size(self, path: str) -> int | None:
        try:
            return self._try(path, lambda: obstore.head(self._store, path)["size"])
        except NotFoundError:
            return None

    def create(self, path: str, data: Content) -> bool:
        def put() -> bool:
            try:
                done = obstore.put(self._store, path, data, mode="create", use_multipart=False)
            except oe.AlreadyExistsError as e:
                if failure(e).kind == "passing":  # somebody is writing it right now
                    raise
                return False  # perhaps by our own request, whose answer was lost
            tag = _MD5.fullmatch(done["e_tag"] or "")
            return tag is None or tag[1] == _md5(data)

        if self._try(path, put):
            return True
        try:
            return self.fetch(path, len(data), files.sha256(data)) == data
        except (CorruptError, NotFoundError):  # it is another's, or was one that is removed by now
            return False

    def require_create_only(self, path: str) -> None:
        # If the server overwrites the object, it does so with the same bytes.
        content = self.read(path, 1 << 20)

        def put() -> bool:
            try:
                obstore.put(self._store, path, content, mode="create", use_multipart=False)
            except oe.AlreadyExistsError:
                return True
            return False

        if not self._try(path, put):
            raise InputError(
                f"{self.url}: this server overwrites objects that exist although asked not to (If-None-Match), so that "
                "nothing can be published safely: use another server"
            )

    def replace(self, path: str, data: bytes) -> None:
        self._try(path, lambda: obstore.put(self._store, path, data, use_multipart=False))

    def sizes(self, folder: str) -> dict[str, int]:
        def listed() -> dict[str, int]:
            found = (meta for page in obstore.list(self._store, folder) for meta in page)
            return {meta["path"].removeprefix(f"{folder}/"): meta["size"] for meta in found}

        # Nothing protects a list on its way, and a name that arrived wrong would count as removed. So two lists in a
        # row must agree, unless others change the folder all the time.
        found = self._try(f"{folder}/", listed)
        for _ in range(_WRONG_AT_MOST):
            before, found = found, self._try(f"{folder}/", listed)
            if found == before:
                break
        return found

    def newest(self, folder: str) -> float:
        return max(self.times(folder).values(), default=0.0)

    def times(self, folder: str) -> dict[str, float]:
        def listed() -> dict[str, float]:
            found = (meta for page in obstore.list(self._store, folder) for meta in page)
            return {meta["path"].removeprefix(f"{folder}/"): meta["last_modified"].timestamp() for meta in found}

        return self._try(f"{folder}/", listed)

    def changed(self, path: str) -> float:
        def last() -> float:
            return obstore.head(self._store, path)["last_modified"].timestamp()

        return self._try(path, last)

    def remove(self, paths: list[str]) -> None:
        if paths:
            self._try(paths[0], lambda: obstore.delete(self._store, paths))

    def folders(self, folder: str, holding: str) -> list[str]:
        # There is no need to look for the object that is created first: a folder exists only by its objects.
        found = self._try(f"{folder}/", lambda: obstore.list_with_delimiter(self._store, folder))
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    @property
    def _store(self) -> ObjectStore:
        if (first := first_process()) != os.getpid():
            # A forked process lacks obstore's threads, so that every request would wait for ever.
            raise UnreadableError(
                f"{self.url} cannot be read in this process, which was forked from one (process {first}) that has read "
                "over a network: start it by spawn, as multiprocessing.get_context('spawn') does"
            )
        return _store(self.url)

    def _try(self, path: str, request: Callable[[], T]) -> T:
        started, wait, tries = time.monotonic(), 0.1, 0
        while True:
            tries += 1
            try:
                found = request()
            except (oe.BaseError, ValueError, OSError) as e:
                failed = failure(e)
                self._reached |= isinstance(e, FileNotFoundError)
            else:
                self._reached = True
                return found
            # Not in the except clause: obstore's error, which holds the server's answer, must be no part of ours.
            passed = time.monotonic() - started
            patience = {"passing": PATIENCE if self._reached else AT_FIRST, "garbled": AT_FIRST}.get(failed.kind, -1.0)
            if passed + wait > patience:
                raise self._error(path, failed, f"{tries} tries in {passed:.0f} s")
            time.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, _LONGEST_WAIT)

    def _error(self, path: str, failed: Failure, tries: str) -> NotFoundError | UnreadableError:
        if failed.kind == "missing":
            return NotFoundError(f"{self.url}/{path} is missing")
        if failed.kind == "no bucket":
            return NotFoundError(f"{self.url}: there is no such bucket")
        if failed.kind == "final":
            return UnreadableError(f"{self.url}/{path}: {failed.reason}")
        return UnreadableError(
            f"{self.url}/{path}: {failed.reason} ({tries}): check the network, then run the same command again (train: "
            "with --resume), which goes on where it stopped"
        )


class Remote(ZarrChunks):
    """A cache below `prefix` of objects over a network. It asks once what is there, when that is first needed.

    store: keeps chunks. mirror: a local folder that keeps identity and commits, which never change.
    """

    writable = False
    again = "ask who published it to push it again"

    def __init__(
        self, objects: RemoteObjects, prefix: str, identity: Identity, mirror: Path, store: LocalStore
    ) -> None:
        self._objects, self._prefix, self._identity = objects, prefix, identity
        self._mirror, self._store = mirror, store
        self.where = f"{objects.url}/{prefix}"
        self.path: Path | None = None

    def fresh(self) -> Remote:
        return Remote(self._objects, self._prefix, self._identity, self._mirror, self._store)

    def locate(self, file: str) -> str:
        return f"{self.where}/{file}"

    @cached_property
    def files(self) -> dict[str, int]:
        """Sizes by name: of all files, or, where files cannot be listed, of the commits that were found by asking."""
        return self._objects.sizes(self._prefix) if self._objects.listable else self._probed()

    def _probed(self) -> dict[str, int]:
        """Ask for each commit that there can be; for those of views from view 0 on, until one is missing."""
        train, evaluation = SplitLayout(self._identity, "train"), SplitLayout(self._identity, "eval")
        fixed = [split.commit_file(name) for split in (train, evaluation) for name in ("labels", "sizes", "prior")]
        fixed += map(evaluation.commit_file, evaluation.shards([0]))
        found: dict[str, int] = {}
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="kdcache-probe") as threads:

            def ask(names: list[str]) -> bool:
                answers = threads.map(lambda name: self._objects.size(f"{self._prefix}/{name}"), names)
                there = {name: size for name, size in zip(names, answers, strict=True) if size is not None}
                found.update(there)
                return len(there) == len(names)

            self._require_not_all()
            ask(fixed)
            step = -(-_AT_ONCE // train.parts)
            for first in range(0, MOST_VIEWS, step):
                if not ask([train.commit_file(name) for name in train.shards(range(first, first + step))]):
                    break
        return found

    def _require_not_all(self) -> None:
        """UnreadableError for a server that has an answer to everything, as some have a page for what is not there."""
        if self._objects.size(f"{self._prefix}/commits/{secrets.token_hex(8)}.json") is not None:
            raise UnreadableError(
                f"{self._objects.url} answers 200 for files that do not exist: what is missing needs status 404"
            )

    def has(self, file: str) -> bool:
        return file == "identity.json" or file in self.files

    def names(self, folder: str) -> list[str]:
        prefix = f"{folder}/"
        return [name.removeprefix(prefix) for name in self.files if name.startswith(prefix)]

    def read(self, file: str, limit: int) -> bytes:
        """A commit is kept here once it is found to be the one of that name, and never on the server's word alone."""
        if file == "identity.json":
            return canonical(self._identity)
        if not file.rpartition("/")[0].endswith("commits"):  # signatures, of which the newest count
            return self._objects.read(f"{self._prefix}/{file}", limit)
        kept = self._mirror / file
        try:
            if self._is_commit(file, content := files.read_bounded(kept, limit)):
                return content
        except (CorruptError, NotFoundError):
            pass  # it is asked for
        for _ in range(_WRONG_AT_MOST):
            content = self._objects.read(f"{self._prefix}/{file}", limit)
            if self._is_commit(file, content):
                files.publish(kept, content, self._mirror / "scratch", replace=True)
                break
        return content  # which whoever asked for it refuses where it is none

    def _is_commit(self, file: str, content: bytes) -> bool:
        """Whether this is a commit of that name in this cache, which names the files that it has to."""
        split = SplitLayout(self._identity, "eval" if file.startswith("eval/") else "train")
        name = file.rpartition("/")[2].removesuffix(".json")
        try:
            commit = parse(Commit, content, file, "")
            files_named = {chunk.file for chunk in split.chunks(name)}
        except (CorruptError, MismatchError, ValueError):
            return False
        told = (commit.key, commit.name, commit.format, set(commit.files))
        return told == (self._identity.key, name, self._identity.format, files_named)

    def distrust(self, file: str) -> bool:
        kept = self._mirror / file
        there = files.is_there(kept)
        files.discard(kept)
        return there

    def require(self, file: str, stored: StoredFile) -> None:
        for name in (file, other(stored)):
            path = f"{self._prefix}/{name}"
            if (self.files.get(name) if self._objects.listable else self._objects.size(path)) == stored.size:
                return
        raise CorruptError(f"{self.locate(file)} is not the object of {stored.size} bytes that was committed")

    def metadata(self, file: str) -> bytes | None:
        return self._objects.read(f"{self._prefix}/{file}", MAX_JSON_BYTES)

    def content(self, file: str, stored: StoredFile, chunk: Chunk) -> Content:
        if not _SHA256.fullmatch(stored.sha256) or not 0 <= stored.size <= chunk.spec.max_file_bytes:
            raise CorruptError(f"the commit of {self.locate(file)} names {stored.size} bytes, which is impossible")
        return self._store.get(stored, lambda: self._fetch(file, stored))

    def _fetch(self, file: str, stored: StoredFile) -> Content:
        try:
            return self._objects.fetch(f"{self._prefix}/{file}", stored.size, stored.sha256)
        except (NotFoundError, CorruptError) as e:
            # Another publisher may have taken the place earlier, and never committed.
            try:
                return self._objects.fetch(f"{self._prefix}/{other(stored)}", stored.size, stored.sha256)
            except NotFoundError:
                raise e from None

    def remedy(self, file: str) -> str:
        return f"it is damaged there, or what is known of it here is out of date: remove {self._mirror}, then try again"

    def more(self, view: int) -> str:
        return f"run kdcache build with --registry {self._objects.url} --views {view + 1} --push to add it"

    def size(self) -> int:
        if self._objects.listable:
            return sum(self.files.values())
        commits = [(file, self.read(file, MAX_JSON_BYTES)) for file in self.files]
        found = (parse(Commit, content, self.locate(file), self.remedy(file)) for file, content in commits)
        return sum(self.files.values()) + sum(stored.size for commit in found for stored in commit.files.values())

    def check(self) -> None:
        """Nothing to check: the key or a commit covers everything that kdcache reads there."""


def other(stored: StoredFile) -> str:
    """Where a chunk lies if its own place was taken by bytes that were never committed."""
    return f"other/{stored.sha256}"


def _md5(content: Content) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
