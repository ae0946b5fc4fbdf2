"""What an FFCV file holds of each image: the JPEG file as it is stored, in whatever container, or else raw pixels."""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.data.kinds.containers.items import unless_wrong
from kdcache.pipeline.data.kinds.containers.passes import in_workers
from kdcache.pipeline.ffcv.format import JPEG, RAW
from kdcache.pipeline.process.progress import Progress

_START = 1 << 16  # bytes of an image that mostly hold its header
_AT_ONCE = 1 << 22  # bytes of images that a worker process hands over at once
_MODES = ("RGB", "L")  # PIL's names of what FFCV decodes to the same pixels


def choose_modes(data: Dataset) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Each image's mode, JPEG or RAW, and how many bytes it takes [N]. InputError where one cannot be read."""
    raw_bytes: NDArray[np.int64] = data.sizes.prod(1, dtype=np.int64) * 3
    if data.in_memory:
        return np.full(len(data), RAW, np.uint8), raw_bytes
    results = in_workers(_Look(data), range(len(data)), data.where, title="look at images", unit="images")
    kept = np.fromiter(unless_wrong(results), np.int64, len(data))
    return np.where(kept >= 0, JPEG, RAW).astype(np.uint8), np.where(kept >= 0, kept, raw_bytes)


def read_images(data: Dataset, modes: NDArray[np.uint8], largest: int) -> Generator[bytes | memoryview, None, None]:
    """Yield what is stored of each image, in order. Who stops before the end closes the generator.

    largest: the most bytes that one image takes. Only worker processes read the images, unless they are held in memory:
    a user's Dataset may open files that must not be open when workers are started.
    """
    if (pixels := data.pixels) is not None:
        with Progress("pack", len(data), "samples") as progress:
            for image in pixels:
                yield image.contiguous().numpy().reshape(-1).data
                progress.advance(1)
        return
    chunk = max(1, min(64, _AT_ONCE // largest))
    with closing(in_workers(_Read(data, modes), range(len(data)), data.where, title="pack", chunk=chunk)) as results:
        yield from unless_wrong(results)


@dataclass(frozen=True)
class _Look:
    """Finds how many bytes an image's file has, if it is a JPEG that FFCV decodes, else -1. Text says what is wrong."""

    data: Dataset

    def __call__(self, i: int) -> int | str:
        try:
            return self._jpeg_bytes(i)
        except InputError as e:
            return str(e)

    def _jpeg_bytes(self, i: int) -> int:
        """InputError where the image cannot be read, or has another size than when the dataset was opened."""
        if (stored := self.data.start(i, _START)) is None or not stored[0].startswith(b"\xff\xd8\xff"):
            return -1
        start, length = stored
        found = _jpeg(start)
        if found is None and len(start) < length:  # a long EXIF part may stand before the size
            found = _jpeg(self.data.content(i) or b"")
        if found is None:
            raise InputError(f"{self.data.where(i)} cannot be read: its JPEG header is damaged")
        if found.mode not in _MODES:
            return -1
        if (found.height, found.width) != tuple(self.data.sizes[i].tolist()):
            raise InputError(f"{self.data.where(i)} has changed since its header was read: open the dataset again")
        return length


def _jpeg(content: bytes) -> JpegImageFile | None:
    """The header of a JPEG file; None where it is damaged, or goes on after these bytes."""
    try:
        return JpegImageFile(io.BytesIO(content))
    except Exception:  # a parser may raise anything for bytes that are no image; the caller says so
        return None


@dataclass(frozen=True)
class _Read:
    """Reads what is stored of an image. Text says what is wrong."""

    data: Dataset
    modes: NDArray[np.uint8]

    def __call__(self, i: int) -> bytes | str:
        try:
            if self.modes[i] == RAW:
                return self.data.decode(i).permute(1, 2, 0).contiguous().numpy().tobytes()
            return self.data.content(i) or b""  # the caller compares the length
        except InputError as e:
            return str(e)
