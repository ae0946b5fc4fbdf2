"""A packed cache: the files of a cache folder in one HDF5 file, as arrays that h5py alone can read.

kdcache itself does not read with the HDF5 library, which crashes or never returns on some damaged files (7 of 1,500 in
a check with HDF5 2.0). Instead, an index says where each chunk lies. The place of the index stands in the 512 bytes
before the HDF5 content, which HDF5 leaves to applications (its "user block"):

    bytes 0..511   canonical JSON, padded with newlines: format, place and sha256 of the index, sha256 of bytes 512..
    bytes 512..    HDF5: the arrays by their names in the folder, each part one chunk (shuffle, gzip, fletcher32);
                   identity.json, the commits and index.json as datasets of bytes

So a read takes the bytes at a known place, inflates them to a known size, unshuffles them and compares them with the
commit.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, NotFoundError
from kdcache.cache.identity import FORMAT, Strict, canonical, parse
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import ArraySpec, Chunk, StoredFile
from kdcache.cache.store.place import Kind

# The level of Python's zlib. On real records, 1 gives 1 to 3% more bytes and is little faster; 6 takes twice as long
# to save 1%.
LEVEL = 4
_BLOCK = 512
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FLETCHER_BYTES = 4
_DEFLATE_MOST = 1032  # no deflate stream inflates to more times its size
_MAX_INDEX_BYTES = 1 << 24
_READ_BYTES = 1 << 22
_MEND = "copy it again, or remove it and pack the cache again"


class _Header(Strict):
    """index: offset and size in bytes. sha256: of everything after the block."""

    format: Literal[1] = FORMAT
    index: tuple[int, int]
    index_sha256: str
    sha256: str


class _Index(Strict):
    """files: offset and size in bytes, by the file's name in a cache folder."""

    files: dict[str, tuple[int, int]]


class PackedFile:
    """Reads a packed cache. It holds no open file, so that it may cross a fork or be sent to another process."""

    kind: Kind = "hdf5"
    again = "pack the cache again"
    writable = False

    def __init__(self, path: Path) -> None:
        self._file, self.where = path, str(path)
        self.path: Path | None = path
        block = files.read_range(path, 0, _BLOCK + len(_SIGNATURE), short=True)
        if block[_BLOCK:] != _SIGNATURE:
            foreign = block.startswith(_SIGNATURE)
            what = "an HDF5 file that kdcache did not pack" if foreign else "neither a cache folder nor a packed cache"
            raise InputError(f"{path} is {what}, or it is damaged")
        header = parse(_Header, block[:_BLOCK].rstrip(b"\n"), f"the head of {path}", _MEND)
        if _block(header) != block[:_BLOCK]:
            raise CorruptError(f"the head of {path} is not what kdcache writes; {_MEND}")
        offset, size = header.index
        if not 0 <= size <= _MAX_INDEX_BYTES:
            raise CorruptError(
                f"{path} declares an index of {size} bytes, more than the {_MAX_INDEX_BYTES} allowed; {_MEND}"
            )
        content = self._range("index.json", offset, size)
        if files.sha256(content) != header.index_sha256:
            raise CorruptError(f"the index of {path} is damaged; {_MEND}")
        self._index: Mapping[str, tuple[int, int]] = parse(_Index, content, f"the index of {path}", _MEND).files
        self._sha256 = header.sha256

    def fresh(self) -> PackedFile:
        return PackedFile(self._file)

    def locate(self, file: str) -> str:
        return f"{self._file}/{file}"

    def has(self, file: str) -> bool:
        return file in self._index

    def names(self, folder: str) -> list[str]:
        prefix = f"{folder}/"
        return [name.removeprefix(prefix) for name in self._index if name.startswith(prefix)]

    def read(self, file: str, limit: int) -> bytes:
        if file not in self._index:
            raise NotFoundError(f"{self.where} holds no {file}")
        offset, size = self._index[file]
        if not 0 <= size <= limit:
            raise CorruptError(f"{self.locate(file)} has {size} bytes, more than the {limit} allowed")
        return self._range(file, offset, size)

    def _range(self, file: str, offset: int, size: int) -> bytes:
        try:
            return files.read_range(self._file, offset, size)
        except (CorruptError, NotFoundError) as e:
            raise CorruptError(f"{e} ({file}); {_MEND}") from e

    def require(self, file: str, stored: StoredFile) -> None:
        if file not in self._index:  # its bytes differ from those in a folder, so their size says nothing
            raise CorruptError(f"{self.where} holds no {file}")

    def distrust(self, file: str) -> bool:
        return False

    def content(self, file: str, stored: StoredFile, chunk: Chunk) -> bytes:
        raise InputError(f"{self.where} is packed in chunks of another kind: run kdcache unpack {self.where} first")

    def metadata(self, file: str) -> bytes | None:
        return None  # HDF5 describes its arrays itself, and `check` looks at those bytes too

    def rows(self, file: str, stored: StoredFile, chunk: Chunk, out: NDArray[Any] | None = None) -> NDArray[Any]:
        where, spec = self.locate(file), chunk.spec
        content = self.read(file, spec.max_file_bytes)
        if spec.chunk_bytes > min(chunks.MAX_CHUNK_BYTES, len(content) * _DEFLATE_MOST):
            raise CorruptError(f"{where}: {len(content)} bytes cannot hold the {spec.chunk_bytes} that belong there")
        inflate = zlib.decompressobj()
        try:
            shuffled = inflate.decompress(content[:-_FLETCHER_BYTES], spec.chunk_bytes + 1)
        except zlib.error as e:
            raise CorruptError(f"{where}: {e}") from e
        if len(shuffled) != spec.chunk_bytes or not inflate.eof:
            raise CorruptError(f"{where} does not inflate to the {spec.chunk_bytes} bytes that belong there")
        rows = _unshuffled(shuffled, spec)[: chunk.rows.stop - chunk.rows.start]
        if chunks.rows_digest(spec, rows) != stored.rows:
            raise CorruptError(f"{where} is not what was committed")
        return chunks.filled(out, rows)

    def some_rows(self, file: str, stored: StoredFile, chunk: Chunk, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self.rows(file, stored, chunk)[rows]

    def remedy(self, file: str) -> str:
        return f"copy {self.where} again, or remove it and pack the cache again"

    def more(self, view: int) -> str:
        return f"pack a cache that has it, or run kdcache unpack {self.where} and build it with --views {view + 1}"

    def size(self) -> int:
        return files.size_of(self._file)

    def check(self) -> None:
        """Compare every byte, HDF5's own included, with the digest of the whole; CorruptError where they differ."""
        if _digest(self._file) != self._sha256:
            raise CorruptError(f"{self.where} is not what was packed: {_MEND}")


class Packer:
    """Writes a packed cache into `target`, an open empty file. Every method raises the target's `failure`."""

    def __init__(self, target: Target, key: str) -> None:
        self._target, self._places = target, dict[str, tuple[int, int]]()
        # The formats of HDF5 1.10, which libraries can read since 2016, have checksums over HDF5's own structures.
        self._file = h5py.File(target, "w", userblock_size=_BLOCK, libver=("v110", "v110"))
        self._file.attrs["kdcache"] = key

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def put(self, file: str, content: bytes) -> tuple[int, int]:
        """Write a file as a dataset of bytes. Returns its offset and size in bytes."""
        dataset = self._file.create_dataset(file, data=np.frombuffer(content, np.uint8))
        self._places[file] = dataset.id.get_offset(), len(content)
        self._target.check()
        return self._places[file]

    def rows(self, prefix: str, chunk: Chunk, rows: NDArray[Any]) -> None:
        """Write one part of an array. prefix: the split's folder, as the beginning of a file's name."""
        spec, name = chunk.spec, prefix + chunk.base + chunk.spec.name
        dataset = self._file[name] if name in self._file else self._create(name, spec)
        dataset[chunk.rows] = rows
        info = dataset.id.get_chunk_info_by_coord((chunk.part * spec.rows, *[0] * (len(spec.shape) - 1)))
        self._places[prefix + chunk.file] = info.byte_offset, info.size
        self._target.check()

    def _create(self, name: str, spec: ArraySpec) -> Any:
        dataset = self._file.create_dataset(
            name,
            spec.shape,
            np.dtype(spec.dtype).newbyteorder("<"),
            chunks=spec.chunk_shape,
            shuffle=True,
            compression="gzip",
            compression_opts=LEVEL,
            fletcher32=True,
            fillvalue=spec.fill,
        )
        for dimension, label in zip(dataset.dims, spec.dims, strict=True):
            dimension.label = label
        for attribute, value in spec.attributes:
            dataset.attrs[attribute] = value
        return dataset

    def finish(self) -> None:
        """Write the index and the head, and sync."""
        index = canonical(_Index(files=self._places))
        if len(index) > _MAX_INDEX_BYTES:
            raise InputError(f"{len(self._places)} chunks are too many for one file: pack fewer views with --views")
        place = self.put("index.json", index)
        self._file.close()
        self._target.check()
        header = _Header(index=place, index_sha256=files.sha256(index), sha256=_digest(Path(self._target.name)))
        self._target.seek(0)
        self._target.write(_block(header))
        self._target.check()
        os.fsync(self._target.fileno())


class Target(io.FileIO):
    """A file that the HDF5 library writes into. The library cannot go on after an error, so the first is kept here.

    Otherwise the library would print the error, which it cannot raise, once for each dataset that it closes.
    """

    failure: BaseException | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest):
                rest = rest[super().write(rest) :]
        except BaseException as e:
            self.failure = self.failure or e
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as e:
            self.failure = self.failure or e
            return size or 0

    def check(self) -> None:
        """Raise the first error of all writes so far."""
        if self.failure:
            raise self.failure


def _block(header: _Header) -> bytes:
    return canonical(header).ljust(_BLOCK, b"\n")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for start in range(_BLOCK, files.size_of(path), _READ_BYTES):
        digest.update(files.read_range(path, start, _READ_BYTES, short=True))
    return digest.hexdigest()


def compressed(rows: NDArray[Any]) -> bytes:
    """Compress rows as HDF5 does here, to estimate size and time."""
    planes = np.ascontiguousarray(rows).view(np.uint8).reshape(-1, rows.dtype.itemsize).T
    return zlib.compress(planes.tobytes(), LEVEL)


def _unshuffled(data: bytes, spec: ArraySpec) -> NDArray[Any]:
    """The array whose bytes are shuffled: the first bytes of all items, then all second bytes, and so on."""
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    out = np.empty(planes.shape[::-1], np.uint8)
    for i, plane in enumerate(planes):
        out[:, i] = plane
    return out.view(dtype).reshape(spec.chunk_shape).astype(spec.dtype, copy=False)
