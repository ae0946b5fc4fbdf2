"""Zip files as torch.save and numpy.savez write them: their checksum, and whether reading them can be a trap."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from kdcache.cache.files import sha256

# The checksum stands where a zip file has room for a comment. It covers all that is before it.
_MARK = b"kdcache sha256 "
_DIGITS = 64


def sealed_zip(content: bytes) -> bytes:
    """The zip file, which has no comment yet, with a comment that holds the checksum of all that stands before it."""
    length = len(_MARK) + _DIGITS
    begin = content[:-2] + length.to_bytes(2, "little") + _MARK  # a zip file without a comment ends with its length, 0
    return begin + sha256(begin).encode()


def seal_holds(content: bytes) -> bool | None:
    """Whether the checksum of a zip file is its own; None where it has none."""
    begin, digest = content[:-_DIGITS], content[-_DIGITS:]
    return sha256(begin).encode() == digest if begin.endswith(_MARK) else None


def inflates(file: Path | bytes) -> bool:
    """Whether what is in a zip file takes more memory than the file has bytes; False for what is no zip file.

    Neither torch.save nor numpy.savez compresses, so such a file is another's, and a few bytes could fill all memory.
    ValueError for one whose directory cannot be read.
    """
    content, size = (io.BytesIO(file), len(file)) if isinstance(file, bytes) else (file.open("rb"), file.stat().st_size)
    with content:
        if content.read(2) != b"PK":
            return False
        try:
            with zipfile.ZipFile(content) as opened:
                # TorchScript compresses its programs' code, which torch.load never reads.
                return sum(entry.file_size for entry in opened.infolist() if "/code/" not in entry.filename) > size
        except (zipfile.BadZipFile, NotImplementedError) as e:
            raise ValueError(str(e)) from e
