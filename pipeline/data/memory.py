"""What was learnt from a dataset at its first opening, kept in KDCACHE_HOME/datasets, so that it is learnt once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kdcache.cache.errors import KdcacheError
from kdcache.cache.files import read_plain, replace_file
from kdcache.cache.sealed import seal_holds, sealed_zip

_USED: set[Path] = set()  # files that this process has read or written


def recall(home: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays that `remember` kept under this key; None where there are none, or not just those any more."""
    try:
        content = read_plain(memory_file(home, key))
    except KdcacheError:
        return None
    if not seal_holds(content):  # it is damaged, or was written before there were checksums
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = dict(stored)
    _USED.add(memory_file(home, key))
    return arrays


def remember(home: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keep the arrays under a key that holds whatever they depend on."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # it takes the flag for one of them
    with contextlib.suppress(OSError):  # without a place to keep them, they are learnt again next time
        replace_file(memory_file(home, key), sealed_zip(buffer.getvalue()))
        _USED.add(memory_file(home, key))


def used() -> dict[str, bytes]:
    """The files, by name, that hold what this process knows of its datasets: for machines that have the same data."""
    found = {}
    for path in _USED:
        with contextlib.suppress(OSError):
            found[path.name] = path.read_bytes()
    return found


def bring(home: Path, files: Mapping[str, bytes]) -> None:
    """Keep the files of `used` here, where they are missing."""
    for name, content in files.items():
        path = memory_file(home, name.removesuffix(".npz"))
        if not path.exists():
            with contextlib.suppress(OSError):
                replace_file(path, content)


def memory_file(home: Path, key: str) -> Path:
    """The file that keeps what belongs to a key."""
    return home / "datasets" / f"{key}.npz"
