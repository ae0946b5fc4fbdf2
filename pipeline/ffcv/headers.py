"""Opens an FFCV file and checks its headers: FFCV takes on trust whatever they say."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import CorruptError, InputError, MismatchError, NotFoundError
from kdcache.cache.files import sha256
from kdcache.cache.identity import parse
from kdcache.pipeline.ffcv.format import (
    ALLOCATION,
    FORMAT,
    HEADER,
    JPEG,
    MAGIC,
    MAX_NOTES,
    MAX_PAGE,
    MIN_PAGE,
    RAW,
    TRAILER,
    VERSION,
    Layout,
    Notes,
    allocations,
)


class Headers(NamedTuple):
    """A file's bytes, mapped, and what its headers say.

    table [N]: image (mode, width, height, pointer), label(s), index and records (pointer). image_bytes [N]: each
    image's length.
    """

    content: NDArray[np.uint8]
    notes: Notes
    layout: Layout
    table: NDArray[Any]
    image_bytes: NDArray[np.int64]


def read_headers(path: Path) -> Headers:
    """The headers of the file that kdcache packed at `path`.

    NotFoundError where there is no file, InputError where kdcache did not pack it, CorruptError where it is damaged or
    forged, MismatchError where a later kdcache packed it.
    """
    content = _mapped(path)
    header = _header(path, content)
    notes, notes_at = _notes(path, content, int(header["allocations"]))
    layout = Layout(notes.identity, len(notes.views))
    return _table(path, content, header, notes, notes_at, layout)


def corrupt(path: Path, problem: str) -> CorruptError:
    """The error for a damaged file, which says what to do."""
    return CorruptError(f"{path}: {problem}; remove it and run kdcache pack again")


def sizes_of(table: NDArray[Any]) -> NDArray[np.int32]:
    """Height and width of each image in pixels, int32 [N, 2]."""
    image = table["image"]
    return np.stack([image["height"], image["width"]], 1).astype(np.int32)


def _mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a plain file, which are read from the disk when they are looked at."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a plain file")
    if found.st_size < HEADER.itemsize + TRAILER.size:
        raise InputError(f"{path} is not an FFCV file of format {FORMAT}")
    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e


def _header(path: Path, content: NDArray[np.uint8]) -> Any:
    header = np.frombuffer(content[: HEADER.itemsize], HEADER)[0]
    if header["version"] != FORMAT or not 1 <= header["fields"] <= 64 or not header["samples"]:
        raise InputError(f"{path} is not an FFCV file of format {FORMAT}")
    if not HEADER.itemsize + TRAILER.size <= header["allocations"] <= len(content):
        raise corrupt(path, "it is cut short")
    return header


def _notes(path: Path, content: NDArray[np.uint8], end: int) -> tuple[Notes, int]:
    """The notes before `end`, and where they begin."""
    trailer: tuple[bytes, int, int, bytes] = TRAILER.unpack(content[end - TRAILER.size : end].tobytes())
    digest, length, version, magic = trailer
    if magic != MAGIC:
        raise InputError(f"{path} is damaged, or not packed by kdcache: make one with kdcache pack CACHE --to ffcv")
    if version > VERSION:
        raise MismatchError(f"{path} has version {version}, this kdcache reads up to {VERSION}: update kdcache")
    start = end - TRAILER.size - length
    if length > MAX_NOTES or start < HEADER.itemsize:
        raise corrupt(path, "its notes are cut short")
    text = content[start : end - TRAILER.size].tobytes()
    if hashlib.sha256(text).digest() != digest:
        raise corrupt(path, "its notes are not what was packed")
    return parse(Notes, text, str(path), "remove it and run kdcache pack again"), start


def _table(path: Path, content: NDArray[np.uint8], header: Any, notes: Notes, end: int, layout: Layout) -> Headers:
    """Return all headers after a check of the table and the allocation table. end: where the notes begin."""
    n = notes.identity.data.samples
    start = HEADER.itemsize + layout.descriptors.nbytes
    if header["samples"] != n or header["fields"] != len(layout.descriptors):
        raise corrupt(path, "its header does not fit its identity")
    table_end, regions_at = start + n * layout.table.itemsize, int(header["allocations"])
    if table_end > end or len(content) - regions_at != 2 * n * ALLOCATION.itemsize:
        raise corrupt(path, "it is cut short")
    head, tail = content[:table_end].tobytes(), content[regions_at:].tobytes()
    if sha256(head + tail) != notes.table:
        raise corrupt(path, "its table is not what was packed")
    regions = np.frombuffer(tail, ALLOCATION).reshape(n, 2)
    found = Headers(
        content,
        notes,
        layout,
        np.frombuffer(head, layout.table, offset=start),
        regions["size"][:, 0].astype(np.int64),
    )
    page = int(header["page_size"])
    if head[HEADER.itemsize : start] != layout.descriptors.tobytes() or not _sound(found, page, regions, end):
        raise corrupt(path, "its table does not fit its identity and length")
    return found


def _sound(found: Headers, page: int, regions: NDArray[Any], end: int) -> bool:
    """Whether all that FFCV takes on trust holds: the digests alone would also fit a forged file."""
    _, notes, layout, table, image_bytes = found
    identity, image, n = notes.identity, table["image"], len(table)
    views, sizes = [v.view for v in notes.views], sizes_of(table)
    raw_bytes = sizes.astype(np.int64).prod(1) * 3
    pages_start = HEADER.itemsize + layout.descriptors.nbytes + table.nbytes
    # Lengths are compared with the room, since a sum of two numbers from the file could overflow.
    room = np.uint64(end) - np.minimum(regions["size"], np.uint64(end))
    labels = [table[name] for name in layout.labels]
    rules = (
        MIN_PAGE <= page <= MAX_PAGE and page & (page - 1) == 0,
        (image["mode"] <= RAW).all() and (raw_bytes > 0).all(),
        ((image["mode"] == JPEG) | (image_bytes == raw_bytes)).all(),
        notes.pixels is None or ((image["mode"] == RAW).all() and (sizes == sizes[0]).all()),
        (table["index"] == np.arange(n)).all(),
        all(((y >= 0) & (y < identity.record.classes)).all() for y in labels),
        (regions.reshape(-1) == allocations(table, image_bytes, layout)).all(),
        (regions["size"] <= end).all() and (regions["pointer"] >= pages_start).all(),
        (regions["pointer"] <= room).all(),
        0 < len(views) == len(set(views)),
        all(len(v.parameters) == -(-n // identity.part) for v in notes.views),
        (notes.prior is None) == identity.record.dense,
    )
    return all(bool(rule) for rule in rules)
