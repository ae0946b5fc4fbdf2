"""What a registry needs of the place that it lies in: objects below a root, each created whole, and once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from kdcache.cache.errors import CorruptError, MismatchError
from kdcache.cache.files import Content
from kdcache.cache.identity import Identity
from kdcache.cache.registry.localstore import LocalStore
from kdcache.cache.store.place import Place

T = TypeVar("T")
_AT_MOST = 3  # how often an object is read before what is wrong with it counts as damage that stays


class Objects(Protocol):
    """Objects below a root, by their paths from there.

    url: the root, as messages name it. address: the root, as a text that is the same in every working directory.
    listable: whether it can be asked what there is. writable: whether objects can be created and removed.
    """

    url: str
    address: str
    listable: bool
    writable: bool

    def require_there(self) -> None:
        """NotFoundError if the root is a folder that does not exist, such as one that is not mounted."""

    def require_create_only(self, path: str) -> None:
        """InputError where `create` would overwrite the object at `path`, which is there."""

    def folder(self, path: str) -> Path | None:
        """The folder at `path`, to be built into and cleared up on this machine; None over a network."""

    def place(self, prefix: str, identity: Identity, mirror: Path, store: LocalStore) -> Place:
        """Where the cache of that identity, which lies below `prefix`, is read from.

        What came over a network is kept here: chunks in `store`, identity and commits in the folder `mirror`.
        """

    def read(self, path: str, limit: int) -> bytes:
        """The object's bytes; NotFoundError if it is missing, CorruptError if it has more than `limit` bytes."""

    def size(self, path: str) -> int | None:
        """Bytes of the object; None where there is none."""

    def create(self, path: str, data: Content) -> bool:
        """Create the object. Returns whether its content is now `data`: an existing object is never changed."""

    def replace(self, path: str, data: bytes) -> None:
        """Create or change the object in one step."""

    def remove(self, paths: list[str]) -> None:
        """Remove objects, in any order; those that are not there are passed over."""

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of all objects at any depth below a folder, by their paths from there."""

    def folders(self, folder: str, holding: str) -> list[str]:
        """The names of the folders in a folder, sorted.

        holding: the object that is created first in each of them, and without which a folder does not count.
        """

    def newest(self, folder: str) -> float:
        """When the latest of the objects below a folder was made, in seconds since 1970; 0 where there is none."""

    def times(self, folder: str) -> dict[str, float]:
        """When each object at any depth below a folder was made, in seconds since 1970, by their paths from there."""

    def changed(self, path: str) -> float:
        """When the object was made, in seconds since 1970; NotFoundError if there is none."""


class RemoteObjects(Objects, Protocol):
    """Objects that are not on this machine: caches are read there through a local store of what was fetched."""

    def fetch(self, path: str, size: int, sha256: str) -> Content:
        """The object's bytes; NotFoundError if it is missing, CorruptError unless size and sha256 are these."""


def read_checked(objects: Objects, path: str, limit: int, check: Callable[[bytes], T]) -> T:
    """What `check` makes of an object's bytes. Those that it refuses are read again, since they may have come wrong.

    Raises what `read` does, and the CorruptError or MismatchError of `check` where the last bytes are refused too.
    """
    for _ in range(_AT_MOST - 1):
        try:
            return check(objects.read(path, limit))
        except (CorruptError, MismatchError):
            continue
    return check(objects.read(path, limit))
