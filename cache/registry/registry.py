"""A place that a team shares: caches by their keys, and names for them, below one root.

    caches/KEY/               as a cache's folder (store/cache.py); other/SHA256: chunks whose place was taken
    caches/KEY/published/     who pushed what and when: one small file for each push
    names/NAME                the key that a name stands for; the only file that may change
    caches/KEY/signatures/    who vouches for it (signing/signatures.py)
    teachers/HASH.safetensors a teacher's weights, by the hash that the identities of its caches name
    leases/KEY/               what the builders of a cache need while they build it in a bucket (leases.py)

Somebody else may have written what lies there, by hand too. So keys are checked against identities, names against a
pattern, and sizes before anything is read.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, cast

from pydantic import TypeAdapter, ValidationError

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, KdcacheError, MismatchError, NotFoundError, first_sentence
from kdcache.cache.identity import FORMAT, MAX_JSON_BYTES, Identity, Strict, canonical, parse
from kdcache.cache.registry.backends import open_objects, require_open
from kdcache.cache.registry.bucket import BucketCache
from kdcache.cache.registry.localstore import LocalStore
from kdcache.cache.registry.objects import RemoteObjects, read_checked
from kdcache.cache.registry.teachers import SharedTeachers
from kdcache.cache.signing.signers import Signers
from kdcache.cache.signing.trusted import trusted
from kdcache.cache.store.cache import Cache

KEY = re.compile(r"[0-9a-f]{64}")
DIGITS = re.compile(r"[0-9a-f]{4,64}")
_NEVER_A_NAME = re.compile(r"[0-9a-f]{6,64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_URL = re.compile(r"(?P<root>.+://.+?)/(?P<kind>caches|names)/(?P<what>[^/]+)/?")
_MOST_SMALL_BYTES = 1 << 16
_MOST_SEEN_BYTES = 1 << 26


class Named(Strict):
    """What a name stands for."""

    format: Literal[1] = FORMAT
    key: str
    by: str
    time: str


class Published(Strict):
    """One push: by whom, when, how many views. evaluation_top1: the teacher's (0..1), as the publisher found it."""

    format: Literal[1] = FORMAT
    key: str
    by: str
    time: str
    kdcache: str
    views: int
    evaluation_top1: float | None


class Registry:
    """The registry at `url`, which is a folder or an address.

    local: a folder of one's own that keeps what came from registries. teachers: the teachers' weights in the registry.
    signers: if set, caches are opened only as these have signed them.
    """

    signers: Signers | None = None

    def __init__(self, url: str, local: Path, store_bytes: int) -> None:
        self.objects = open_objects(url)
        self.url, self.teachers = self.objects.url, SharedTeachers(self.objects)
        self._mirror = local / "registries" / hashlib.sha256(self.objects.address.encode()).hexdigest()[:16]
        self._chunks = local / "chunks"
        self._store = LocalStore(self._chunks, store_bytes)

    @property
    def _listing(self) -> str:
        return f"see kdcache ls --registry {shlex.quote(self.url)}"

    def require_writable(self) -> Registry:
        """Return this registry; InputError for a web server, before anything is done in vain."""
        if not self.objects.writable:
            raise InputError(f"{self.url} can only be read: change the folder or bucket behind it")
        return self

    # Keys and names

    def keys(self) -> list[str]:
        """The keys of all caches, sorted; InputError for a web server."""
        if not self.objects.listable:
            raise InputError(f"{self.url}: a web server cannot be listed: give a name or all 64 digits of a key")
        return [name for name in self.objects.folders("caches", "identity.json") if KEY.fullmatch(name)]

    @cached_property
    def names(self) -> dict[str, str]:
        """Keys by name; empty for a web server. Files that are no names, or cannot be parsed, are left out."""
        found = {}
        if self.objects.listable:
            for name in sorted(self.objects.sizes("names")):
                if _NAME.fullmatch(name):
                    try:
                        found[name] = self._named(name).key
                    except (CorruptError, NotFoundError):
                        continue  # whoever asks for that name is told
        return found

    def all_names(self) -> dict[str, str]:
        """The keys by name as they are now; CorruptError if one cannot be parsed, since it may stand for any key."""
        found = sorted(filter(_NAME.fullmatch, self.objects.sizes("names")))
        return {name: self._named(name).key for name in found}

    def remove_name(self, name: str) -> None:
        """Remove a name; NotFoundError if it does not exist."""
        check_name(name)
        if self.objects.size(f"names/{name}") is None:
            raise NotFoundError(f"{self.url} has no cache named {name}: {self._listing}")
        self.objects.remove([f"names/{name}"])

    def _named(self, name: str) -> Named:
        path = f"names/{name}"
        return read_checked(self.objects, path, _MOST_SMALL_BYTES, partial(_named, f"{self.url}/{path}"))

    def find(self, what: str) -> str:
        """The key that `what` means: a key, at least four of its first digits, or a name.

        What can be both is taken for a name.
        """
        if KEY.fullmatch(what):
            return what
        if DIGITS.fullmatch(what) and not self.has_name(what):
            found = [key for key in self.keys() if key.startswith(what)]
            if len(found) == 1:
                return found[0]
            if found:
                keys = ", ".join(key[:16] for key in found)
                raise InputError(f"several caches in {self.url} begin with {what}: {keys}; give more digits")
            raise NotFoundError(f"no cache in {self.url} begins with {what}: {self._listing}")
        check_name(what)
        try:
            return self._named(what).key
        except NotFoundError:
            raise NotFoundError(f"{self.url} has no cache named {what}: {self._listing}") from None

    def has_name(self, name: str) -> bool:
        """Whether this is a name that stands for a cache. Digits can be one only where they are fewer than six."""
        return may_be_name(name) and self.objects.size(f"names/{name}") is not None

    def give_name(self, name: str, key: str, move: bool) -> None:
        """Have `name` stand for a key; InputError if it stands for another one, unless `move`."""
        check_name(name)
        content = canonical(Named(key=key, by=_who(), time=_now()))
        if self.objects.create(f"names/{name}", content):
            return
        had = self._named(name).key if not move else None
        if had == key:
            return
        if had is not None:
            raise InputError(f"{name} stands for cache {had[:12]} in {self.url}: give another --name, or add --move")
        self.objects.replace(f"names/{name}", content)

    # Caches

    def has(self, key: str) -> bool:
        """Whether there is a cache of that key."""
        return self.objects.size(f"caches/{key}/identity.json") is not None

    def cache(self, key: str) -> Cache:
        """Open the cache of that key; MismatchError if it is another cache, or lacks what was seen of it before."""
        cache = self.open(key)
        self._require_no_older(cache)
        return cache

    def open(self, key: str) -> Cache:
        """Open the cache of that key, whatever was seen of it before, and remember nothing of it."""
        prefix = f"caches/{key}"
        identified = partial(_identified, f"{self.url}/{prefix}/identity.json", key)
        try:
            identity = read_checked(self.objects, f"{prefix}/identity.json", MAX_JSON_BYTES, identified)
        except NotFoundError:
            raise NotFoundError(f"{self.url} has no cache {key[:16]}: {self._listing}") from None
        cache = Cache(self.objects.place(prefix, identity, self._mirror / key, self._store))
        return cache if self.signers is None else trusted(cache, self.signers)

    def folder(self, key: str) -> Path | None:
        """The folder in which the cache of that key is built right in the registry; None over a network."""
        return self.objects.folder(f"caches/{key}")

    def mirrors(self) -> list[Path]:
        """The local folders, named by keys, with what was seen here of the registry's caches."""
        return [self._mirror / name for name in files.names(self._mirror) if KEY.fullmatch(name)]

    def forget(self, key: str) -> None:
        """Remove what was seen here of a cache that was removed, so that it can be built again."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._mirror / key)

    def _require_no_older(self, cache: Cache) -> None:
        """Remember what is committed, and refuse a state that lacks what was seen here before."""
        seen = self._mirror / cache.key / "seen.json"
        try:
            content = files.read_bounded(seen, _MOST_SEEN_BYTES)
            before = set(TypeAdapter(list[str]).validate_json(content, strict=True))
        except NotFoundError:
            before = set()
        except (CorruptError, ValidationError) as e:
            raise CorruptError(f"{seen} is damaged ({first_sentence(e)}): remove it") from e
        now = set(cache.commits())  # only now: another process may just have noted what it saw
        if lost := sorted(before - now):
            raise MismatchError(
                f"{cache.where} lacks {len(lost)} commits that were there before, such as {lost[0]}: it is an older "
                f"state, or commits were removed; if that is intended, remove {seen.parent}"
            )
        if now - before:
            seen.parent.mkdir(parents=True, exist_ok=True)
            files.replace_file(seen, json.dumps(sorted(now)).encode())

    def caches(self) -> tuple[list[Cache], list[str]]:
        """All caches, and one line for each folder among them that is no readable cache."""
        good, bad = [], []
        for key in self.keys():
            try:
                good.append(self.cache(key))
            except KdcacheError as e:
                bad.append(str(e))
        return good, bad

    # Provenance

    def record(self, cache: Cache, version: str, evaluation_top1: float | None) -> None:
        """Note that this user has published `cache`, which is here."""
        about = Published(
            key=cache.key,
            by=_who(),
            time=_now(),
            kdcache=version,
            views=len(cache.views),
            evaluation_top1=evaluation_top1,
        )
        self.objects.create(f"caches/{cache.key}/published/{_token()}.json", canonical(about))

    def published(self, key: str) -> Published | None:
        """The latest push; None where none is known."""
        folder = f"caches/{key}/published"
        names = sorted(self.objects.sizes(folder)) if self.objects.listable else []
        if not names:
            return None
        path = f"{folder}/{names[-1]}"
        return read_checked(self.objects, path, _MOST_SMALL_BYTES, partial(_published, f"{self.url}/{path}"))


def _named(where: str, content: bytes) -> Named:
    advice = "give the name again, with --move"
    found = parse(Named, content, where, advice)
    if not KEY.fullmatch(found.key):
        raise CorruptError(f"{where} names no key; {advice}")
    return found


def _identified(where: str, key: str, content: bytes) -> Identity:
    found = parse(Identity, content, where, "ask whoever keeps the registry to remove that cache")
    if found.key != key:
        raise MismatchError(f"{where} is that of cache {found.key[:12]}, not of {key[:12]}: it was tampered with")
    return found


def _published(where: str, content: bytes) -> Published:
    return parse(Published, content, where, "remove it")


def in_bucket(shared: Registry, identity: Identity) -> BucketCache:
    """A cache in a registry's bucket as one of those who build it there. It need not exist yet.

    What is put there is kept here too, until a reader finds more in the local store than it allows.
    """
    objects = cast("RemoteObjects", shared.objects)  # whoever has no folder can fetch
    return BucketCache(objects, identity, shared._mirror / identity.key, LocalStore(shared._chunks, sys.maxsize))


def may_be_name(text: str) -> bool:
    """Whether this can name a cache. Six or more digits of a key cannot, so that no registry is asked for them."""
    return bool(_NAME.fullmatch(text)) and not _NEVER_A_NAME.fullmatch(text)


def check_name(name: str) -> None:
    """InputError for what cannot name a cache."""
    if not may_be_name(name):
        raise InputError(
            f"{name!r} is no name for a cache: give up to 100 letters, digits, dots, - and _ that begin with a letter "
            "or digit, and not just six or more of 0-9 and a-f, which would be a key"
        )


def split_url(url: str) -> tuple[str, str] | None:
    """The registry's root and the key or name in the address of a cache; None if it is no such address.

    InputError for an address that may hold a secret.
    """
    if "://" in url:
        require_open(url)
    found = _URL.fullmatch(url)
    return (found["root"], found["what"]) if found else None


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # as in many containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _token() -> str:
    """A name that nobody else takes. Such names sort by time."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
