"""Where things live under KDCACHE_HOME, and how a cache is found there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kdcache.cache.errors import InputError, KdcacheError, NotFoundError
from kdcache.cache.store import Cache


def home() -> Path:
    """KDCACHE_HOME, or ~/.cache/kdcache."""
    return Path(os.environ.get("KDCACHE_HOME") or Path.home() / ".cache" / "kdcache")


def caches_folder() -> Path:
    return home() / "caches"


def open_cache(where: str | os.PathLike[str]) -> Cache:
    """The cache in a folder, or under KDCACHE_HOME by its key or the key's first six or more digits."""
    text = os.fspath(where)
    if Path(text).is_dir():
        return Cache(Path(text))
    if "://" in text:
        raise InputError(f"{text}: caches are read from folders; remote ones are not supported yet")
    if re.fullmatch(r"[0-9a-f]{6,64}", text):
        found = sorted(caches_folder().glob(f"{text}*"))
        if len(found) == 1:
            return Cache(found[0])
        if found:
            raise InputError(f"several caches begin with {text}: {', '.join(p.name[:16] for p in found)}")
    raise NotFoundError(f"no cache at {text}, and none with that key in {caches_folder()}: see kdcache ls")


def list_caches() -> tuple[list[Cache], list[str]]:
    """Every cache under KDCACHE_HOME, and a line for each folder there that is none."""
    good: list[Cache] = []
    bad: list[str] = []
    folder = caches_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            good.append(Cache(path))
        except KdcacheError as e:
            bad.append(str(e))
    return good, bad
