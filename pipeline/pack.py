"""`kdcache pack` and `unpack`: a cache as one file, for file systems that dislike many files or for FFCV, and back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder, open_cache
from kdcache.cache.packing import choose_views, packed_rows_bytes, unpack_hdf5
from kdcache.cache.records.choices import FileStore
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.progress import Progress, duration, size
from kdcache.pipeline.stores import STORES, Say

_PACKED = [name for name, store in STORES.items() if store.pack]


@dataclass(frozen=True)
class PackResult:
    """What was made, or was there already: path, key, complete views in it, bytes, and the seconds that it took."""

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
    store = STORES[to]
    if store.pack is None:
        raise InputError(f"a cache is built in a folder and not packed into one: give --to {' or '.join(_PACKED)}")
    found = open_cache(cache)
    chosen = choose_views(found, views)
    path = Path(out) if out else _beside(found.path, store.suffix, views)
    store.pack(found, path, chosen, data, say)
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


def _beside(cache: Path, suffix: str, views: range | None) -> Path:
    cache = cache if cache.name not in ("", "..") else cache.resolve()
    chosen = "" if views is None else f"-views-{views.start}-{views.stop}"
    return cache.with_name(cache.name.removesuffix(STORES["hdf5"].suffix) + chosen + suffix)
