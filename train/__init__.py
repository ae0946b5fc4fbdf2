"""Stage 2: students from the cache."""

from kdcache.train.loaders.cached import CachedLoader

__all__ = ["CachedLoader"]
