"""Faults that are planted into kdcache, one at a time, to see that a machine finds each of them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from kdcache.cache import care, files
from kdcache.cache.registry import bucket, transfer
from kdcache.cache.registry.leases import ObjectLeases
from kdcache.cache.store import chunks, leases
from kdcache.cache.store.place import Folder

Patch = pytest.MonkeyPatch


def without_digests(patch: Patch) -> None:
    """A reader compares no chunk with the digest in its commit."""
    patch.setattr(Folder, "content", lambda self, file, stored, chunk: self.read(file, chunk.spec.max_file_bytes))


def without_checksums(patch: Patch) -> None:
    """A reader overlooks a flipped bit: it compares neither digest nor checksum."""

    class Agrees:
        @staticmethod
        def value(content) -> int:
            return _Any()

    class _Any(int):
        def __ne__(self, other: object) -> bool:
            return False

    without_digests(patch)
    patch.setattr(chunks, "google_crc32c", Agrees)


def leases_for_ever(patch: Patch) -> None:
    """The lease of a builder that died on another machine never expires."""
    init = leases.Leases.__init__

    def forever(self, token, say) -> None:
        init(self, token, say)
        self._owner = self._owner.model_copy(update={"seconds": 1e8})

    patch.setattr(leases.Leases, "__init__", forever)


def not_durable(patch: Patch) -> None:
    """A file gets its name before its bytes are on the disk."""

    def write(path, data) -> None:
        with files.naming(path), path.open("wb") as f:
            f.write(data)

    patch.setattr(files, "write", write)


def collects_what_lives(patch: Patch) -> None:
    """gc takes any file that has not been changed for long for a temporary one."""
    patch.setattr(care, "_TEMPORARY", re.compile(r".*"))


def commits_first(patch: Patch) -> None:
    """In a bucket a commit is there before the chunks that it names."""
    put_commit = bucket.put_commit

    def reversed_(objects, prefix, store, commit, content, contents, each=map) -> bool:
        made = objects.create(f"{prefix}/{store.layout.commit_file(commit.name)}", content)
        put_commit(objects, prefix, store, commit, content, contents, each)
        return made

    for module in (bucket, transfer):
        patch.setattr(module, "put_commit", reversed_)


def nobody_dies(patch: Patch) -> None:
    """To builders in a bucket whoever has a lease is alive, however long ago they have shown themselves."""
    patch.setattr(ObjectLeases, "_living", lambda self, name: self._owner_of(name))


# The machine that has to find each.
PLANTS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "a read without digests": ("folders", without_digests),
    "a read that overlooks a flipped bit": ("folders", without_checksums),
    "a lease that never expires": ("folders", leases_for_ever),
    "a name before the bytes are durable": ("folders", not_durable),
    "a gc that takes what lives": ("folders", collects_what_lives),
    "a commit before its chunks": ("bucket", commits_first),
    "a lease in a bucket that never expires": ("bucket", nobody_dies),
}
