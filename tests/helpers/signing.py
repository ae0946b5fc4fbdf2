"""Keys and files of trusted signers, for tests of signatures."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kdcache.cache.signing.keys import SigningKey, load_key


def no_passphrase(question: str) -> str:
    raise AssertionError(f"asked: {question}")


def write_key(path: Path, passphrase: str | None = None) -> Path:
    """A new key in a file of OpenSSH's, and its public key beside it; nobody else may read it."""
    key = Ed25519PrivateKey.generate()
    quick = PrivateFormat.OpenSSH.encryption_builder().kdf_rounds(1)  # the usual ones take half a second
    secret = quick.build(passphrase.encode()) if passphrase else NoEncryption()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, secret)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    path.write_bytes(content)
    path.with_name(f"{path.name}.pub").write_text(f"{SigningKey(key).public.line} {path.name}@lab\n")
    return path


def key_of(path: Path) -> SigningKey:
    """The key in a file; a new one, if there is no such file."""
    return load_key(str(path if path.exists() else write_key(path)), no_passphrase)


def trust_in(file: Path, *keys: Path, options: str = "") -> str:
    """A file that trusts these keys, each by the name of its file."""
    lines = (f"{key.name}@lab {options} {key_of(key).public.line}\n" for key in keys)
    file.write_text("# who may sign\n\n" + "".join(lines))
    return str(file)
