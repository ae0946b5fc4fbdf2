"""A user's own dataset: a function in a module, called with 'train' or 'eval'."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.decode import in_one_line
from kdcache.pipeline.data.imagefiles import FilesDone, unreadable_files
from kdcache.pipeline.data.kinds.arrays import Arrays, from_arrays
from kdcache.pipeline.data.kinds.base import Asked, Described, Kind
from kdcache.pipeline.data.kinds.containers.items import ItemDataset, require_labels, unreadable_items
from kdcache.pipeline.data.kinds.containers.own import OwnSource, own_classes, survey, whole_number
from kdcache.pipeline.data.kinds.files import FileDataset, Listing, below_one_root, open_listing
from kdcache.pipeline.data.kinds.folders import note_of
from kdcache.pipeline.process.functions import call_function, import_function

_RETURN = (
    "return an ArrayDataset, a FileDataset, or images, labels and perhaps class names; a list of paths in place of the "
    "images; or a map-style torch Dataset of (image, label)"
)


@dataclass(frozen=True)
class UserFunction(Kind):
    """A `module:function` that returns a dataset of any kind, a torch Dataset, arrays, or paths and labels.

    known: the names of the other kinds, for error messages.
    """

    known: str

    def open(self, asked: Asked) -> Described:
        call = self._caller(asked)
        found = call(asked.split)
        if isinstance(found, Described):
            return found.named(asked.spec, asked.split)
        train = found if asked.split == "train" else None
        return _opened(asked, found, lambda: call("train") if train is None else train)

    def unreadable(self, asked: Asked, progress: FilesDone | None = None) -> list[str]:
        """Read the samples without opening the dataset, which is refused where one of them cannot be taken."""
        found = self._caller(asked)(asked.split)
        if _is_map_style(found):
            source = OwnSource(found, asked.spec, not asked.unlabelled)
            return unreadable_items(source, np.arange(len(source)), progress)
        if _gives_paths(found):
            return unreadable_files(*below_one_root(asked.spec, found[0]), progress)
        return super().unreadable(asked, progress)

    def _caller(self, asked: Asked) -> Callable[[str], Any]:
        spec = asked.spec
        function = import_function(spec, "dataset", f"; known are {self.known}")

        def call(split: str) -> Any:
            try:
                return call_function(function, (split,), spec, "dataset")
            except InputError as e:
                if "Protocols cannot be instantiated" in str(e.__cause__):  # Python's words for Dataset(...)
                    raise InputError(f"dataset {spec!r}: Dataset(...) is only a protocol: {_RETURN}") from e
                raise

        return call


def _opened(asked: Asked, found: Any, train: Callable[[], Any]) -> Described:
    """Open what the function returned for the split; train() gives what it returns for the train split."""
    if _is_map_style(found):
        return _of_items(asked, found, train())
    if _gives_paths(found):
        return _of_paths(asked, found, train())
    return from_arrays(asked.spec, asked.split, lambda is_train: _arrays(asked.spec, train() if is_train else found))


def _is_map_style(found: Any) -> bool:
    """Whether it has samples by place, and is no plain sequence. An IterableDataset has the methods of its base."""
    if isinstance(found, IterableDataset | tuple | list | dict | str | bytes | np.ndarray):
        return False
    return hasattr(found, "__getitem__") and hasattr(found, "__len__")


def _of_items(asked: Asked, found: Any, train: Any) -> ItemDataset:
    """Open a map-style Dataset. Class names, mean and std are those of the train split."""
    spec, labelled = asked.spec, not asked.unlabelled
    if not _is_map_style(train):
        raise InputError(f"dataset {spec!r}: 'train' must give a Dataset as {asked.split!r} does")
    own = survey(OwnSource(found, spec, labelled), asked.home)
    first = own if found is train else survey(OwnSource(train, spec, labelled), asked.home)
    names: tuple[str, ...] = ()
    labels = np.empty((len(own.sizes), 0), np.int64)
    if labelled:
        names = own_classes(train) or tuple(map(str, range(max(0, int(first.labels.max())) + 1)))
        require_labels(own.labels, names, own.source.where)
        labels = own.labels[:, None]
    return ItemDataset(
        name=spec,
        split=asked.split,
        labels=labels,
        class_names=names,
        sizes=own.sizes,
        mean=first.mean,
        std=first.std,
        note=note_of(spec, asked.split, len(own.sizes), names),
        source=own.source,
        places=np.arange(len(own.sizes)),
        pixels=own.all_pixels(),
        digests=own.digests,
    )


def _gives_paths(found: Any) -> bool:
    """Whether it is (paths, labels) or (paths, labels, class names)."""
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        return False
    paths = found[0]
    if isinstance(paths, np.ndarray):
        return bool(paths.dtype.kind == "U")
    return isinstance(paths, Sequence) and len(paths) > 0 and isinstance(paths[0], str | os.PathLike)


def _of_paths(asked: Asked, found: Any, train: Any) -> FileDataset:
    """Open a list of image files, in the order of the list. Class names, mean and std are those of the train split."""
    spec = asked.spec
    if not _gives_paths(train):
        raise InputError(f"dataset {spec!r}: 'train' must give paths as {asked.split!r} does")
    root, paths = below_one_root(spec, found[0])
    labels, names = np.empty((len(paths), 0), np.int64), tuple[str, ...]()
    if not asked.unlabelled:
        flat, names = _labels(spec, found), _names(train, _labels(spec, train))
        require_labels(flat, names, lambda i: in_one_line(root / paths[i]))
        labels = flat[:, None]
    own = Listing(root, paths, labels, names, note_of(spec, asked.split, len(paths), names))
    return open_listing(asked, spec, own, lambda: below_one_root(spec, train[0]), apart=True)


def _labels(spec: str, found: tuple[Any, ...]) -> np.ndarray:
    """Check the labels of images or paths, int64 [N]. InputError names the first that is no whole number."""
    samples, given = found[0], found[1]
    rule = f"dataset {spec!r}: labels must be whole numbers [N]"
    if isinstance(given, list | tuple):  # NumPy would make numbers of bools, and text of all where one is text
        for i, label in enumerate(given):
            if type(label) is int:
                continue
            name = str(samples[i]) if i < len(samples) and isinstance(samples[i], str | os.PathLike) else f"sample {i}"
            whole_number(label, f"{rule}: {in_one_line(name)}")
    labels = np.asarray(given)
    if labels.dtype.kind not in "iu" or labels.shape != (len(samples),):
        raise InputError(f"{rule}, not {labels.dtype} {labels.shape}")
    return labels.astype(np.int64)


def _names(found: tuple[Any, ...], labels: np.ndarray) -> tuple[str, ...]:
    names = found[2] if len(found) == 3 else range(int(labels.max()) + 1)
    return tuple(str(name) for name in names)


def _arrays(spec: str, found: object) -> Arrays:
    """Check the arrays that a user's function returned."""
    if isinstance(found, IterableDataset):
        raise InputError(f"dataset {spec!r}: an IterableDataset has no samples by place: {_RETURN}")
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise InputError(f"dataset {spec!r}: {_RETURN}")
    images = np.asarray(found[0])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        kind, empty = f"{images.dtype} {images.shape}", "has no samples; " if images.shape[:1] == (0,) else ""
        raise InputError(f"dataset {spec!r}: {empty}images must be uint8 [N, H, W, 3], not {kind}")
    labels = _labels(spec, (images, found[1]))
    return images, labels, _names(found, labels)
