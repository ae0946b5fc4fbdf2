"""What is stored, and how it is read: knows nothing of images or models."""

from kdcache.cache.errors import KdcacheError
from kdcache.cache.home import open_cache
from kdcache.cache.identity import Identity
from kdcache.cache.records import Records, encode
from kdcache.cache.store import Cache

__all__ = ["Cache", "Identity", "KdcacheError", "Records", "encode", "open_cache"]
