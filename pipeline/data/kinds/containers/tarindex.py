"""Finds the samples of one WebDataset tar: where their images lie in the file, and what their labels say.

Headers are read one after another, and nothing is unpacked: names serve only to tell which members make a sample. Only
plain members are taken, and each must lie inside the file.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.decode import MAX_BYTES

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json")
_BLOCK = 512
_MAX_LABEL = 1 << 20  # bytes of a label, and of a header that holds a long name
_PAX = re.compile(rb"(\d{1,20}) ([^=]+)=")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class TarIndex:
    """The samples of one tar, in its order, and how many were left out because they hold no image.

    names: of the images' members. labels: as they are written; None where there is none. numbers, texts: the first
    .json member whose label is a number, and the first one whose label is text.
    """

    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    without_image: int = 0
    numbers: str | None = None
    texts: str | None = None


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int  # of its content
    length: int


def index_tar(path: Path) -> TarIndex:
    """Read all headers of a tar. InputError names the tar, and the member that cannot be taken."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return _indexed(path, fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e


def _indexed(path: Path, fd: int) -> TarIndex:
    index = TarIndex()
    key, sample = None, dict[str, _Member]()
    for member in _members(path, fd):
        folder, _, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not stem or not dot:  # hidden files, and names that belong to no sample
            continue
        if (folder, stem) != key:
            _add(path, fd, index, sample)
            key, sample = (folder, stem), {}
        kind = ending.lower()
        if kind in sample:
            raise InputError(f"{path}: {member.name} is there twice")
        sample[kind] = member
    _add(path, fd, index, sample)
    return index


def _add(path: Path, fd: int, index: TarIndex, sample: dict[str, _Member]) -> None:
    """Add a sample, which is the members of one name by their endings."""
    images = [sample[kind] for kind in IMAGES if kind in sample]
    if len(images) > 1:
        raise InputError(f"{path}: {images[0].name} and {images[1].name} are two images of one sample")
    if not images:
        index.without_image += bool(sample)
        return
    if images[0].length > MAX_BYTES:
        raise InputError(f"{path}: {images[0].name} is larger than 1 GiB")
    index.offsets.append(images[0].offset)
    index.lengths.append(images[0].length)
    index.names.append(images[0].name)
    written = next((_label(path, fd, sample[kind], kind) for kind in LABELS if kind in sample), None)
    index.labels.append(None if written is None else str(written))
    if "json" in sample and "cls" not in sample and written is not None:
        if isinstance(written, int):
            index.numbers = index.numbers or f"{path}: {sample['json'].name}"
        else:
            index.texts = index.texts or f"{path}: {sample['json'].name}"


def _label(path: Path, fd: int, member: _Member, kind: str) -> str | int | None:
    """What a .cls member says, or `label` or `cls` in a .json member; None where the latter has neither."""
    where = f"{path}: {member.name}"
    if member.length > _MAX_LABEL:
        raise InputError(f"{where} is larger than 1 MiB")
    content = os.pread(fd, member.length, member.offset)
    try:
        text = content.decode("utf-8-sig").strip()
        if kind == "cls":
            value: object = text
        else:
            about = json.loads(text)
            value = about.get("label", about.get("cls")) if isinstance(about, dict) else None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where} cannot be read: {e}") from e
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "" or str(value).startswith("-"):
        raise InputError(f"{where}: label {str(value)[:40]!r} is neither a class name nor a whole number from 0 on")
    return value


def _members(path: Path, fd: int) -> Iterator[_Member]:
    """The plain members of a tar, in order. InputError for what is no whole tar, and for members of other kinds."""
    total, at = os.fstat(fd).st_size, 0
    name, size = None, None  # of the next member, where a header before it tells them
    while True:
        block = os.pread(fd, _BLOCK, at)
        if len(block) < _BLOCK:
            raise InputError(f"{path}: ends in the middle: it is truncated, or no tar")
        if not block.strip(b"\0"):
            _require_end(path, fd, at)
            return
        about = _header(path, block, at)
        length = about.size if size is None else size
        offset, kind = at + _BLOCK, about.type
        if length < 0 or offset + length > total:
            raise InputError(f"{path}: ends before the content of {name or about.name}: it is truncated")
        at = offset + -(-length // _BLOCK) * _BLOCK
        if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if length > _MAX_LABEL:
                raise InputError(f"{path}: the header at byte {offset} is larger than 1 MiB")
            content = os.pread(fd, length, offset)
            if kind == tarfile.GNUTYPE_LONGNAME:
                name = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            else:
                name, size = _extended(path, content, name)
            continue
        own, name, size = name or about.name, None, None
        if kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            yield _Member(own.removeprefix("./"), offset, length)
        elif kind not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            raise InputError(
                f"{path}: {own} is a link or something else that is no plain file: pack the files themselves"
            )


def _header(path: Path, block: bytes, at: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as e:
        for start, name in _COMPRESSED.items():
            if not at and block.startswith(start):
                raise InputError(f"{path}: is compressed ({name}): unpack it to a plain .tar") from e
        what = "is no tar" if not at else f"is damaged at byte {at}"
        raise InputError(f"{path}: {what}: {e}") from e


def _extended(path: Path, content: bytes, name: str | None) -> tuple[str | None, int | None]:
    """The name and the size that a pax header gives to the next member."""
    size, at = None, 0
    while found := _PAX.match(content, at):
        end = at + int(found[1])
        value = content[found.end() : end - 1]
        if end <= found.end() or end > len(content):
            break
        if found[2] == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif found[2] == b"size":
            size = int(value) if value.isdigit() and len(value) < 20 else -1
        elif found[2].startswith(b"GNU.sparse"):
            raise InputError(f"{path}: holds a sparse file: pack the files without --sparse")
        at = end
    return name, size


def _require_end(path: Path, fd: int, at: int) -> None:
    """InputError where a tar goes on after its end, as it does after `cat a.tar b.tar`."""
    if os.pread(fd, 1 << 20, at).strip(b"\0"):
        raise InputError(f"{path}: goes on after its end at byte {at}: give tars that were joined as several files")
