"""Images by their place in a container: how any container is read, and the dataset that its samples make."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from PIL import Image

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.decode import decode_bytes, pixels_of_image, size_of_bytes, size_of_image
from kdcache.pipeline.data.imagefiles import IMAGENET_MEAN, IMAGENET_STD, FilesDone, Paths, Triple, are_small, mean_std
from kdcache.pipeline.data.kinds.base import Described, drawn_places, paths_at
from kdcache.pipeline.data.kinds.containers.passes import in_workers
from kdcache.pipeline.data.kinds.files import FINGERPRINTED_FILES
from kdcache.pipeline.data.kinds.folders import HELD_OUT, held_out
from kdcache.pipeline.data.memory import recall, remember

Content = bytes | Image.Image | torch.Tensor  # an image file's bytes, a PIL image, or pixels uint8 [3, H, W]
Places = np.ndarray  # int64 [n], places in a container
_START = 1 << 16  # bytes of an image that mostly hold its header


class Source(Protocol):
    """A container of images by their places 0..len-1. Worker processes get it by fork, or pickled."""

    @property
    def few(self) -> int:
        """How many images this process may read itself where starting workers would take longer."""

    def __len__(self) -> int: ...

    def where(self, place: int) -> str:
        """What to call the image in a message."""

    def read(self, place: int) -> tuple[Content, int | None]:
        """The image, and its label where each reading gives it. InputError where it cannot be read."""

    def size(self, place: int) -> tuple[int, int]:
        """Height and width of the image, without decoding it where that can be. InputError likewise."""


def content_size(content: Content, where: str) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(content, bytes):
        return size_of_bytes(content, where)
    if isinstance(content, torch.Tensor):
        return content.shape[1], content.shape[2]
    return size_of_image(content, where)


def content_pixels(content: Content, where: str, size: np.ndarray | None = None) -> torch.Tensor:
    """Decode to uint8 [3, H, W]. InputError where that cannot be, or where it is not of the `size` (H, W)."""
    if isinstance(content, bytes):
        return decode_bytes(content, where, size)
    if isinstance(content, Image.Image):
        return pixels_of_image(content, where, size)
    if size is not None and tuple(content.shape[1:]) != tuple(size.tolist()):
        raise InputError(f"{where}: has changed since its size was read: open the dataset again")
    return content


def content_digest(content: Content, where: str) -> bytes:
    """The sha256 of an image file's bytes; of other images, that of their size and their pixels."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    pixels = content_pixels(content, where).permute(1, 2, 0).contiguous()
    digest = hashlib.sha256(f"pixels {tuple(pixels.shape)}\n".encode())
    digest.update(pixels.numpy().data)
    return digest.digest()


@dataclass(frozen=True, eq=False)
class ItemDataset(Described):
    """The images at some places of a container, decoded one at a time; small ones of one size are in memory too.

    digests: those of contents that were read at opening, by place. parts: whether the splits are parts of one whole,
    which was not split by its owner.
    """

    source: Source
    places: Places
    paths: Sequence[str] = ()
    pixels: torch.Tensor | None = None
    digests: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    parts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.places.shape == (len(self),), "places must be [N]")
        if self.pixels is not None:
            self._require_pixels(self.pixels)

    def decode(self, index: int) -> torch.Tensor:
        if self.pixels is not None:
            return self.pixels[index].permute(2, 0, 1).contiguous()
        return content_pixels(self._read(index), self.where(index), self.sizes[index])

    def content(self, index: int) -> bytes | None:
        content = self._read(index)
        return content if isinstance(content, bytes) else None

    def _read(self, index: int) -> Content:
        """Read an image. InputError where its label is not what it was when the dataset was opened."""
        content, label = self.source.read(int(self.places[index]))
        if label is not None and self.labels.size and label != self.labels[index, 0]:
            was = int(self.labels[index, 0])
            raise InputError(f"{self.where(index)}: its label is {label}, and was {was} when the dataset was opened")
        return content

    def where(self, index: int) -> str:
        return self.source.where(int(self.places[index]))

    def unreadable(self, progress: FilesDone | None = None) -> list[str]:
        return unreadable_items(self.source, self.places, progress)

    def _fingerprint(self, full: bool) -> str:
        """Digest all sizes, and the contents of FINGERPRINTED_FILES drawn images or, when `full`, of all."""
        digest = self._begun("items", full)
        digest.update(np.ascontiguousarray(self.sizes, "<i4").data)
        chosen = self.places[drawn_places(len(self), len(self) if full else FINGERPRINTED_FILES)]
        known = {} if full else self.digests
        missing = [place for place in chosen.tolist() if place not in known]
        read = unless_wrong(_each(_Digest(self.source), missing)) if missing else iter(())
        for place in chosen.tolist():
            digest.update(known[place] if place in known else next(read))
        return digest.hexdigest()

    def _contents(self, places: np.ndarray) -> dict[str, Any]:
        pixels = None if self.pixels is None else self.pixels[torch.from_numpy(places)]
        paths = paths_at(self.paths, places) if self.paths else ()
        return {"places": self.places[places], "paths": paths, "pixels": pixels}

    def joined(self, before: object) -> Self | None:
        if not isinstance(before, ItemDataset) or not self.parts or before.source != self.source:
            return None
        pixels = None
        if before.pixels is not None and self.pixels is not None:
            pixels = torch.cat([before.pixels, self.pixels])
        both: dict[str, Any] = {name: np.concatenate([getattr(before, name), getattr(self, name)]) for name in _ARRAYS}
        return replace(self, **both, paths=Paths.of(chain(before.paths, self.paths)), pixels=pixels)


_ARRAYS = ("labels", "sizes", "places")


@dataclass(frozen=True)
class _Digest:
    source: Source

    def __call__(self, place: int) -> bytes | str:
        try:
            return content_digest(self.source.read(place)[0], self.source.where(place))
        except InputError as e:
            return str(e)


@dataclass(frozen=True)
class _Pixels:
    """Decodes an image to uint8 [H, W, 3]. check: whether only what is wrong is of interest."""

    source: Source
    check: bool = False

    def __call__(self, place: int) -> np.ndarray | str | None:
        try:
            pixels = content_pixels(self.source.read(place)[0], self.source.where(place))
        except InputError as e:
            return str(e)
        return None if self.check else np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class _Size:
    source: Source

    def __call__(self, place: int) -> tuple[int, int] | str:
        try:
            return self.source.size(place)
        except InputError as e:
            return str(e)


def _each(
    work: _Digest | _Pixels | _Size, places: Sequence[int], title: str = "read samples"
) -> Generator[Any, None, None]:
    source = work.source
    return in_workers(work, places, source.where, title=title, few=source.few)


def unless_wrong(results: Generator[Any, None, None]) -> Iterator[Any]:
    """The results of a pass; InputError for the first that is text, which tells what is wrong."""
    with closing(results):
        for result in results:
            if isinstance(result, str):
                raise InputError(f"{result} (kdcache build --list-unreadable with the same --data lists every one)")
            yield result


def unreadable_items(source: Source, places: Places, progress: FilesDone | None = None) -> list[str]:
    """Decode every image and list a line for each that cannot be decoded."""
    lines = []
    for done, line in enumerate(_each(_Pixels(source, check=True), places.tolist()), 1):
        if line:
            lines.append(str(line))
        if progress and (done % 256 == 0 or done == len(places)):
            progress(done, len(places))
    return lines


def item_sizes(source: Source) -> np.ndarray:
    """The size of every image, int32 [N, 2]."""
    results = unless_wrong(_each(_Size(source), range(len(source)), "read sizes"))
    sizes = np.empty((len(source), 2), np.int32)
    for i, size in enumerate(results):
        sizes[i] = size
    return sizes


def small_pixels(source: Source, places: Places, sizes: np.ndarray) -> torch.Tensor | None:
    """The pixels uint8 [n, H, W, 3] of images that are small enough to be held in memory, else None."""
    if not are_small(sizes):
        return None
    read = unless_wrong(_each(_Pixels(source), places.tolist(), "decode small images"))
    found = np.empty((len(places), *sizes[0].tolist(), 3), np.uint8)
    for i, pixels in enumerate(read):
        if pixels.shape != found.shape[1:]:
            raise InputError(f"{source.where(int(places[i]))}: has changed since its size was read: open it again")
        found[i] = pixels
    return torch.from_numpy(found)


def statistics(pixels: torch.Tensor | None) -> tuple[Triple, Triple]:
    """Mean and standard deviation of images in memory; ImageNet's for others, as for image files."""
    return (IMAGENET_MEAN, IMAGENET_STD) if pixels is None else mean_std(pixels.numpy())


def known_statistics(
    source: Source, sizes: np.ndarray, key: str, places: Places, pixels: torch.Tensor | None, home: Path
) -> tuple[Triple, Triple]:
    """Mean and standard deviation of the images at these places, measured once where they are small.

    sizes: those of all images of the source, int32 [N, 2]. key: that of all that is known of the source. pixels: those
    of the images at these places, where they are at hand.
    """
    if not are_small(sizes[places]):
        return IMAGENET_MEAN, IMAGENET_STD
    key = hashlib.sha256(f"kdcache-statistics 1 {key}\n".encode() + places.astype("<i8").tobytes()).hexdigest()
    stored = (recall(home, key) or {}).get("statistics", np.empty(0))
    if stored.shape != (2, 3):
        if pixels is None:
            pixels = small_pixels(source, places, sizes[places])
        stored = np.array(statistics(pixels))
        remember(home, key, {"statistics": stored})
    mean, std = stored.tolist()
    return tuple(mean), tuple(std)


def part_of(labels: np.ndarray, split: str, where: object) -> Places:
    """The places of a split's samples, where every tenth of a class is held out for the eval split.

    labels: int64 [N, 1] or [N, 0]. InputError, which begins with `where`, if there is nothing to hold out.
    """
    flat = labels[:, 0] if labels.shape[1] else np.zeros(len(labels), np.int64)
    places = np.flatnonzero(held_out(flat, HELD_OUT) == (split == "eval"))
    if not places.size:
        raise InputError(f"{where}: there is no tenth image in any class to hold out for the eval split")
    return places


State = tuple[int, int]  # a file's size in bytes and its time of change in ns


def file_states(files: Sequence[Path]) -> tuple[State, ...]:
    """The state of each file. InputError for one that cannot be read, or that is not a plain file."""
    states = []
    for path in files:
        try:
            about = path.stat()
        except OSError as e:
            raise InputError(f"{path}: cannot be read: {e.strerror}") from e
        if not stat.S_ISREG(about.st_mode):
            raise InputError(f"{path}: not a plain file")
        states.append((about.st_size, about.st_mtime_ns))
    return tuple(states)


def read_part(path: Path, state: State, offset: int, length: int, where: str) -> bytes:
    """Some bytes of a file that was indexed. InputError if it has changed since; `where` names the image for it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            about = os.fstat(fd)
            if (about.st_size, about.st_mtime_ns) != state:
                raise InputError(f"{path}: has changed since it was indexed: open the dataset again")
            content = os.pread(fd, length, offset)
        finally:
            os.close(fd)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e
    if len(content) < length:
        raise InputError(f"{where}: {path.name} ends before it: the file is truncated")
    return content


def size_by_parts(read: Callable[[int], bytes], length: int, where: str) -> tuple[int, int]:
    """Height and width of an image of `length` bytes, whose first n bytes read(n) gives: mostly, a few are enough."""
    if length > _START:
        try:
            return size_of_bytes(read(_START), where)
        except InputError:
            pass  # a long EXIF part may stand before the size: the whole image decides
    return size_of_bytes(read(length), where)


def require_labels(labels: np.ndarray, names: Sequence[str], where: Callable[[int], str]) -> None:
    """InputError that names the first sample whose label, in int64 [N], is not the place of a class."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if wrong.size:
        first = int(wrong[0])
        raise InputError(f"{where(first)}: its label {labels[first]} is not one of the {len(names):,} classes")
