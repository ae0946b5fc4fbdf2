"""Signatures as files beside a cache: a statement (statements.py) and its signature, each made once and never changed.

    signatures/KEYID-0001.sha256   the statement, as `sha256sum -c` takes it
    signatures/KEYID-0001.sig      its signature, as `ssh-keygen -Y verify -n kdcache` takes it

KEYID is the beginning of the sha256 of the public key. So whoever knows which keys to look for finds their signatures
without a list, on a web server too. Numbers have no meaning: what is newest is said by the times in the statements.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, NotFoundError
from kdcache.cache.identity import MAX_JSON_BYTES
from kdcache.cache.signing import sshsig, statements
from kdcache.cache.signing.keys import PublicKey, SigningKey
from kdcache.cache.signing.statements import IDENTITY, Statement
from kdcache.cache.store.cache import Cache, place_of
from kdcache.cache.store.place import Place

FOLDER = "signatures"
_FILE = re.compile(r"([0-9a-f]{16})-[0-9]{4}\.sig")
_THREADS = 16  # for reading commits, which may be far away
_MOST = 9999  # of one key beside one cache

Put = Callable[[str, bytes], bool]  # creates a file by its name; False where another one has that name


@dataclass(frozen=True)
class Signature:
    """A signature that was found and is valid: whose it is, and what it says. name: of its files, without suffix."""

    name: str
    key: PublicKey
    statement: Statement
    signed: bytes
    signature: bytes


def signatures_by(place: Place, key_id: str) -> tuple[list[Signature], list[str]]:
    """The valid signatures beside a cache of the keys of that id, and one line for each that is not valid."""
    found, problems = list[Signature](), list[str]()
    for number in range(1, _MOST + 1):
        name = f"{FOLDER}/{key_id}-{number:04d}"
        try:
            signed = place.read(f"{name}.sha256", statements.MAX_BYTES)
        except NotFoundError:
            break
        try:
            signature = place.read(f"{name}.sig", sshsig.MAX_BYTES)
            key = sshsig.signer_of(signature, signed)
            if key.id != key_id:
                raise ValueError(f"it is by another key than its name says, {key.fingerprint}")
            found.append(Signature(name, key, statements.decoded(signed), signed, signature))
        except NotFoundError:  # whoever signed was stopped between the two files
            continue
        except (ValueError, CorruptError) as e:
            problems.append(f"{place.locate(f'{name}.sig')} is not valid: {e}")
    return found, problems


def all_signatures(place: Place) -> tuple[list[Signature], list[str]]:
    """The same for the keys of all signatures; none where a place cannot list its files."""
    listed = (match[1] for match in map(_FILE.fullmatch, place.names(FOLDER)) if match)
    found, problems = list[Signature](), list[str]()
    for key_id in sorted(set(listed)):
        more, bad = signatures_by(place, key_id)
        found += more
        problems += bad
    return found, problems


def digests(cache: Cache) -> dict[str, str]:
    """The sha256 of the identity and of each commit of a cache, by the files' names: what a statement says of it."""
    place, names = place_of(cache), [IDENTITY, *cache.commits()]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="kdcache-digest") as threads:
        each = threads.map(lambda file: files.sha256(place.read(file, MAX_JSON_BYTES)), names)
        return dict(zip(names, each, strict=True))


def sign(place: Place, put: Put, key: SigningKey, covered: Mapping[str, str]) -> Statement:
    """File a signature of these digests beside the cache at a place, unless the key's newest one says the same."""
    before = sorted(signatures_by(place, key.public.id)[0], key=_time)
    if before and before[-1].statement.files == covered:
        return before[-1].statement
    # The newest statement counts, whatever the clock of the machine that made the one before.
    now = max(int(time.time()), before[-1].statement.time + 1 if before else 0)
    statement = Statement(now, covered)
    signed = statement.encoded()
    if len(signed) > statements.MAX_BYTES:
        raise InputError(f"{place.where} has {len(covered)} commits, more than one signature covers")
    _file(place, put, key.public.id, signed, sshsig.sign(key, signed))
    return statement


def copy_signatures(source: Sequence[Signature], target: Place, put: Put) -> int:
    """File the signatures beside another copy of the cache, those that are not there. Returns how many were not."""
    new, there = 0, dict[str, set[bytes]]()
    for one in source:
        if one.key.id not in there:
            there[one.key.id] = {other.signed for other in signatures_by(target, one.key.id)[0]}
        if one.signed not in there[one.key.id]:
            _file(target, put, one.key.id, one.signed, one.signature)
            new += 1
    return new


def into_folder(folder: Path) -> Put:
    """Creates files in the folder of a cache."""

    def put(name: str, content: bytes) -> bool:
        try:
            files.publish(folder / name, content, folder / "scratch")
        except CorruptError:
            return False
        return True

    return put


def _file(place: Place, put: Put, key_id: str, signed: bytes, signature: bytes) -> None:
    """Put the files under the first number that is free."""
    for number in range(1, _MOST + 1):
        name = f"{FOLDER}/{key_id}-{number:04d}"
        if put(f"{name}.sha256", signed) and put(f"{name}.sig", signature):
            return
    raise InputError(f"{place.where} has {_MOST} signatures by one key already: remove its folder {FOLDER}")


def _time(one: Signature) -> int:
    return one.statement.time
