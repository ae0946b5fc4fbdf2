"""What every kind of dataset has in common: what it is asked for, how it is opened, what is known of its images."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.decode import in_one_line
from kdcache.pipeline.data.imagefiles import FilesDone, Paths, Triple
from kdcache.pipeline.data.labels import require_text

TakesPath = Literal["never", "may", "must"]
_PIECE = 1 << 18  # numbers that are drawn at a time


@dataclass(frozen=True)
class Asked:
    """A dataset that someone asks for: the parts of its spec, NAME[:PATH][?train=FOLDER&eval=FOLDER], and its split."""

    spec: str
    name: str
    path: Path | None  # absolute
    folders: Mapping[str, str]  # by split, where the user names the folders
    split: str
    unlabelled: bool
    home: Path  # takes downloads, and what was learnt from image headers

    @property
    def downloads(self) -> Path:
        """The folder that downloaded files belong in."""
        return self.path or self.home / "data"


class Kind(ABC):
    """One row of the table of kinds: how a dataset of this kind is opened."""

    takes_path: TakesPath = "may"
    between: str = ""  # what stands between two paths, where PATH may be two
    takes_folders: bool = False  # whether --train-folder and --eval-folder name folders in its PATH

    @abstractmethod
    def open(self, asked: Asked) -> Described:
        """Open the split that is asked for. InputError where it cannot be found or read, or does not fit."""

    def splits(self, asked: Asked) -> tuple[str, ...]:
        """The splits that there are: 'train' and 'eval', and perhaps 'validation' to choose weights by."""
        return "train", "eval"

    def is_place(self, text: str) -> bool:
        """Whether what stands behind the kind's name is a place on this disk."""
        return True

    def unreadable(self, asked: Asked, progress: FilesDone | None = None) -> list[str]:
        """Decode every file and list a line 'path: reason' for each that cannot be decoded."""
        return self.open(asked).unreadable(progress)


class _Contents:
    """What each kind has beside `Described`'s fields, as a field of its own or as a constant."""

    pixels: torch.Tensor | None  # uint8 [N, H, W, 3] where the images are held in memory
    paths: Sequence[str]  # the name of each image, in byte order; () where there are none


@dataclass(frozen=True, eq=False)
class Described(_Contents, ABC):
    """What is known of the images of one split. Each kind adds the pixels; dataset.Dataset explains the fields.

    InputError where the fields do not fit each other.
    """

    name: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    sizes: np.ndarray
    mean: Triple
    std: Triple
    note: str | None = field(default=None, kw_only=True)
    _fingerprints: dict[bool, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        n, ids = len(self.sizes), self.labels
        self._require(n > 0 and self.sizes.shape == (n, 2), "sizes must be [N, 2] with N > 0")
        self._require(self.sizes.dtype == np.int32 and ids.dtype == np.int64, "sizes are int32, labels int64")
        self._require(ids.shape in ((n, 0), (n, 1)), "labels must be [N, 1] or [N, 0]")
        sound = not ids.size or (ids.min() >= 0 and ids.max() < len(self.class_names))
        wrong = np.empty(0) if sound else np.flatnonzero((ids < 0) | (ids >= len(self.class_names)))
        first = f", but sample {wrong[0]} has {ids.flat[wrong[0]]}" if wrong.size else ""
        self._require(not wrong.size, f"labels must be places in class_names{first}")
        require_text(self.class_names, f"dataset {self.name}, split {self.split}")

    def _require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise InputError(f"dataset {self.name}, split {self.split}: {rule}")

    def _require_pixels(self, pixels: torch.Tensor) -> None:
        shape = (len(self), *self.sizes[0].tolist(), 3)
        self._require(
            isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8 and pixels.shape == shape,
            "images must be uint8 [N, H, W, 3]",
        )

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def in_memory(self) -> bool:
        return self.pixels is not None

    @property
    def image_size(self) -> int | None:
        return int(self.sizes[0].max()) if self.in_memory else None

    @abstractmethod
    def decode(self, index: int) -> torch.Tensor:
        """See Dataset."""

    def content(self, index: int) -> bytes | None:
        return None

    def start(self, index: int, most: int) -> tuple[bytes, int] | None:
        content = self.content(index)
        return None if content is None else (content, len(content))

    def file(self, index: int) -> Path | None:
        return None

    def where(self, index: int) -> str:
        return in_one_line(self.file(index) or f"image {index} of {self.name}")

    def unreadable(self, progress: FilesDone | None = None) -> list[str]:
        return []

    def fingerprint(self, full: bool = False) -> str:
        if full not in self._fingerprints:
            self._fingerprints[full] = self._fingerprint(full)
        return self._fingerprints[full]

    @abstractmethod
    def _fingerprint(self, full: bool) -> str:
        """The digest that `_begun` starts, taken over the order and the contents too, in hexadecimal."""

    def _begun(self, kind: str, full: bool, **more: object) -> hashlib._Hash:
        """Start a digest with the labels and the class names. The caller adds the contents."""
        about = {
            "format": 1,
            "kind": kind,
            "contents": "full" if full else "sample",
            "labels": self.labels.shape,
            "classes": self.class_names,
            **more,
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        return digest

    def named(self, name: str, split: str) -> Self:
        return replace(self, name=name, split=split)

    def unlabelled(self) -> Self:
        return replace(self, labels=np.empty((len(self), 0), np.int64), class_names=())

    def subset(self, places: np.ndarray) -> Self:
        return replace(self, labels=self.labels[places], sizes=self.sizes[places], **self._contents(places))

    @abstractmethod
    def _contents(self, places: np.ndarray) -> dict[str, Any]:
        """The kind's own fields for the images at these places."""

    def joined(self, before: object) -> Self | None:
        return None


def drawn_places(n: int, most: int, key: int = 0) -> np.ndarray:
    """Draw `most` of n places (all, where n is no more), int64 in rising order: the same ones on every machine."""
    if n <= most:
        return np.arange(n)
    # NumPy keeps the raw bits the same across versions. The smallest numbers choose the places, the first ones of
    # equal numbers. They are drawn in pieces, after each of which the smallest so far are kept.
    words = np.random.Philox(key=key)
    numbers, places = np.empty(0, np.uint64), np.empty(0, np.int64)
    for start in range(0, n, _PIECE):
        piece = words.random_raw(min(_PIECE, n - start))
        new = np.arange(len(piece)) if len(numbers) < most else np.flatnonzero(piece < numbers.max())
        numbers, places = np.concatenate([numbers, piece[new]]), np.concatenate([places, new + start])
        least = np.argsort(numbers, kind="stable")[:most]
        numbers, places = numbers[least], places[least]
    return np.sort(places)


def paths_at(paths: Sequence[str], places: np.ndarray) -> Paths:
    """The paths at these places, int64 [n]."""
    return Paths.of(paths[int(place)] for place in places)
