"""Datasets whose samples have a stable index: sample i is the same image with the same label on every machine.

`Dataset` is what the rest of kdcache knows of one split. `open_data` opens one by its spec:

    digits                  scikit-learn's 8x8 digits; every fifth image of each class is the eval split
    cifar10[:PATH]          torchvision's files in PATH (default KDCACHE_HOME/data), downloaded where they are missing
    cifar100[:PATH]         likewise
    fashion-mnist[:PATH]    likewise, or PATH holds the four .gz files; by default the files of Debian's package
                            dataset-fashion-mnist where it is installed
    imagenet:PATH           PATH/train/CLASS/* and PATH/val/CLASS/*
    imagefolder:PATH        PATH/train/CLASS/* and PATH/val, PATH/test or PATH/eval (the first that exists); or
                            PATH/CLASS/* alone, where every tenth image of each class is the eval split
        ...?train=A&eval=B  for folders of the splits that have other names (see with_folders)
    files:TABLE             a .csv, .tsv, .jsonl or .parquet with the columns path, label and perhaps split; paths are
                            relative to it. Without splits, every tenth image of each class is the eval split
    hf:PATH, hf:NAME        a Hugging Face data set: a folder of save_to_disk, a folder of parquet files, parquet files,
                            or a name on the hub, where there is no such file or folder here
        ...:TRAIN,EVAL      for splits that have other names; with one name, a tenth of it is the eval split
        ...?image=A&label=B for the columns; ?config=NAME for a configuration
    wds:TRAIN::EVAL         WebDataset tars. A pattern is a file, a folder, {000..099}, or has * and ?. With one pattern
                            the tars' names tell their splits, or every tenth image of each class is the eval split
    module:function         function(split) gives a map-style torch Dataset of (image, label), (images uint8
                            [N, H, W, 3], labels int [N]), (paths, labels), or the last two with class names, or a
                            Described; modules in the current directory are found too

The folders of splits may also be called Training, Testing, valid, validation and so on, in any case. Images count at
any depth below a class folder; class ids go by the train split's folder names in byte order. An image folder
that is opened without labels needs no class folders.

A new kind of dataset is a file in kinds/ and a line in `KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import parse_qsl, urlencode

import numpy as np
import torch

from kdcache.cache.errors import InputError
from kdcache.cache.files import expanded, is_folder
from kdcache.cache.home import home as default_home
from kdcache.pipeline.data.imagefiles import FilesDone, Triple
from kdcache.pipeline.data.kinds import named
from kdcache.pipeline.data.kinds.arrays import InMemory
from kdcache.pipeline.data.kinds.base import Asked, Kind
from kdcache.pipeline.data.kinds.containers.hf.kind import HuggingFace
from kdcache.pipeline.data.kinds.containers.tars import Tars
from kdcache.pipeline.data.kinds.folders import EVALUATION, TEST, VALIDATION, ClassFolders, Layout
from kdcache.pipeline.data.kinds.functions import UserFunction
from kdcache.pipeline.data.kinds.tables import Table
from kdcache.pipeline.process.functions import did_you_mean


@runtime_checkable
class Dataset(Protocol):
    """One split of a dataset, by index 0..N-1."""

    @property
    def name(self) -> str:
        """The spec without its path."""

    @property
    def split(self) -> str:
        """'train', 'eval' or 'validation'."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [N, L]; L is 1, or 0 when unlabelled."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class by its id: the folder names for class folders; () when unlabelled."""

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2], height and width of each image in pixels."""

    @property
    def mean(self) -> Triple:
        """The mean of the train split's pixels in 0..1, by channel, for students and taught teachers."""

    @property
    def std(self) -> Triple:
        """The standard deviation of the train split's pixels in 0..1, by channel."""

    @property
    def note(self) -> str | None:
        """A line for the user that tells what was found, such as the classes, and what was left out."""

    @property
    def in_memory(self) -> bool:
        """Whether all images have one size and are held in memory, as `pixels`."""

    @property
    def pixels(self) -> torch.Tensor | None:
        """uint8 [N, H, W, 3] where the images are held in memory, else None."""

    @property
    def image_size(self) -> int | None:
        """The longer side, in pixels, of images that are held in memory; None for others."""

    @property
    def paths(self) -> Sequence[str]:
        """The name of each image: its path relative to the dataset's folder, in byte order; () where there are none."""

    def __len__(self) -> int:
        """N, at least 1."""

    def decode(self, index: int) -> torch.Tensor:
        """The whole image, uint8 [3, H, W]. InputError where it cannot be read or has changed."""

    def content(self, index: int) -> bytes | None:
        """The image file's content as it is stored, in whatever container; None where there are only pixels.

        InputError where it cannot be read.
        """

    def start(self, index: int, most: int) -> tuple[bytes, int] | None:
        """The first `most` bytes of the content (more where that costs nothing) and the length of all, or None."""

    def file(self, index: int) -> Path | None:
        """The file that holds this image alone, where there is one."""

    def where(self, index: int) -> str:
        """What to call the image in a message: its file, or its place in the dataset."""

    def fingerprint(self, full: bool = False) -> str:
        """The sha256, in hexadecimal, of labels, class names, order and pixels. Places and times do not count.

        For image files it covers, in place of the pixels, all relative paths and sizes, and the contents of 4,096
        drawn files or, when `full`, of all files. A full fingerprint never equals one that is not full. It is computed
        once. InputError names a file that cannot be read.
        """

    def unreadable(self, progress: FilesDone | None = None) -> list[str]:
        """Decode every file and list a line 'path: reason' for each that cannot be. Calls progress(done, all)."""

    def named(self, name: str, split: str) -> Dataset:
        """The same images under another name."""

    def unlabelled(self) -> Dataset:
        """The same images without labels."""

    def subset(self, places: np.ndarray) -> Dataset:
        """The images at these places (int64 [n]) alone."""

    def joined(self, before: Dataset) -> Dataset | None:
        """The images of `before`, followed by these; None unless both are parts of one folder."""


KINDS: dict[str, Kind] = {
    "digits": InMemory(lambda asked, train: named.digits(train), takes_path="never"),
    "cifar10": InMemory(partial(named.cifar, "cifar10")),
    "cifar100": InMemory(partial(named.cifar, "cifar100")),
    "fashion-mnist": InMemory(named.fashion_mnist),
    "imagenet": ClassFolders(Layout((VALIDATION,), split_folders=True)),
    "imagefolder": ClassFolders(Layout((VALIDATION, TEST, EVALUATION), split_folders=False)),
    "files": Table(),
    "hf": HuggingFace(),
    "wds": Tars(),
}


def open_data(spec: str, split: str, *, unlabelled: bool = False, home: Path | None = None) -> Dataset:
    """The 'train' or 'eval' split of the dataset that `spec` names (see above), without labels if asked.

    `home` (default: KDCACHE_HOME) takes downloads, and what was learnt from image headers. InputError for
    whatever cannot be found or read, or does not fit.
    """
    if split not in ("train", "eval"):
        raise InputError(f"there is no split {split!r}: it is train or eval")
    asked = _asked(spec, split, unlabelled, home)
    data = _kind(asked).open(asked)
    return data.unlabelled() if unlabelled else data


def open_validation(spec: str, home: Path | None = None) -> Dataset | None:
    """The split to choose weights by, where the data have one beside train and eval; else None."""
    asked = _asked(spec, "validation", False, home)
    kind = KINDS.get(asked.name)
    return kind.open(asked) if kind and "validation" in kind.splits(asked) else None


def list_unreadable(
    spec: str,
    split: str,
    *,
    unlabelled: bool = False,
    progress: FilesDone | None = None,
) -> list[str]:
    """Do what Dataset.unreadable does, also for image folders that open_data refuses because headers cannot be read."""
    asked = _asked(spec, split, unlabelled, None)
    return _kind(asked).unreadable(asked, progress)


def is_function(spec: str) -> bool:
    """Whether open_data would import a module for this spec."""
    asked = _asked(spec, "train", False, None)
    return asked.name not in KINDS and bool(_FUNCTION.fullmatch(spec))


def with_folders(spec: str, train: str | None, evaluation: str | None) -> str:
    """The spec with the names of the splits' folders, relative to its PATH. InputError where it takes no such names."""
    given = {split: name for split, name in (("train", train), ("eval", evaluation)) if name is not None}
    if not given:
        return spec
    kind = KINDS.get(spec.partition(":")[0])
    if kind is None or not kind.takes_folders:
        takers = " and ".join(name for name, one in KINDS.items() if one.takes_folders)
        raise InputError(f"--train-folder and --eval-folder are for {takers}, not for {spec}")
    return f"{spec}?{urlencode(given)}"


_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # module:function; what is a path or a pattern is none
_FOLDERS = re.compile(r"\?((?:train|eval)=[^?&]*(?:&eval=[^?&]*)?)$")  # what with_folders adds


def _asked(spec: str, split: str, unlabelled: bool, home: Path | None) -> Asked:
    name, _, place = spec.partition(":")
    folders = {}
    kind = KINDS.get(name)
    if kind and kind.takes_folders and (found := _FOLDERS.search(place)):
        folders, place = dict(parse_qsl(found[1])), place[: found.start()]
    path = expanded(place).absolute() if place else None
    return Asked(spec, name, path, folders, split, unlabelled, home or default_home())


def _kind(asked: Asked) -> Kind:
    """Choose the kind of a dataset: a row of the table, or a user's function. InputError where it is neither."""
    names = [f"{name}:PATH" if kind.takes_path == "must" else name for name, kind in KINDS.items()]
    known = f"{', '.join(names)} and module:function"
    kind = KINDS.get(asked.name)
    if kind and kind.takes_path == "never" and asked.path:
        raise InputError(f"unknown dataset {asked.spec!r}: {asked.name} takes no path")
    if kind:
        return kind
    near = did_you_mean(asked.name, KINDS)
    if is_function(asked.spec):
        return UserFunction(f"{known}{near}")
    if asked.name and asked.path:
        raise InputError(
            f"unknown dataset {asked.spec!r}: there is no such kind{near or ''}, and kdcache cannot import "
            f"{asked.name!r}: what follows is not the name of a function; known are {known}"
        )
    hint = f"; a folder of images is imagefolder:{asked.spec}" if is_folder(Path(asked.spec)) else ""
    raise InputError(f"unknown dataset {asked.spec!r}: known are {known}{near}{hint}")
