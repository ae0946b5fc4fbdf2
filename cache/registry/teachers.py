"""Teachers' weights in a registry, in files named by the hash that the identities of caches name."""

from __future__ import annotations

import re
from collections.abc import Callable

from kdcache.cache.errors import CorruptError
from kdcache.cache.registry.objects import Objects, read_checked

# A bucket takes 5 GB in one request.
MOST_TEACHER_BYTES = 1 << 32
_HASH = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"([0-9a-f]{64})\.safetensors")


class SharedTeachers:
    """The weights that a registry holds, each by its hash."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def sizes(self) -> dict[str, int]:
        """The bytes of each teacher's weights by their hash; nothing for a web server, which cannot be listed."""
        return weights_among(self._objects.sizes("teachers")) if self._objects.listable else {}

    def url(self, weights: str) -> str:
        """Where the weights of that hash lie, or would lie."""
        return f"{self._objects.url}/{_path(weights)}"

    def has(self, weights: str) -> bool:
        """Whether the weights of that hash are there."""
        return self._objects.size(_path(weights)) is not None

    def read(self, weights: str, check: Callable[[bytes], None] = lambda content: None) -> bytes:
        """The file of the weights of that hash; NotFoundError where there is none.

        check: raises CorruptError unless these bytes are such a file. Then it is read again, a few times.
        """

        def checked(content: bytes) -> bytes:
            check(content)
            return content

        return read_checked(self._objects, _path(weights), MOST_TEACHER_BYTES, checked)

    def add(self, weights: str, content: bytes) -> bool:
        """Publish a file of weights; whether it is new. One that is there stays as it is."""
        return False if self.has(weights) else self._objects.create(_path(weights), content)

    def changed(self, weights: str) -> float:
        """When the weights of that hash were published, in seconds since 1970; NotFoundError."""
        return self._objects.changed(_path(weights))

    def remove(self, weights: str) -> None:
        """Remove the weights of that hash."""
        self._objects.remove([_path(weights)])


def _path(weights: str) -> str:
    return f"teachers/{weights_name(weights)}"


def weights_name(weights: str) -> str:
    """The name of the file of weights with that hash; CorruptError if it is no hash, as in a forged identity."""
    if not _HASH.fullmatch(weights):
        raise CorruptError(f"{weights[:80]!r} is not the hash of a teacher's weights, which has 64 digits (0-9, a-f)")
    return f"{weights}.safetensors"


def weights_among(sizes: dict[str, int]) -> dict[str, int]:
    """The bytes of those files that are teachers' weights, by hash; `sizes` has the bytes of files by name."""
    return {found[1]: size for name, size in sizes.items() if (found := _FILE.fullmatch(name))}
