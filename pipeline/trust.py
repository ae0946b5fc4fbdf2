"""What is believed of what others have written: of the names in their files, and of caches that they have signed.

A `module:function` in a cache, a run folder or a weights file is never imported: only a function that the user names is
called. Whose signatures count is said by a file of keys that the user names too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from kdcache.cache.errors import InputError
from kdcache.cache.home import open_cache, registry_beside
from kdcache.cache.registry.registry import Registry
from kdcache.cache.signing.keys import SigningKey
from kdcache.cache.signing.signatures import Put, all_signatures, copy_signatures, digests, into_folder, sign
from kdcache.cache.signing.signers import read_signers
from kdcache.cache.signing.statements import Statement
from kdcache.cache.signing.trusted import TrustedPlace, require_signed, trusted
from kdcache.cache.store.cache import Cache, place_of
from kdcache.pipeline.data.dataset import KINDS, is_function
from kdcache.pipeline.process.functions import names_code

C = TypeVar("C")


def stored_network(name: str, where: object, flag: str) -> str:
    """Return the network's name, which was read from `where`. InputError names the flag to give for a function."""
    if names_code(name):
        raise _refused("network", name, where, flag)
    return name


def stored_data(spec: str, where: object, flag: str = "--data") -> str:
    """Return the dataset's spec, which was read from `where`. InputError names the flag to give for a function."""
    if is_function(spec):
        raise _refused("dataset", spec, where, flag)
    return spec


def images_of(name: str, given: str | None, where: object, otherwise: str = "") -> str:
    """The spec of the images that a cache was built from: `given`, or else the name in the cache at `where`.

    InputError where the name says nothing of the folder that holds the images, and for a function. Its text ends in
    `otherwise`, which tells how to do without the images.
    """
    if given:
        return given
    kind = KINDS.get(name)
    if kind and kind.takes_path == "must":
        raise InputError(f"where are the images? give --data {name}:PATH{otherwise}")
    return stored_data(name, where)


def _refused(kind: str, name: str, where: object, flag: str) -> InputError:
    return InputError(
        f"{where} names the {kind} {name!r}, a function in a module, and what a file names is never called: "
        f"if you know that function, give {flag} {name}"
    )


@dataclass(frozen=True)
class SignResult:
    """A cache that is signed: its key, where it is, by which key (as ssh-keygen -l shows it), and how many commits."""

    key: str
    where: str
    signer: str
    commits: int


def sign_cache(
    cache: str | Path, key: SigningKey, registry: str | None = None, say: Callable[[str], None] = print
) -> SignResult:
    """Sign a cache as it is now, here or in a registry. InputError for a packed one and for a web server."""
    found = open_cache(cache, registry)
    if found.packed:
        raise InputError(f"{found.where} is packed: sign the cache that it was packed from, then pack it again")
    if found.writable:
        put = into_folder(found.path)
    else:
        shared = registry_beside(found.where)
        assert shared is not None  # whatever is neither packed nor a folder of one's own lies in one
        put = _into_registry(shared.require_writable(), found.key)
    statement = sign(place_of(found), put, key, digests(found))
    say(_signed(found, key, statement))
    return SignResult(found.key, found.where, key.public.fingerprint, len(statement.files) - 1)


def sign_pushed(
    cache: Cache, shared: Registry, key: SigningKey, theirs: Mapping[str, str | None], say: Callable[[str], None]
) -> None:
    """Sign a cache that was pushed: as it is here, and as it is in the registry where that differs.

    theirs: of the commits that others had published before, the sha256 of each file; None for those that name other
    bytes, for which this signature does not speak.
    """
    place, own = place_of(cache), digests(cache)
    there, put = place_of(shared.open(cache.key)), _into_registry(shared, cache.key)
    if not theirs:
        if cache.writable and os.access(cache.path, os.W_OK):
            sign(place, into_folder(cache.path), key, own)
            publish_signatures(cache, shared)
        statement = sign(there, put, key, own)
    else:
        equal = {file: digest for file, digest in {**own, **theirs}.items() if digest is not None}
        statement = sign(there, put, key, equal)
    say(_signed(cache, key, statement))
    if others := sum(digest is None for digest in theirs.values()):
        say(
            f"note: {others} parts there are by others, with other bytes, and your signature does not cover them: run "
            f"kdcache verify {there.where}, then kdcache sign {there.where} --key KEYFILE"
        )


def publish_signatures(cache: Cache, shared: Registry) -> int:
    """Publish the signatures that lie beside a cache here; returns how many were new there."""
    found, _ = all_signatures(place_of(cache))
    if not found:
        return 0
    return copy_signatures(found, place_of(shared.open(cache.key)), _into_registry(shared, cache.key))


def fetch_signatures(theirs: Cache, folder: Path) -> int:
    """Copy the signatures of a cache that was copied into a folder, where its readers find them."""
    place = place_of(theirs)
    found = place.by if isinstance(place, TrustedPlace) else all_signatures(place)[0]
    return copy_signatures(found, place_of(Cache(folder)), into_folder(folder)) if found else 0


def trusting(cache: C, trust: str | None, views: Iterable[int] = ()) -> C:
    """The cache as those have signed it whom the file `trust` names; the cache itself where no file is given.

    views: those that will be read. UntrustedError where these, or all of it, are not signed; InputError for a file
    with images, which has no commits that could be signed.
    """
    if trust is None:
        return cache
    signers = read_signers(trust)
    if not isinstance(cache, Cache):
        where = getattr(cache, "where", cache)
        raise InputError(f"{where} cannot be signed, as --trust wants it: give the cache that it was packed from")
    found = trusted(cache, signers)
    require_signed(found, views)
    return cast("C", found)


def trusting_registry(shared: Registry, trust: str | None) -> Registry:
    """The registry, from which only caches are read that the keys in the file `trust` have signed, if one is given."""
    shared.signers = None if trust is None else read_signers(trust)
    return shared


def say_signed(cache: Cache, views: Iterable[int], say: Callable[[str], None]) -> None:
    """Say who has signed these views, where that counts; UntrustedError where nobody has who is trusted."""
    if signers := require_signed(cache, views):
        say(f"cache {cache.key[:12]} is signed by {signers}")


def _signed(cache: Cache, key: SigningKey, statement: Statement) -> str:
    commits = len(statement.files) - 1
    return f"{key.public.fingerprint} has signed cache {cache.key[:12]} with {commits} commits ({statement.date})"


def _into_registry(shared: Registry, key: str) -> Put:
    return lambda name, content: shared.objects.create(f"caches/{key}/{name}", content)
