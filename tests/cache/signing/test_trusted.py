"""What a reader who trusts certain signers can read, and attacks on signatures that have to be refused."""

import base64
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.cache import errors as e
from kdcache.cache.packing import pack_hdf5, unpack_hdf5
from kdcache.cache.signing import sshsig
from kdcache.cache.signing.keys import packed
from kdcache.cache.signing.signatures import all_signatures, digests, into_folder, sign
from kdcache.cache.signing.signers import read_signers
from kdcache.cache.signing.statements import Statement
from kdcache.cache.signing.trusted import require_signed, trusted
from kdcache.cache.store.cache import Cache, place_of
from kdcache.tests.helpers.caches import Filled, same
from kdcache.tests.helpers.registries import about
from kdcache.tests.helpers.signing import key_of, trust_in


class Lab:
    """A folder with a cache of two views, keys by name, and what the files of trusted signers make of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.filled = Filled(root / "c", about(), views=2)
        self.path = self.filled.cache.path

    def key(self, name: str) -> Path:
        return self.root / "keys" / name

    def signed(self, name: str, path: Path | None = None) -> Path:
        """Have a key sign the cache at a path; the signature's file, without suffix."""
        cache, key = Cache(path or self.path), key_of(self.key(name))
        sign(place_of(cache), into_folder(cache.path), key, digests(cache))
        return sorted((cache.path / "signatures").glob(f"{key.public.id}-*.sig"))[-1].with_suffix("")

    def opened(self, *names: str, path: Path | None = None, options: str = "") -> Cache:
        trust = trust_in(self.root / "signers", *map(self.key, names), options=options)
        return trusted(Cache(path or self.path), read_signers(trust))

    def refused(self, *names: str, match: str, path: Path | None = None, options: str = "") -> None:
        with pytest.raises(e.UntrustedError, match=match):
            self.opened(*names, path=path, options=options)

    def add_view(self) -> None:
        view = len(self.filled.cache.views)
        self.filled.logits["train", view] = self.filled.draw(self.filled.cache.train)
        for part in range(self.filled.cache.train.parts):
            self.filled.write(self.filled.cache.train, view, part)


@pytest.fixture
def lab(tmp_path: Path, no_fsync: None) -> Lab:
    return Lab(tmp_path)


def whole(cache: Cache) -> None:
    """Read all that there is."""
    require_signed(cache, cache.views)
    cache.read_evaluation()
    for view in cache.views:
        cache.read(view)


def test_what_is_signed_reads_as_without_signatures(lab: Lab) -> None:
    lab.signed("alice")
    cache, plain = lab.opened("alice"), Cache(lab.path)
    assert cache.key == plain.key and cache.views == plain.views and cache.complete and cache.size() == plain.size()
    assert cache.path == plain.path and cache.writable and not cache.packed and cache.where == plain.where
    for view in cache.views:
        assert same(cache.read(view), plain.read(view))
    assert same(cache.fresh().read_evaluation(), plain.read_evaluation())
    assert re.fullmatch(r"alice@lab \(20\d\d-\d\d-\d\d\)", str(require_signed(cache, cache.views)))
    assert require_signed(plain, plain.views) is None


def test_a_cache_that_is_not_signed_or_by_others(lab: Lab) -> None:
    lab.refused("alice", "bob", match=r"c is not signed, and only caches signed by alice@lab or bob@lab \(/.*signers\)")
    lab.signed("mallory")
    foreign = f"is signed by {re.escape(key_of(lab.key('mallory')).public.fingerprint)}, whom /.*signers does not name"
    lab.refused("alice", match=foreign)
    lab.signed("alice")
    whole(lab.opened("alice"))
    shutil.rmtree(lab.path / "signatures")  # stripped
    lab.refused("alice", match="is not signed")


def test_an_old_signature_does_not_cover_what_was_added(lab: Lab) -> None:
    lab.signed("alice")
    lab.add_view()
    cache = lab.opened("alice")
    require_signed(cache, (0, 1))
    assert cache.read(1) and cache.read_evaluation()
    more = (
        r"c has 2 commits, such as commits/v00002-p0000.json, that the signature of alice@lab \(.*\) does not cover "
        r"\(views from 2 on are not: take those before by --views\): what was added since has to be signed again"
    )
    with pytest.raises(e.UntrustedError, match=more):
        require_signed(cache, (0, 1, 2))
    with pytest.raises(e.UntrustedError, match=r"has 1 commit, commits/v00002-p000[01].json, that the signature"):
        cache.read(2)
    lab.signed("alice")
    whole(lab.opened("alice"))
    # Somebody else may vouch for what was added.
    for file in (lab.path / "signatures").glob("*-0002.*"):
        file.unlink()
    lab.signed("bob")
    whole(lab.opened("alice", "bob"))
    whole(lab.opened("bob"))


def test_a_commit_that_is_replaced_is_refused_whenever_it_is_read(lab: Lab) -> None:
    """Also one that was there in an earlier state, which the same key had signed, and one replaced after the check."""
    lab.signed("alice")
    file = lab.path / "commits" / "v00001-p0001.json"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"host":"test"', b'"host":"else"'))
    changed = r"v00001-p0001.json is not the file that alice@lab \(.*\) signed: it was changed or replaced since"
    with pytest.raises(e.UntrustedError, match=changed):
        whole(lab.opened("alice"))
    lab.signed("alice")
    cache = lab.opened("alice")
    whole(cache)
    file.write_bytes(before)
    with pytest.raises(e.UntrustedError, match=changed):
        cache.read(1)
    with pytest.raises(e.UntrustedError, match=changed):
        whole(lab.opened("alice"))
    lab.signed("bob")
    whole(lab.opened("alice", "bob"))


def test_a_signature_of_another_cache_is_none_of_this_one(lab: Lab) -> None:
    other = Filled(lab.root / "other", about(k=3), views=2).cache
    file = lab.signed("alice", other.path)
    shutil.copytree(other.path / "signatures", lab.path / "signatures")
    lab.refused("alice", match=f"{file.name}.sig is about another cache, {other.key[:12]}")
    # Its commits are no better.
    lab.signed("alice")
    shutil.copy(other.path / "commits" / "prior.json", lab.path / "commits" / "prior.json")
    with pytest.raises(e.UntrustedError, match=r"prior.json is not the file that alice@lab"):
        whole(lab.opened("alice"))


def _by_mallory(lab: Lab, file: Path) -> None:
    """A signature by another key under the name of a trusted one."""
    file.with_suffix(".sig").write_bytes(
        sshsig.sign(key_of(lab.key("mallory")), file.with_suffix(".sha256").read_bytes())
    )


def _claims(lab: Lab, file: Path) -> None:
    """The trusted public key in a signature that another key has made."""
    signed, blob = file.with_suffix(".sha256").read_bytes(), key_of(lab.key("mallory")).public.blob
    forged = sshsig.sign(key_of(lab.key("mallory")), signed)
    content = base64.b64decode(b"".join(forged.split(b"\n")[1:-2]))
    content = content.replace(packed(blob), packed(key_of(lab.key("alice")).public.blob))
    lines = [forged.split(b"\n")[0], base64.b64encode(content), b"-----END SSH SIGNATURE-----", b""]
    file.with_suffix(".sig").write_bytes(b"\n".join(lines))


def _says_more(lab: Lab, file: Path) -> None:
    """A statement that lists another digest under the signature of the one before."""
    statement = file.with_suffix(".sha256")
    statement.write_bytes(statement.read_bytes().replace(b"  commits/prior", b"  commits/later"))


def _for_files(lab: Lab, file: Path) -> None:
    """What the key has signed for another purpose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sshsig, "NAMESPACE", "file")
        made = sshsig.sign(key_of(lab.key("alice")), file.with_suffix(".sha256").read_bytes())
    file.with_suffix(".sig").write_bytes(made)


def _cut(lab: Lab, file: Path) -> None:
    file.with_suffix(".sig").write_bytes(file.with_suffix(".sig").read_bytes()[:-40])


def _huge(lab: Lab, file: Path) -> None:
    file.with_suffix(".sig").write_bytes(b"A" * (1 << 15))


def _linked(lab: Lab, file: Path) -> None:
    sig = file.with_suffix(".sig")
    sig.rename(lab.root / "elsewhere.sig")
    sig.symlink_to(lab.root / "elsewhere.sig")


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (_by_mallory, "it is by another key than its name says, SHA256:"),
        (_claims, "it is not a signature of what stands beside it"),
        (_says_more, "it is not a signature of what stands beside it"),
        (_for_files, "it was made for the namespace 'file', not for 'kdcache'"),
        (_cut, "it is no whole SSH signature"),
        (_huge, "longer than the 16384 bytes allowed"),
        (_linked, "it is a symbolic link, which is not followed"),
    ],
)
def test_forged_signatures_are_refused_and_do_not_hide_good_ones(
    lab: Lab, attack: Callable[[Lab, Path], None], reason: str
) -> None:
    file = lab.signed("alice")
    attack(lab, file)
    words = rf"has no signature of alice@lab \(.*\) that counts: .*{file.name}.sig is not valid: .*{re.escape(reason)}"
    lab.refused("alice", match=words)
    lab.signed("alice")
    whole(lab.opened("alice"))


def test_keys_that_are_trusted_for_a_time(lab: Lab) -> None:
    """A key that is followed by another one: what it signed before stays good, and nothing later does."""
    lab.signed("old")
    whole(lab.opened("old", options='valid-before="29991231"'))
    words = r"has no signature of old@lab .* that counts: .*\.sig is of 20.*signers does not trust its key then"
    lab.refused("old", match=words, options='valid-before="20200101"')
    lab.refused("old", match=words, options='valid-after="29991231"')
    lab.signed("new")
    whole(lab.opened("new"))


def test_packed_and_unpacked_caches_keep_their_signatures(lab: Lab) -> None:
    lab.signed("alice")
    lab.signed("bob")
    file = lab.root / "c.h5"
    assert pack_hdf5(Cache(lab.path), file, (0, 1)) and not pack_hdf5(Cache(lab.path), file, (0, 1))
    whole(lab.opened("bob", path=file))
    lab.refused("carol", match="is signed by SHA256:.*, SHA256:", path=file)
    unpack_hdf5(Cache(file), lab.root / "out")
    whole(lab.opened("alice", path=lab.root / "out"))
    assert all_signatures(place_of(Cache(lab.root / "out"))) == all_signatures(place_of(Cache(lab.path)))
    lab.signed("carol")
    with pytest.raises(e.InputError, match="exists and holds something else"):
        pack_hdf5(Cache(lab.path), file, (0, 1))


def test_the_newest_statement_counts_even_of_a_clock_that_was_ahead(lab: Lab) -> None:
    key, cache = key_of(lab.key("alice")), Cache(lab.path)
    ahead = Statement(1 << 33, {**digests(cache), "commits/prior.json": "0" * 64}).encoded()
    put = into_folder(lab.path)
    assert put(f"signatures/{key.public.id}-0001.sha256", ahead)
    assert put(f"signatures/{key.public.id}-0001.sig", sshsig.sign(key, ahead))
    with pytest.raises(e.UntrustedError, match=r"prior.json is not the file"):
        whole(lab.opened("alice"))
    lab.signed("alice")
    whole(lab.opened("alice"))
