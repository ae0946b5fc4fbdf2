"""Where things live under KDCACHE_HOME, and how a cache is found there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache.cache.errors import InputError, KdcacheError, NotFoundError
from kdcache.cache.store import Cache


def home() -> Path:
    """KDCACHE_HOME, or ~/.cache/kdcache."""
    return Path(os.environ.get("KDCACHE_HOME") or Path.home() / ".cache" / "kdcache")


@contextmanager
def home_at(folder: Path) -> Iterator[None]:
    """KDCACHE_HOME is `folder` for a while."""
    before = os.environ.get("KDCACHE_HOME")
    os.environ["KDCACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["KDCACHE_HOME"]
        else:
            os.environ["KDCACHE_HOME"] = before


def caches_folder() -> Path:
    return home() / "caches"


def open_cache(where: str | os.PathLike[str]) -> Cache:
    """The cache in a folder or a packed file, or under KDCACHE_HOME by its key or at least six digits of it."""
    text = os.fspath(where)
    if text.endswith(".beton"):
        raise InputError(f"{text} is packed for training (kdcache train, eval): give the cache that it was packed from")
    if Path(text).exists():
        return Cache(Path(text))
    if "://" in text:
        raise InputError(f"{text}: caches are read from folders; remote ones are not supported yet")
    if re.fullmatch(r"[0-9a-f]{6,64}", text):
        found = [p for p in _entries() if p.name.startswith(text)]
        # A folder before what was packed from it.
        folders = [p for p in found if p.is_dir()]
        if len({p.name[:64] for p in found}) == 1 and len(folders or found) == 1:
            return Cache((folders or found)[0])
        if found:
            raise InputError(f"several caches begin with {text}: {', '.join(p.name[:16] + p.name[64:] for p in found)}")
    raise NotFoundError(f"no cache at {text}, and none with that key in {caches_folder()}: see kdcache ls")


def list_caches() -> tuple[list[Cache], list[str]]:
    """Every cache under KDCACHE_HOME, packed ones too, and a line for what lies there and is none."""
    good: list[Cache] = []
    bad: list[str] = []
    for path in _entries():
        try:
            good.append(Cache(path))
        except (KdcacheError, OSError) as e:
            bad.append(str(e))
    return good, bad


def _entries() -> list[Path]:
    """What lies in the caches' folder, but temporary files, and what is packed for FFCV: that is read with images."""
    folder = caches_folder()
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in found if not p.name.startswith(".") and p.suffix != ".beton"]
