"""What a signer signs: a list of a cache's identity and commits with their sha256, which `sha256sum -c` reads too.

    # kdcache-statement 1
    # 2026-11-28T19:24:06Z
    <sha256>  commits/labels.json
    <sha256>  commits/v00000-p0000.json
    ...
    <sha256>  identity.json

Commits name every chunk with its sha256, and all else follows from the identity, whose sha256 is the cache's key. So
such a list covers all that is ever read of a cache.
"""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

MAX_BYTES = 1 << 26  # about 600,000 commits
IDENTITY = "identity.json"
_HEAD = "# kdcache-statement 1"
_TIME = "# %Y-%m-%dT%H:%M:%SZ"
_NAME = re.compile(r"identity\.json|(eval/)?commits/[a-z0-9-]{1,40}\.json")
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


def is_covered(file: str) -> bool:
    """Whether a file of a cache is one that statements name."""
    return _NAME.fullmatch(file) is not None


@dataclass(frozen=True)
class Statement:
    """time: when it was signed, in seconds since 1970, as the signer says. files: the sha256 of each file by name."""

    time: int
    files: Mapping[str, str]

    @property
    def key(self) -> str:
        """The key of the cache that it is about."""
        return self.files[IDENTITY]

    @property
    def date(self) -> str:
        """The day on which it was signed, for people."""
        return time.strftime("%Y-%m-%d", time.gmtime(self.time))

    def encoded(self) -> bytes:
        """The statement as it is signed: equal ones are equal bytes."""
        lines = [_HEAD, time.strftime(_TIME, time.gmtime(self.time))]
        lines += [f"{digest}  {file}" for file, digest in sorted(self.files.items())]
        return "\n".join([*lines, ""]).encode()


def decoded(content: bytes) -> Statement:
    """The statement in these bytes; ValueError, with the reason, where they are none."""
    try:
        head, when, *lines = content.decode("ascii").split("\n")
    except ValueError as e:  # other characters, or fewer lines
        raise ValueError("what it signs is no statement of kdcache's") from e
    if head != _HEAD:
        newer = head.startswith(_HEAD.rpartition(" ")[0])
        raise ValueError("update kdcache: a later version has made it" if newer else "it signs no statement of kdcache")
    try:
        signed = calendar.timegm(time.strptime(when, _TIME))
    except (ValueError, OverflowError) as e:
        raise ValueError("its statement has no time") from e
    files: dict[str, str] = {}
    for line in lines[:-1]:
        found = _LINE.fullmatch(line)
        if found is None or not is_covered(found[2]) or found[2] in files:
            raise ValueError("its statement has a line of an unknown kind")
        files[found[2]] = found[1]
    if IDENTITY not in files or lines[-1:] != [""]:
        raise ValueError("its statement is not whole")
    return Statement(signed, files)
