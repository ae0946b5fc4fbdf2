"""Keys, signatures and files of signers, beside OpenSSH's own programs."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError
from kdcache.cache.signing import sshsig, statements
from kdcache.cache.signing.keys import PublicKey, load_key
from kdcache.cache.signing.signatures import copy_signatures, digests, into_folder, sign, signatures_by
from kdcache.cache.signing.signers import read_signers
from kdcache.cache.signing.statements import Statement, decoded
from kdcache.cache.store.cache import Cache, place_of
from kdcache.tests.helpers.caches import Filled
from kdcache.tests.helpers.registries import about
from kdcache.tests.helpers.signing import key_of, no_passphrase, trust_in, write_key

with_openssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs OpenSSH's ssh-keygen")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, no_fsync: None) -> Cache:
    return Filled(tmp_path_factory.mktemp("toy") / "c", about(), views=2).cache


def ssh_keygen(*args: object, **how: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ssh-keygen", *map(str, args)], capture_output=True, check=False, **how)  # type: ignore[call-overload,no-any-return]


# Keys


@with_openssh
def test_a_key_of_ssh_keygens_signs_what_ssh_keygen_accepts(toy: Cache, tmp_path: Path) -> None:
    """And sha256sum finds the identity and the commits as they are signed."""
    file, signers = tmp_path / "alice", tmp_path / "signers"
    assert ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", "alice@lab", "-f", file).returncode == 0
    folder = tmp_path / "c"
    shutil.copytree(toy.path, folder)
    key = load_key(str(file), no_passphrase)
    sign(place_of(Cache(folder)), into_folder(folder), key, digests(Cache(folder)))
    name = f"signatures/{key.public.id}-0001"
    signers.write_text(f"alice@lab {(tmp_path / 'alice.pub').read_text()}")
    check = ("-Y", "verify", "-f", signers, "-I", "alice@lab", "-n", "kdcache", "-s", folder / f"{name}.sig")
    signed = (folder / f"{name}.sha256").read_bytes()
    assert ssh_keygen(*check, input=signed).returncode == 0
    assert ssh_keygen(*check, input=signed + b"\n").returncode != 0
    assert key.public.fingerprint.encode() in ssh_keygen("-l", "-f", tmp_path / "alice.pub").stdout
    assert PublicKey.decode_text((tmp_path / "alice.pub").read_text().split()[1]) == key.public
    done = subprocess.run(["sha256sum", "-c", "--strict", f"{name}.sha256"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 1 + len(toy.commits()), done


@with_openssh
@pytest.mark.parametrize(("namespace", "valid"), [("kdcache", True), ("file", False), ("git", False)])
def test_what_ssh_keygen_has_signed_is_read(toy: Cache, tmp_path: Path, namespace: str, valid: bool) -> None:
    file, message = tmp_path / "alice", tmp_path / "message"
    key = key_of(file)
    message.write_bytes(Statement(0, digests(toy)).encoded())
    assert ssh_keygen("-Y", "sign", "-f", file, "-n", namespace, message).returncode == 0
    signature = (tmp_path / "message.sig").read_bytes()
    if valid:
        assert sshsig.signer_of(signature, message.read_bytes()) == key.public
        assert sshsig.sign(key, message.read_bytes()) == signature
    else:
        with pytest.raises(ValueError, match=f"namespace '{namespace}', not for 'kdcache'"):
            sshsig.signer_of(signature, message.read_bytes())


def test_a_key_with_a_passphrase(tmp_path: Path) -> None:
    file = write_key(tmp_path / "alice", "secret words")
    asked: list[str] = []
    key = load_key(str(file), lambda question: asked.append(question) or "secret words")  # type: ignore[func-returns-value]
    assert asked == [f"Passphrase of {file}"]
    assert key.public.line in (tmp_path / "alice.pub").read_text()
    with pytest.raises(InputError, match=r"alice cannot be opened: the passphrase is wrong, or the file is damaged$"):
        load_key(str(file), lambda question: "other words")


def test_files_that_are_no_signing_keys(tmp_path: Path) -> None:
    write_key(tmp_path / "alice")
    content = (tmp_path / "alice").read_bytes()
    (tmp_path / "open").write_bytes(content)
    (tmp_path / "open").chmod(0o644)
    for name, bad in (("cut", content[:200]), ("noise", b"\0\xff" * 40), ("empty", b""), ("pem", b"-----BEGIN X-----")):
        (tmp_path / name).write_bytes(bad)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "damaged").write_bytes(content.replace(content[100:104], b"AAAA"))
    (tmp_path / "damaged").chmod(0o600)
    make = "make one with ssh-keygen -t ed25519"
    for name, words in {
        "alice.pub": "is a public key: give the private one",
        "open": f"can be read by others, who could sign with it: run chmod 600 {tmp_path}/open",
        "cut": f"is no Ed25519 key, or is damaged: {make}",
        "damaged": f"is no Ed25519 key, or is damaged: {make}",
        "noise": f"is no private key of OpenSSH's: {make}",
        "empty": f"is no private key of OpenSSH's: {make}",
        "pem": f"is no private key of OpenSSH's: {make}",
    }.items():
        with pytest.raises(InputError) as e:
            load_key(str(tmp_path / name), no_passphrase)
        assert str(e.value) == f"{tmp_path / name} {words}"
    with pytest.raises(CorruptError, match="not a plain file"):
        load_key(str(tmp_path), no_passphrase)


@with_openssh
def test_a_key_of_another_kind(tmp_path: Path) -> None:
    assert ssh_keygen("-q", "-t", "ecdsa", "-N", "", "-f", tmp_path / "other").returncode == 0
    with pytest.raises(InputError, match=r"other is no Ed25519 key: make one with ssh-keygen -t ed25519$"):
        load_key(str(tmp_path / "other"), no_passphrase)
    (tmp_path / "signers").write_text(f"bob {(tmp_path / 'other.pub').read_text()}")
    with pytest.raises(InputError, match="has no Ed25519 key for kdcache"):
        read_signers(str(tmp_path / "signers"))


# Signatures


def test_any_changed_byte_makes_a_signature_invalid(toy: Cache, tmp_path: Path) -> None:
    """Of the decoded content: base64 has bits that stand for nothing, and blanks."""
    key, message = key_of(tmp_path / "alice"), Statement(7, digests(toy)).encoded()
    good = sshsig.sign(key, message)
    assert sshsig.signer_of(good, message) == key.public
    lines = good.split(b"\n")
    for cut in range(0, len(good) - 2, 7):
        with pytest.raises(ValueError):
            sshsig.signer_of(good[:cut], message)
    for place in range(len(lines[1])):
        changed = bytearray(lines[1])
        changed[place] = ord("A") if changed[place] != ord("A") else ord("Q")
        with pytest.raises(ValueError):
            sshsig.signer_of(b"\n".join([lines[0], bytes(changed), *lines[2:]]), message)
    for place in range(0, len(message), 37):
        with pytest.raises(ValueError, match="is not a signature of what stands beside it"):
            sshsig.signer_of(good, message[:place] + bytes([message[place] ^ 1]) + message[place + 1 :])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.replace(b"statement 1", b"statement 2"), "update kdcache: a later version has made it"),
        (lambda s: s.replace(b"# kdcache", b"# kdcash"), "it signs no statement of kdcache"),
        (lambda s: b"", "is no statement"),
        (lambda s: b"\xff\n\n\n", "is no statement"),
        (lambda s: s.replace(b"# 1970", b"# then"), "has no time"),
        (lambda s: s[:-1], "is not whole"),
        (lambda s: s[: s.index(b"identity.json") - 66], "is not whole"),
        (lambda s: s + s.splitlines()[-1] + b"\n", "a line of an unknown kind"),
        (lambda s: s.replace(b"commits/prior", b"../prior"), "a line of an unknown kind"),
        (lambda s: s.replace(b"  commits/prior", b" *commits/prior"), "a line of an unknown kind"),
    ],
)
def test_statements_that_are_none(toy: Cache, change: object, reason: str) -> None:
    good = Statement(12, digests(toy))
    assert decoded(good.encoded()) == good and good.key == toy.key and good.date == "1970-01-01"
    with pytest.raises(ValueError, match=reason):
        decoded(change(good.encoded()))  # type: ignore[operator]


def test_a_state_is_signed_once_and_a_newer_one_has_a_later_time(toy: Cache, tmp_path: Path) -> None:
    """Also by a machine whose clock is behind; copies keep their numbers apart and are made once."""
    folder, key, other = tmp_path / "c", key_of(tmp_path / "alice"), key_of(tmp_path / "bob")
    shutil.copytree(toy.path, folder)
    place, put, now = place_of(Cache(folder)), into_folder(folder), digests(toy)
    first = sign(place, put, key, now)
    assert abs(first.time - time.time()) < 60 and sign(place, put, key, now) == first
    sign(place, put, other, now)
    fewer = {file: digest for file, digest in now.items() if "v00001" not in file}
    second = sign(place, put, key, fewer)
    assert second.time > first.time
    names = [f"{k.public.id}-000{n}.{kind}" for k, n in ((key, 1), (key, 2), (other, 1)) for kind in ("sha256", "sig")]
    assert files.names(folder / "signatures") == sorted(names)
    # A signer who was stopped between the two files is passed over.
    (folder / "signatures" / f"{key.public.id}-0001.sig").unlink()
    assert [one.statement for one in signatures_by(place, key.public.id)[0]] == [second]
    copy = tmp_path / "copy"
    shutil.copytree(toy.path, copy)
    sign(place_of(Cache(copy)), into_folder(copy), key, {**now, "commits/prior.json": "0" * 64})
    found = signatures_by(place, key.public.id)[0]
    assert copy_signatures(found, place_of(Cache(copy)), into_folder(copy)) == 1
    assert copy_signatures(found, place_of(Cache(copy)), into_folder(copy)) == 0
    assert len(signatures_by(place_of(Cache(copy)), key.public.id)[0]) == 2


# Signers


def test_lines_of_a_file_of_signers(tmp_path: Path) -> None:
    line = key_of(tmp_path / "alice").public.line
    other = key_of(tmp_path / "bob").public.line
    file = tmp_path / "signers"
    file.write_text(
        f"# comment\n\n  alice@lab {line} a comment\n"
        f'"Bob B",bob@lab namespaces="git,kdcache",valid-after="20260101Z",valid-before="20260201120000Z" {other}\n'
        f"ca@lab cert-authority {other}\n"
        f'git@lab namespaces="git" {other}\n'
        f'not@lab namespaces="*,!kdcache" {other}\n'
        f"rsa@lab ssh-rsa AAAAB3NzaC1yc2E=\n"
        f"{other} bare\n"
    )
    found = read_signers(str(file))
    assert [one.who for one in found.lines] == ["alice@lab", "Bob B,bob@lab", "bare"]
    alice, bob, _ = found.lines
    assert alice.admits(0) and alice.admits(1 << 40)
    assert (bob.after, bob.before) == (1767225600, 1769947200)
    assert bob.admits(1767225600) and bob.admits(1769947200)
    assert not bob.admits(1767225599) and not bob.admits(1769947201)
    assert found.keys == (alice.key, bob.key) and found.name(alice.key, 5) == "alice@lab"
    assert found.name(bob.key, 5) == "bare"
    file.write_text(f"alice@lab valid-after=20260101 {line}\n")
    with pytest.raises(InputError, match="line 1: its options cannot be read"):
        read_signers(str(file))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("alice@lab", "there is no key"),
        ("alice@lab ssh-ed25519", "there is no key"),
        ("alice@lab ssh-ed25519 AAAA", "ends too early"),
        ("alice@lab ssh-ed25519 &&&&", "is no base64"),
        ("alice@lab touch-required KEY", "there is no option touch-required"),
        ('alice@lab valid-after="tomorrow" KEY', "'tomorrow' is no time such as 20261128"),
        ('alice@lab valid-after="20261340" KEY', "'20261340' is no time such as 20261128"),
        ('alice@lab valid-after="20260101",valid-after="20260102" KEY', "options cannot be read"),
        ("alice@lab namespaces KEY", "namespaces has no value"),
        ('alice@lab cert-authority="yes" KEY', "cert-authority has a value"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path: Path, line: str, reason: str) -> None:
    text = line.replace("KEY", key_of(tmp_path / "alice").public.line)
    (tmp_path / "signers").write_text(f"# first\n{text}\n")
    with pytest.raises(InputError, match=f"signers, line 2: .*{re.escape(reason)}.*; a line is 'NAME ssh-ed25519 AAAA"):
        read_signers(str(tmp_path / "signers"))


def test_files_that_trust_nobody(tmp_path: Path) -> None:
    for content in (b"", b"# nobody\n", b"a ssh-rsa AAAA\n"):
        (tmp_path / "signers").write_bytes(content)
        with pytest.raises(InputError, match="has no Ed25519 key for kdcache, so that nobody would be trusted"):
            read_signers(str(tmp_path / "signers"))
    with pytest.raises(InputError, match="--trust names no file"):
        read_signers("")
    (tmp_path / "signers").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no file of keys"):
        read_signers(str(tmp_path / "signers"))
    assert read_signers(trust_in(tmp_path / "signers", tmp_path / "alice")).names == "alice@lab"
    three = trust_in(tmp_path / "signers", tmp_path / "alice", tmp_path / "bob", tmp_path / "carol")
    assert read_signers(three).names == "alice@lab, bob@lab or carol@lab"


def test_a_statement_lists_what_readers_go_by(toy: Cache) -> None:
    assert statements.is_covered("identity.json") and not statements.is_covered("views/v00000/zarr.json")
    assert set(digests(toy)) == {"identity.json", *toy.commits()}
