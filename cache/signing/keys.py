"""Ed25519 keys as OpenSSH writes them: private ones sign, and public ones check what was signed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cache import files
from kdcache.cache.errors import InputError

if TYPE_CHECKING:  # few commands sign or check anything, and the library takes a while to import
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KIND = b"ssh-ed25519"
_MOST_BYTES = 1 << 16
_ID_DIGITS = 16
_BEGIN = b"-----BEGIN OPENSSH PRIVATE KEY-----"
_MAKE = "make one with ssh-keygen -t ed25519"
_NONE = f"is no Ed25519 key, or is damaged: {_MAKE}"


def packed(*parts: bytes) -> bytes:
    """The parts as SSH's strings (RFC 4251): the length of each stands before it, in four bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def unpacked(data: bytes, count: int) -> list[bytes]:
    """The `count` strings that make up `data`; ValueError if it is anything else."""
    found = []
    for _ in range(count):
        early = len(data) < 4
        size, data = int.from_bytes(data[:4], "big"), data[4:]
        if len(data) < size or early:
            raise ValueError("it ends too early")
        found.append(data[:size])
        data = data[size:]
    if data:
        raise ValueError("something follows its end")
    return found


@dataclass(frozen=True)
class PublicKey:
    """A public key. raw: its 32 bytes."""

    raw: bytes

    @classmethod
    def decode(cls, blob: bytes) -> PublicKey:
        """The key that OpenSSH encodes as `blob` (RFC 8709); ValueError for any other kind of key."""
        kind, raw = unpacked(blob, 2)
        if kind != KIND or len(raw) != 32:
            raise ValueError("it is no Ed25519 key")
        return cls(raw)

    @classmethod
    def decode_text(cls, text: str) -> PublicKey:
        """The key in the base64 of a line in a .pub file; ValueError for any other kind of key."""
        try:
            return cls.decode(base64.b64decode(text, validate=True))
        except binascii.Error as e:
            raise ValueError("it is no base64") from e

    @property
    def blob(self) -> bytes:
        """The key as OpenSSH encodes it."""
        return packed(KIND, self.raw)

    @property
    def line(self) -> str:
        """The key as it stands in a .pub file."""
        return f"{KIND.decode()} {base64.b64encode(self.blob).decode()}"

    @property
    def fingerprint(self) -> str:
        """What ssh-keygen -l shows of the key: the sha256 of its encoding."""
        digest = base64.b64encode(hashlib.sha256(self.blob).digest())
        return f"SHA256:{digest.decode().rstrip('=')}"

    @property
    def id(self) -> str:
        """The first digits of the same sha256, with which the names of its signatures begin."""
        return hashlib.sha256(self.blob).hexdigest()[:_ID_DIGITS]

    def has_signed(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's, of just these bytes."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except (InvalidSignature, ValueError):  # ValueError: the bytes are no point of the curve
            return False
        return True


class SigningKey:
    """A private key. public: the public key that belongs to it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """The signature of these bytes: 64 bytes, always the same for the same data."""
        return self._key.sign(data)


def load_key(file: str, ask: Callable[[str], str]) -> SigningKey:
    """The private key in a file of OpenSSH's. ask: gets the passphrase for a question, if the key has one.

    InputError if it is no such key, if others may read it, or if the passphrase is wrong.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    content = files.read_plain(Path(file), _MOST_BYTES)
    if not content.lstrip().startswith(_BEGIN):
        public = content.split(b" ")[0] in (KIND, b"ssh-rsa")
        what = "is a public key: give the private one" if public else f"is no private key of OpenSSH's: {_MAKE}"
        raise InputError(f"{file} {what}")
    _require_private(file)
    try:
        try:
            key = load_ssh_private_key(content, None)
        except (ValueError, TypeError):
            if not _has_passphrase(content):
                raise
            key = load_ssh_private_key(content, ask(f"Passphrase of {file}").encode())
    except UnsupportedAlgorithm as e:
        lacks = "bcrypt" in str(e)
        reason = "has a passphrase, and the package bcrypt, which it needs, is not installed: pip install bcrypt"
        raise InputError(f"{file} {reason if lacks else _NONE}") from e
    except (ValueError, TypeError) as e:
        wrong = "cannot be opened: the passphrase is wrong, or the file is damaged"
        raise InputError(f"{file} {wrong if _has_passphrase(content) else _NONE}") from e
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{file} is no Ed25519 key: {_MAKE}")
    return SigningKey(key)


def _has_passphrase(content: bytes) -> bool:
    """Whether the private key of OpenSSH's is encrypted: its header names a cipher (PROTOCOL.key of OpenSSH)."""
    try:
        inner = base64.b64decode(content.split(b"-----")[2])
    except (binascii.Error, IndexError):
        return False
    magic = b"openssh-key-v1\0"
    return inner.startswith(magic) and not inner.startswith(magic + packed(b"none"))


def _require_private(file: str) -> None:
    """InputError, as ssh's own programs have it, if anybody but its owner may read the key."""
    about = Path(file).stat()
    if about.st_uid == os.getuid() and stat.S_IMODE(about.st_mode) & 0o077:
        raise InputError(f"{file} can be read by others, who could sign with it: run chmod 600 {shlex.quote(file)}")
