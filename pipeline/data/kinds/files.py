"""Images that are files below one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from kdcache.cache.errors import InputError
from kdcache.pipeline.data import imagefiles
from kdcache.pipeline.data.decode import decode_file
from kdcache.pipeline.data.imagefiles import FilesDone, Paths
from kdcache.pipeline.data.kinds.base import Asked, Described, drawn_places, paths_at

FINGERPRINTED_FILES = 4096


@dataclass(frozen=True, eq=False)
class Listing:
    """The files of one split, in its order, and what is known of them before any is read."""

    root: Path
    paths: Sequence[str]  # relative to root
    labels: np.ndarray  # int64 [N, 1], or [N, 0] when unlabelled
    class_names: tuple[str, ...]
    note: str  # one line that tells what was found


@dataclass(frozen=True, eq=False)
class FileDataset(Described):
    """A dataset of image files, decoded one at a time; small images of one size are held in memory too, as `pixels`.

    apart: whether the owner gave the splits apart, so that images below one root are still no parts of one whole.
    """

    root: Path
    paths: Sequence[str]  # POSIX, relative to root, in byte order
    pixels: torch.Tensor | None = None  # uint8 [N, H, W, 3]
    apart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(len(self.paths) == len(self), "root must come with a path a sample")
        if self.pixels is not None:
            self._require_pixels(self.pixels)

    def decode(self, index: int) -> torch.Tensor:
        """Decode the image. InputError where its file cannot be read or has changed."""
        if self.pixels is not None:
            return self.pixels[index].permute(2, 0, 1).contiguous()
        return decode_file(self.file(index), self.sizes[index])

    def content(self, index: int) -> bytes:
        return self._read(index)[0]

    def start(self, index: int, most: int) -> tuple[bytes, int]:
        return self._read(index, most)

    def _read(self, index: int, most: int = -1) -> tuple[bytes, int]:
        """The file's content, or its first `most` bytes, and the length of all. InputError where it cannot be read."""
        path = self.file(index)
        try:
            with path.open("rb", buffering=0) as file:
                length = os.fstat(file.fileno()).st_size
                return file.read(most) if most >= 0 else file.readall(), length
        except OSError as e:
            raise InputError(f"{path} cannot be read: {e.strerror}") from e

    def file(self, index: int) -> Path:
        return self.root / self.paths[index]

    def unreadable(self, progress: FilesDone | None = None) -> list[str]:
        return imagefiles.unreadable_files(self.root, self.paths, progress)

    def _fingerprint(self, full: bool) -> str:
        """Digest all paths and sizes, and the contents of FINGERPRINTED_FILES drawn files or, when `full`, of all."""
        n = len(self)
        digest = self._begun("files", full)
        for lines in imagefiles.listing(self.root, self.paths):
            digest.update(lines)
        chosen = drawn_places(n, n if full else FINGERPRINTED_FILES)
        for content in imagefiles.file_digests(self.root, self.paths if full else paths_at(self.paths, chosen)):
            digest.update(content)
        return digest.hexdigest()

    def _contents(self, places: np.ndarray) -> dict[str, Any]:
        pixels = None if self.pixels is None else self.pixels[torch.from_numpy(places)]
        return {"paths": paths_at(self.paths, places), "pixels": pixels}

    def joined(self, before: object) -> Self | None:
        if not isinstance(before, FileDataset) or before.root != self.root or self.apart:
            return None
        pixels = None
        if before.pixels is not None and self.pixels is not None:
            pixels = torch.cat([before.pixels, self.pixels])
        return replace(
            self,
            labels=np.concatenate([before.labels, self.labels]),
            sizes=np.concatenate([before.sizes, self.sizes]),
            paths=Paths.of(chain(before.paths, self.paths)),
            pixels=pixels,
        )


def open_listing(
    asked: Asked, name: str, own: Listing, train: Callable[[], tuple[Path, Sequence[str]]], *, apart: bool = False
) -> FileDataset:
    """Open the files of a split. train() gives the folder and the paths of the train split, whose mean and std count.

    InputError names the first file that cannot be read.
    """
    found = imagefiles.load_folder(own.root, own.paths, asked.home)
    of_train = found if asked.split == "train" else imagefiles.load_folder(*train(), asked.home, decode=False)
    return FileDataset(
        name=name,
        split=asked.split,
        labels=own.labels,
        class_names=own.class_names,
        sizes=found.sizes,
        mean=of_train.mean,
        std=of_train.std,
        note=own.note,
        root=own.root,
        paths=own.paths,
        pixels=found.images,
        apart=apart,
    )


def below_one_root(name: str, paths: Sequence[str | os.PathLike[str]]) -> tuple[Path, Paths]:
    """The folder that holds all files, at any depth, and their paths relative to it: a moved copy is the same."""
    for i, path in enumerate(paths):
        if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in os.fspath(path):
            raise InputError(f"dataset {name!r}: path {i} is {path!r}, which is no path of a file")
    whole = [os.path.abspath(os.path.expanduser(path)) for path in paths]  # noqa: PTH100, PTH111  Paths take seconds
    root = os.path.commonpath({os.path.dirname(path) for path in whole})  # noqa: PTH120
    skip = len(root.rstrip("/")) + 1
    try:
        return Path(root), Paths.of(path[skip:] for path in whole)
    except UnicodeEncodeError as e:
        raise InputError(f"dataset {name!r}: {e.object!r} is no path of a file") from e
