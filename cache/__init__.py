"""What is stored, and how it is read: knows nothing of images or models."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcache.cache.errors import KdcacheError
    from kdcache.cache.home import open_cache
    from kdcache.cache.identity import Identity
    from kdcache.cache.records.encoding import encode
    from kdcache.cache.records.records import Records
    from kdcache.cache.store.cache import Cache
else:
    _HOMES = {
        "Cache": "store.cache",
        "Identity": "identity",
        "KdcacheError": "errors",
        "Records": "records.records",
        "encode": "records.encoding",
        "open_cache": "home",
    }

    def __getattr__(name: str) -> object:
        """Import each name when it is first used: Records and encode need torch, which takes seconds to import."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found


__all__ = ["Cache", "Identity", "KdcacheError", "Records", "encode", "open_cache"]
