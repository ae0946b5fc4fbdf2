"""Stage 2: students from the cache."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcache.train.loaders.cached import CachedLoader
else:

    def __getattr__(name: str) -> object:
        """Import CachedLoader when it is first used: it needs torch, and the config beside it does not."""
        if name != "CachedLoader":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from kdcache.train.loaders.cached import CachedLoader

        globals()[name] = CachedLoader
        return CachedLoader


__all__ = ["CachedLoader"]
