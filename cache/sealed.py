"""Files of kdcache's own that carry a checksum of themselves, so that changed ones are not taken for what was written.

People can still read JSON, and change it on purpose if they remove the line of the checksum. The zip files are those
that torch.save and numpy.savez write.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache.cache.errors import CorruptError
from kdcache.cache.files import read_plain, sha256

_SEAL = "sha256"
_MOST_BYTES = 1 << 28
_IS_HASH = re.compile(r"[0-9a-f]{64}")
# The checksum of a zip file stands where that has room for a comment. It covers all that is before it.
_MARK = b"kdcache sha256 "
_DIGITS = 64


def sealed(value: Mapping[str, Any], *, sort: bool = False) -> bytes:
    """The JSON text of an object, with its checksum under the name "sha256"."""
    return (json.dumps({**value, _SEAL: _digest(value)}, indent=2, sort_keys=sort) + "\n").encode()


def read_sealed(file: Path, advice: str) -> dict[str, Any]:
    """Read an object that `sealed` wrote, or one without a checksum, as versions before it wrote them.

    NotFoundError where there is no file, CorruptError where it is not what was written; both end with `advice`.
    """
    return unsealed(read_plain(file, _MOST_BYTES), str(file), advice)


def unsealed(content: bytes, where: str, advice: str) -> dict[str, Any]:
    """Do what `read_sealed` does, for the content of a file that lies at `where`."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:  # also where it is no text
        raise CorruptError(f"{where} is not valid JSON ({e}): {advice}") from e
    if not isinstance(value, dict):
        raise CorruptError(f"{where} is not what kdcache writes: {advice}")
    had = value.pop(_SEAL, None)
    try:
        damaged = _is_renamed(value) if had is None else had != _digest(value)
    except RecursionError as e:  # nested as deeply as can just be read, and not written
        raise CorruptError(f"{where} is not what kdcache writes: {advice}") from e
    if damaged:
        raise CorruptError(
            f"{where} is not what was written, by the checksum in it: {advice}; if you changed it on purpose, remove "
            f'its "{_SEAL}"'
        )
    return value


def _is_renamed(value: Mapping[str, Any]) -> bool:
    """Whether the checksum is there under another name, which is damage too."""
    hashes = [name for name, held in value.items() if isinstance(held, str) and _IS_HASH.fullmatch(held)]
    return any(value[name] == _digest({k: v for k, v in value.items() if k != name}) for name in hashes)


def _digest(value: Mapping[str, Any]) -> str:
    """The checksum of a value as it is after it was written and read."""
    plain = json.loads(json.dumps(value))
    return sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


# Zip files


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
