"""Packs a cache and its images into an FFCV file, which appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from kdcache.cache.errors import InputError, NotFoundError
from kdcache.cache.files import sync_folder
from kdcache.cache.packing import clear_leaving, new_file
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.data.split import require_described
from kdcache.pipeline.ffcv.format import AREA_RENDERER, SUFFIX
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.ffcv.write import Writer
from kdcache.pipeline.process.progress import duration, size


def pack_ffcv(
    cache: Cache, data: Dataset, out: Path, views: Sequence[int] | None = None, say: Callable[[str], None] = print
) -> Path:
    """Write `out` with the images of `data`, the cache's train split, and the records of `views` (None: all of them).

    Images in memory are stored as raw pixels. Of image files, JPEG files are stored as they are and all others as raw
    pixels. A file that holds the same already is left as it is. InputError where `out` holds something else, is not
    named .beton or does not fit on the disk, and for mixed views; MismatchError for other data; NotFoundError for a
    view that is not complete.
    """
    if out.suffix != SUFFIX:
        raise InputError(f"{out}: the name of an FFCV file ends in {SUFFIX}")
    if cache.identity.views.mixed:
        raise InputError(
            f"{cache.where} has mixed views ({cache.identity.views.policy}), and FFCV's loader gives one image at a "
            "time: train from the cache itself, or pack it --to hdf5"
        )
    require_described(data, cache.identity, cache.where)
    cache.train.require_sizes(data.sizes)
    chosen = _chosen(cache, views)
    if out.exists():
        _require_same(out, cache, chosen)
        say(f"{out} holds these views already")
        return out
    writer = Writer(cache, data, chosen)
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if writer.bytes > free:
        raise InputError(f"{out} would take {size(writer.bytes)}, and {size(free)} are free: give another --out")
    try:
        _publish(writer, out, folder, say)
    except OSError as e:
        e.filename = str(out)  # not the temporary file, which is gone
        raise
    return out


def _chosen(cache: Cache, views: Sequence[int] | None) -> tuple[int, ...]:
    complete = cache.views
    chosen = tuple(sorted(set(complete if views is None else views)))
    if not chosen:
        raise NotFoundError(f"there are no views to pack: {cache.where} has {len(complete)} complete ones")
    if missing := set(chosen) - set(complete):
        raise NotFoundError(f"{cache.where} has no complete view {min(missing)}: build it, or choose other --views")
    return chosen


def _require_same(out: Path, cache: Cache, views: tuple[int, ...]) -> None:
    """InputError unless the file that is there holds these views of this cache; CorruptError where it is damaged."""
    there = FFCVFile(out)
    if (there.key, there.views) != (cache.key, views):
        raise InputError(f"{out} holds other records and is never overwritten: remove it, or give another --out")
    there.check_pixels()
    for view in views:
        there.read(view)


def _publish(writer: Writer, out: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Write a temporary file beside `out`, and give it that name once it is whole."""
    temporary = folder / f".{out.name}.packing"
    clear_leaving(temporary)
    with new_file(temporary) as target, open(target.fileno(), "wb", closefd=False) as file:
        seconds = writer.estimate(file)
        data, key = writer.data, writer.cache.key
        kept = "raw pixels" if data.in_memory else f"JPEG as it is; trained on with {AREA_RENDERER}"
        say(
            f"packing {len(data):,} images ({kept}) and {len(writer.views)} views of cache {key[:12]}: "
            f"{size(writer.bytes)}, about {duration(seconds)}, in {out}"
        )
        writer.write(file, folder)
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(temporary, out)
        except FileExistsError:
            raise InputError(f"{out} was made meanwhile and is never overwritten") from None
    sync_folder(folder)
