"""The kinds of store that a cache can lie in: a folder as it is built, or one file that it is packed into.

A new kind is a file that packs and reads it, a row in `STORES`, its name in cache/records/choices.py, and a class
with its name in tests/pipeline/test_store_kinds.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.home import open_cache
from kdcache.cache.identity import Identity
from kdcache.cache.packing import pack_hdf5, packed_rows_bytes
from kdcache.cache.records.records import Records
from kdcache.cache.store import hdf5
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.ffcv.format import SUFFIX as FFCV_SUFFIX
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.process.progress import Progress, duration, size
from kdcache.pipeline.trust import images_of

Say = Callable[[str], None]

_SAMPLE_BYTES = 1 << 20


class StoredSplit(Protocol):
    """What is stored of one split's samples beside their records."""

    @property
    def labels(self) -> NDArray[Any]:
        """[N, L] class ids of the teacher."""

    def require_sizes(self, sizes: NDArray[np.int32]) -> None:
        """MismatchError if these sizes [N, 2] show that the images are not those that were stored."""


class Stored(Protocol):
    """A cache as a student learns from it, whatever it lies in. where: the path or the address, for people."""

    where: str
    identity: Identity

    @property
    def path(self) -> Path:
        """The folder or file; InputError for a cache at an address."""

    @property
    def key(self) -> str: ...

    @property
    def views(self) -> tuple[int, ...]:
        """The complete views."""

    @property
    def prior(self) -> torch.Tensor | None:
        """float32 [T, C], or None for dense records."""

    @property
    def train(self) -> StoredSplit: ...

    @property
    def evaluation(self) -> StoredSplit: ...

    def read(self, view: int) -> Records:
        """All records of one view; NotFoundError if it is not there, CorruptError if bytes are damaged."""

    def read_evaluation(self) -> Records:
        """The records of the unaugmented evaluation split."""


@dataclass(frozen=True)
class Store:
    """One kind of store.

    suffix: what the names of its files end in; empty for a folder. open: opens the cache in such a file. pack: writes
    these complete views of a cache into a new file, perhaps with the images that are given, as a dataset or by their
    name as in --data; None for the folder, which `build` makes.
    """

    suffix: str
    open: Callable[[Path], Stored]
    pack: Callable[[Cache, Path, tuple[int, ...], str | Dataset | None, Say], None] | None = None


def open_store(where: str, registry: str | None = None, store_bytes: int | None = None) -> Stored:
    """The cache to learn from in a file of any kind, or else where `open_cache` finds it."""
    for store in STORES.values():
        if store.suffix and where.endswith(store.suffix) and store.open is not Cache:
            return store.open(Path(where))
    return open_cache(where, registry, store_bytes)


def _pack_hdf5(cache: Cache, out: Path, views: tuple[int, ...], data: str | Dataset | None, say: Say) -> None:
    total = packed_rows_bytes(cache, views)
    if not out.exists():
        ratio, rate = _compression(cache, views[0])
        say(
            f"packing {len(views)} views of cache {cache.key[:12]}: about {size(total * ratio)} "
            f"in about {duration(total / rate)}, in {out}"
        )
    with Progress("pack", 2 * total, "bytes") as progress:  # written, then read again
        if not pack_hdf5(cache, out, views, progress.advance):
            say(f"{out} holds these views already")


def _compression(cache: Cache, view: int) -> tuple[float, float]:
    """The compressed bytes for each byte, and the bytes compressed in a second, measured on the view's first rows."""
    shard = cache.train.load(shard_name(view, 0))
    start, raw, packed = time.monotonic(), 0, 0
    for rows in shard:
        sample = rows[: max(1, _SAMPLE_BYTES // max(rows[:1].nbytes, 1))]
        raw += sample.nbytes
        packed += len(hdf5.compressed(sample))
    return packed / raw, raw / max(time.monotonic() - start, 1e-9)


def _pack_ffcv(cache: Cache, out: Path, views: tuple[int, ...], data: str | Dataset | None, say: Say) -> None:
    identity = cache.identity
    if identity.views.imported:
        raise InputError(f"{cache.where} was imported, and FFCV's loader cannot make such views: give --to hdf5")
    if data is None or isinstance(data, str):
        spec = images_of(identity.data.name, data, cache.where)
        data = open_data(spec, "train", unlabelled=identity.record.labels == 0)
    pack_ffcv(cache, data, out, views, say)


STORES = {
    "zarr": Store("", Cache),
    "hdf5": Store(".h5", Cache, _pack_hdf5),
    "ffcv": Store(FFCV_SUFFIX, FFCVFile, _pack_ffcv),
}
