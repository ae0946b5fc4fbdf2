"""Files that appear whole or not at all, and are never changed afterwards."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from kdcache.cache.errors import CorruptError, InputError, KdcacheError, NotFoundError, UnreadableError

Content = bytes | memoryview


def sha256(data: Content) -> str:
    return hashlib.sha256(data).hexdigest()


def publish(path: Path, data: bytes, scratch: Path, *, replace: bool = False) -> None:
    """Create `path` with `data`, synced to disk, by way of a temporary file in `scratch` (same file system).

    An existing file with the same bytes is left as it is. One with other bytes raises CorruptError, unless `replace`
    is set, which is meant for files that nothing has committed.
    """
    try:
        _put(path, partial(write, data=data), scratch, os.link)
    except FileExistsError:
        if holds(path, data):
            sync_folder(path.parent)  # whoever made the file may not have synced it yet
        elif replace:
            _put(path, partial(write, data=data), scratch, os.replace)
        else:
            raise CorruptError(f"{path} exists with other content; it is never overwritten") from None


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step, synced: a reader sees the old file or the new one."""
    _put(path, partial(write, data=data), path.parent, os.replace)


def link_file(path: Path, file: Path, scratch: Path) -> None:
    """Make `path` another name of `file` in one step, whatever was there; its folder is not synced."""
    _put(path, partial(os.link, file), scratch, os.replace, sync=False)


def write(path: Path, data: Content) -> None:
    """Write and sync a file that nobody looks for yet. Its folder is not synced.

    Where the folder belongs to a group (see `make_folder`), the group may read and write the file.
    """
    with naming(path), path.open("wb") as f:
        if _is_groups(path.parent):
            # The group needs the right to write: without it nobody else may link to the file, and so nobody could
            # finish another's work.
            os.fchmod(f.fileno(), stat.S_IMODE(os.fstat(f.fileno()).st_mode) | stat.S_IRGRP | stat.S_IWGRP)
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, unless it exists.

    Where its parent belongs to a group (setgid, and the group may write), so does the new folder, whatever the umask.
    """
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    if not _is_groups(folder.parent):
        return folder.mkdir(exist_ok=True)
    # The folder gets its name only once it has its rights: files that others made in it earlier would lack them.
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    new.mkdir()
    try:
        new.chmod(stat.S_IMODE(new.stat().st_mode) | stat.S_IRWXG | stat.S_ISGID)
        new.rename(folder)
    except OSError as e:
        new.rmdir()
        if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _is_groups(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def _put(
    path: Path, make: Callable[[Path], None], scratch: Path, move: Callable[[Path, Path], None], sync: bool = True
) -> None:
    for last in (False, True):
        temporary = scratch / f".{path.name}.{secrets.token_hex(8)}.tmp"
        with naming(path):
            try:
                make_folder(path.parent)
                make_folder(scratch)
                make(temporary)
                move(temporary, path)
                return sync_folder(path.parent) if sync else None
            except FileNotFoundError:
                # This builder was stopped for so long that another took it for dead and cleared its scratch folder.
                if last:
                    raise
            finally:
                temporary.unlink(missing_ok=True)


def remove_folder(folder: Path, scratch: Path) -> None:
    """Remove a folder and all in it. Others see it vanish in one step; another process may remove it too."""
    aside = scratch / secrets.token_hex(8)
    while folder.exists():
        make_folder(scratch)
        with suppress(FileNotFoundError):  # the folder has gone, or this builder's scratch folder has
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def names(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where it is gone or no folder."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder and all in it, if it is there. Nothing behind a link is touched."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_below(top: Path, file: str) -> None:
    """Remove a file below the folder `top`, whatever it is. What is no folder on the way to it goes in its place."""
    at = top
    for name in PurePosixPath(file).parts:
        at /= name
        if at.is_symlink() or not at.is_dir():
            break
    discard(at)


def links_below(top: Path) -> list[Path]:
    """The links to folders below a folder. They are not followed."""
    found = (Path(where, name) for where, folders, _ in os.walk(top) for name in folders)
    return sorted(path for path in found if path.is_symlink())


def require_no_link(top: Path, file: str) -> None:
    """CorruptError if a folder on the way from `top` to a file is a link, which would lead elsewhere."""
    at = top
    for name in PurePosixPath(file).parent.parts:
        at /= name
        if at.is_symlink() and at.is_dir():
            raise CorruptError(f"{at} is a symbolic link, which is not followed: remove it")


def clear_way(top: Path, file: str) -> None:
    """Remove what keeps a file below `top` from being written: no folder on the way to it, or a folder in its place."""
    at = top
    for name in PurePosixPath(file).parent.parts:
        at /= name
        if not at.is_dir():
            with suppress(FileNotFoundError, IsADirectoryError):  # another process has just cleared it away
                at.unlink()
    if (top / file).is_dir():
        with suppress(FileNotFoundError, NotADirectoryError):
            discard(top / file)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of the block name the file, as those of a write, such as on a full disk, do not by themselves."""
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise


def holds(path: Path, data: bytes) -> bool:
    """Whether there is a plain file with just this content."""
    try:
        return read_bounded(path, len(data)) == data
    except KdcacheError:  # it is missing, longer, or no plain file
        return False


def read_bounded(path: Path, limit: int) -> bytes:
    """The file's bytes; CorruptError, before anything is read, if it is longer than `limit` or not a plain file."""
    # O_NOFOLLOW: a link could lead out of the cache.
    with _opened(path, os.O_NOFOLLOW) as (f, size):
        if size > limit:
            raise CorruptError(f"{path} is longer than the {limit} bytes allowed")
        return f.read(size)


def read_plain(path: Path, limit: int | None = None) -> bytes:
    """The bytes of a file that its user may have put behind a link; CorruptError as in `read_bounded`.

    A pipe or a device in its place is refused at once, since reading it might never end.
    """
    with _opened(path) as (f, size):
        if limit is not None and size > limit:
            raise CorruptError(f"{path} is longer than the {limit} bytes allowed")
        return f.read()


def size_of(path: Path) -> int:
    """The bytes of a plain file; raises what `read_range` does where it cannot be read."""
    with _opened(path) as (_, size):
        return size


def read_range(path: Path, offset: int, size: int, *, short: bool = False) -> bytes:
    """`size` bytes from `offset`; CorruptError if the file ends before that, or with `short` as many as there are."""
    with _opened(path) as (f, length):
        if not short and not 0 <= offset <= offset + size <= length:
            raise CorruptError(f"{path} ends at byte {length}, and bytes {offset} to {offset + size} are needed")
        f.seek(offset)
        return f.read(size)


def is_there(path: Path) -> bool:
    """Whether something is at the path; False too for a name that is too long for a file, where Path.exists raises."""
    try:
        return path.exists()
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            return False
        raise


def is_folder(path: Path) -> bool:
    """Whether a folder is at the path; False, as with `is_there`, for a name that is too long for a file."""
    return is_there(path) and path.is_dir()


def expanded(text: str) -> Path:
    """The path that a user has written, where ~ stands for a home. InputError for what no file can be called."""
    try:
        os.fsencode(text)
        path = Path(text).expanduser()
    except (UnicodeEncodeError, RuntimeError) as e:
        reason = "it is no text" if isinstance(e, UnicodeEncodeError) else "there is no such home"
        raise InputError(f"{text!r} is no path: {reason}") from e
    if "\0" in text:
        raise InputError(f"{text!r} is no path: it holds a NUL")
    return path


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[tuple[BinaryIO, int]]:
    """Open a plain file: yields it and its size in bytes."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing") from None
    except ValueError as e:  # a NUL, or what is no text
        raise InputError(f"{str(path)!r} is no path of a file") from e
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise CorruptError(f"{path} cannot be read: it is a symbolic link, which is not followed") from e
        kind = CorruptError if e.errno in (errno.ENOTDIR, errno.ENXIO, errno.ENAMETOOLONG) else UnreadableError
        raise kind(f"{path} cannot be read: {e.strerror}") from e
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptError(f"{path} is not a plain file")
        with open(fd, "rb", closefd=False) as f:
            yield f, found.st_size
    except OSError as e:
        raise UnreadableError(f"{path} cannot be read: {e.strerror}") from e
    finally:
        os.close(fd)
