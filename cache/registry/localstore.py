"""A local store of what came over a network, so that nothing is fetched twice."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, NotFoundError
from kdcache.cache.files import Content
from kdcache.cache.store.layout import StoredFile

LOCAL_STORE_BYTES = 20 * 10**9
_EVICT_TO = 0.9  # of the limit, so that not all files are looked at again for every new one


class LocalStore:
    """Chunks that came over a network, in files named by their sha256 below `folder`, shared by all processes.

    They take about `limit` bytes at most: those that were not read for the longest time are removed first. Each chunk
    is compared with its digest whenever it is read.
    """

    def __init__(self, folder: Path, limit: int = LOCAL_STORE_BYTES) -> None:
        self._folder, self._limit = folder, limit
        self._come: int | None = None  # bytes that came since all files were looked at

    def get(self, stored: StoredFile, fetch: Callable[[], Content]) -> Content:
        """The bytes of that digest. Those that are not here yet are fetched by `fetch` and kept."""
        folder = self._folder / stored.sha256[:2]
        file = folder / stored.sha256
        if (content := _held(file, stored)) is not None:
            return content
        if stored.size > self._limit:
            return fetch()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # so that only one of several processes fetches
            if (content := _held(file, stored)) is None:
                content = fetch()
                self._keep(file, content)
        return content

    def keep(self, stored: StoredFile, content: Content) -> None:
        """Keep bytes of that digest, which did not come over a network."""
        self.get(stored, lambda: content)

    def has(self, stored: StoredFile) -> bool:
        """Whether the bytes of that digest seem to be here; they are checked when they are read."""
        file = self._folder / stored.sha256[:2] / stored.sha256
        return file.is_file() and file.stat().st_size == stored.size

    def drop(self, stored: StoredFile) -> None:
        """Remove the bytes of that digest, which are kept elsewhere too."""
        (self._folder / stored.sha256[:2] / stored.sha256).unlink(missing_ok=True)

    def _keep(self, file: Path, content: Content) -> None:
        # Not synced: what a crash leaves does not match its digest, and is fetched again.
        temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
        temporary.write_bytes(content)
        with suppress(FileNotFoundError):  # in a very small store another process may remove it to make room
            temporary.replace(file)
        self._come = None if self._come is None else self._come + len(content)
        if self._come is None or self._come > self._limit // 20:
            self.make_room()

    def beyond(self) -> list[tuple[Path, int]]:
        """The files to remove if there is more than the limit, with their bytes; those unread for longest first."""
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
        ):  # if another process is doing it, that is enough
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
