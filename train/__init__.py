"""Stage 2: students from the cache."""

from kdcache.train.loader import CachedLoader

__all__ = ["CachedLoader"]
