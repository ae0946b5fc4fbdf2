"""Reads an FFCV file that kdcache packed, without FFCV."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import CorruptError, InputError, MismatchError, NotFoundError
from kdcache.cache.files import sha256
from kdcache.cache.identity import id_dtype
from kdcache.cache.records.records import Records
from kdcache.cache.store.chunks import as_records
from kdcache.pipeline.data.decode import decode_bytes
from kdcache.pipeline.ffcv.format import AREA_RENDERER, CRC_BYTES, RAW, Block, PackedView
from kdcache.pipeline.ffcv.headers import corrupt, read_headers, sizes_of
from kdcache.pipeline.views.parameters import ViewParameters, draw_as
from kdcache.pipeline.views.render import RENDERER

_AT_ONCE = 8192  # rows


class FFCVFile:
    """A packed file, opened and checked: its identity, its views, the records of a view, and the images.

    table [N]: image (mode, width, height, pointer), label(s), index and records (pointer). image_bytes [N]. content:
    the file's bytes, mapped. NotFoundError where there is no file, InputError where kdcache did not pack it,
    CorruptError where it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.where = Path(path), str(Path(path))
        self._headers = read_headers(self.path)
        self.content, notes, self.layout, self.table, self.image_bytes = self._headers
        self.identity, self.key = notes.identity, notes.identity.key
        if self.identity.views.mixed:
            raise self.corrupt("it is said to hold mixed views, which are never packed")
        self.views = tuple(v.view for v in notes.views)
        self.mean, self.std = notes.mean, notes.std
        self.train, self.evaluation = _Train(self), _Evaluation(self)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def raw(self) -> bool:
        """Whether the images are raw pixels of one size, and not files."""
        return self._headers.notes.pixels is not None

    @property
    def renderer(self) -> str:
        """The renderer of a loader of this file: the cache's own, or FFCV's where images are resized."""
        return RENDERER if self.raw else AREA_RENDERER

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Height and width of each image in pixels, int32 [N, 2]."""
        return sizes_of(self.table)

    @cached_property
    def labels(self) -> NDArray[Any]:
        """[N, L] class ids of the teacher."""
        columns = [self.table[name] for name in self.layout.labels]
        dtype = id_dtype(self.identity.record.classes)
        return np.stack(columns, 1).astype(dtype) if columns else np.empty((len(self), 0), dtype)

    @cached_property
    def prior(self) -> torch.Tensor | None:
        """float32 [T, C], or None for dense records."""
        if self._headers.notes.prior is None:
            return None
        shape = self.identity.record.tails, self.identity.record.classes
        values = np.frombuffer(self._block(self._headers.notes.prior, 4 * shape[0] * shape[1], "the prior"), "<f4")
        return torch.from_numpy(values.reshape(shape).copy())

    def read(self, view: int) -> Records:
        """All records of one view; NotFoundError if it is not packed, CorruptError if bytes are damaged."""
        slot, packed = self._find(view)
        self.require_unchanged()
        rows = np.empty((len(self), self.layout.record_bytes), np.uint8)
        columns = np.arange(self.layout.record_bytes) + slot * (self.layout.record_bytes + CRC_BYTES)
        for at in range(0, len(self), _AT_ONCE):
            first = self.table["records"][at : at + _AT_ONCE].astype(np.int64)
            rows[at : at + _AT_ONCE] = self.content[first[:, None] + columns]
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
        drawn = draw_as(views, view, range(len(self)), self.sizes)
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
        data = self.content[start : start + int(self.image_bytes[index])]
        if row["mode"] == RAW:
            pixels = torch.from_numpy(data.copy())
            return pixels.view(int(row["height"]), int(row["width"]), 3).permute(2, 0, 1).contiguous()
        try:
            return decode_bytes(data.tobytes(), f"{self.path}, sample {index}")
        except InputError as e:
            raise self.corrupt(f"the image of sample {index} cannot be decoded") from e

    def check_pixels(self) -> None:
        """CorruptError unless raw pixels are those that were packed. Image files have no digest here."""
        if self._headers.notes.pixels is None:
            return
        digest = hashlib.sha256()
        for start, length in zip(self.table["image"]["pointer"].tolist(), self.image_bytes.tolist(), strict=True):
            digest.update(self.content[start : start + length].data)
        if digest.hexdigest() != self._headers.notes.pixels:
            raise self.corrupt("the images are not what was packed")

    def require_unchanged(self) -> None:
        """CorruptError where the file has another length than when it was opened: reading on would end the process."""
        try:
            now = self.path.stat().st_size
        except OSError as e:
            raise CorruptError(f"{self.path} cannot be read any more: {e.strerror}") from e
        if now != len(self.content):
            raise self.corrupt("it has changed while it was open")

    def corrupt(self, problem: str) -> CorruptError:
        """The error for damage in this file."""
        return corrupt(self.path, problem)

    def _find(self, view: int) -> tuple[int, PackedView]:
        if view not in self.views:
            raise NotFoundError(f"view {view} is not packed in {self.path} (packed: {_ranges(self.views)})")
        slot = self.views.index(view)
        return slot, self._headers.notes.views[slot]

    def _block(self, block: Block, expected: int, what: str) -> bytes:
        if block.size != expected or not 0 <= block.offset <= len(self.content) - block.size:
            raise self.corrupt(f"{what} is not of the size that belongs there")
        content: bytes = self.content[block.offset : block.offset + block.size].tobytes()
        if sha256(content) != block.sha256:
            raise self.corrupt(f"{what} is not what was packed")
        return content


class _Train:
    """The train split of a packed file, whose images lie beside its records."""

    def __init__(self, file: FFCVFile) -> None:
        self._file = file

    @property
    def labels(self) -> NDArray[Any]:
        """[N, L] class ids of the teacher."""
        return self._file.labels

    def require_sizes(self, sizes: NDArray[np.int32]) -> None:
        """Nothing to compare: the images that a student sees are the file's own."""


class _Evaluation:
    """The evaluation split of a packed file, read when it is asked for."""

    def __init__(self, file: FFCVFile) -> None:
        self._file = file

    @cached_property
    def records(self) -> Records:
        file, record = self._file, self._file.identity.record
        n, width = file.identity.evaluation.samples, file.layout.record_bytes
        content = file._block(file._headers.notes.evaluation, n * (width + 4 * record.labels), "the evaluation split")
        rows = np.frombuffer(content, np.uint8, n * width).reshape(n, width)
        labels = np.frombuffer(content, "<u4", offset=n * width).reshape(n, record.labels)
        if labels.size and int(labels.max()) >= record.classes:
            raise file.corrupt("the evaluation split holds a class id that is too large")
        return as_records(record, file.layout.split(rows), labels.astype(id_dtype(record.classes)), file.prior)

    @property
    def labels(self) -> NDArray[Any]:
        """[N, L] class ids of the teacher."""
        return self.records.labels.numpy()

    def require_sizes(self, sizes: NDArray[np.int32]) -> None:
        """Nothing to compare: the file does not hold the sizes of the evaluation split's images."""


def _ranges(views: Sequence[int]) -> str:
    """Views as people write them: 0-3,7."""
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in _runs(views))


def _runs(views: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = last = views[0]
    for view in views[1:]:
        if view != last + 1:
            yield first, last
            first = view
        last = view
    yield first, last
