"""The kinds of places that a registry can lie in: a table from an address's scheme to what opens it.

To add one, write a class with the methods of `Objects` in a file in kinds/, put a line for its scheme into BACKENDS,
and give it a row in tests/cache/registry/test_backends.py. A class that also has `fetch` (see RemoteObjects) returns
`Remote(self, ...)` from `place`, and needs no reader of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from kdcache.cache.errors import InputError
from kdcache.cache.registry.kinds.local import FolderObjects
from kdcache.cache.registry.kinds.network import NetworkObjects
from kdcache.cache.registry.objects import Objects
from kdcache.cache.secrecy import hide

_bucket, _web = partial(NetworkObjects, bucket=True), partial(NetworkObjects, bucket=False)
# Each is called with the address, which has neither user nor query.
BACKENDS: dict[str, Callable[[str], Objects]] = {
    "s3": _bucket,
    "gs": _bucket,
    "az": _bucket,
    "http": _web,
    "https": _web,
}


def require_open(url: str) -> None:
    """InputError for what is no address, and for one that may hold a secret, which the error does not tell."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no IPv6 address
        raise InputError(f"{url} is no address that can be read") from None
    if hide(url, {}) != url:
        raise InputError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: an address must not hold a user, "
            "password, token or query, which would end up in logs: give credentials in the environment (see "
            "docs/sharing.md)"
        )


def open_objects(url: str) -> Objects:
    """The objects below an address or the path of a folder; InputError for what is neither, or may hold a secret."""
    if "://" not in url:
        return FolderObjects(Path(url))
    url = url.rstrip("/")
    require_open(url)
    parts = urlsplit(url)
    if parts.scheme == "file":
        return FolderObjects(Path(parts.path))
    if parts.scheme not in BACKENDS or not parts.netloc:
        known = ", ".join(f"{scheme}://" for scheme in BACKENDS)
        raise InputError(f"{url} is no place for a registry: give a folder, or an address that begins with {known}")
    return BACKENDS[parts.scheme](url)
