"""Parsers of signatures: private keys, files of trusted signers, and what is signed, beside its signature."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from damages import BYTES, LINES

from kdcache.cache.signing import sshsig
from kdcache.cache.signing.keys import SigningKey, load_key, packed
from kdcache.cache.signing.signatures import digests
from kdcache.cache.signing.signers import read_signers
from kdcache.cache.signing.statements import Statement
from kdcache.cache.signing.trusted import TrustedPlace, trusted
from kdcache.cache.store.cache import place_of
from parsers.caches import copied_cache
from parsers.parser import Parser, Prepared, always, contents, in_place

_OPTIONS = (
    "", 'namespaces="kdcache" ', 'namespaces="git,!file,kd*",valid-after="20200101",valid-before="203012312359Z" ',
)  # fmt: skip


def _key(seed: int) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


def _file_of(seed: int) -> bytes:
    """A key as OpenSSH's PROTOCOL.key writes it. The library would write other bytes each time."""
    public = _key(seed).public
    inner = b"\0\0\0\7" * 2 + public.blob + packed(bytes([seed]) * 32 + public.raw, b"me")
    inner += bytes(range(1, 1 + -len(inner) % 8))
    whole = b"openssh-key-v1\0" + packed(b"none", b"none", b"") + b"\0\0\0\1" + packed(public.blob, inner)
    text = base64.encodebytes(whole)
    return b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + text + b"-----END OPENSSH PRIVATE KEY-----\n"


def _trust(*seeds: int) -> bytes:
    lines = [f"{seed}@lab {options}{_key(seed).public.line} a key" for seed in seeds for options in _OPTIONS]
    return "\n".join(["# who may sign", *lines, ""]).encode()


def _private_keys(top: Path) -> Prepared:
    file = top / "key"
    file.touch(0o600)

    def read(name: str, content: bytes) -> Any:
        file.write_bytes(content)
        return load_key(str(file), lambda question: "wrong").public.line

    return Prepared({str(seed): _file_of(seed) for seed in (1, 2)}, read, (*BYTES, *LINES))


def _signers(top: Path) -> Prepared:
    file = top / "signers"

    def read(name: str, content: bytes) -> Any:
        file.write_bytes(content)
        return read_signers(str(file)).lines

    return Prepared({"one": _trust(1), "three": _trust(1, 2, 3)}, read, (*LINES, *BYTES))


def _signatures(top: Path) -> Prepared:
    """What is signed, and its signature: nobody may be taken to have signed anything else."""
    cache = copied_cache(top / "c")
    (cache.path / "signatures").mkdir()
    (top / "trust").write_bytes(_trust(1))
    signed = Statement(1_700_000_000, digests(cache)).encoded()
    files = {}
    for suffix, content in (("sha256", signed), ("sig", sshsig.sign(_key(1), signed))):
        files[suffix] = cache.path / f"signatures/{_key(1).public.id}-0001.{suffix}"
        files[suffix].write_bytes(content)

    def read() -> Any:
        place = place_of(trusted(cache, read_signers(str(top / "trust"))))
        assert isinstance(place, TrustedPlace)
        return sorted((file, *each) for file, each in place.covered.items())

    return Prepared(contents(files), in_place(files, read), (*BYTES, *LINES), always)


PARSERS = (
    Parser("private keys", 20, _private_keys),
    Parser("trusted signers", 30, _signers),
    Parser("signatures", 30, _signatures),
)
