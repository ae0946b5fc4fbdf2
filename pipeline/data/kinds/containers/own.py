"""A user's own map-style Dataset: its samples are (image, label), and what they are is found out by reading them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcache.cache.errors import InputError, KdcacheError, kind_and_message, machine_error
from kdcache.pipeline.data.decode import MAX_PIXELS
from kdcache.pipeline.data.imagefiles import Triple
from kdcache.pipeline.data.kinds.base import drawn_places
from kdcache.pipeline.data.kinds.containers.items import (
    Content,
    content_digest,
    content_size,
    small_pixels,
    statistics,
    unless_wrong,
)
from kdcache.pipeline.data.kinds.containers.passes import in_workers
from kdcache.pipeline.data.kinds.files import FINGERPRINTED_FILES
from kdcache.pipeline.data.memory import recall, remember

_TWICE = 8  # samples that are read twice, to see whether they stay the same
_Found = tuple[int, int, int, bytes]  # label, height, width, digest
_FORMS = "a PIL image, an image file's bytes, or a tensor uint8 [3, H, W]"


@dataclass(frozen=True, eq=False)
class OwnSource:
    """A map-style Dataset, such as torch's.

    Without `labelled`, samples may be images alone, and labels are not read.
    """

    dataset: Any
    name: str
    labelled: bool
    # What a Dataset opens at its first sample, such as an HDF5 file, must not be open when workers are forked.
    few = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, place: int) -> str:
        return f"sample {place} of {self.name}"

    def read(self, place: int) -> tuple[Content, int | None]:
        where = self.where(place)
        try:
            item = self.dataset[place]
        except KdcacheError:
            raise
        except Exception as e:  # a user's Dataset may raise anything
            if machine_error(e):
                raise
            raise InputError(f"{where}: {kind_and_message(e)}") from e
        if not self.labelled:
            return _image(item[0] if isinstance(item, tuple | list) and item else item, where), None
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(f"{where}: is {_kind(item)}, but must be (image, label)")
        return _image(item[0], where), whole_number(item[1], where)

    def size(self, place: int) -> tuple[int, int]:
        return content_size(self.read(place)[0], self.where(place))


def _image(image: Any, where: str) -> Content:
    """The image of a sample; InputError unless it has one of the three forms."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
        if not 0 < image.shape[1] * image.shape[2] <= MAX_PIXELS:
            raise InputError(f"{where}: its image has {image.shape[1]} x {image.shape[2]} pixels")
        return image.detach().cpu().as_subclass(torch.Tensor)
    hint = ""
    if isinstance(image, torch.Tensor) and image.is_floating_point():
        hint = ": leave out transforms such as ToTensor, since kdcache cuts and normalises the images"
    elif isinstance(image, str | Path):
        hint = ": return (paths, labels) for images in files"
    raise InputError(f"{where}: its image is {_kind(image)}, but must be {_FORMS}{hint}")


def whole_number(label: Any, where: str) -> int:
    """The label of the sample `where` as a number; InputError for anything but one whole number."""
    if isinstance(label, torch.Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
        raise InputError(f"{where}: its label is {_kind(label)}, but must be a whole number")
    if not -(2**63) <= label < 2**63:
        raise InputError(f"{where}: its label {label} is no class")
    return int(label)


def _kind(value: Any) -> str:
    """What a value is, in a few words: its type, with the shape of arrays, or itself where that is short."""
    name = type(value).__name__
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{name} of {len(value)}"
    text = repr(value)
    return f"{name} {text}" if isinstance(value, str | int | float) and len(text) < 40 else name


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found out of all samples: labels int64 [N] (empty without labels), sizes int32 [N, 2], and statistics.

    digests: those of the samples that a fingerprint covers. pixels: of small images, where they had to be decoded.
    """

    source: OwnSource
    labels: np.ndarray
    sizes: np.ndarray
    mean: Triple
    std: Triple
    digests: dict[int, bytes]
    pixels: torch.Tensor | None = None

    def all_pixels(self) -> torch.Tensor | None:
        """The pixels of all images where they are small enough to be held in memory."""
        return self.pixels if self.pixels is not None else small_pixels(self.source, _all(self.source), self.sizes)


def survey(source: OwnSource, home: Path) -> Survey:
    """Find out what there is to know of a Dataset. What needs every sample to be read is remembered.

    It is remembered under a digest of the samples that a fingerprint covers, so these are read at each opening. Every
    other sample is compared with what is remembered when it is decoded. InputError for a sample that cannot be taken,
    and for one that is not the same each time.
    """
    n = _length(source)
    drawn = drawn_places(n, FINGERPRINTED_FILES).tolist()
    looks = list(_looks(_Look(source, digests=True, twice=tuple(drawn[:_TWICE])), drawn))
    digests = {place: look[3] for place, look in zip(drawn, looks, strict=True)}
    key = hashlib.sha256(f"kdcache-own-dataset 1 {n} {source.labelled} {looks}".encode()).hexdigest()
    if known := _recalled(source, home, key, n, digests):
        return known
    found = _numbers(iter(looks) if len(drawn) == n else _looks(_Look(source), range(n)), n)
    labels = found[:, 0].copy() if source.labelled else np.empty(0, np.int64)
    sizes = found[:, 1:].astype(np.int32)
    pixels = small_pixels(source, _all(source), sizes)
    mean, std = statistics(pixels)
    about: dict[str, np.ndarray] = {"labels": labels, "sizes": sizes}
    remember(home, key, about | {"mean": np.array(mean), "std": np.array(std)})
    return Survey(source, labels, sizes, mean, std, digests, pixels)


def _length(source: OwnSource) -> int:
    try:
        n = len(source)
    except Exception as e:  # a user's Dataset may raise anything
        raise InputError(f"dataset {source.name!r}: its len() failed: {kind_and_message(e)}") from e
    if n < 1:
        raise InputError(f"dataset {source.name!r}: has no samples in this split")
    return n


def _all(source: OwnSource) -> np.ndarray:
    return np.arange(len(source))


@dataclass(frozen=True)
class _Look:
    """Reads a sample: its label (or -1 without one), height, width, and the digest of its content where asked for.

    twice: samples that are read twice, to see whether they stay the same.
    """

    source: OwnSource
    digests: bool = False
    twice: tuple[int, ...] = ()

    def __call__(self, place: int) -> _Found | str:
        try:
            found = self._look(place)
            if place not in self.twice or self._look(place) == found:
                return found
        except InputError as e:
            return str(e)
        return (
            f"{self.source.where(place)}: has other pixels or another label each time it is read: leave out random "
            "transforms, since kdcache draws and cuts the views itself"
        )

    def _look(self, place: int) -> _Found:
        where = self.source.where(place)
        content, label = self.source.read(place)
        height, width = content_size(content, where)
        digest = content_digest(content, where) if self.digests else b""
        return -1 if label is None else label, height, width, digest


def _looks(look: _Look, places: Sequence[int]) -> Iterator[_Found]:
    return unless_wrong(in_workers(look, places, look.source.where))


def _numbers(looks: Iterator[_Found], n: int) -> np.ndarray:
    """Labels, heights and widths, int64 [n, 3]. Millions of samples take little memory on the way."""
    return np.fromiter((look[:3] for look in looks), np.dtype((np.int64, 3)), n)


def _recalled(source: OwnSource, home: Path, key: str, n: int, digests: dict[int, bytes]) -> Survey | None:
    stored = recall(home, key) or {}
    if not stored.keys() >= {"labels", "sizes", "mean", "std"}:
        return None
    labels, sizes, mean, std = (stored[name] for name in ("labels", "sizes", "mean", "std"))
    fits = labels.shape == ((n,) if source.labelled else (0,)) and sizes.shape == (n, 2) and len(mean) == len(std) == 3
    if not fits or labels.dtype != np.int64 or sizes.dtype != np.int32:
        return None
    return Survey(source, labels, sizes, tuple(mean.tolist()), tuple(std.tolist()), digests)


def own_classes(dataset: Any) -> tuple[str, ...] | None:
    """The class names in an attribute `classes` of a Dataset or of the one that it is a Subset of; None without one."""
    while not hasattr(dataset, "classes"):
        if not hasattr(dataset, "dataset"):
            return None
        dataset = dataset.dataset
    names = dataset.classes
    if isinstance(names, str) or not isinstance(names, Sequence) or not len(names):
        return None
    return tuple(", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name) for name in names)
