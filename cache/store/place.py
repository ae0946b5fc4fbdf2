"""Where the files of a cache lie: in a folder, as built, or packed into one file."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, NotFoundError, UnreadableError
from kdcache.cache.files import Content
from kdcache.cache.identity import Strict
from kdcache.cache.store import chunks
from kdcache.cache.store.chunks import ArraySpec


class StoredFile(Strict):
    """A committed chunk: its file's size in bytes and sha256, and the sha256 of the rows in it.

    rows: of the part's rows alone as raw little-endian bytes in C order, the same in every kind of store.
    """

    size: int
    sha256: str
    rows: str


class Place(Protocol):
    """Reads a cache by the names that its files have in a folder; nothing is trusted that no digest covers.

    again: what people do to get what is missing. writable: whether it can be built into and repaired.
    """

    path: Path
    again: str
    writable: bool

    def fresh(self) -> Place:
        """The same with nothing in memory that was read before."""

    def has(self, file: str) -> bool:
        """Whether there is such a file."""

    def names(self, folder: str) -> list[str]:
        """The names in a folder; others than kdcache's may be among them."""

    def read(self, file: str, limit: int) -> bytes:
        """The file's bytes; NotFoundError, CorruptError where there are more than `limit`."""

    def require(self, file: str, stored: StoredFile) -> None:
        """CorruptError unless a committed chunk is there and, as far as that is known unread, of its size."""

    def content(self, file: str, stored: StoredFile, spec: ArraySpec, part: int) -> Content:
        """The bytes of a committed chunk as in a folder; CorruptError unless they are what was committed."""

    def rows(
        self, file: str, stored: StoredFile, spec: ArraySpec, part: int, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """The rows of a committed chunk, in `out` if given; CorruptError unless they are what was committed."""

    def remedy(self, file: str) -> str:
        """What people do about a damaged commit, or about what it commits."""

    def more(self, view: int) -> str:
        """What people do to get a view that is not there."""

    def size(self) -> int:
        """Bytes of all files."""

    def check(self) -> None:
        """CorruptError where bytes are damaged that `rows` and `read` do not look at."""


class ZarrChunks:
    """Rows out of Zarr's chunks, for places that know how to get a chunk's bytes. Their digest covers the rows too."""

    path: Path

    def content(self, file: str, stored: StoredFile, spec: ArraySpec, part: int) -> Content:
        raise NotImplementedError

    def rows(
        self, file: str, stored: StoredFile, spec: ArraySpec, part: int, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        content = self.content(file, stored, spec, part)
        return chunks.decode_part(spec, part, content, str(self.path / file), out)


class Folder(ZarrChunks):
    """A cache as it is built: a file a chunk, readable with zarr."""

    again = "run kdcache build again"
    writable = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def fresh(self) -> Folder:
        return self

    def at(self, file: str) -> Path:
        """Where a file lies."""
        return self.path / file

    def has(self, file: str) -> bool:
        return self.at(file).exists()

    def names(self, folder: str) -> list[str]:
        found = self.at(folder)
        return [p.name for p in found.iterdir()] if found.is_dir() else []

    def read(self, file: str, limit: int) -> bytes:
        return files.read_bounded(self.at(file), limit)

    def require(self, file: str, stored: StoredFile) -> None:
        path = self.at(file)
        try:
            found = path.lstat()
        except FileNotFoundError:
            raise NotFoundError(f"{path} is missing") from None
        except OSError as e:
            raise UnreadableError(f"{path} cannot be read: {e.strerror}") from e
        if not stat.S_ISREG(found.st_mode) or found.st_size != stored.size:
            raise CorruptError(f"{path} is not the file of {stored.size} bytes that was committed")

    def content(self, file: str, stored: StoredFile, spec: ArraySpec, part: int) -> Content:
        content = self.read(file, spec.max_file_bytes)
        if len(content) != stored.size or files.sha256(content) != stored.sha256:
            raise CorruptError(f"{self.path / file} is not what was committed")
        return content

    def remedy(self, file: str) -> str:
        return f"remove {self.path / file} and run kdcache build again to make that shard anew"

    def more(self, view: int) -> str:
        return f"run kdcache build with --views {view + 1} or more"

    def size(self) -> int:
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                with suppress(FileNotFoundError):  # a temporary file of a build that runs now
                    total += Path(folder, name).lstat().st_size
        return total

    def check(self) -> None:
        """Plain zarr's metadata is all that no commit covers, and kdcache reads none of it."""
