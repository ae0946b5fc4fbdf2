"""Reading a cache where it lies: in a bucket or on a web server, by way of a local store; or in a shared folder."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, NotFoundError
from kdcache.cache.files import Content
from kdcache.cache.identity import MAX_JSON_BYTES, Identity, canonical, parse
from kdcache.cache.registry.objects import FolderObjects, NetworkObjects
from kdcache.cache.store.layout import Chunk, Commit, SplitLayout, StoredFile
from kdcache.cache.store.place import Folder, ZarrChunks

LOCAL_STORE_BYTES = 20 * 10**9
MOST_VIEWS = 100_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AT_ONCE = 32  # requests that ask what there is
_EVICT_TO = 0.9  # of the limit, so that not every file that comes costs a look at all


class LocalStore:
    """Chunks that came over a network, in files named by their sha256 below `folder`, shared by all processes.

    At most about `limit` bytes: those that were not read for the longest time go first. Each is compared with its
    digest whenever it is read.
    """

    def __init__(self, folder: Path, limit: int = LOCAL_STORE_BYTES) -> None:
        self._folder, self._limit = folder, limit
        self._come: int | None = None  # bytes that came since all files were looked at

    def get(self, stored: StoredFile, fetch: Callable[[], Content]) -> Content:
        """The bytes of that digest: from here, else those that `fetch` brings, which are kept."""
        folder = self._folder / stored.sha256[:2]
        file = folder / stored.sha256
        if (content := _held(file, stored)) is not None:
            return content
        if stored.size > self._limit:
            return fetch()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # so that of several processes one fetches
            if (content := _held(file, stored)) is None:
                content = fetch()
                self._keep(file, content)
        return content

    def _keep(self, file: Path, content: Content) -> None:
        # Not synced: what a crash leaves has another digest, and is fetched again.
        temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
        temporary.write_bytes(content)
        with suppress(FileNotFoundError):  # a very small store, and another process makes room
            temporary.replace(file)
        self._come = None if self._come is None else self._come + len(content)
        if self._come is None or self._come > self._limit // 20:
            self.make_room()

    def beyond(self) -> list[tuple[Path, int]]:
        """The files that go where there is more than the limit, and their bytes; unread for longest first."""
        found: list[tuple[int, int, Path]] = []
        for where, _, names in os.walk(self._folder):
            for name in names:
                with suppress(FileNotFoundError):
                    about = Path(where, name).stat()
                    found.append((about.st_mtime_ns, about.st_size, Path(where, name)))
        total, gone = sum(size for _, size, _ in found), []
        if total > self._limit:
            for _, size, path in sorted(found):
                if path.name != "lock" and total > self._limit * _EVICT_TO:
                    gone.append((path, size))
                    total -= size
        return gone

    def make_room(self) -> None:
        """Remove what is beyond the limit."""
        with (
            suppress(Timeout),
            FileLock(self._folder / "lock", timeout=0),
        ):  # where another process is at it, it does it
            for path, _ in self.beyond():
                path.unlink(missing_ok=True)
        self._come = 0


def _held(file: Path, stored: StoredFile) -> Content | None:
    try:
        content = files.read_bounded(file, stored.size)
    except (NotFoundError, CorruptError):
        return None
    if len(content) != stored.size or files.sha256(content) != stored.sha256:
        return None
    with suppress(FileNotFoundError):  # evicted just now
        os.utime(file)
    return content


class Remote(ZarrChunks):
    """A cache below `prefix` of remote objects. What there is is asked once, when it is first needed.

    store: keeps chunks. mirror: a local folder that keeps identity and commits, which never change.
    """

    writable = False
    again = "ask who published it to push it again"

    def __init__(
        self, objects: NetworkObjects, prefix: str, identity: Identity, mirror: Path, store: LocalStore
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
        """Sizes by name: of all files, or, where they cannot be listed, of the commits that probing finds."""
        return self._objects.sizes(self._prefix) if self._objects.listable else self._probed()

    def _probed(self) -> dict[str, int]:
        """Names are foretold; views are asked for from 0 on, until one is not there."""
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

            ask(fixed)
            step = -(-_AT_ONCE // train.parts)
            for first in range(0, MOST_VIEWS, step):
                if not ask([train.commit_file(name) for name in train.shards(range(first, first + step))]):
                    break
        return found

    def has(self, file: str) -> bool:
        return file == "identity.json" or file in self.files

    def names(self, folder: str) -> list[str]:
        prefix = f"{folder}/"
        return [name.removeprefix(prefix) for name in self.files if name.startswith(prefix)]

    def read(self, file: str, limit: int) -> bytes:
        if file == "identity.json":
            return canonical(self._identity)
        try:
            return files.read_bounded(self._mirror / file, limit)
        except NotFoundError:
            content = self._objects.read(f"{self._prefix}/{file}", limit)
        files.publish(self._mirror / file, content, self._mirror / "scratch")
        return content

    def require(self, file: str, stored: StoredFile) -> None:
        for name in (file, other(stored)):
            path = f"{self._prefix}/{name}"
            if (self.files.get(name) if self._objects.listable else self._objects.size(path)) == stored.size:
                return
        raise CorruptError(f"{self.locate(file)} is not the object of {stored.size} bytes that was committed")

    def content(self, file: str, stored: StoredFile, chunk: Chunk) -> Content:
        if not _SHA256.fullmatch(stored.sha256) or not 0 <= stored.size <= chunk.spec.max_file_bytes:
            raise CorruptError(f"the commit of {self.locate(file)} names {stored.size} bytes, which cannot be")
        return self._store.get(stored, lambda: self._fetch(file, stored))

    def _fetch(self, file: str, stored: StoredFile) -> Content:
        try:
            return self._objects.read(f"{self._prefix}/{file}", stored.size, stored.sha256)
        except (NotFoundError, CorruptError) as e:
            # Perhaps another publisher was there before, and has not committed.
            try:
                return self._objects.read(f"{self._prefix}/{other(stored)}", stored.size, stored.sha256)
            except NotFoundError:
                raise e from None

    def remedy(self, file: str) -> str:
        return (
            f"it is damaged there, or what is known of it in {self._mirror} is out of date: remove that, then try again"
        )

    def more(self, view: int) -> str:
        return f"kdcache build with --registry {self._objects.url} --views {view + 1} --push adds it"

    def size(self) -> int:
        if self._objects.listable:
            return sum(self.files.values())
        commits = [(file, self.read(file, MAX_JSON_BYTES)) for file in self.files]
        found = (parse(Commit, content, self.locate(file), self.remedy(file)) for file, content in commits)
        return sum(self.files.values()) + sum(stored.size for commit in found for stored in commit.files.values())

    def check(self) -> None:
        """Nothing is there that neither the key nor a commit covers, and kdcache reads."""


class SharedFolder(Folder):
    """A cache in the folder of a registry: not followed through links, and not repaired by those who only use it."""

    writable = False

    def __init__(self, objects: FolderObjects, prefix: str) -> None:
        super().__init__(objects.root / prefix)
        self._objects, self._prefix = objects, prefix

    def at(self, file: str) -> Path:
        return self._objects.at(f"{self._prefix}/{file}")

    def remedy(self, file: str) -> str:
        return f"ask who keeps that registry to run kdcache verify {self.where} --repair, then to build it again"


def other(stored: StoredFile) -> str:
    """Where a chunk lies whose own place was taken by one that was never committed."""
    return f"other/{stored.sha256}"
