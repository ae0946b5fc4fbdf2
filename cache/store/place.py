"""The places that a cache's files can lie in: what each must offer, and the folder that a build makes.

The other places are packed files (hdf5.py) and registries (registry/kinds/).
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, NotFoundError, UnreadableError
from kdcache.cache.files import Content
from kdcache.cache.identity import MAX_JSON_BYTES
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import Chunk, StoredFile

Kind = Literal["zarr", "hdf5"]


class Place(Protocol):
    """Reads a cache by the names that its files have in a folder. It trusts nothing that no digest covers.

    where: the folder, file or address, for people. path: the folder or file; None where it is not on this machine.
    kind: how arrays are stored there. again: the advice on how to get what is missing. writable: whether the cache can
    be built into and repaired there.
    """

    where: str
    path: Path | None
    kind: Kind
    again: str
    writable: bool

    def fresh(self) -> Place:
        """The same place, without anything in memory from earlier reads."""

    def locate(self, file: str) -> str:
        """Where a file lies, for people."""

    def has(self, file: str) -> bool:
        """Whether there is such a file."""

    def names(self, folder: str) -> list[str]:
        """The names in a folder, perhaps with some that are not kdcache's."""

    def read(self, file: str, limit: int) -> bytes:
        """The file's bytes; NotFoundError if it is missing, CorruptError if it has more than `limit` bytes."""

    def require(self, file: str, stored: StoredFile) -> None:
        """CorruptError unless a committed chunk is there, of the right size if that is known without reading it."""

    def content(self, file: str, stored: StoredFile, chunk: Chunk) -> Content:
        """The bytes that a committed chunk has in a folder; CorruptError unless they are what was committed."""

    def metadata(self, file: str) -> bytes | None:
        """What a file for plain zarr holds, which nothing has checked; None where a place has no such files.

        NotFoundError if it is missing, CorruptError if it is too long, or no plain file.
        """

    def rows(self, file: str, stored: StoredFile, chunk: Chunk, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The rows of a committed chunk, in `out` if given; CorruptError unless they are what was committed."""

    def some_rows(self, file: str, stored: StoredFile, chunk: Chunk, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Those of a committed chunk's rows, ascending places in it; CorruptError unless it is what was committed."""

    def distrust(self, file: str) -> bool:
        """Remove what was kept here of a commit that lies elsewhere; whether there was anything."""

    def remedy(self, file: str) -> str:
        """The advice for a damaged commit, or for damage to what it commits."""

    def more(self, view: int) -> str:
        """The advice on how to get a view that is not there."""

    def size(self) -> int:
        """Bytes of all files."""

    def check(self) -> None:
        """CorruptError if bytes are damaged that `rows` and `read` do not look at."""


def path_of(place: Place) -> Path:
    """The folder or file that a place is; InputError if it is an address."""
    if place.path is None:
        raise InputError(f"{place.where} is not on this machine: run kdcache pull {place.where} first")
    return place.path


class ZarrChunks:
    """Reads rows from Zarr's chunks, for places that can get a chunk's bytes. Their digest covers the rows."""

    kind: Kind = "zarr"

    def locate(self, file: str) -> str:
        raise NotImplementedError

    def distrust(self, file: str) -> bool:
        return False

    def content(self, file: str, stored: StoredFile, chunk: Chunk) -> Content:
        raise NotImplementedError

    def rows(self, file: str, stored: StoredFile, chunk: Chunk, out: NDArray[Any] | None = None) -> NDArray[Any]:
        content = self.content(file, stored, chunk)
        return chunks.decode_part(chunk.spec, chunk.part, content, self.locate(file), out)

    def some_rows(self, file: str, stored: StoredFile, chunk: Chunk, rows: NDArray[np.int64]) -> NDArray[Any]:
        content = self.content(file, stored, chunk)
        return chunks.decode_rows(chunk.spec, chunk.part, content, self.locate(file), rows)


class Folder(ZarrChunks):
    """A cache as it is built: one file for each chunk, readable with zarr."""

    again = "run kdcache build again"
    writable = True

    def __init__(self, path: Path) -> None:
        self.folder, self.where = path, str(path)
        self.path: Path | None = path

    def fresh(self) -> Folder:
        return self

    def at(self, file: str) -> Path:
        """The path by which a file is opened."""
        return self.folder / file

    def locate(self, file: str) -> str:
        return str(self.folder / file)

    def has(self, file: str) -> bool:
        return os.path.lexists(self.at(file))  # a link that leads nowhere is refused when it is read

    def names(self, folder: str) -> list[str]:
        found = self.at(folder)
        return [p.name for p in found.iterdir()] if found.is_dir() else []

    def read(self, file: str, limit: int) -> bytes:
        return files.read_bounded(self.at(file), limit)

    def metadata(self, file: str) -> bytes | None:
        return self.read(file, MAX_JSON_BYTES)

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

    def content(self, file: str, stored: StoredFile, chunk: Chunk) -> Content:
        content = self.read(file, chunk.spec.max_file_bytes)
        if len(content) != stored.size or files.sha256(content) != stored.sha256:
            raise CorruptError(f"{self.locate(file)} is not what was committed")
        return content

    def remedy(self, file: str) -> str:
        return f"remove {self.locate(file)} and run kdcache build again to rebuild that shard"

    def more(self, view: int) -> str:
        return f"run kdcache build with --views {view + 1} or more"

    def size(self) -> int:
        total = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with suppress(FileNotFoundError):  # a temporary file of a build that runs now
                    total += Path(folder, name).lstat().st_size
        return total

    def check(self) -> None:
        """Nothing to check: `metadata` gives what no commit covers, and whoever asks for it compares it."""
