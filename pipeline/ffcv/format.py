"""The format of an FFCV file as kdcache packs it: images, labels, and the records of chosen views, in one file.

It is FFCV's format 2. All of it is written and read with NumPy alone: FFCV need not be installed, and it would trust
every header and pointer that it finds. The parts of the file, in their order:

    header, field descriptors           FFCV's
    table                               a row for each sample: image pointer and size, label(s), index, records pointer
    pages of `page_size` bytes          each sample's image, then its records [V, R + 4] uint8
    blocks                              the evaluation split (records and labels), then the class prior
    notes, trailer                      JSON of `Notes`; then its sha256 and length, and our magic
    allocation table                    FFCV's: sample, pointer and size of each region, to the end of the file

R bytes are the arrays of a record one after the other (cache/store/chunks.py). The four bytes behind them are a CRC-32
that also covers the place (sample, view), so that a loader can check the one record that it copies.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.identity import Identity, Sha256, Strict
from kdcache.cache.store.layout import ArraySpec, record_arrays
from kdcache.pipeline.data.imagefiles import Triple

SUFFIX = ".beton"
AREA_RENDERER = "ffcv-area-1"  # decodes JPEG by turbojpeg's fast DCT, resizes by OpenCV's INTER_AREA
FORMAT = 2  # FFCV's
JPEG, RAW = 0, 1  # FFCV's modes of an image
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31  # bytes
CRC_BYTES = 4
CRC_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    CRC_TABLE = np.where(CRC_TABLE & 1, (CRC_TABLE >> 1) ^ np.uint32(0xEDB88320), CRC_TABLE >> 1)

VERSION = 1  # of the notes
MAGIC = b"kdcache\n"
TRAILER = struct.Struct("<32sQQ8s")  # sha256 and length of the notes, version, magic
MAX_NOTES = 1 << 26  # bytes
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations", "<u8")]
)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
_FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
_INT, _RGB, _NDARRAY = 1, 2, 4  # FFCV's types of a field


class Block(Strict):
    """Bytes somewhere in the file."""

    offset: int
    size: int
    sha256: Sha256


class PackedView(Strict):
    """One view: the digests of its parameters, one for each part as in its commits, and of its records [N, R]."""

    view: int
    parameters: tuple[Sha256, ...]
    records: Sha256


class Notes(Strict):
    """What kdcache writes into a file because FFCV's own headers have no place for it.

    mean, std: the dataset's. table: the digest of everything before the pages, and of the allocation table. pixels:
    the digest of all images where they are raw pixels of one size; None where they are image files.
    """

    identity: Identity
    mean: Triple
    std: Triple
    views: tuple[PackedView, ...]
    table: Sha256
    pixels: Sha256 | None
    evaluation: Block
    prior: Block | None


def checksum_seed(sample: Any, view: Any) -> Any:
    """The start of a record's CRC, modulo 2^32. It tells the place, so that a record in another's place is noticed."""
    return (sample + view * 2654435761) & 0xFFFFFFFF


def checksums(rows: NDArray[np.uint8], first: int, view: int) -> NDArray[np.uint32]:
    """CRC-32 [n], as zlib computes it, of the records [n, R] of samples first, first + 1, ..."""
    crc: NDArray[np.uint32] = ~checksum_seed(np.arange(first, first + len(rows)), view).astype(np.uint32)
    for column in rows.T:
        crc = CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    return ~crc


class Layout:
    """The field descriptors and the type of the table, which follow from the identity and the number of views."""

    def __init__(self, identity: Identity, views: int) -> None:
        record = identity.record
        self.arrays = record_arrays(record, 1, 1)
        self.record_bytes = sum(spec.chunk_bytes for spec in self.arrays)
        self.labels = ["label", "label2"][: record.labels]
        shape = (views, self.record_bytes + CRC_BYTES)
        self.sample_bytes = views * shape[1]
        fields = [("image", _RGB, _IMAGE), *((name, _INT, "<i8") for name in (*self.labels, "index"))]
        fields.append(("records", _NDARRAY, "<u8"))
        self.table = np.dtype([(name, kind) for name, _, kind in fields], align=True)
        self.descriptors = np.zeros(len(fields), _FIELD)
        for row, (name, kind, _) in zip(self.descriptors, fields, strict=True):
            row["type"], row["name"] = kind, name.encode()
        description = json.dumps([["", "|u1"]]).encode()
        arguments = np.array([*shape, *[0] * 30, len(description)], "<u8").tobytes() + description
        self.descriptors[-1]["arguments"] = np.void(arguments.ljust(1024, b"\0"))

    def split(self, rows: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Split records [n, R] into copies of their arrays, by name."""
        out, at = {}, 0
        for spec in self.arrays:
            out[spec.name] = rows[:, at : at + spec.chunk_bytes].copy().view(_little(spec))
            at += spec.chunk_bytes
        return out

    def join(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Join arrays to records uint8 [n, R]: the inverse of split."""
        parts = [np.ascontiguousarray(arrays[spec.name], _little(spec)).view(np.uint8) for spec in self.arrays]
        return np.concatenate(parts, axis=1)


def _little(spec: ArraySpec) -> np.dtype[Any]:
    return np.dtype(spec.dtype).newbyteorder("<")


def allocations(table: NDArray[Any], image_bytes: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """FFCV's allocation table [2 N]: the image, then the records, of each sample."""
    out = np.empty((len(table), 2), ALLOCATION)
    out["sample"] = table["index"][:, None]
    out["pointer"] = np.stack([table["image"]["pointer"], table["records"]], 1)
    out["size"][:, 0], out["size"][:, 1] = image_bytes, layout.sample_bytes
    return out.reshape(-1)
