"""A user's own dataset: a function in a module, called with 'train' or 'eval'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.kinds.arrays import Arrays, from_arrays
from kdcache.pipeline.data.kinds.base import Asked, Described, Kind
from kdcache.pipeline.process.functions import call_function, import_function

_RETURN = "return an ArrayDataset, a FileDataset, or images, labels and perhaps class names"


@dataclass(frozen=True)
class UserFunction(Kind):
    """A `module:function` that returns a dataset of any kind, or arrays.

    known: the names of the other kinds, for error messages.
    """

    known: str

    def open(self, asked: Asked) -> Described:
        spec = asked.spec
        function = import_function(spec, "dataset", f"; known are {self.known}")

        def call(split: str) -> object:
            try:
                return call_function(function, (split,), spec, "dataset")
            except InputError as e:
                if "Protocols cannot be instantiated" in str(e.__cause__):  # Python's words for Dataset(...)
                    raise InputError(f"dataset {spec!r}: Dataset(...) is only a protocol: {_RETURN}") from e
                raise

        found = call(asked.split)
        if isinstance(found, Described):
            return found.named(spec, asked.split)
        of_this_split = asked.split == "train"
        return from_arrays(
            spec, asked.split, lambda train: _arrays(spec, found if train == of_this_split else call("train"))
        )


def _arrays(spec: str, found: object) -> Arrays:
    """Check the arrays that a user's function returned."""
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise InputError(f"dataset {spec!r}: {_RETURN}")
    images, labels = np.asarray(found[0]), np.asarray(found[1])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        kind = f"{images.dtype} {images.shape}"
        raise InputError(f"dataset {spec!r}: images must be uint8 [N, H, W, 3], not {kind}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        kind = f"{labels.dtype} {labels.shape}"
        raise InputError(f"dataset {spec!r}: labels must be whole numbers [N], not {kind}")
    names = found[2] if len(found) == 3 else range(int(labels.max()) + 1)
    return images, labels.astype(np.int64), tuple(str(name) for name in names)
