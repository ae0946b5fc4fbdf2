"""What a parser is to the fuzzing job: sound files, a way to read them, and ways to damage them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from damages import Damage


class Prepared(NamedTuple):
    """A parser that is ready to read.

    seeds: sound contents by name. read: reads the content of the seed of that name, or what was made of it, and gives
    something that can be compared. ways: each is taken as often as it stands there. covered: whether a digest covers
    this content of the seed of that name, so that it may not give other values unnoticed. others: contents to splice.
    """

    seeds: dict[str, bytes]
    read: Callable[[str, bytes], Any]
    ways: Sequence[Damage]
    covered: Callable[[str, bytes], bool] = lambda name, content: False
    others: tuple[bytes, ...] = ()


class Parser(NamedTuple):
    """One row of the table. share: how many cases it gets beside the others. prepare: makes what it needs in a folder.

    slow: whether that takes long, or packages that may be missing, so that tests leave it out. megabytes: the memory
    that a case may take.
    """

    name: str
    share: float
    prepare: Callable[[Path], Prepared]
    slow: bool = False
    megabytes: int = 500


def in_place(files: dict[str, Path], read: Callable[[], Any]) -> Callable[[str, bytes], Any]:
    """Reading with one of the files, by its seed's name, holding other content; afterwards it holds its own again."""
    sound = contents(files)

    def reading(name: str, content: bytes) -> Any:
        path = files[name]
        path.write_bytes(content)
        try:
            return read()
        finally:
            path.write_bytes(sound[name])

    return reading


def contents(files: dict[str, Path]) -> dict[str, bytes]:
    """What the files hold."""
    return {name: path.read_bytes() for name, path in files.items()}


def always(name: str, content: bytes) -> bool:
    """Covered by a digest, whatever it is."""
    return True


def quiet(line: str) -> None:
    """Say nothing."""
