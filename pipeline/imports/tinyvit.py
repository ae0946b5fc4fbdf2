"""Logits that TinyViT has stored (microsoft/Cream, TinyViT, save_logits.py).

For epoch E there is a folder logits_topK_epochE with, for each process R, rankR-keys.txt, one key a line, and
rankR-values.bin, one record a key: int32 seed of the transforms, K int16 class ids, K float16 softmax probabilities,
largest first. A key is the sample's place in torchvision's ImageFolder, or, for ImageNet-22k, its file's name without
suffix. TinyViT fills up the last batches with samples that another process has too. As there, one record of each
counts (here that of the lowest R).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import InputError
from kdcache.pipeline.build.config import PART
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.imports.stored import Answers, by_name, require_all, stem

_EPOCH = re.compile(r"logits_top([1-9][0-9]{0,4})_epoch([0-9]{1,6})")
_VALUES = re.compile(r"rank(-?[0-9]{1,6})-values\.bin")
_KEY_BYTES = 1024  # the longest key


class TinyViT:
    """TinyViT's folders of epochs: view v is the v-th folder by number."""

    policy: Literal["stored", "foreign"] = "foreign"
    dtype = np.dtype(np.float16)

    def __init__(self, path: Path, data: Dataset) -> None:
        own = [path] if _EPOCH.fullmatch(path.name) else path.iterdir() if path.is_dir() else []
        epochs = sorted((int(m[2]), int(m[1]), p) for p in own if (m := _EPOCH.fullmatch(p.name)))
        if not epochs:
            raise InputError(f"{path} holds no folders logits_topK_epochE, as TinyViT's save_logits.py writes them")
        ks = {k for _, k, _ in epochs}
        if len(ks) > 1 or len({e for e, _, _ in epochs}) < len(epochs):
            raise InputError(f"{path} holds epochs with top {sorted(ks)}: move all but one K elsewhere")
        self.k, self.views, self._folders = ks.pop(), len(epochs), [p for _, _, p in epochs]
        self.part = PART
        self._record = np.dtype([("seed", "<i4"), ("ids", "<u2", (self.k,)), ("p", "<f2", (self.k,))])
        self._data = data
        self._samples: dict[bool, dict[str, int]] = {}
        self._view: tuple[int, list[NDArray[Any]], NDArray[np.int16], NDArray[np.int64]] | None = None

    def units(self) -> Iterator[range]:
        return (range(v, v + 1) for v in range(self.views))

    def where(self, view: int, sample: int) -> str:
        return f"{self._folders[view]}: the record of {self._name(sample)}"

    def read(self, views: range, rows: range, advance: Callable[[int], object]) -> Answers:
        (view,) = views
        if self._view is None or self._view[0] != view:
            self._view = view, *self._open(self._folders[view])
        _, packages, package, row = self._view
        out = np.empty(len(rows), self._record)
        here = package[rows.start : rows.stop]
        for number, records in enumerate(packages):
            at = np.flatnonzero(here == number)
            at = at[np.argsort(row[rows.start + at])]  # in the order of the file
            out[at] = records[row[rows.start + at]]
        advance(len(rows))
        ids, p = (out[name].reshape(1, len(rows), self.k) for name in ("ids", "p"))
        return Answers(ids.astype(np.uint32), p, {"seeds": out["seed"][None].copy()})

    def _open(self, folder: Path) -> tuple[list[NDArray[Any]], NDArray[np.int16], NDArray[np.int64]]:
        """Open an epoch: the records of each process, and for each sample its process [N] and its place there [N]."""
        ranks = sorted(int(m[1]) for name in files.names(folder) if (m := _VALUES.fullmatch(name)))
        if not ranks:
            raise InputError(f"{folder} holds no rankR-values.bin: was it written to its end?")
        package, row = np.full(len(self._data), -1, np.int16), np.zeros(len(self._data), np.int64)
        packages: list[NDArray[Any]] = []
        foreign: list[str] = []
        doubled: list[str] = []
        for number, rank in enumerate(ranks):
            values = folder / f"rank{rank}-values.bin"
            count, rest = divmod(values.stat().st_size, self._record.itemsize)
            keys = self._keys(folder / f"rank{rank}-keys.txt", count)
            if rest or len(keys) != count:
                raise InputError(
                    f"{values} has {values.stat().st_size:,} bytes, and {len(keys):,} keys need "
                    f"{self._record.itemsize} each: one of the two is cut short, copy both again"
                )
            packages.append(np.memmap(values, self._record, "r") if count else np.empty(0, self._record))
            if count == 0:
                continue
            samples = self._lookup(keys[0])
            for i, key in enumerate(keys):
                sample = samples.get(key, -1)
                if sample < 0:
                    foreign.append(key)
                elif package[sample] == number:
                    doubled.append(key)
                elif package[sample] < 0:
                    package[sample], row[sample] = number, i
        require_all(package >= 0, foreign, doubled, self._name, str(folder))
        return packages, package, row

    def _keys(self, path: Path, count: int) -> list[str]:
        limit = (count + 1) * _KEY_BYTES
        content = files.read_range(path, 0, limit + 1, short=True)
        if len(content) > limit:
            raise InputError(f"{path} has more than {limit:,} bytes, too many for the {count:,} records beside it")
        try:
            return content.decode().split("\n")[:-1]
        except UnicodeDecodeError as e:
            raise InputError(f"{path} is no text of keys: {e}") from e

    def _lookup(self, key: str) -> dict[str, int]:
        """Samples by key, for keys like this one: places in torchvision's ImageFolder, or file names."""
        placed = key.isdecimal() and len(key) < 20 and key == str(int(key))
        if placed not in self._samples:
            paths = self._data.paths
            if placed:
                order = sorted(range(len(self._data)), key=lambda i: _in_image_folder(paths[i]) if paths else i)
                self._samples[placed] = {str(place): i for place, i in enumerate(order)}
            else:
                self._samples[placed] = by_name(paths, lambda path: stem(path, last=True), self._data.name)
        return self._samples[placed]

    def _name(self, sample: int) -> str:
        return self._data.paths[sample] if self._data.paths else f"image {sample}"


def _in_image_folder(path: str) -> tuple[str, str, str]:
    """What torchvision's ImageFolder sorts by: class, folder, file."""
    folder, _, name = path.rpartition("/")
    return folder.partition("/")[0], folder, name
