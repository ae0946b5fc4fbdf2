"""One part of one array to and from the bytes of a Zarr v3 chunk.

Metadata is always generated from the identity, never taken from a cache: a foreign codec, dtype or shape in a
file cannot reach the decoder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from kdcache.cache.errors import CorruptError
from kdcache.cache.files import Content
from kdcache.cache.identity import NO_TAIL, STEP, RecordIdentity
from kdcache.cache.identity import id_dtype as id_dtype

if TYPE_CHECKING:  # torch takes seconds to import, and much that is done with a cache needs no tensors
    import torch

    from kdcache.cache.records import Records

# Blosc never grows data by more than its header and a few bytes a block, and takes no more than this at once.
_OVERHEAD = 4096
MAX_CHUNK_BYTES = 2**31 - 17
_CRC_BYTES = 4


@dataclass(frozen=True)
class ArraySpec:
    """An array [N, ...] in chunks of `rows` rows; `attributes` are for people who open it with zarr alone."""

    name: str
    shape: tuple[int, ...]
    rows: int
    dtype: str
    dims: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()

    @property
    def fill(self) -> float | int:
        """Shows a hole: NaN, or the largest id."""
        return float("nan") if np.dtype(self.dtype).kind == "f" else int(np.iinfo(self.dtype).max)

    @property
    def level(self) -> int:
        """Of blosc: bench/codec.py. The best for records of few bytes, which are soon done; faster for dense ones."""
        return 9 if np.dtype(self.dtype).kind == "u" else 5

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (min(self.rows, self.shape[0]), *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    @property
    def max_file_bytes(self) -> int:
        return self.chunk_bytes + self.chunk_bytes // 128 + _OVERHEAD

    def chunk_file(self, part: int) -> str:
        return "/".join([self.name, "c", str(part), *["0"] * (len(self.shape) - 1)])

    def interval(self, part: int) -> slice:
        return slice(part * self.rows, min((part + 1) * self.rows, self.shape[0]))


def record_arrays(record: RecordIdentity, samples: int, part: int) -> list[ArraySpec]:
    """The arrays of one view. An array without elements (K = 1 gaps, L = 0 labels) is left out."""
    ids = id_dtype(record.classes)
    names: list[tuple[str, int, str, str]] = []
    if record.k is not None:
        names.append(("classes", record.k, ids, "rank"))
        names.append(("gaps", record.k - 1, record.precision, "rank_from_2"))
    else:
        names.append(("gaps", record.classes, record.precision, "class"))
    names.append(("target_gap", record.target_gaps, "float16", "label"))
    if record.k is not None:
        coded = record.precision == "uint8"
        names.append(("tail", len(record.temperatures), "uint8" if coded else "float16", "temperature"))
        if record.tail_std:
            names.append(("tail_std", 2, "float16", "std_and_tail"))
    return [
        ArraySpec(name, (samples, width), part, dtype, ("sample", dim), _notes(name, record))
        for name, width, dtype, dim in names
        if width
    ]


def view_arrays(policy: str, samples: int, part: int) -> list[ArraySpec]:
    """The arrays of a view that say how an imported one was made; none of one that is drawn."""
    if policy == "stored":
        return [
            ArraySpec("boxes", (samples, 4), part, "int32", ("sample", "top_left_height_width")),
            ArraySpec("flips", (samples,), part, "uint8", ("sample",)),
        ]
    return [ArraySpec("seeds", (samples,), part, "int32", ("sample",))] if policy == "foreign" else []


def _notes(name: str, record: RecordIdentity) -> tuple[tuple[str, Any], ...]:
    """How to read an array's numbers, for people who open it with zarr alone."""
    coded = record.k is not None and record.precision == "uint8"
    if name == "gaps":
        return (("nats", f"{STEP} * cumulative sum along the row" if coded else "as stored"),)
    if name == "tail":
        most = f"log({record.classes} - {record.k}) - last gap / temperature - {STEP} * code; {NO_TAIL}: no tail"
        return ("temperatures", record.temperatures), ("nats", most if coded else "as stored")
    return ()


def encode_as(record: RecordIdentity, logits: torch.Tensor, labels: torch.Tensor, check: bool = True) -> Records:
    """Logits [B, C] and labels [B, L] as a cache stores them; check: as in `encode`."""
    from kdcache.cache.records import encode

    return encode(logits, labels, record.k, record.temperatures, record.precision, record.tail_std, check)


def as_tensors(records: Records) -> dict[str, torch.Tensor]:
    """The fields of records by the name of the array that stores them."""
    fields = {"gaps": records.gaps, "target_gap": records.target_gap, "tail": records.tail}
    if records.classes is not None:
        fields["classes"] = records.classes
    if records.tail_std is not None:
        fields["tail_std"] = records.tail_std
    return fields


def as_arrays(records: Records) -> dict[str, NDArray[Any]]:
    """as_tensors, in NumPy."""
    return {name: tensor.cpu().numpy() for name, tensor in as_tensors(records).items()}


def as_records(
    record: RecordIdentity, stored: Mapping[str, NDArray[Any]], labels: NDArray[Any], prior: torch.Tensor | None
) -> Records:
    """The inverse of as_arrays; arrays without elements may be missing. labels [B, L]; shares memory."""
    import torch

    from kdcache.cache.records import Records

    def tensor(name: str, dtype: str) -> torch.Tensor:
        found = stored.get(name)
        return torch.from_numpy(np.empty((len(labels), 0), dtype) if found is None else found)

    return Records(
        classes=None if record.dense else torch.from_numpy(stored["classes"]),
        gaps=tensor("gaps", record.precision),
        target_gap=tensor("target_gap", "float16"),
        tail=tensor("tail", "float16"),
        labels=torch.from_numpy(labels),
        num_classes=record.classes,
        temperatures=() if record.dense else record.temperatures,
        tail_std=torch.from_numpy(stored["tail_std"]) if record.tail_std else None,
        prior=prior,
    )


def _open(store: dict[str, Buffer], spec: ArraySpec) -> Any:
    return zarr.create_array(
        MemoryStore(store),
        name=spec.name,
        shape=spec.shape,
        chunks=spec.chunk_shape,
        dtype=spec.dtype,
        fill_value=spec.fill,
        dimension_names=spec.dims,
        attributes=dict(spec.attributes),
        compressors=(BloscCodec(cname="zstd", clevel=spec.level, shuffle=BloscShuffle.shuffle), Crc32cCodec()),
        zarr_format=3,
        config={"write_empty_chunks": True},
    )


@cache
def group_metadata() -> bytes:
    """The zarr.json of a view's group."""
    store: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(store), zarr_format=3)
    return store["zarr.json"].to_bytes()


@lru_cache(100)  # zarr takes milliseconds, and every view's are the same
def array_metadata(spec: ArraySpec) -> bytes:
    """The zarr.json of an array."""
    store: dict[str, Buffer] = {}
    _open(store, spec)
    return store[f"{spec.name}/zarr.json"].to_bytes()


def rows_digest(spec: ArraySpec, rows: NDArray[Any]) -> str:
    """sha256 of rows as raw little-endian bytes in C order: says what they are in every kind of store."""
    return hashlib.sha256(np.ascontiguousarray(rows, np.dtype(spec.dtype).newbyteorder("<")).data).hexdigest()


def encode_part(spec: ArraySpec, part: int, data: NDArray[Any]) -> bytes:
    """The chunk's bytes for rows `spec.interval(part)`."""
    store: dict[str, Buffer] = {}
    _open(store, spec)[spec.interval(part)] = data
    return store[spec.chunk_file(part)].to_bytes()


def decode_part(spec: ArraySpec, part: int, data: Content, where: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """The rows of a part, in `out` if given; CorruptError naming the file where the bytes are not such a chunk."""
    # Blosc's header declares how much it will write and read; it does neither check, so both are checked here.
    if len(data) < 16 + _CRC_BYTES:
        raise CorruptError(f"{where}: {len(data)} bytes are no chunk")
    writes, reads = (int.from_bytes(data[i : i + 4], "little") for i in (4, 12))
    if writes != spec.chunk_bytes:
        raise CorruptError(f"{where}: declares {writes} bytes of data where {spec.chunk_bytes} belong")
    if reads != len(data) - _CRC_BYTES:
        raise CorruptError(f"{where}: declares {reads} compressed bytes and has {len(data) - _CRC_BYTES}")
    content = np.frombuffer(data, np.uint8)[:-_CRC_BYTES]  # no copy
    if google_crc32c.value(content) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise CorruptError(f"{where}: its checksum is not that of its bytes")
    # Without zarr, whose ways around blosc take several times as long as blosc itself.
    rows, dtype = spec.interval(part), np.dtype(spec.dtype).newbyteorder("<")
    direct = out is not None and len(out) == spec.chunk_shape[0] and out.dtype == dtype and out.flags.c_contiguous
    chunk = out if direct else np.empty(spec.chunk_shape, dtype)
    try:
        blosc.decompress(content, chunk)
    except RuntimeError as e:
        raise CorruptError(f"{where}: {e}") from e
    assert chunk is not None
    if direct:
        return chunk
    return filled(out, chunk[: rows.stop - rows.start].astype(spec.dtype, copy=False))


def filled(out: NDArray[Any] | None, rows: NDArray[Any]) -> NDArray[Any]:
    """The rows, in `out` if given."""
    if out is None:
        return rows
    out[:] = rows
    return out
