"""Where things live under KDCACHE_HOME, and how a cache is found there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache.cache.errors import InputError, KdcacheError, NotFoundError
from kdcache.cache.files import is_there
from kdcache.cache.registry.localstore import LOCAL_STORE_BYTES
from kdcache.cache.registry.registry import DIGITS, Registry, may_be_name, split_url
from kdcache.cache.registry.teachers import weights_name
from kdcache.cache.store.cache import Cache

# Suffixes of files that are packed with their images, and so are opened in pipeline/stores.py.
WITH_IMAGES = (".beton",)
_SHORT = re.compile(r"[0-9a-f]{1,3}")  # too few digits of a key


def home() -> Path:
    """KDCACHE_HOME, or ~/.cache/kdcache."""
    return Path(os.environ.get("KDCACHE_HOME") or Path.home() / ".cache" / "kdcache")


@contextmanager
def home_at(folder: Path) -> Iterator[None]:
    """Set KDCACHE_HOME to `folder` inside the `with`."""
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


def teachers_folder() -> Path:
    """The folder of teachers' weights: a folder of taught ones for each data set, and those of caches by their hash."""
    return home() / "teachers"


def weights_file(weights: str) -> Path:
    """Where the weights of that hash are filed here."""
    return teachers_folder() / weights_name(weights)


def open_registry(url: str, store_bytes: int | None = None) -> Registry:
    """The registry in a folder or at an address. store_bytes: what may be kept here of what comes over a network."""
    return Registry(url, home() / "remote", LOCAL_STORE_BYTES if store_bytes is None else store_bytes)


def registry_beside(where: str | os.PathLike[str]) -> Registry | None:
    """The registry that the cache at a path or an address lies in; None if it lies in none."""
    if found := split_url(os.fspath(where)):
        return open_registry(found[0], store_bytes=0)
    folder = Path(where).absolute().parent
    lies_in_one = folder.name == "caches" and folder != caches_folder().absolute() and folder.is_dir()
    return open_registry(str(folder.parent), store_bytes=0) if lies_in_one else None


def open_cache(where: str | os.PathLike[str], registry: str | None = None, store_bytes: int | None = None) -> Cache:
    """Open a cache by its folder, its packed file, its address, its key or its name.

    An address is ROOT/caches/KEY or ROOT/names/NAME. A key, or at least four digits of one, is looked for under
    KDCACHE_HOME first and then in the registry, a name only there.
    """
    text = os.fspath(where)
    if text.endswith(WITH_IMAGES):
        raise InputError(f"{text} is packed for training (kdcache train, eval): give the cache that it was packed from")
    if is_there(Path(text)):
        return Cache(Path(text))
    if "://" in text:
        if (address := split_url(text)) is None:
            raise InputError(f"{text} is not the address of a cache, which ends in /caches/KEY or /names/NAME")
        shared = open_registry(address[0], store_bytes)
        return shared.cache(shared.find(address[1]))
    if DIGITS.fullmatch(text):
        local = [p for p in _entries() if p.name.startswith(text)]
        if local and registry is not None and may_be_name(text):
            shared = open_registry(registry, store_bytes)
            if shared.has_name(text):
                raise InputError(
                    f"{text} is a name in {shared.url}, and the key of cache {local[0].name[:16]} here begins with it: "
                    f"give more digits of the key, or {shared.url}/names/{text}"
                )
        # A folder comes before a file that was packed from it.
        folders = [p for p in local if p.is_dir()]
        if len({p.name[:64] for p in local}) == 1 and len(folders or local) == 1:
            return _nearest(Cache((folders or local)[0]), registry, store_bytes)
        if local:
            found = ", ".join(p.name[:16] + p.name[64:] for p in local)
            raise InputError(f"several caches begin with {text}: {found}; give more digits")
    if registry is not None and "/" not in text:
        shared = open_registry(registry, store_bytes)
        key = shared.find(text)
        # A copy that was pulled or built here comes before one that is far away.
        here = caches_folder() / key
        if (here / "identity.json").exists():
            return _nearest(Cache(here), registry, store_bytes)
        return shared.cache(key)
    if _SHORT.fullmatch(text):
        raise NotFoundError(f"no cache at {text}: give at least four digits of a key, see kdcache ls")
    raise NotFoundError(f"no cache at {text}, and none with that key in {caches_folder()}: see kdcache ls")


def _nearest(own: Cache, registry: str | None, store_bytes: int | None) -> Cache:
    """A cache that is here; but the same one in the registry if the one here holds no view.

    So it is on a machine that has built a cache together with others in a bucket.
    """
    if own.views or registry is None:
        return own
    shared = open_registry(registry, store_bytes)
    return shared.cache(own.key) if shared.has(own.key) else own


def list_caches() -> tuple[list[Cache], list[str]]:
    """Every cache under KDCACHE_HOME, packed ones too, and one line for each thing there that is no readable cache."""
    good: list[Cache] = []
    bad: list[str] = []
    for path in _entries():
        try:
            good.append(Cache(path))
        except (KdcacheError, OSError) as e:
            bad.append(str(e))
    return good, bad


def _entries() -> list[Path]:
    """The caches in the folder of caches, without temporary files and files packed with images (pipeline/stores.py)."""
    folder = caches_folder()
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in found if not p.name.startswith(".") and p.suffix not in WITH_IMAGES]
