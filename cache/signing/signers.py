"""The keys that a reader trusts: a file of OpenSSH's kind `allowed_signers` (ssh-keygen(1), ALLOWED SIGNERS).

    alice@lab ssh-ed25519 AAAAC3Nza...
    bob@lab,ci@lab namespaces="kdcache",valid-before="20270101" ssh-ed25519 AAAAC3Nza...

Lines with other kinds of keys, and with authorities of certificates, are passed over: they make nobody trusted. A line
of a .pub file counts too.
"""

from __future__ import annotations

import calendar
import re
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from kdcache.cache import files
from kdcache.cache.errors import InputError
from kdcache.cache.signing.keys import KIND, PublicKey
from kdcache.cache.signing.sshsig import NAMESPACE

_MOST_BYTES = 1 << 20
# Blanks separate fields, and commas separate options, but not within quotes.
_FIELD = re.compile(r'(?:"(?:\\.|[^"\\])*"|[^\s"])+')
_OPTION = re.compile(r'([A-Za-z-]+)(?:="((?:\\.|[^"\\])*)")?(?:,|$)')
_KEY_TYPE = re.compile(r"(sk-)?(ssh|ecdsa)-[a-z0-9@.-]+")
_TIME = re.compile(r"(\d{8})(\d{4})?(\d{2})?(Z)?")


@dataclass(frozen=True)
class Signer:
    """A line of the file. who: its principals. after, before: the times that its signatures may have."""

    key: PublicKey
    who: str
    after: float = float("-inf")
    before: float = float("inf")

    def admits(self, when: int) -> bool:
        """Whether a signature of that time counts."""
        return self.after <= when <= self.before


@dataclass(frozen=True)
class Signers:
    """Whom a reader trusts. file: the file that says so."""

    file: str
    lines: tuple[Signer, ...]

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        """Each key once."""
        return tuple(dict.fromkeys(line.key for line in self.lines))

    @property
    def names(self) -> str:
        """Who they are, for people."""
        names = list(dict.fromkeys(line.who for line in self.lines))
        return " or ".join([", ".join(names[:-1]), names[-1]]) if 1 < len(names) < 4 else ", ".join(names[:3])

    def name(self, key: PublicKey, when: int) -> str | None:
        """Who has signed with that key at that time; None where the file does not trust the key for that time."""
        return next((line.who for line in self.lines if line.key == key and line.admits(when)), None)


def read_signers(file: str) -> Signers:
    """The keys in a file; InputError, with the line, where it is not such a file or has no key that can be used."""
    if not file:
        raise InputError(
            "--trust names no file, so that nobody would be trusted: leave it out to read without signatures"
        )
    try:
        content = files.read_plain(Path(file), _MOST_BYTES).decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{file} is no file of keys, as OpenSSH's allowed_signers (see docs/trust.md)") from e
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if (text := line.strip()) and not text.startswith("#") and (signer := _signer(text)):
                found.append(signer)
        except ValueError as e:
            raise InputError(
                f"{file}, line {number}: {e}; a line is 'NAME ssh-ed25519 AAAA...', as in OpenSSH's allowed_signers"
            ) from e
    if not found:
        raise InputError(f"{file} has no Ed25519 key for {NAMESPACE}, so that nobody would be trusted")
    return Signers(file, tuple(found))


def _signer(line: str) -> Signer | None:
    """What a line says; None where it is about other signatures than kdcache's. ValueError where it cannot be read."""
    fields = _FIELD.findall(line)
    place = next((i for i, field in enumerate(fields[:3]) if _KEY_TYPE.fullmatch(field)), None)
    if place is None or len(fields) < place + 2:
        raise ValueError("there is no key")
    options = _options(fields[1]) if place == 2 else {}
    if fields[place] != KIND.decode() or "cert-authority" in options:
        return None
    if not _matches(NAMESPACE, options.get("namespaces") or "*"):
        return None
    key = PublicKey.decode_text(fields[place + 1])
    who = fields[0].replace('"', "") if place else " ".join(fields[2:]) or key.fingerprint
    after, before = options.get("valid-after"), options.get("valid-before")
    return Signer(key, who, *([_seconds(after)] if after else [float("-inf")]), *([_seconds(before)] if before else []))


def _options(text: str) -> dict[str, str | None]:
    """The options of a line by name, in lower case. ValueError for one that is unknown or stands twice."""
    found: dict[str, str | None] = {}
    place = 0
    while place < len(text):
        option = _OPTION.match(text, place)
        if option is None or (name := option[1].lower()) in found:
            raise ValueError("its options cannot be read")
        if name not in ("cert-authority", "namespaces", "valid-after", "valid-before"):
            raise ValueError(f"there is no option {name}")
        found[name], place = option[2], option.end()
        if (name == "cert-authority") != (option[2] is None):
            raise ValueError(f"{name} has {'a' if option[2] else 'no'} value")
    return found


def _matches(name: str, patterns: str) -> bool:
    """Whether a list of patterns has the name in it; one that begins with ! excludes what it matches."""
    each = [pattern.strip() for pattern in patterns.split(",")]
    excluded = any(fnmatchcase(name, pattern[1:]) for pattern in each if pattern.startswith("!"))
    return not excluded and any(fnmatchcase(name, pattern) for pattern in each)


def _seconds(text: str) -> float:
    """A time of the file, YYYYMMDD[HHMM[SS]][Z], in seconds since 1970. Without Z it is local."""
    if (found := _TIME.fullmatch(text)) is None or (found[3] and not found[2]):
        raise ValueError(f"{text!r} is no time such as 20261128 or 202611281924Z")
    day, minute, second, utc = found.groups()
    try:
        parsed = time.strptime(day + (minute or "0000") + (second or "00"), "%Y%m%d%H%M%S")
        return float(calendar.timegm(parsed) if utc else time.mktime(parsed))
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time such as 20261128 or 202611281924Z") from None
