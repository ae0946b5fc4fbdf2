"""Objects below a root: in a folder, in a bucket, or on a web server. They are created whole, and once.

A bucket and a web server are reached over a network that fails at any time: everything is tried again, with back-off,
until `PATIENCE` is spent.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import secrets
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, overload
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as oe
from obstore.store import ObjectStore, from_url

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, NotFoundError, UnreadableError
from kdcache.cache.files import Content

T = TypeVar("T")
BUCKETS = ("s3", "gs", "az")
# Seconds that one request is tried for: once the place has answered, and before.
PATIENCE, AT_FIRST = 90.0, 15.0
_LONGEST_WAIT = 10.0
_WRONG_AT_MOST = 3  # times that bytes are fetched again which are not those that belong there
# A stalled connection is given up after read_timeout; a chunk may have 2 GB.
_CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h"}
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def open_objects(url: str) -> FolderObjects | NetworkObjects:
    """Those below a URL or the path of a folder; InputError for what is neither, or may hold a secret."""
    if "://" not in url:
        return FolderObjects(Path(url))
    url = url.rstrip("/")
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"{shown}: an address takes no user, password, token or query, which would end up in logs; credentials "
            "come from the environment (see docs/sharing.md)"
        )
    if parts.scheme == "file":
        return FolderObjects(Path(parts.path))
    if parts.scheme not in (*BUCKETS, "http", "https") or not parts.netloc:
        known = ", ".join(f"{scheme}://" for scheme in (*BUCKETS, "http", "https"))
        raise InputError(f"{shown} is no place for a registry: give a folder, or an address with {known}")
    return NetworkObjects(url, bucket=parts.scheme in BUCKETS)


class FolderObjects:
    """Files below a folder, of which none is reached through a symbolic link. For the methods see NetworkObjects."""

    listable = writable = True

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, str(root)

    def at(self, path: str) -> Path:
        """The file's path; CorruptError where a link would lead elsewhere."""
        parent = (self.root / path).parent
        if parent.resolve() != self.root.resolve() / Path(path).parent:
            raise CorruptError(f"{parent} is, or lies behind, a symbolic link, which is not followed: remove it")
        return self.root / path

    def read(self, path: str, limit: int) -> bytes:
        return files.read_bounded(self.at(path), limit)

    def size(self, path: str) -> int | None:
        file = self.at(path)
        return file.lstat().st_size if file.is_file() else None

    def create(self, path: str, data: bytes) -> bool:
        try:
            files.publish(self.at(path), data, self.at("scratch/x").parent)
        except CorruptError:
            return False
        return True

    def replace(self, path: str, data: bytes) -> None:
        file = self.at(path)
        files.make_folder(file.parent)
        files.replace_file(file, data)

    def sizes(self, folder: str) -> dict[str, int]:
        top, found = self.at(f"{folder}/x").parent, {}
        for where, _, names in os.walk(top):
            for name in names:
                file = Path(where, name)
                found[file.relative_to(top).as_posix()] = file.lstat().st_size
        return found

    def newest(self, folder: str) -> float:
        top = self.at(f"{folder}/x").parent
        found = (Path(where, name) for where, _, names in os.walk(top) for name in names)
        return max((file.lstat().st_mtime for file in found), default=0.0)

    def changed(self, path: str) -> float:
        file = self.at(path)
        if not file.is_file():
            raise NotFoundError(f"{file} is missing")
        return file.lstat().st_mtime

    def remove(self, paths: list[str]) -> None:
        for path in paths:
            self.at(path).unlink(missing_ok=True)

    def folders(self, folder: str) -> list[str]:
        top = self.at(f"{folder}/x").parent
        return sorted(p.name for p in top.iterdir() if p.is_dir()) if top.is_dir() else []


class NetworkObjects:
    """Objects in a bucket, or, read only, on a web server, which cannot be listed. May be pickled.

    Every method raises UnreadableError once it was tried for long enough.
    """

    def __init__(self, url: str, bucket: bool) -> None:
        self.url, self.listable, self.writable = url, bucket, bucket
        self._reached = False

    @overload
    def read(self, path: str, limit: int) -> bytes: ...

    @overload
    def read(self, path: str, limit: int, sha256: str) -> Content: ...

    def read(self, path: str, limit: int, sha256: str | None = None) -> Content:
        """The object's bytes; NotFoundError; CorruptError where there are more than `limit`, or of another digest."""
        wrong = 0
        while True:
            content, tag = self._try(path, lambda: self._get(path, limit))
            if sha256 is not None:
                right = files.sha256(content) == sha256
            else:
                # Of most buckets the tag is the content's MD5; where it is something else, it does not agree by chance.
                right = self.url.startswith("https://") or (tag is not None and tag[1] == _md5(content))
                # Or nothing covers these bytes on the way: two answers must agree.
                right = right or content == self._try(path, lambda: self._get(path, limit))[0]
            if right:
                return content if sha256 is not None else bytes(content)
            wrong += 1
            if wrong == _WRONG_AT_MOST:
                raise CorruptError(f"{self.url}/{path} is not what was committed")

    def _get(self, path: str, limit: int) -> tuple[memoryview, re.Match[str] | None]:
        """The object, and its tag where that may be an MD5."""
        found = obstore.get(self._store, path)
        size, tag = found.meta["size"], _MD5.fullmatch(found.meta["e_tag"] or "")
        if size > limit:
            raise CorruptError(f"{self.url}/{path} has {size} bytes, more than the {limit} that it may have")
        content = memoryview(found.bytes())  # no copy
        if len(content) != size:
            raise oe.GenericError(f"{len(content)} of {size} bytes came")
        return content, tag

    def size(self, path: str) -> int | None:
        """Bytes of the object; None where there is none."""
        try:
            return self._try(path, lambda: obstore.head(self._store, path)["size"])
        except NotFoundError:
            return None

    def create(self, path: str, data: Content) -> bool:
        """Create the object; whether its content is now `data`: an existing one is never changed."""

        def put() -> bool:
            try:
                done = obstore.put(self._store, path, data, mode="create", use_multipart=False)
            except oe.AlreadyExistsError:
                return False  # perhaps by our own request, whose answer was lost
            tag = _MD5.fullmatch(done["e_tag"] or "")
            return tag is None or tag[1] == _md5(data)

        if self._try(path, put):
            return True
        try:
            return self.read(path, len(data), files.sha256(data)) == data
        except CorruptError:
            return False

    def require_create_only(self, path: str) -> None:
        """InputError where the server would overwrite the object at `path`, which is there: with the same bytes now."""
        content = self.read(path, 1 << 20)

        def put() -> bool:
            try:
                obstore.put(self._store, path, content, mode="create", use_multipart=False)
            except oe.AlreadyExistsError:
                return True
            return False

        if not self._try(path, put):
            raise InputError(
                f"{self.url}: this server overwrites what exists although asked not to (If-None-Match), so that "
                "nothing could be published safely; use another"
            )

    def replace(self, path: str, data: bytes) -> None:
        """Create or change the object in one step."""
        self._try(path, lambda: obstore.put(self._store, path, data, use_multipart=False))

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of all objects at any depth below a folder, by their paths from there."""

        def listed() -> dict[str, int]:
            found = (meta for page in obstore.list(self._store, folder) for meta in page)
            return {meta["path"].removeprefix(f"{folder}/"): meta["size"] for meta in found}

        # Nothing covers a list on its way, and a name that came wrong would count as removed: two in a row must agree,
        # unless others change it all the time.
        found = self._try(f"{folder}/", listed)
        for _ in range(_WRONG_AT_MOST):
            before, found = found, self._try(f"{folder}/", listed)
            if found == before:
                break
        return found

    def newest(self, folder: str) -> float:
        """When the latest of them was made, in seconds since 1970; 0 where there is none."""

        def latest() -> float:
            found = (meta for page in obstore.list(self._store, folder) for meta in page)
            return max((meta["last_modified"].timestamp() for meta in found), default=0.0)

        return self._try(f"{folder}/", latest)

    def changed(self, path: str) -> float:
        """When the object was made, in seconds since 1970; NotFoundError."""

        def last() -> float:
            return obstore.head(self._store, path)["last_modified"].timestamp()

        return self._try(path, last)

    def remove(self, paths: list[str]) -> None:
        """Remove objects, in any order; those that are not there are passed over."""
        if paths:
            self._try(paths[0], lambda: obstore.delete(self._store, paths))

    def folders(self, folder: str) -> list[str]:
        """The names of the folders in a folder."""
        found = self._try(f"{folder}/", lambda: obstore.list_with_delimiter(self._store, folder))
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    @property
    def _store(self) -> ObjectStore:
        if (first := _process()) != os.getpid():
            # obstore's threads have not come along: every request would wait for ever.
            raise UnreadableError(
                f"{self.url} cannot be read in a process forked off one (process {first}) that has read over a "
                "network: start it by spawn, as multiprocessing.get_context('spawn') does"
            )
        return _store(self.url)

    def _try(self, path: str, request: Callable[[], T]) -> T:
        where, started, wait, tries = f"{self.url}/{path}", time.monotonic(), 0.1, 0
        while True:
            tries += 1
            try:
                found = request()
            except FileNotFoundError as e:
                self._reached = True
                if "NoSuchBucket" in str(e):
                    raise NotFoundError(f"{self.url}: there is no such bucket") from e
                raise NotFoundError(f"{where} is missing") from None
            except (oe.PermissionDeniedError, oe.UnauthenticatedError) as e:
                raise UnreadableError(f"{where}: {_reason(e)}: these credentials may not do this") from e
            except (oe.BaseError, ValueError, OSError) as e:
                if _final(e):
                    raise UnreadableError(f"{self.url}: no credentials were found (see docs/sharing.md)") from e
                passed = time.monotonic() - started
                if passed + wait > (PATIENCE if self._reached else AT_FIRST):
                    raise UnreadableError(
                        f"{where}: {_reason(e)} ({tries} tries in {passed:.0f} s): see to the network, then run the "
                        "same command again (train: with --resume), it goes on where it was"
                    ) from e
            else:
                self._reached = True
                return found
            time.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, _LONGEST_WAIT)


@cache
def _process() -> int:
    """The process that was the first to ask."""
    return os.getpid()


@cache
def _store(url: str) -> ObjectStore:
    # A bucket's endpoint may be within a building; https is not to be left by a redirection.
    client = {**_CLIENT, "allow_http": not url.startswith("https://")}
    options: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": 0}}
    if url.startswith("s3://"):
        options |= _profile()
    try:
        return from_url(url, **options)
    except (oe.BaseError, ValueError) as e:
        raise InputError(f"{url} cannot be opened: {_reason(e)}") from e


def _profile() -> dict[str, Any]:
    """What boto3 knows from ~/.aws and single sign-on, where that is installed and the environment names no keys."""
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_SKIP_SIGNATURE" in os.environ:
        return {}
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    session = boto3.Session()
    return {"credential_provider": Boto3CredentialProvider(session)} if session.get_credentials() else {}


def _final(e: Exception) -> bool:
    """Whether trying again is of no use: no credentials were found, so that a cloud machine's own were asked for."""
    return "169.254." in str(e)


def _reason(e: Exception) -> str:
    """The first line of an error of obstore's, without what may be a token."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return re.sub(r"\?\S+", "?...", lines[0] if lines else type(e).__name__)[:300]


def _md5(content: Content) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def token() -> str:
    """A name that nobody else takes."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
