"""Datasets by stable index: sample i is the same image with the same label, today and on every machine.

open_data knows these specs:

    digits                  scikit-learn's 8x8 digits; every fifth image of each class is the eval split
    cifar10[:PATH]          torchvision's, downloaded to PATH (default KDCACHE_HOME/data) where missing
    cifar100[:PATH]
    fashion-mnist[:PATH]    the same, or PATH holds the four .gz files; by default those of Debian's package
                            dataset-fashion-mnist where it is installed
    imagenet:PATH           PATH/train/CLASS/* and PATH/val/CLASS/*
    imagefolder:PATH        PATH/train/CLASS/* and PATH/val, PATH/test or PATH/eval (the first there is); or
                            PATH/CLASS/* alone, where every tenth image of each class is the eval split
        ...?train=A&eval=B  the same, where the folders of the splits have other names (see with_folders)
    module:function         function(split) gives a Dataset, or (images uint8 [N, H, W, 3], labels int [N]),
                            or these and the class names; also modules in the current directory are found

The folders of splits may also be called Training, Testing, valid, validation and so on, in any case. Images below a
class folder count, at any depth; class ids go by folder name in byte order, always the train split's. Unlabelled, an
image folder needs no class folders.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import numpy as np
import torch

from kdcache.cache.errors import InputError, KdcacheError
from kdcache.cache.home import home as default_home
from kdcache.pipeline.data import arrays, imagefiles
from kdcache.pipeline.data.arrays import Arrays
from kdcache.pipeline.data.decode import decode_file
from kdcache.pipeline.data.folders import EVALUATION, TEST, VALIDATION, Layout, Listing, has_validation, list_split
from kdcache.pipeline.data.imagefiles import Progress, Triple, one_line

FINGERPRINTED_FILES = 4096
_ARRAYS = ("digits", "cifar10", "cifar100", "fashion-mnist")
_FOLDERS = {
    "imagenet": Layout((VALIDATION,), split_folders=True),
    "imagefolder": Layout((VALIDATION, TEST, EVALUATION), split_folders=False),
}
_SPLITS = re.compile(r"\?((?:train|eval)=[^?&]*(?:&eval=[^?&]*)?)$")  # what with_folders adds
_KNOWN = "digits, cifar10, cifar100, fashion-mnist, imagenet:PATH, imagefolder:PATH and module:function"


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a dataset: in memory (images), in files (root, paths), or in both where files are small.

    InputError where the fields do not fit each other.
    """

    name: str  # the spec without its path
    split: str  # 'train', 'eval' or 'validation'
    labels: np.ndarray  # int64 [N, L]; L is 1, or 0 when unlabelled
    class_names: tuple[str, ...]  # by label id: the folder names for class folders; () when unlabelled
    sizes: np.ndarray  # int32 [N, 2], H and W of each image in pixels
    mean: Triple  # of the train split's pixels in 0..1, for students and taught teachers
    std: Triple
    images: torch.Tensor | None = None  # uint8 [N, H, W, 3]
    root: Path | None = None
    paths: tuple[str, ...] = ()  # POSIX, relative to root, in byte order
    note: str | None = None  # for the user: what was found there, such as classes, and what was left out
    _fingerprints: dict[bool, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        n, ids = len(self.sizes), self.labels
        self._require(n > 0 and self.sizes.shape == (n, 2), "sizes must be [N, 2] with N > 0")
        self._require(self.sizes.dtype == np.int32 and ids.dtype == np.int64, "sizes are int32, labels int64")
        self._require(ids.shape in ((n, 0), (n, 1)), "labels must be [N, 1] or [N, 0]")
        known = ids.size == 0 or (ids.min() >= 0 and ids.max() < len(self.class_names))
        self._require(known, "labels must be places in class_names")
        if self.root is None or self.images is not None:
            shape = (n, *self.sizes[0].tolist(), 3)
            fits = self.images is not None and self.images.dtype == torch.uint8 and self.images.shape == shape
            self._require(fits, "images must be uint8 [N, H, W, 3] where there are no root and paths")
        self._require(len(self.paths) == (n if self.root else 0), "root must come with a path a sample")

    def _require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise InputError(f"dataset {self.name}, split {self.split}: {rule}")

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def image_size(self) -> int | None:
        """Of images held in memory the side in pixels, the longer one where they are not square; else None."""
        return None if self.images is None else max(self.images.shape[1:3])

    @property
    def in_memory(self) -> bool:
        """Whether all images are held in memory, as `pixels`."""
        return self.images is not None

    @property
    def pixels(self) -> torch.Tensor | None:
        """uint8 [N, H, W, 3], where all images are held in memory."""
        return self.images

    def file(self, index: int) -> Path | None:
        """The file that holds the image alone, where there is one."""
        return None if self.root is None else self.root / self.paths[index]

    def where(self, index: int) -> str:
        """What to call the image in a message: its file, or its place in the dataset."""
        return str(self.file(index) or f"image {index} of {self.name}")

    def subset(self, places: np.ndarray) -> Dataset:
        """The images at these places (int64 [n]) alone."""
        return replace(
            self,
            labels=self.labels[places],
            sizes=self.sizes[places],
            images=None if self.images is None else self.images[torch.from_numpy(places)],
            paths=tuple(self.paths[i] for i in places) if self.paths else (),
        )

    def joined(self, before: Dataset) -> Dataset | None:
        """These images after those of `before`; None unless both are parts of one folder."""
        if self.root is None or before.root != self.root:
            return None
        images = None
        if before.images is not None and self.images is not None:
            images = torch.cat([before.images, self.images])
        return replace(
            self,
            labels=np.concatenate([before.labels, self.labels]),
            sizes=np.concatenate([before.sizes, self.sizes]),
            images=images,
            paths=(*before.paths, *self.paths),
        )

    def decode(self, index: int) -> torch.Tensor:
        """The whole image, uint8 [3, H, W]. InputError where its file cannot be read or has changed."""
        if self.images is not None:
            return self.images[index].permute(2, 0, 1).contiguous()
        assert self.root is not None
        return decode_file(self.root / self.paths[index], self.sizes[index])

    def fingerprint(self, full: bool = False) -> str:
        """sha256, in hexadecimal, of labels, class names, order and pixels; not of places and times.

        In files: all relative paths and sizes, and the contents of 4,096 drawn files or, when `full`, of all.
        A full fingerprint never equals one that is not. InputError names a file that cannot be read. Computed once.
        """
        if full not in self._fingerprints:
            self._fingerprints[full] = self._fingerprint(full)
        return self._fingerprints[full]

    def _fingerprint(self, full: bool) -> str:
        n = len(self)
        about: dict[str, object] = {
            "format": 1,
            "kind": "files" if self.root else "arrays",
            "contents": "full" if full else "sample",
            "labels": self.labels.shape,
            "classes": self.class_names,
        }
        if self.images is not None and not self.root:
            about["pixels"] = self.images.shape
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        digest.update(self.labels.astype("<i8").tobytes())
        if self.root:
            for path, size in zip(self.paths, imagefiles.file_sizes(self.root, self.paths), strict=True):
                digest.update(os.fsencode(path) + f"\0{size}\n".encode())
            chosen = np.arange(n)
            if n > FINGERPRINTED_FILES and not full:
                # Raw bits, since numpy keeps those across versions. The smallest numbers choose the files.
                drawn = np.random.Philox(key=0).random_raw(n)
                chosen = np.sort(np.argsort(drawn, kind="stable")[:FINGERPRINTED_FILES])
            for content in imagefiles.file_digests(self.root, [self.paths[i] for i in chosen]):
                digest.update(content)
        else:
            assert self.images is not None
            digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()

    def unreadable(self, progress: Progress | None = None) -> list[str]:
        """Decodes every file; one line 'path: reason' for each that cannot be. Calls progress(done, all)."""
        return imagefiles.unreadable_files(self.root, self.paths, progress) if self.root else []


def open_data(spec: str, split: str, *, unlabelled: bool = False, home: Path | None = None) -> Dataset:
    """The 'train' or 'eval' split of the dataset that `spec` names (see above), without labels if asked.

    `home` (default: KDCACHE_HOME) takes downloads, and what was learnt from image headers. InputError for
    whatever cannot be found or read, or does not fit.
    """
    if split not in ("train", "eval"):
        raise InputError(f"there is no split {split!r}: it is train or eval")
    home = home or default_home()
    name, path = _parse(spec)
    place = path or home / "data"
    if name in _FOLDERS:
        return _open_folder(spec, split, unlabelled, home)
    if name == "digits" and not path:
        data = _from_arrays(name, split, arrays.digits)
    elif name in ("cifar10", "cifar100"):
        data = _from_arrays(name, split, lambda train: arrays.cifar(name, place, train))
    elif name == "fashion-mnist":
        data = _from_arrays(name, split, lambda train: arrays.fashion_mnist(path, place, train))
    elif name and path:
        data = _from_function(spec, split)
    else:
        hint = f"; a folder of images is imagefolder:{spec}" if Path(spec).is_dir() else ""
        raise InputError(f"unknown dataset {spec!r}: known are {_KNOWN}{hint}")
    if unlabelled:
        return replace(data, labels=np.empty((len(data), 0), np.int64), class_names=())
    return data


def open_validation(spec: str, home: Path | None = None) -> Dataset | None:
    """The split to choose weights by, where the data have one beside those that open_data knows; else None.

    Image folders have one where val and test folders stand beside train, and the eval split is test.
    """
    name, path = _parse(spec)
    if name not in _FOLDERS or path is None or not has_validation(path, _layout(spec)):
        return None
    return _open_folder(spec, "validation", False, home or default_home())


def list_unreadable(
    spec: str,
    split: str,
    *,
    unlabelled: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Dataset.unreadable, also for image folders that open_data refuses because headers cannot be read."""
    if _parse(spec)[0] in _FOLDERS:
        files = _list_folder(spec, split, unlabelled)
        return imagefiles.unreadable_files(files.root, files.paths, progress)
    return open_data(spec, split, unlabelled=unlabelled).unreadable(progress)


def is_function(spec: str) -> bool:
    """Whether open_data would import a module for this spec."""
    name, path = _parse(spec)
    return path is not None and name not in (*_FOLDERS, *_ARRAYS)


def with_folders(spec: str, train: str | None, evaluation: str | None) -> str:
    """The spec with the names of the splits' folders, relative to its PATH. InputError where it is no folder's."""
    named = {"train": train, "eval": evaluation}
    given = {key: name for key, name in named.items() if name is not None}
    if not given:
        return spec
    if spec.partition(":")[0] not in _FOLDERS:
        raise InputError(f"--train-folder and --eval-folder are for {' and '.join(_FOLDERS)}, not for {spec}")
    return f"{spec}?{urlencode(given)}"


def _parse(spec: str) -> tuple[str, Path | None]:
    name, _, place = spec.partition(":")
    if name in _FOLDERS:
        place = _SPLITS.sub("", place)
    return name, Path(place).expanduser().absolute() if place else None


def _layout(spec: str) -> Layout:
    found = _SPLITS.search(spec)
    named = dict(parse_qsl(found[1])) if found else {}
    return replace(_FOLDERS[_parse(spec)[0]], train=named.get("train"), eval=named.get("eval"))


def _list_folder(spec: str, split: str, unlabelled: bool) -> Listing:
    name, path = _parse(spec)
    if path is None:
        raise InputError(f"{name} needs a folder: {name}:PATH")
    return list_split(path, split, _layout(spec), labelled=not unlabelled)


def _open_folder(spec: str, split: str, unlabelled: bool, home: Path) -> Dataset:
    files = _list_folder(spec, split, unlabelled)
    found = imagefiles.load_folder(files.root, files.paths, home)
    train = found
    if split != "train":
        listing = _list_folder(spec, "train", unlabelled)
        train = imagefiles.load_folder(listing.root, listing.paths, home, decode=False)
    return Dataset(
        name=_parse(spec)[0],
        split=split,
        labels=files.labels,
        class_names=files.class_names,
        sizes=found.sizes,
        mean=train.mean,
        std=train.std,
        images=found.images,
        root=files.root,
        paths=files.paths,
        note=files.note,
    )


def _from_arrays(name: str, split: str, load: Callable[[bool], Arrays]) -> Dataset:
    """load(train) gives one split; class names and statistics are always the train split's."""
    images, labels, names = load(split == "train")
    train_images = images
    if split == "eval":
        train_images, _, names = load(True)
    mean, std = imagefiles.mean_std(train_images)
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    sizes = np.tile(np.array(images.shape[1:3], dtype=np.int32), (len(images), 1))
    return Dataset(name, split, labels[:, None], names, sizes, mean, std, pixels)


def _from_function(spec: str, split: str) -> Dataset:
    module_name, _, function_name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # and left there, for worker processes
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as e:  # a user's module may raise anything
        raise InputError(f"dataset {spec!r} cannot be imported ({one_line(e)}); known are {_KNOWN}") from e

    def call(part: str) -> object:
        try:
            return function(part)
        except KdcacheError:
            raise
        except Exception as e:
            raise InputError(f"dataset {spec!r}: {function_name}({part!r}) failed: {one_line(e)}") from e

    found = call(split)
    if isinstance(found, Dataset):
        return replace(found, name=spec, split=split)
    return _from_arrays(
        spec, split, lambda train: _arrays(spec, found if train == (split == "train") else call("train"))
    )


def _arrays(spec: str, found: object) -> Arrays:
    """What a user's function returned, checked."""
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise InputError(f"dataset {spec!r}: must give a Dataset, or images, labels and perhaps class names")
    images, labels = np.asarray(found[0]), np.asarray(found[1])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        kind = f"{images.dtype} {images.shape}"
        raise InputError(f"dataset {spec!r}: images must be uint8 [N, H, W, 3], not {kind}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        kind = f"{labels.dtype} {labels.shape}"
        raise InputError(f"dataset {spec!r}: labels must be whole numbers [N], not {kind}")
    names = found[2] if len(found) == 3 else range(int(labels.max()) + 1)
    return images, labels.astype(np.int64), tuple(str(name) for name in names)
