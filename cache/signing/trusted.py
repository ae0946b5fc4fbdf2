"""A cache as somebody reads it who trusts certain signers alone: what none of them has signed cannot be read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import UntrustedError
from kdcache.cache.files import Content
from kdcache.cache.identity import MAX_JSON_BYTES
from kdcache.cache.signing.signatures import Signature, all_signatures, signatures_by
from kdcache.cache.signing.signers import Signers
from kdcache.cache.signing.statements import IDENTITY, is_covered
from kdcache.cache.store.cache import Cache, place_of
from kdcache.cache.store.layout import Chunk, StoredFile, parse_shard_name
from kdcache.cache.store.place import Kind, Place

_THREADS = 16  # for reading commits, which may be far away
_VIEW = re.compile(r"commits/(v[0-9]+-p[0-9]+)\.json")


class TrustedPlace:
    """The place of a cache, of which identity and commits can be read only as trusted signers have signed them.

    Commits hold the digests of all else. Each file is compared whenever it is read, since whoever may write at the
    place can change it at any time. covered: by file, the sha256 that trusted signers give it. signers: those that have
    signed, for people. by: the signatures that count.
    """

    def __init__(self, place: Place, covered: Mapping[str, frozenset[str]], signers: str, by: Sequence[Signature]):
        self.inner, self.covered, self.signers, self.by = place, covered, signers, by
        self.where, self.path, self.again, self.writable = place.where, place.path, place.again, place.writable
        self.kind: Kind = place.kind

    def read(self, file: str, limit: int) -> bytes:
        content = self.inner.read(file, limit)
        if is_covered(file):
            signed = self.covered.get(file)
            if signed is None:
                raise self.lacks([file])
            if files.sha256(content) not in signed and self.inner.distrust(file):  # what is kept here may be old
                content = self.inner.read(file, limit)
            if files.sha256(content) not in signed:
                raise UntrustedError(
                    f"{self.locate(file)} is not the file that {self.signers} signed: it was changed or "
                    "replaced since; ask for it to be signed again once it is verified (kdcache sign)"
                )
        return content

    def lacks(self, wanted: Sequence[str]) -> UntrustedError:
        """The error for files of the cache that are there and that nobody who is trusted has signed."""
        views = sorted({shard[0] for file in wanted if (shard := _shard(file))})
        first = f"commits, such as {wanted[0]}" if len(wanted) > 1 else f"commit, {wanted[0]}"
        others = f" (views from {views[0]} on are not: take those before by --views)" if views and views[0] else ""
        return UntrustedError(
            f"{self.where} has {len(wanted)} {first}, that the signature of {self.signers} does not cover{others}: "
            "what was added since has to be signed again (kdcache sign)"
        )

    def fresh(self) -> TrustedPlace:
        return TrustedPlace(self.inner.fresh(), self.covered, self.signers, self.by)

    def locate(self, file: str) -> str:
        return self.inner.locate(file)

    def has(self, file: str) -> bool:
        return self.inner.has(file)

    def names(self, folder: str) -> list[str]:
        return self.inner.names(folder)

    def metadata(self, file: str) -> bytes | None:
        return self.inner.metadata(file)

    def distrust(self, file: str) -> bool:
        return self.inner.distrust(file)

    def require(self, file: str, stored: StoredFile) -> None:
        self.inner.require(file, stored)

    def content(self, file: str, stored: StoredFile, chunk: Chunk) -> Content:
        return self.inner.content(file, stored, chunk)

    def rows(self, file: str, stored: StoredFile, chunk: Chunk, out: NDArray[Any] | None = None) -> NDArray[Any]:
        return self.inner.rows(file, stored, chunk, out)

    def some_rows(self, file: str, stored: StoredFile, chunk: Chunk, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self.inner.some_rows(file, stored, chunk, rows)

    def remedy(self, file: str) -> str:
        return self.inner.remedy(file)

    def more(self, view: int) -> str:
        return self.inner.more(view)

    def size(self) -> int:
        return self.inner.size()

    def check(self) -> None:
        self.inner.check()


def trusted(cache: Cache, signers: Signers) -> Cache:
    """The same cache, of which only what these signers have signed can be read.

    UntrustedError if none of them has signed the cache at all; for commits that are not signed, see `require_signed`.
    """
    place = place_of(cache)
    content = files.sha256(place.read(IDENTITY, MAX_JSON_BYTES))
    good, names, problems = [], dict[str, None](), list[str]()
    for key in signers.keys:
        found, bad = signatures_by(place, key.id)
        problems += bad
        for one in sorted(found, key=lambda one: one.statement.time):
            where = place.locate(f"{one.name}.sig")
            who = signers.name(one.key, one.statement.time) if one.key == key else None
            if who is None:
                problems.append(f"{where} is of {one.statement.date}, and {signers.file} does not trust its key then")
            elif one.statement.key != content:
                problems.append(f"{where} is about another cache, {one.statement.key[:12]}")
            else:
                good.append(one)
                names[f"{who} ({one.statement.date})"] = None
    if not good:
        raise UntrustedError(f"{cache.where} {_why(place, signers, problems)}")
    return Cache(TrustedPlace(place, _covered(good), " and ".join(names), good))


def _covered(good: Sequence[Signature]) -> dict[str, frozenset[str]]:
    """The digests that count for each file: for every key, that of its newest statement that names the file."""
    newest: dict[tuple[str, str], str] = {}
    for one in sorted(good, key=lambda one: one.statement.time):
        newest |= {(file, one.key.id): digest for file, digest in one.statement.files.items()}
    covered: dict[str, frozenset[str]] = {}
    for (file, _), digest in newest.items():
        covered[file] = covered.get(file, frozenset()) | {digest}
    return covered


def _why(place: Place, signers: Signers, problems: Sequence[str]) -> str:
    """What is wrong with a cache that nobody who is trusted has signed, and what helps."""
    wanted = f"{signers.names} ({signers.file})"
    if problems:
        return f"has no signature of {wanted} that counts: {problems[0]}"
    found, _ = all_signatures(place)
    by = list(dict.fromkeys(one.key.fingerprint for one in found))
    if by:
        return (
            f"is signed by {', '.join(by[:3])}, whom {signers.file} does not name: add that key there if you trust "
            f"whose it is, or ask for the signature of {wanted} (kdcache sign)"
        )
    return (
        f"is not signed, and only caches signed by {wanted} are trusted: ask whoever made it to run kdcache push "
        "--sign KEYFILE, or verify it and sign it yourself (kdcache sign)"
    )


def require_signed(cache: Cache, views: Iterable[int]) -> str | None:
    """UntrustedError where a commit is not signed that readers of these views read. All of them are read now.

    So nothing is begun that would fail later. Returns who has signed, for people; None for a cache that is read without
    regard to signatures.
    """
    place = place_of(cache)
    if not isinstance(place, TrustedPlace):
        return None
    wanted = [store.layout.commit_file(name) for store, name in cache.contents(tuple(views)) if store.has(name)]
    if lacking := [file for file in wanted if file not in place.covered]:
        raise place.lacks(lacking)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="kdcache-signed") as threads:
        list(threads.map(lambda file: place.read(file, MAX_JSON_BYTES), wanted))
    return place.signers


def _shard(file: str) -> tuple[int, int] | None:
    found = _VIEW.fullmatch(file)
    return parse_shard_name(found[1]) if found else None
