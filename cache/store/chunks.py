"""Encodes a part of an array as the bytes of a Zarr v3 chunk, and decodes it. Turns records into arrays, and back.

Metadata is always generated from the identity and never taken from a cache, so that a foreign codec, dtype or shape in
a file cannot reach the decoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
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
from kdcache.cache.identity import NO_TAIL, RecordIdentity
from kdcache.cache.store.layout import ArraySpec, Chunk

if TYPE_CHECKING:  # torch takes seconds to import, and much that is done with a cache needs no tensors
    import torch

    from kdcache.cache.records.records import Records

# Blosc takes no more than this at once.
MAX_CHUNK_BYTES = 2**31 - 17
_CRC_BYTES = 4
_STORED = 2  # the flag in Blosc's head of what could not be compressed
# Fields of zarr.json that some versions of zarr leave out where they are empty.
_MAY_BE_EMPTY = ("attributes", "storage_transformers", "consolidated_metadata", "configuration", "dimension_names")


def encode_as(
    record: RecordIdentity, logits: torch.Tensor, labels: torch.Tensor, check: bool = True, carry: bool = True
) -> Records:
    """Logits [B, C] and labels [B, L] encoded as a cache stores them; for `check` and `carry` see `encode`."""
    from kdcache.cache.records.encoding import encode

    k, temperatures, precision = record.k, record.temperatures, record.precision
    return encode(logits, labels, k, temperatures, precision, record.tail_std, check, carry=carry)


def as_tensors(records: Records) -> dict[str, torch.Tensor]:
    """The tensors of records, by the name of the array that stores each."""
    fields = {"gaps": records.gaps, "target_gap": records.target_gap, "tail": records.tail}
    if records.classes is not None:
        fields["classes"] = records.classes
    if records.tail_std is not None:
        fields["tail_std"] = records.tail_std
    return fields


def as_arrays(records: Records) -> dict[str, NDArray[Any]]:
    """The tensors of `as_tensors` as NumPy arrays on the CPU."""
    return {name: tensor.cpu().numpy() for name, tensor in as_tensors(records).items()}


def as_records(
    record: RecordIdentity, stored: Mapping[str, NDArray[Any]], labels: NDArray[Any], prior: torch.Tensor | None
) -> Records:
    """Records from their arrays, whose memory they share: the inverse of `as_arrays`. labels: [B, L].

    Arrays without elements may be missing.
    """
    import torch

    from kdcache.cache.records.records import Records

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


@lru_cache(100)  # zarr takes milliseconds to make them, and those of every view are the same
def array_metadata(spec: ArraySpec) -> bytes:
    """The zarr.json of an array."""
    store: dict[str, Buffer] = {}
    _open(store, spec)
    return store[f"{spec.name}/zarr.json"].to_bytes()


def metadata_files(chunk: Chunk) -> list[tuple[str, Callable[[], bytes]]]:
    """The zarr.json files of a chunk's array and of its view's group.

    Each is given by its name within the split's folder and by a function that makes its content.
    """
    group = [(f"{chunk.folder}/zarr.json", group_metadata)] if chunk.folder else []
    return [*group, (f"{chunk.base}{chunk.spec.name}/zarr.json", partial(array_metadata, chunk.spec))]


def same_metadata(a: bytes, b: bytes) -> bool:
    """Whether two zarr.json files say the same: versions of zarr differ in whether they write some fields if empty."""
    try:
        return a == b or _told(json.loads(a)) == _told(json.loads(b))
    except (ValueError, RecursionError):
        return False


def _told(metadata: Any) -> str:
    def without_empty(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_empty(one) for name, one in value.items() if one or name not in _MAY_BE_EMPTY}
        return [without_empty(one) for one in value] if isinstance(value, list) else value

    return json.dumps(without_empty(metadata), sort_keys=True)  # in which 1, 1.0 and true differ


def rows_digest(spec: ArraySpec, rows: NDArray[Any]) -> str:
    """The sha256 of rows as raw little-endian bytes in C order, which is the same in every kind of store."""
    return hashlib.sha256(np.ascontiguousarray(rows, np.dtype(spec.dtype).newbyteorder("<")).data).hexdigest()


def encode_part(spec: ArraySpec, part: int, data: NDArray[Any]) -> bytes:
    """The bytes of the chunk that holds a part's rows, `data`."""
    store: dict[str, Buffer] = {}
    _open(store, spec)[spec.interval(part)] = data
    return store[spec.chunk_file(part)].to_bytes()


def decode_part(spec: ArraySpec, part: int, data: Content, where: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """The rows of a part, in `out` if given; CorruptError naming the file where the bytes are not such a chunk."""
    return _decompressed(spec, part, _frame(spec, data, where), where, out)


def _decompressed(
    spec: ArraySpec, part: int, frame: NDArray[np.uint8], where: str, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    # zarr is not used here: its code around blosc takes several times as long as blosc itself.
    rows, dtype = spec.interval(part), np.dtype(spec.dtype).newbyteorder("<")
    direct = out is not None and len(out) == spec.chunk_shape[0] and out.dtype == dtype and out.flags.c_contiguous
    chunk = out if direct else np.empty(spec.chunk_shape, dtype)
    try:
        blosc.decompress(frame, chunk)
    except RuntimeError as e:
        raise CorruptError(f"{where}: {e}") from e
    assert chunk is not None
    if direct:
        return chunk
    return filled(out, chunk[: rows.stop - rows.start].astype(spec.dtype, copy=False))


def decode_rows(spec: ArraySpec, part: int, data: Content, where: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Those rows of a part, ascending, as `decode_part` gives all of them. Only blocks that hold them are decompressed.

    Blosc cuts a chunk into blocks and compresses each by itself.
    """
    frame, row = _frame(spec, data, where), spec.chunk_bytes // spec.chunk_shape[0]
    block = max(1, int.from_bytes(frame[8:12].data, "little"))
    count = -(-spec.chunk_bytes // block)
    first, last = rows * row // block, ((rows + 1) * row - 1) // block
    held = np.bincount(first, minlength=count + 1) - np.bincount(last + 1, minlength=count + 1)
    wanted = np.flatnonzero(held.cumsum())
    if frame[2] & _STORED or not 0 < 2 * len(wanted) <= count:
        return _decompressed(spec, part, frame, where)[rows]
    if wanted[0] == count - 1:
        wanted = np.array([count - 2, count - 1])  # Blosc reads no chunk that is shorter than a block
    try:
        content = blosc.decompress(_with_blocks(frame, spec.chunk_bytes, block, wanted, where))
    except RuntimeError as e:
        raise CorruptError(f"{where}: {e}") from e
    starts = np.searchsorted(wanted, first) * block + rows * row % block
    found = np.lib.stride_tricks.sliding_window_view(np.frombuffer(content, np.uint8), row)[starts]
    typed: NDArray[Any] = found.view(np.dtype(spec.dtype).newbyteorder("<")).astype(spec.dtype, copy=False)
    return typed.reshape(-1, *spec.shape[1:])


def _with_blocks(
    frame: NDArray[np.uint8], nbytes: int, block: int, wanted: NDArray[np.int64], where: str
) -> NDArray[np.uint8]:
    """What Blosc would have made of these blocks alone, in ascending order; CorruptError where they are not in it.

    Blosc's README_CHUNK_FORMAT: after 16 bytes of head an int32 for each block says where it begins. Blocks may lie in
    any order, and only the last one may be short.
    """
    count = -(-nbytes // block)
    starts = frame[16:][: 4 * count].view("<i4").astype(np.int64) if len(frame) > 16 + 4 * count else np.zeros(1, int)
    in_order = np.sort(starts)
    if in_order[0] < 16 + 4 * count or in_order[-1] >= len(frame):
        raise CorruptError(f"{where}: its blocks do not lie within it")
    stops = np.append(in_order[1:], len(frame))[np.searchsorted(in_order, starts)]
    sizes = (stops - starts)[wanted]
    begins = 16 + 4 * len(wanted) + np.cumsum(sizes) - sizes
    writes = len(wanted) * block - (count * block - nbytes if wanted[-1] == count - 1 else 0)
    head = np.array([writes, block, begins[-1] + sizes[-1], *begins], "<u4").view(np.uint8)
    blocks = (frame[start:stop] for start, stop in zip(starts[wanted], stops[wanted], strict=True))
    return np.concatenate([frame[:4], head, *blocks])


def _frame(spec: ArraySpec, data: Content, where: str) -> NDArray[np.uint8]:
    """What Blosc made of a chunk, without a copy; CorruptError where it is damaged or of another size."""
    # Blosc's header declares how much it will write and read. Blosc checks neither, so both are checked here.
    if len(data) < 16 + _CRC_BYTES:
        raise CorruptError(f"{where}: {len(data)} bytes are too few for a chunk")
    writes, reads = (int.from_bytes(data[i : i + 4], "little") for i in (4, 12))
    if writes != spec.chunk_bytes:
        raise CorruptError(f"{where}: declares {writes} bytes of data where {spec.chunk_bytes} belong")
    if reads != len(data) - _CRC_BYTES:
        raise CorruptError(f"{where}: declares {reads} compressed bytes and has {len(data) - _CRC_BYTES}")
    content = np.frombuffer(data, np.uint8)[:-_CRC_BYTES]
    if google_crc32c.value(content) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise CorruptError(f"{where}: its checksum does not match its bytes")
    return content


def filled(out: NDArray[Any] | None, rows: NDArray[Any]) -> NDArray[Any]:
    """The rows, in `out` if given."""
    if out is None:
        return rows
    out[:] = rows
    return out


def unsound(name: str, rows: NDArray[Any], classes: int) -> str | None:
    """Which values the array of that name holds that no teacher's answer can give; None if there are none."""
    if not len(rows):
        return None
    low, high = rows.min(), rows.max()  # both are NaN where one value is
    if name == "classes":
        return f"a class id above {classes - 1}" if int(high) >= classes else None
    if rows.dtype == np.uint8:
        return "holes" if name == "tail" and high > NO_TAIL else None
    if np.isnan(low) or np.isposinf(high):
        return "values that are not finite"
    return f"values below zero ({low:g})" if name not in ("tail", "tail_std") and low < 0 else None
