"""FFCV's side of the loader: our decoders, and its epoch's thread made to end in every case.

Imports FFCV, so it is itself imported only where one trains from a .beton. FFCV's random operations are never used:
what to cut comes in with the state of an epoch, which FFCV passes on to each decoder as `storage`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from queue import Empty, Full
from typing import Any

import numpy as np
import torch
from ffcv.fields.ndarray import NDArrayDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers.base import MemoryContext
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from numba import config as numba_config
from numba import njit, prange
from numpy.typing import NDArray

from kdcache.cache.errors import KdcacheError
from kdcache.pipeline.ffcv.format import CRC_BYTES, CRC_TABLE, JPEG, checksum_seed
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.process.rank import cores
from kdcache.pipeline.views.operations.compiled import kept

# What an epoch's decoders read: the file's bytes, the images' lengths [N], boxes [N, 4], flips [N], the view and its
# slot in the file.
Storage = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_], int, int]
_BYTE = np.dtype("u1")
_seed = njit(checksum_seed)


# These kernels are not decoders, which FFCV compiles again for every loader: they are compiled once on a machine.
@kept(nogil=True, parallel=True)
def _crop(index, pixels, metadata, content, boxes, flips):  # type: ignore[no-untyped-def]
    """Cut boxes of the images' own size, black beyond the edge, into pixels [B, H, W, 3]."""
    # In flat slices without a sign in their indices: four times as fast as [y, x, channel].
    height, width = pixels.shape[1], pixels.shape[2]
    for i in prange(len(index)):
        sample = index[i]
        top, left, flip = boxes[sample, 0], boxes[sample, 1], flips[sample]
        start = np.intp(metadata[sample]["data_ptr"])
        image = content[start : start + height * width * 3]
        out = pixels[i].reshape(-1)
        first, last = max(0, -left), min(width, width - left)
        if top != 0 or left != 0:
            out[:] = 0
        row = 3 * max(0, last - first)
        for y in range(max(0, -top), min(height, height - top)):
            at = 3 * ((top + y) * width + left + first)
            source = image[at : at + row]
            at = 3 * (y * width + (width - last if flip else first))
            to = out[at : at + row]
            if flip:
                for x in range(0, row, 3):
                    mirrored = row - 3 - x
                    to[mirrored], to[mirrored + 1], to[mirrored + 2] = source[x], source[x + 1], source[x + 2]
            else:
                for x in range(row):
                    to[x] = source[x]


@kept(nogil=True)
def _copy_records(index, rows, sound, starts, content, table, seeds):  # type: ignore[no-untyped-def]
    """Copy records into rows [B, R]; sound [B]: whether the CRC behind each is right."""
    width = rows.shape[1]
    for i in range(len(index)):
        stored = content[starts[i] : starts[i] + np.uint64(width + 4)]
        crc = ~seeds[i]
        for j in range(width):
            rows[i, j] = stored[j]
            crc = table[(crc ^ np.uint32(stored[j])) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
        crc = ~crc
        sound[i] = 1
        for j in range(4):
            if stored[width + j] != np.uint8((crc >> np.uint32(8 * j)) & np.uint32(0xFF)):
                sound[i] = 0


class CropDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
    """(uint8 [B, H, W, 3], uint8 [B] sound) of raw images of one size: the box cut out, black beyond the edge."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        shape = (int(self.metadata["height"][0]), int(self.metadata["width"][0]), 3)
        return _bytes(previous_state, shape)

    def generate_code(self) -> Callable[..., Any]:
        def decode(index, out, metadata, storage):  # type: ignore[no-untyped-def]
            _crop(index, out[0], metadata, storage[0], storage[2], storage[3])
            out[1][:] = 1
            return out[0][: len(index)], out[1][: len(index)]

        return decode


class RecordDecoder(NDArrayDecoder):  # type: ignore[misc]
    """Gives (uint8 [B, R], uint8 [B] sound): the record of one view, and whether its CRC is right."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        return _bytes(previous_state, (int(self.field.shape[1]) - CRC_BYTES,))

    def generate_code(self) -> Callable[..., Any]:
        width, table = np.uint64(self.field.shape[1]), CRC_TABLE

        def decode(index, out, metadata, storage):  # type: ignore[no-untyped-def]
            starts = metadata[index] + np.uint64(storage[5]) * width
            seeds = _seed(index, storage[4]).astype(np.uint32)
            _copy_records(index, out[0], out[1], starts, storage[0], table, seeds)
            return out[0][: len(index)], out[1][: len(index)]

        return decode


class AreaDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
    """(uint8 [B, S, S, 3], uint8 [B] sound) of images of any size: the box cut out and resized by area."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        return _bytes(previous_state, (*self.size, 3))

    def generate_code(self) -> Callable[..., Any]:
        # Calls C functions by address, which numba cannot keep for another process.
        each = Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        jpeg, last = JPEG, self.size[1] - 1

        def decode(index, out, metadata, storage):  # type: ignore[no-untyped-def]
            pixels, sound = out
            content, lengths, boxes, flips, _, _ = storage
            for i in each(len(index)):
                sample = index[i]
                field = metadata[sample]
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                data = content[field["data_ptr"] : field["data_ptr"] + np.uint64(lengths[sample])]
                # Not in a buffer that FFCV allots for the largest image, times batch, times batches ahead.
                whole = np.empty((height, width, 3), np.uint8)
                sound[i] = 1
                if field["mode"] == jpeg:
                    code = decode_jpeg(data, whole, height, width, height, width, 0, 0, 1, 1, False, False)
                    sound[i] = code == 0
                else:
                    whole[:] = data.reshape(whole.shape)
                top, left = boxes[sample, 0], boxes[sample, 1]
                resize(whole, top, top + boxes[sample, 2], left, left + boxes[sample, 3], pixels[i])
                if flips[sample]:
                    for y in range(pixels.shape[1]):
                        for x in range((last + 1) // 2):
                            for c in range(3):
                                kept = pixels[i, y, x, c]
                                pixels[i, y, x, c] = pixels[i, y, last - x, c]
                                pixels[i, y, last - x, c] = kept
            return pixels[: len(index)], sound[: len(index)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


def _bytes(state: State, shape: tuple[int, ...]) -> tuple[State, Any]:
    """What FFCV wants to know of a decoder of this shape with a byte that says whether all is sound."""
    return (
        replace(state, jit_mode=True, shape=shape, dtype=_BYTE),
        (AllocationQuery(shape, _BYTE), AllocationQuery((), _BYTE)),
    )


class _Mapped(MemoryContext):  # type: ignore[misc]
    """The memory manager of one epoch: the file is mapped whole, so there are no pages to fetch."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @property
    def state(self) -> Storage:
        return self._storage

    def schedule_epoch(self, batches: Any) -> _Mapped:
        return self

    def __enter__(self) -> _Mapped:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Epoch(EpochIterator):  # type: ignore[misc]
    """FFCV's thread for one epoch, with two repairs: an exception in it reaches the reader, and close() ends it."""

    def __init__(self, loader: Loader, order: NDArray[np.int64], storage: Storage) -> None:
        self._error: BaseException | None = None
        loader.memory_manager = _Mapped(storage)
        super().__init__(loader, order)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as e:
            self._error = e
            # The reader would wait for ever. Where the queue is full it has not come to this batch yet.
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(None, timeout=0.1)
                    break
                except Full:
                    pass

    def __next__(self) -> tuple[Any, ...]:
        try:
            batch: tuple[Any, ...] = super().__next__()
        except StopIteration:
            if self._error is None:
                raise
            reason = " ".join(f"{type(self._error).__name__}: {self._error}".split())
            raise KdcacheError(f"FFCV failed while it read {self.loader.fname}: {reason[:500]}") from self._error
        return batch

    def close(self) -> None:
        super().close()
        # It may wait for room in the queue, also for its last None, which FFCV puts there without a time limit.
        while self.is_alive():
            try:
                self.output_queue.get_nowait()
            except Empty:
                self.join(0.01)


def make_loader(file: FFCVFile, batch_size: int, size: tuple[int, int] | None, workers: int | None) -> Loader:
    """FFCV's loader for a checked file; images resized to `size`, or cut out of raw pixels where it is None."""
    most = int(numba_config.NUMBA_NUM_THREADS)
    torch_threads = torch.get_num_threads()
    try:
        return Loader(
            str(file.path),
            batch_size,
            num_workers=min(cores() if workers is None else max(workers, 1), most),
            os_cache=False,  # FFCV's mapped reader changes numba's shared array types; ours is set by each epoch
            pipelines={
                "image": [CropDecoder() if size is None else AreaDecoder(size)],
                "records": [RecordDecoder()],
                "index": None,
                **dict.fromkeys(file.layout.labels),
            },
        )
    finally:
        torch.set_num_threads(torch_threads)  # FFCV sets it for the whole process
