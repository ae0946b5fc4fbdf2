"""Signatures in the format of OpenSSH's PROTOCOL.sshsig, which `ssh-keygen -Y` makes and checks too."""

from __future__ import annotations

import base64
import binascii
import hashlib

from kdcache.cache.signing.keys import KIND, PublicKey, SigningKey, packed, unpacked

# A signature holds for one purpose: one that the same key gave to a file or a git commit is none of a cache.
NAMESPACE = "kdcache"
MAX_BYTES = 1 << 14
_MAGIC = b"SSHSIG"
_VERSION = (1).to_bytes(4, "big")
_BEGIN, _END = b"-----BEGIN SSH SIGNATURE-----", b"-----END SSH SIGNATURE-----"
_HASHES = {b"sha512": hashlib.sha512, b"sha256": hashlib.sha256}
_COLUMNS = 70


def sign(key: SigningKey, message: bytes) -> bytes:
    """The key's signature of a message, as text that begins with -----BEGIN SSH SIGNATURE-----."""
    namespace, name = NAMESPACE.encode(), b"sha512"
    signature = packed(KIND, key.sign(_signed(namespace, name, message)))
    blob = _MAGIC + _VERSION + packed(key.public.blob, namespace, b"", name, signature)
    text = base64.b64encode(blob)
    lines = [text[i : i + _COLUMNS] for i in range(0, len(text), _COLUMNS)]
    return b"\n".join([_BEGIN, *lines, _END, b""])


def signer_of(signature: bytes, message: bytes) -> PublicKey:
    """The key that has signed the message; ValueError, with the reason, where the signature is not valid."""
    key, namespace, name, raw = _parts(signature)
    if namespace != NAMESPACE.encode():
        shown = namespace.decode("ascii", "backslashreplace")[:40]
        raise ValueError(f"it was made for the namespace {shown!r}, not for {NAMESPACE!r}")
    if name not in _HASHES:
        raise ValueError("it names a hash that SSH signatures do not have")
    if not key.has_signed(_signed(namespace, name, message), raw):
        raise ValueError("it is not a signature of what stands beside it: one of the two was changed")
    return key


def claimed_signer(signature: bytes) -> PublicKey:
    """The key that a signature says it is by, which proves nothing; ValueError where there is none."""
    return _parts(signature)[0]


def _parts(signature: bytes) -> tuple[PublicKey, bytes, bytes, bytes]:
    """The key, namespace, hash and bare signature in the text of one."""
    begin, _, rest = signature.strip().partition(b"\n")
    body, _, end = rest.rpartition(b"\n")
    if begin.strip() != _BEGIN or end.strip() != _END:
        raise ValueError("it is no whole SSH signature")
    try:
        blob = base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error as e:
        raise ValueError("it is no base64") from e
    head = len(_MAGIC) + len(_VERSION)
    if blob[:head] != _MAGIC + _VERSION:
        raise ValueError("it is no SSH signature of version 1")
    public, namespace, _, name, inner = unpacked(blob[head:], 5)
    kind, raw = unpacked(inner, 2)
    if kind != KIND:
        raise ValueError("it is by another kind of key than Ed25519")
    return PublicKey.decode(public), namespace, name, raw


def _signed(namespace: bytes, name: bytes, message: bytes) -> bytes:
    """The bytes that a key really signs for a message."""
    return _MAGIC + packed(namespace, b"", name, _HASHES[name](message).digest())
