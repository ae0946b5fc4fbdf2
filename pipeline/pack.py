"""A cache as one file, for file systems that dislike many files (HDF5) or for FFCV's loader, and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder, open_cache
from kdcache.cache.packing import choose_views, pack_hdf5, packed_rows_bytes, unpack_hdf5
from kdcache.cache.store import hdf5
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.ffcv.beton import pack_beton
from kdcache.pipeline.process.progress import Progress, duration, size
from kdcache.pipeline.trust import stored_data

FileStore = Literal["hdf5", "ffcv"]
Say = Callable[[str], None]

_SUFFIX = {"hdf5": ".h5", "ffcv": ".beton"}
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class PackResult:
    """What was made, or was there already: path, key, complete views in it, bytes; seconds it took."""

    path: Path
    key: str
    views: int
    bytes: int
    seconds: float


def pack(
    cache: str | Path,
    to: FileStore,
    out: str | None = None,
    views: range | None = None,
    data: str | Dataset | None = None,
    say: Say = print,
) -> PackResult:
    """Pack complete views of a cache, all by default, into the new file `out` (by default named after the cache).

    data: the images, or their name as in --data, for ffcv. A file that holds the same already is only named; no file is
    ever overwritten.
    """
    start = time.monotonic()
    found = open_cache(cache)
    chosen = choose_views(found, views)
    path = Path(out) if out else _beside(found.path, to, views)
    if to == "ffcv":
        if found.identity.views.imported:
            raise InputError(f"{found.where} was imported, and FFCV's loader cannot make its views: give --to hdf5")
        path = pack_beton(found, _images(found, data), path, chosen, say)
    else:
        _hdf5(found, path, chosen, say)
    written = path.stat().st_size
    seconds = time.monotonic() - start
    say(f"{size(written)} in {duration(seconds)}: {path}")
    return PackResult(path, found.key, len(chosen), written, seconds)


def unpack(file: str, out: str | None = None, say: Say = print) -> PackResult:
    """Make a folder of a packed cache (by default where builds look for it, by its key), or complete that folder."""
    start = time.monotonic()
    cache = Cache(Path(file))
    if not cache.packed:
        raise InputError(f"{file} is a folder already")
    path = Path(out) if out else caches_folder() / cache.key
    total = packed_rows_bytes(cache, cache.views)
    say(f"unpacking {len(cache.views)} views of cache {cache.key[:12]}, {size(cache.size())}, into {path}")
    with Progress("unpack", total, "bytes") as progress:
        changed = unpack_hdf5(cache, path, progress.advance)
    if changed:
        say(f"{changed} commits name other bytes than those packed (the same rows, compressed by another version)")
    unpacked = Cache(path)
    seconds = time.monotonic() - start
    say(f"{size(unpacked.size())} in {duration(seconds)}: {path}")
    return PackResult(path, cache.key, len(cache.views), unpacked.size(), seconds)


def _images(cache: Cache, data: str | Dataset | None) -> Dataset:
    if data is not None and not isinstance(data, str):
        return data
    identity = cache.identity
    if data is None and identity.data.name in ("imagenet", "imagefolder"):
        raise InputError(f"where are the images? give --data {identity.data.name}:PATH")
    data = data or stored_data(identity.data.name, cache.where)
    return open_data(data, "train", unlabelled=identity.record.labels == 0)


def _beside(cache: Path, to: FileStore, views: range | None) -> Path:
    cache = cache if cache.name not in ("", "..") else cache.resolve()
    chosen = "" if views is None else f"-views-{views.start}-{views.stop}"
    return cache.with_name(cache.name.removesuffix(".h5") + chosen + _SUFFIX[to])


def _hdf5(cache: Cache, out: Path, views: tuple[int, ...], say: Say) -> None:
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
    """Compressed bytes a byte, and bytes a second, of the view's first rows."""
    shard = cache.train.load(shard_name(view, 0))
    start, raw, packed = time.monotonic(), 0, 0
    for rows in shard:
        sample = rows[: max(1, _SAMPLE_BYTES // max(rows[:1].nbytes, 1))]
        raw += sample.nbytes
        packed += len(hdf5.compressed(sample))
    return packed / raw, raw / max(time.monotonic() - start, 1e-9)
