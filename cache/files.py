"""Files that appear whole or not at all, and are never changed afterwards."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from kdcache.cache.errors import CorruptError, NotFoundError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def publish(path: Path, data: bytes, scratch: Path, *, replace: bool = False) -> None:
    """Create `path` with `data`, synced to disk, by way of a temporary file in `scratch` (same file system).

    An existing file with the same bytes passes. With other bytes it is a CorruptError, unless `replace`: for a
    file that nothing has committed.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f"{os.getpid()}-{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            if path.read_bytes() != data:
                if not replace:
                    raise CorruptError(f"{path} exists with other content; it is never overwritten") from None
                temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step, synced: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_bounded(path: Path, limit: int) -> bytes:
    """The file's bytes; a CorruptError, without reading on, where it is longer or not a plain file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing") from None
    except OSError as e:
        raise CorruptError(f"{path} cannot be read: {e.strerror}") from e
    with os.fdopen(fd, "rb") as f:
        try:
            data = f.read(limit + 1) or b""
        except OSError as e:
            raise CorruptError(f"{path} cannot be read: {e.strerror}") from e
    if len(data) > limit:
        raise CorruptError(f"{path} is longer than the {limit} bytes that fit its shape")
    return data
