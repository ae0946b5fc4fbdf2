"""One self-contained .beton file, FFCV's format 2: images, labels, and the records of chosen views.

Written and read here with NumPy alone, so that neither needs FFCV, which trusts every header and pointer that it
finds. In the order of the file:

    header, field descriptors           FFCV's
    table                               a row a sample: image pointer and size, label(s), index, records pointer
    pages of `page_size` bytes          each sample's image, then its records [V, R + 4] uint8
    blocks                              evaluation split (records and labels), class prior
    notes, trailer                      JSON of `Notes`; its sha256 and length, our magic
    allocation table                    FFCV's: sample, pointer and size of each region, to the end of the file

R bytes are the arrays of a record one after the other (store/chunks.py); the four behind them are a CRC-32 that also
covers the place (sample, view), so that a loader can check the one record which it copies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode

from kdcache.cache.errors import CorruptError, InputError, MismatchError, NotFoundError
from kdcache.cache.files import sha256, sync_folder
from kdcache.cache.identity import Identity, Sha256, Strict, canonical, id_dtype, parse
from kdcache.cache.packing import clear_leaving, new_file
from kdcache.cache.records import Records
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.chunks import as_arrays, as_records
from kdcache.cache.store.layout import ArraySpec, Commit, record_arrays, shard_name
from kdcache.pipeline.build.source import describe_data
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.data.imagefiles import Triple
from kdcache.pipeline.process.progress import Progress, duration, size
from kdcache.pipeline.views.policy import ViewParameters, draw
from kdcache.pipeline.views.render import RENDERER

AREA_RENDERER = "ffcv-area-1"  # decodes JPEG by turbojpeg's fast DCT, resizes by OpenCV's INTER_AREA
JPEG, RAW = 0, 1  # FFCV's image modes
CRC_BYTES = 4
CRC_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    CRC_TABLE = np.where(CRC_TABLE & 1, (CRC_TABLE >> 1) ^ np.uint32(0xEDB88320), CRC_TABLE >> 1)

_VERSION = 1  # of the notes
_MAGIC = b"kdcache\n"
_TRAILER = struct.Struct("<32sQQ8s")  # sha256 and length of the notes, version, magic
_MAX_NOTES = 1 << 26
_MIN_PAGE, _MAX_PAGE = 1 << 21, 1 << 31
_CHUNK = 8192  # rows
_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations", "<u8")]
)
_FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
_ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
_FORMAT = 2  # of FFCV
_INT, _RGB, _NDARRAY = 1, 2, 4  # FFCV's field types


class Block(Strict):
    """Bytes somewhere in the file."""

    offset: int
    size: int
    sha256: Sha256


class PackedView(Strict):
    """A view: digests of its parameters, a part each, as in its commits, and of its records [N, R]."""

    view: int
    parameters: tuple[Sha256, ...]
    records: Sha256


class Notes(Strict):
    """What FFCV's own headers cannot say.

    table: digest of everything before the pages, and of the allocation table. pixels: digest of all images where
    they are raw pixels of one size, None where they are image files. mean, std: of the dataset.
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
    """What the CRC of a record starts from, so that a record in another's place is noticed. Modulo 2^32."""
    return (sample + view * 2654435761) & 0xFFFFFFFF


def _checksums(rows: NDArray[np.uint8], first: int, view: int) -> NDArray[np.uint32]:
    """[n] CRC-32 (zlib's) of the records [n, R] of samples first, first + 1, ..."""
    crc: NDArray[np.uint32] = ~checksum_seed(np.arange(first, first + len(rows)), view).astype(np.uint32)
    for column in rows.T:
        crc = CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    return ~crc


class _Layout:
    """Field descriptors and the table's type: both follow from the identity and the number of views."""

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
        """The arrays of records [n, R], by name; copies."""
        out, at = {}, 0
        for spec in self.arrays:
            out[spec.name] = rows[:, at : at + spec.chunk_bytes].copy().view(_little(spec))
            at += spec.chunk_bytes
        return out

    def join(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """uint8 [n, R], the inverse of split."""
        parts = [np.ascontiguousarray(arrays[spec.name], _little(spec)).view(np.uint8) for spec in self.arrays]
        return np.concatenate(parts, axis=1)


def _little(spec: ArraySpec) -> np.dtype[Any]:
    return np.dtype(spec.dtype).newbyteorder("<")


# Packing


def pack_beton(
    cache: Cache, data: Dataset, out: Path, views: Sequence[int] | None = None, say: Callable[[str], None] = print
) -> Path:
    """Write `out` with the images of `data` (the cache's train split) and the records of `views` (None: all).

    In-memory images are stored as raw pixels; of files, JPEG is stored as it is and all else as raw pixels. The file
    appears whole or not at all, and one that holds the same already is left as it is. InputError where it holds
    something else, is not named .beton or does not fit on the disk; MismatchError for other data; NotFoundError for
    a view that is not complete.
    """
    if out.suffix != ".beton":
        raise InputError(f"{out}: the name of an FFCV file ends in .beton")
    has = cache.identity.data
    if found := has.differences(describe_data(data, has.full_contents), theirs="the data"):
        raise MismatchError(f"{cache.where} was built from other data than {data.name}: {'; '.join(found)}")
    cache.train.require_sizes(data.sizes)
    complete = cache.views
    chosen = tuple(sorted(set(complete if views is None else views)))
    if not chosen:
        raise NotFoundError(f"there are no views to pack: {cache.where} has {len(complete)} complete ones")
    if missing := set(chosen) - set(complete):
        raise NotFoundError(f"{cache.where} has no complete view {min(missing)}: build it, or choose other --views")
    if out.exists():
        there = Beton(out)
        if (there.key, there.views) != (cache.key, chosen):
            raise InputError(f"{out} holds other records and is never overwritten: remove it, or give another --out")
        there.check_pixels()
        for view in there.views:
            there.read(view)
        say(f"{out} holds these views already")
        return out
    writer = _Writer(cache, data, chosen)
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if writer.bytes > free:
        raise InputError(f"{out} would take {size(writer.bytes)}, and {size(free)} are free: give another --out")
    temporary = folder / f".{out.name}.packing"
    clear_leaving(temporary)
    try:
        with new_file(temporary) as target, open(target.fileno(), "wb", closefd=False) as file:
            seconds = writer.estimate(file)
            kept = "raw pixels" if data.in_memory else f"JPEG as it is; trained on with {AREA_RENDERER}"
            say(
                f"packing {len(data):,} images ({kept}) and {len(chosen)} views of cache {cache.key[:12]}: "
                f"{size(writer.bytes)}, about {duration(seconds)}, in {out}"
            )
            writer.write(file, folder)
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(temporary, out)
            except FileExistsError:
                raise InputError(f"{out} was made meanwhile and is never overwritten") from None
        sync_folder(folder)
    except OSError as e:
        e.filename = str(out)  # not the temporary file, which is gone
        raise
    return out


def _parameters(commit: Commit) -> str:
    if commit.parameters is None:
        raise CorruptError(f"{commit.name} of cache {commit.key[:12]} lacks the digest of its view: build it anew")
    return commit.parameters


class _Writer:
    """Writes the file from its start to its end, then the headers, which need the pointers."""

    def __init__(self, cache: Cache, data: Dataset, views: tuple[int, ...]) -> None:
        self.cache, self.data, self.views = cache, data, views
        self.layout = layout = _Layout(cache.identity, len(views))
        n = len(data)
        self.table = np.zeros(n, layout.table)
        self.table["index"] = np.arange(n)
        for j, name in enumerate(layout.labels):
            self.table[name] = cache.train.labels[:, j]
        image = self.table["image"]
        image["height"], image["width"] = data.sizes.T
        if (data.sizes > 65535).any():
            raise InputError(f"{data.name} has images above 65,535 pixels a side, which FFCV cannot store")
        raw_bytes = data.sizes.prod(1, dtype=np.int64) * 3
        if data.in_memory:
            image["mode"], self.image_bytes = RAW, raw_bytes
        else:
            kept = np.empty(n, np.int64)
            with ThreadPoolExecutor() as pool, Progress("look at files", n, "files") as progress:
                for at in range(0, n, _CHUNK):  # no more is under way when someone presses Ctrl-C
                    rows = range(at, min(at + _CHUNK, n))
                    kept[at : rows.stop] = list(pool.map(self._jpeg_bytes, rows))
                    progress.advance(len(rows))
            image["mode"] = np.where(kept >= 0, JPEG, RAW)
            self.image_bytes = np.where(kept >= 0, kept, raw_bytes)
        sample = self.image_bytes + layout.sample_bytes
        self.page_size = max(_MIN_PAGE, 1 << (int(sample.max()) - 1).bit_length())
        if self.page_size > _MAX_PAGE:
            raise InputError(f"a sample of {size(int(sample.max()))} is too much for FFCV: pack fewer --views")
        head = _HEADER.itemsize + layout.descriptors.nbytes + self.table.nbytes
        at = self.pages_start = -(-head // self.page_size) * self.page_size
        for i, length in enumerate(sample.tolist()):
            if at // self.page_size != (at + length - 1) // self.page_size:
                at += -at % self.page_size  # a sample lies within one page
            image["pointer"][i], at = at, at + length
        self.table["records"] = image["pointer"] + self.image_bytes.astype(np.uint64)
        self.pages_end = at
        held_out = cache.identity.evaluation.samples * layout.record_bytes
        self.bytes = at + held_out + n * 2 * _ALLOCATION.itemsize  # but for notes and the like

    def _jpeg_bytes(self, i: int) -> int:
        """The length of a JPEG file that FFCV can decode, or -1."""
        if (path := self.data.file(i)) is None:
            return -1
        try:
            with Image.open(path) as found:
                if found.format not in ("JPEG", "MPO") or found.mode not in ("RGB", "L"):
                    return -1
                if found.size[::-1] != tuple(self.data.sizes[i]):
                    raise InputError(f"{path} has changed since its header was read: open the dataset again")
            return path.stat().st_size
        except OSError as e:
            raise InputError(f"{path} cannot be read: {e}") from e

    def estimate(self, file: BinaryIO) -> float:
        """Seconds that it will take, from one shard read and a few megabytes written."""
        started = time.monotonic()
        rows = self.layout.join(self.cache.train.check_shard(self.views[0], 0))
        _checksums(rows, 0, self.views[0])
        a_record = (time.monotonic() - started) / len(rows)
        started = time.monotonic()
        tried = min(self.bytes, 1 << 24)
        file.write(bytes(tried))
        file.flush()
        os.fsync(file.fileno())
        a_byte = (time.monotonic() - started) / tried
        file.seek(0)
        file.truncate()
        return a_record * len(self.table) * len(self.views) + a_byte * self.bytes

    def write(self, file: BinaryIO, folder: Path) -> None:
        """folder: where there is room for the records of a part, which memory may not hold."""
        views = [hashlib.sha256() for _ in self.views]
        pixels = hashlib.sha256() if self.data.in_memory else None
        with Progress("pack", len(self.table), "samples") as progress:
            for part in range(self.cache.train.parts):
                rows = self.cache.train.rows(part)
                packed = self._packed_records(part, rows, views, folder)
                for i in rows:
                    image = self._image(i)
                    if len(image) != self.image_bytes[i]:
                        raise InputError(f"image {i} of {self.data.name} has changed: pack again")
                    if pixels:
                        pixels.update(image)
                    file.seek(int(self.table["image"]["pointer"][i]))
                    file.write(image)
                    file.write(packed[i - rows.start].data)
                    progress.advance(1)
        self._finish(file, [h.hexdigest() for h in views], pixels.hexdigest() if pixels else None)

    def _packed_records(self, part: int, rows: range, digests: list[Any], folder: Path) -> NDArray[np.uint8]:
        """[n, V, R + 4] for the samples of a part, in an unnamed file."""
        shape = (len(rows), len(self.views), self.layout.record_bytes + CRC_BYTES)
        with tempfile.TemporaryFile(dir=folder) as room:
            packed = np.memmap(room, np.uint8, "w+", shape=shape)
        for slot, (view, digest) in enumerate(zip(self.views, digests, strict=True)):
            records = self.layout.join(self.cache.train.check_shard(view, part))
            digest.update(records.data)
            packed[:, slot, :-CRC_BYTES] = records
            crc = _checksums(records, rows.start, view).astype("<u4")
            packed[:, slot, -CRC_BYTES:] = crc[:, None].view(np.uint8)
        return packed

    def _image(self, i: int) -> bytes | memoryview:
        if (pixels := self.data.pixels) is not None:
            return pixels[i].contiguous().numpy().reshape(-1).data
        if self.table["image"]["mode"][i] == JPEG and (path := self.data.file(i)):
            try:
                return path.read_bytes()
            except OSError as e:
                raise InputError(f"{path} cannot be read: {e.strerror}") from e
        return self.data.decode(i).permute(1, 2, 0).contiguous().numpy().reshape(-1).data

    def _finish(self, file: BinaryIO, views: list[str], pixels: str | None) -> None:
        evaluation = self.cache.read_evaluation()
        labels = evaluation.labels.numpy().astype("<u4").tobytes()
        blocks = [self.layout.join(as_arrays(evaluation)).tobytes() + labels]
        if (prior := self.cache.prior) is not None:
            blocks.append(prior.numpy().astype("<f4").tobytes())
        file.seek(self.pages_end)
        places = []
        for content in blocks:
            places.append(Block(offset=file.tell(), size=len(content), sha256=sha256(content)))
            file.write(content)
        store = self.cache.train
        commits = [[store.commit(shard_name(v, p)) for p in range(store.parts)] for v in self.views]
        notes = Notes(
            identity=self.cache.identity,
            mean=self.data.mean,
            std=self.data.std,
            views=tuple(
                PackedView(view=v, parameters=tuple(_parameters(c) for c in parts), records=digest)
                for v, parts, digest in zip(self.views, commits, views, strict=True)
            ),
            table=sha256(b""),  # in its place until its length is known
            pixels=pixels,
            evaluation=places[0],
            prior=places[1] if prior is not None else None,
        )
        allocations = _allocations(self.table, self.image_bytes, self.layout)
        header = np.zeros(1, _HEADER)
        header["version"], header["fields"], header["samples"] = _FORMAT, len(self.layout.descriptors), len(self.table)
        header["page_size"] = self.page_size
        header["allocations"] = file.tell() + len(canonical(notes)) + _TRAILER.size
        head = b"".join(part.tobytes() for part in (header, self.layout.descriptors, self.table))
        content = canonical(notes.model_copy(update={"table": sha256(head + allocations.tobytes())}))
        file.write(content)
        file.write(_TRAILER.pack(hashlib.sha256(content).digest(), len(content), _VERSION, _MAGIC))
        file.write(allocations.tobytes())
        file.seek(0)
        file.write(head)


def _allocations(table: NDArray[Any], image_bytes: NDArray[Any], layout: _Layout) -> NDArray[Any]:
    out = np.empty((len(table), 2), _ALLOCATION)
    out["sample"] = table["index"][:, None]
    out["pointer"] = np.stack([table["image"]["pointer"], table["records"]], 1)
    out["size"][:, 0], out["size"][:, 1] = image_bytes, layout.sample_bytes
    return out.reshape(-1)


# Reading


class Beton:
    """A packed file, opened and checked: `identity`, `views`, `prior`, and the records of a view.

    table [N]: image (mode, width, height, pointer), label(s), index, records (pointer); image_bytes [N]; content:
    the file's bytes, mapped. InputError where there is no file or it is not one that kdcache packed; CorruptError
    where it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.where = Path(path), str(Path(path))
        self.content = _mapped(self.path)
        self._bytes = len(self.content)
        header = self._header()
        notes_at = self._read_notes(int(header["allocations"]))
        self.identity, self.key = self._notes.identity, self._notes.identity.key
        self.views = tuple(v.view for v in self._notes.views)
        self.mean, self.std = self._notes.mean, self._notes.std
        self.layout = _Layout(self.identity, len(self.views))
        self._read_table(header, notes_at)
        self.evaluation = _Evaluation(self)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def raw(self) -> bool:
        """Whether the images are raw pixels of one size, and not files."""
        return self._notes.pixels is not None

    @property
    def renderer(self) -> str:
        """Of a loader of this file: the cache's own, or FFCV's where images are resized."""
        return RENDERER if self.raw else AREA_RENDERER

    @property
    def sizes(self) -> NDArray[np.int32]:
        """[N, 2] H and W of each image."""
        image = self.table["image"]
        return np.stack([image["height"], image["width"]], 1).astype(np.int32)

    @cached_property
    def labels(self) -> NDArray[Any]:
        """[N, L] class ids of the teacher."""
        columns = [self.table[name] for name in self.layout.labels]
        dtype = id_dtype(self.identity.record.classes)
        return np.stack(columns, 1).astype(dtype) if columns else np.empty((len(self), 0), dtype)

    @cached_property
    def prior(self) -> torch.Tensor | None:
        """float32 [T, C], or None for dense records."""
        if self._notes.prior is None:
            return None
        shape = self.identity.record.tails, self.identity.record.classes
        values = np.frombuffer(self._block(self._notes.prior, 4 * shape[0] * shape[1], "the prior"), "<f4")
        return torch.from_numpy(values.reshape(shape).copy())

    def read(self, view: int) -> Records:
        """All records of one view; NotFoundError if it is not packed, CorruptError if bytes are damaged."""
        slot, packed = self._find(view)
        self.require_unchanged()
        rows = np.empty((len(self), self.layout.record_bytes), np.uint8)
        columns = np.arange(self.layout.record_bytes) + slot * (self.layout.record_bytes + CRC_BYTES)
        for at in range(0, len(self), _CHUNK):
            first = self.table["records"][at : at + _CHUNK].astype(np.int64)
            rows[at : at + _CHUNK] = self.content[first[:, None] + columns]
        if hashlib.sha256(rows.data).hexdigest() != packed.records:
            raise self.corrupt(f"the records of view {view} are not what was packed")
        return as_records(self.identity.record, self.layout.split(rows), self.labels, self.prior)

    def read_evaluation(self) -> Records:
        """The records of the unaugmented evaluation split."""
        return self.evaluation.records

    def parameters(self, view: int) -> ViewParameters:
        """The view's parameters, drawn again and compared with the digests of the cache's commits."""
        _, packed = self._find(view)
        views, part = self.identity.views, self.identity.part
        if views.renderer != RENDERER:
            raise MismatchError(f"{self.path} was rendered by {views.renderer}, this kdcache renders by {RENDERER}")
        drawn = draw(views.policy, views.seed, view, range(len(self)), self.sizes)
        digests = tuple(drawn[at : at + part].digest() for at in range(0, len(self), part))
        if digests != packed.parameters:
            raise MismatchError(
                f"view {view} of {self.path} was built with other view parameters than this kdcache draws: its "
                "records do not belong to these pixels"
            )
        return drawn

    def image(self, index: int) -> torch.Tensor:
        """The whole image of a sample, uint8 [3, H, W], by the decoder that built the cache."""
        row = self.table["image"][index]
        start = int(row["pointer"])
        data = torch.from_numpy(self.content[start : start + int(self.image_bytes[index])].copy())
        if row["mode"] == RAW:
            return data.view(int(row["height"]), int(row["width"]), 3).permute(2, 0, 1).contiguous()
        try:
            decoded: torch.Tensor = torch.ops.image.decode_image(data, ImageReadMode.RGB.value)
        except RuntimeError as e:
            raise self.corrupt(f"the image of sample {index} cannot be decoded") from e
        return decoded

    def check_pixels(self) -> None:
        """CorruptError unless raw pixels are those that were packed; image files have no digest here."""
        if self._notes.pixels is None:
            return
        digest = hashlib.sha256()
        for start, length in zip(self.table["image"]["pointer"].tolist(), self.image_bytes.tolist(), strict=True):
            digest.update(self.content[start : start + length].data)
        if digest.hexdigest() != self._notes.pixels:
            raise self.corrupt("the images are not what was packed")

    def require_unchanged(self) -> None:
        """CorruptError when the file has another length than when it was opened: reading on would end the process."""
        try:
            now = self.path.stat().st_size
        except OSError as e:
            raise CorruptError(f"{self.path} cannot be read any more: {e.strerror}") from e
        if now != self._bytes:
            raise self.corrupt("it has changed while it was open")

    def corrupt(self, problem: str) -> CorruptError:
        return CorruptError(f"{self.path}: {problem}; remove it and run kdcache pack again")

    def _find(self, view: int) -> tuple[int, PackedView]:
        if view not in self.views:
            raise NotFoundError(f"view {view} is not packed in {self.path} (packed: {_ranges(self.views)})")
        slot = self.views.index(view)
        return slot, self._notes.views[slot]

    def _header(self) -> Any:
        header = np.frombuffer(self.content[: _HEADER.itemsize], _HEADER)[0]
        if header["version"] != _FORMAT or not 1 <= header["fields"] <= 64 or not header["samples"]:
            raise InputError(f"{self.path} is not an FFCV file of format {_FORMAT}")
        if not _HEADER.itemsize + _TRAILER.size <= header["allocations"] <= self._bytes:
            raise self.corrupt("it is cut short")
        return header

    def _read_notes(self, end: int) -> int:
        """Where the notes begin."""
        trailer: tuple[bytes, int, int, bytes] = _TRAILER.unpack(self.content[end - _TRAILER.size : end].tobytes())
        digest, length, version, magic = trailer
        if magic != _MAGIC:
            raise InputError(
                f"{self.path} is damaged, or not packed by kdcache: make one with kdcache pack CACHE --to ffcv"
            )
        if version > _VERSION:
            raise MismatchError(
                f"{self.path} has version {version}, this kdcache reads up to {_VERSION}: update kdcache"
            )
        start = end - _TRAILER.size - length
        if length > _MAX_NOTES or start < _HEADER.itemsize:
            raise self.corrupt("its notes are cut short")
        content = self.content[start : end - _TRAILER.size].tobytes()
        if hashlib.sha256(content).digest() != digest:
            raise self.corrupt("its notes are not what was packed")
        self._notes = parse(Notes, content, str(self.path), "remove it and run kdcache pack again")
        return start

    def _read_table(self, header: Any, end: int) -> None:
        layout, n = self.layout, self.identity.data.samples
        start = _HEADER.itemsize + layout.descriptors.nbytes
        if header["samples"] != n or header["fields"] != len(layout.descriptors):
            raise self.corrupt("its header does not fit its identity")
        table_end, allocations = start + n * layout.table.itemsize, int(header["allocations"])
        if table_end > end or self._bytes - allocations != 2 * n * _ALLOCATION.itemsize:
            raise self.corrupt("it is cut short")
        head = self.content[:table_end].tobytes()
        tail = self.content[allocations:].tobytes()
        if sha256(head + tail) != self._notes.table:
            raise self.corrupt("its table is not what was packed")
        self.table = np.frombuffer(head, layout.table, offset=start)
        regions = np.frombuffer(tail, _ALLOCATION).reshape(n, 2)
        self.image_bytes = regions["size"][:, 0].astype(np.int64)
        if head[_HEADER.itemsize : start] != layout.descriptors.tobytes() or not self._sound(header, regions, end):
            raise self.corrupt("its table does not fit its identity and length")

    def _sound(self, header: Any, regions: NDArray[Any], end: int) -> bool:
        """Whether all that FFCV takes on trust holds: the digests alone would also fit a forged file."""
        table, layout, identity, page = self.table, self.layout, self.identity, int(header["page_size"])
        image, n = table["image"], len(table)
        raw_bytes = self.sizes.astype(np.int64).prod(1) * 3
        pages_start = _HEADER.itemsize + layout.descriptors.nbytes + table.nbytes
        # Lengths against the room first: a sum of two numbers from the file could overflow.
        room = np.uint64(end) - np.minimum(regions["size"], np.uint64(end))
        labels = [table[name] for name in layout.labels]
        rules = (
            _MIN_PAGE <= page <= _MAX_PAGE and page & (page - 1) == 0,
            (image["mode"] <= RAW).all() and (raw_bytes > 0).all(),
            ((image["mode"] == JPEG) | (self.image_bytes == raw_bytes)).all(),
            not self.raw or ((image["mode"] == RAW).all() and (self.sizes == self.sizes[0]).all()),
            (table["index"] == np.arange(n)).all(),
            all(((y >= 0) & (y < identity.record.classes)).all() for y in labels),
            (regions.reshape(-1) == _allocations(table, self.image_bytes, layout)).all(),
            (regions["size"] <= end).all() and (regions["pointer"] >= pages_start).all(),
            (regions["pointer"] <= room).all(),
            0 < len(self.views) == len(set(self.views)),
            all(len(v.parameters) == -(-n // identity.part) for v in self._notes.views),
            (self._notes.prior is None) == identity.record.dense,
        )
        return all(bool(rule) for rule in rules)

    def _block(self, block: Block, expected: int, what: str) -> bytes:
        if block.size != expected or not 0 <= block.offset <= self._bytes - block.size:
            raise self.corrupt(f"{what} is not of the size that belongs there")
        content: bytes = self.content[block.offset : block.offset + block.size].tobytes()
        if sha256(content) != block.sha256:
            raise self.corrupt(f"{what} is not what was packed")
        return content


class _Evaluation:
    """The evaluation split of a packed file: records and labels, read when asked for."""

    def __init__(self, beton: Beton) -> None:
        self._beton = beton

    @cached_property
    def records(self) -> Records:
        beton, record = self._beton, self._beton.identity.record
        n, width = beton.identity.evaluation.samples, beton.layout.record_bytes
        content = beton._block(beton._notes.evaluation, n * (width + 4 * record.labels), "the evaluation split")
        rows = np.frombuffer(content, np.uint8, n * width).reshape(n, width)
        labels = np.frombuffer(content, "<u4", offset=n * width).reshape(n, record.labels)
        if labels.size and int(labels.max()) >= record.classes:
            raise beton.corrupt("the evaluation split holds a class id that is too large")
        return as_records(record, beton.layout.split(rows), labels.astype(id_dtype(record.classes)), beton.prior)

    @property
    def labels(self) -> NDArray[Any]:
        """[N, L] class ids of the teacher."""
        return self.records.labels.numpy()


def _mapped(path: Path) -> NDArray[np.uint8]:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a plain file")
    if found.st_size < _HEADER.itemsize + _TRAILER.size:
        raise InputError(f"{path} is not an FFCV file of format {_FORMAT}")
    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e


def _ranges(views: Sequence[int]) -> str:
    """0-3,7"""
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in _runs(views))


def _runs(views: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = last = views[0]
    for view in views[1:]:
        if view != last + 1:
            yield first, last
            first = view
        last = view
    yield first, last
