"""Writes an FFCV file into an open file."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import CorruptError, InputError
from kdcache.cache.files import sha256
from kdcache.cache.identity import canonical
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.chunks import as_arrays
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.ffcv.format import (
    ALLOCATION,
    CRC_BYTES,
    FORMAT,
    HEADER,
    MAGIC,
    MAX_PAGE,
    MIN_PAGE,
    TRAILER,
    VERSION,
    Block,
    Layout,
    Notes,
    PackedView,
    allocations,
    checksums,
)
from kdcache.pipeline.ffcv.images import choose_modes, read_images
from kdcache.pipeline.process.progress import size


class Writer:
    """Writes the images of `data` and the records of `views`: from the file's start to its end, then the headers.

    The headers come last because they hold the pointers. bytes: the length of the file, without notes and the like.
    InputError where FFCV cannot store the images, or they cannot be read.
    """

    def __init__(self, cache: Cache, data: Dataset, views: tuple[int, ...]) -> None:
        self.cache, self.data, self.views = cache, data, views
        self.layout = layout = Layout(cache.identity, len(views))
        n = len(data)
        self.table = np.zeros(n, layout.table)
        self.table["index"] = np.arange(n)
        for j, name in enumerate(layout.labels):
            self.table[name] = cache.train.labels[:, j]
        if (data.sizes > 65535).any():
            raise InputError(f"{data.name} has images above 65,535 pixels a side, which FFCV cannot store")
        self.table["image"]["height"], self.table["image"]["width"] = data.sizes.T
        self.modes, self.image_bytes = choose_modes(data)
        self.table["image"]["mode"] = self.modes
        self.page_size, self.pages_end = self._place_samples()
        held_out = cache.identity.evaluation.samples * layout.record_bytes
        self.bytes = self.pages_end + held_out + n * 2 * ALLOCATION.itemsize

    def _place_samples(self) -> tuple[int, int]:
        """Set the pointers so that no sample crosses a page. Returns the size of a page and the end of all."""
        layout, image = self.layout, self.table["image"]
        sample = self.image_bytes + layout.sample_bytes
        page_size = max(MIN_PAGE, 1 << (int(sample.max()) - 1).bit_length())
        if page_size > MAX_PAGE:
            raise InputError(f"a sample of {size(int(sample.max()))} is too much for FFCV: pack fewer --views")
        head = HEADER.itemsize + layout.descriptors.nbytes + self.table.nbytes
        at = -(-head // page_size) * page_size
        for i, length in enumerate(sample.tolist()):
            if at // page_size != (at + length - 1) // page_size:
                at += -at % page_size
            image["pointer"][i], at = at, at + length
        self.table["records"] = image["pointer"] + self.image_bytes.astype(np.uint64)
        return page_size, at

    def estimate(self, file: BinaryIO) -> float:
        """Seconds that writing will take, judged by reading one shard and writing a few megabytes."""
        started = time.monotonic()
        rows = self.layout.join(self.cache.train.check_shard(self.views[0], 0))
        checksums(rows, 0, self.views[0])
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
        """Write the whole file. folder: has room for the records of a part, which memory may not hold."""
        views = [hashlib.sha256() for _ in self.views]
        pixels = hashlib.sha256() if self.data.in_memory else None
        with closing(read_images(self.data, self.modes, int(self.image_bytes.max()))) as images:
            for part in range(self.cache.train.parts):
                rows = self.cache.train.rows(part)
                packed = self._packed_records(part, rows, views, folder)
                for i in rows:
                    image = next(images)
                    if len(image) != self.image_bytes[i]:
                        raise InputError(f"image {i} of {self.data.name} has changed: pack again")
                    if pixels:
                        pixels.update(image)
                    file.seek(int(self.table["image"]["pointer"][i]))
                    file.write(image)
                    file.write(packed[i - rows.start].data)
        self._finish(file, [h.hexdigest() for h in views], pixels.hexdigest() if pixels else None)

    def _packed_records(self, part: int, rows: range, digests: list[Any], folder: Path) -> NDArray[np.uint8]:
        """The records [n, V, R + 4] of the samples of a part, in a nameless file. digests: updated, one for a view."""
        shape = (len(rows), len(self.views), self.layout.record_bytes + CRC_BYTES)
        with tempfile.TemporaryFile(dir=folder) as room:
            packed = np.memmap(room, np.uint8, "w+", shape=shape)
        for slot, (view, digest) in enumerate(zip(self.views, digests, strict=True)):
            records = self.layout.join(self.cache.train.check_shard(view, part))
            digest.update(records.data)
            packed[:, slot, :-CRC_BYTES] = records
            crc = checksums(records, rows.start, view).astype("<u4")
            packed[:, slot, -CRC_BYTES:] = crc[:, None].view(np.uint8)
        return packed

    def _finish(self, file: BinaryIO, views: list[str], pixels: str | None) -> None:
        """Write what stands behind the pages, then the headers before them. views, pixels: digests, as in `Notes`."""
        file.seek(self.pages_end)
        evaluation, *prior = [self._block(file, content) for content in self._blocks()]
        notes = Notes(
            identity=self.cache.identity,
            mean=self.data.mean,
            std=self.data.std,
            views=tuple(
                PackedView(view=view, parameters=self._parameters(view), records=digest)
                for view, digest in zip(self.views, views, strict=True)
            ),
            table=sha256(b""),  # holds the place, since the length has to be known
            pixels=pixels,
            evaluation=evaluation,
            prior=prior[0] if prior else None,
        )
        regions = allocations(self.table, self.image_bytes, self.layout).tobytes()
        header = np.zeros(1, HEADER)
        header["version"], header["fields"], header["samples"] = FORMAT, len(self.layout.descriptors), len(self.table)
        header["page_size"] = self.page_size
        header["allocations"] = file.tell() + len(canonical(notes)) + TRAILER.size
        head = b"".join(part.tobytes() for part in (header, self.layout.descriptors, self.table))
        content = canonical(notes.model_copy(update={"table": sha256(head + regions)}))
        file.write(content)
        file.write(TRAILER.pack(hashlib.sha256(content).digest(), len(content), VERSION, MAGIC))
        file.write(regions)
        file.seek(0)
        file.write(head)

    def _blocks(self) -> list[bytes]:
        """The evaluation split, and the class prior where there is one."""
        evaluation = self.cache.read_evaluation()
        labels = evaluation.labels.numpy().astype("<u4").tobytes()
        blocks = [self.layout.join(as_arrays(evaluation)).tobytes() + labels]
        if (prior := self.cache.prior) is not None:
            blocks.append(prior.numpy().astype("<f4").tobytes())
        return blocks

    def _block(self, file: BinaryIO, content: bytes) -> Block:
        block = Block(offset=file.tell(), size=len(content), sha256=sha256(content))
        file.write(content)
        return block

    def _parameters(self, view: int) -> tuple[str, ...]:
        """The digests of the view's parameters, part by part, from its commits."""
        store = self.cache.train
        commits = [store.commit(shard_name(view, part)) for part in range(store.parts)]
        for commit in commits:
            if commit.parameters is None:
                raise CorruptError(f"{commit.name} of cache {commit.key[:12]} lacks the digest of its view: rebuild it")
        return tuple(commit.parameters for commit in commits if commit.parameters is not None)
