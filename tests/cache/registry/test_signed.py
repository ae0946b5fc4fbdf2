"""Signed caches in a folder, in a bucket and on a web server: commands sign them, and refuse what is not signed."""

import json
import shutil
from pathlib import Path

import pytest

from kdcache.cache import Cache
from kdcache.cache.home import caches_folder, open_registry
from kdcache.cache.registry.backends import open_objects
from kdcache.cache.signing.signatures import signatures_by
from kdcache.cache.store.cache import place_of
from kdcache.pipeline.share import pull, push
from kdcache.tests.helpers.caches import Filled
from kdcache.tests.helpers.registries import about, content, quiet, refused, run, stored
from kdcache.tests.helpers.servers import web_server
from kdcache.tests.helpers.signing import key_of, trust_in, write_key

pytestmark = pytest.mark.usefixtures("impatient", "own_home")


@pytest.fixture
def toy(tmp_path: Path, one: Filled) -> Cache:
    """A cache with 2 views in a folder of one's own."""
    shutil.copytree(one.cache.path, tmp_path / "c")
    return Cache(tmp_path / "c")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return Filled(tmp_path_factory.mktemp("toy") / "c", about(), views=2)


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    return write_key(tmp_path / "keys" / "alice")


@pytest.fixture
def trust(tmp_path: Path, alice: Path) -> str:
    return trust_in(tmp_path / "signers", alice)


def works(line: str, **env: str) -> str:
    result = run(line, **env)
    assert result.exit_code == 0, result.output
    return str(result.stderr)


def test_a_cache_is_signed_as_it_is_pushed_and_pulled_by_those_who_trust_the_signer(
    toy: Cache, alice: Path, trust: str, root: str, tmp_path: Path
) -> None:
    digits, fingerprint = toy.key[:12], key_of(alice).public.fingerprint
    works(f"push {toy.path} --registry {root}")
    refused(f"pull {toy.key} --registry {root} --trust {trust}", "is not signed, and only caches signed by alice@lab")
    assert not caches_folder().exists()
    said = works(f"push {toy.path} --registry {root} --sign {alice}")
    commits = len(toy.commits())
    assert f"{fingerprint} has signed cache {digits} with {commits} commits" in said
    before = stored(root)
    works(f"push {toy.path} --registry {root} --sign {alice}")  # nothing to be signed again
    works(f"push {toy.path} --registry {root}")
    assert stored(root) == before
    said = works(f"pull {toy.key} --registry {root} --trust {trust}")
    assert f"cache {digits} is signed by alice@lab (20" in said
    assert content(caches_folder() / toy.key) == content(toy.path)
    for line in (f"verify {toy.key} --depth contents", f"verify {root}/caches/{toy.key} --depth contents"):
        assert f"cache {digits} is signed by alice@lab (20" in works(f"{line} --trust {trust}")
    other = trust_in(tmp_path / "others", write_key(tmp_path / "keys" / "bob"))
    foreign = f"is signed by {fingerprint}, whom {other} does not name: add that key there if you trust whose it is"
    for line in (
        f"pull {toy.key} --registry {root} --out {tmp_path}/p",
        f"verify {toy.key}",
        f"train --cache {toy.key} --data digits",
        f"train --cache {toy.key} --data digits --registry {root}",
        f"mix {toy.key} {toy.path}",
    ):
        refused(f"{line} --trust {other}", foreign)
        refused(f"{line} --trust {tmp_path}/nowhere", "nowhere is missing")
    assert not (tmp_path / "p").exists()


def test_views_that_are_added_are_signed_again(one: Filled, toy: Cache, alice: Path, trust: str, root: str) -> None:
    """By push, or by whoever signs what lies there; until then those that are signed can be had alone."""
    push(toy.path, root, range(1), say=quiet, key=key_of(alice))
    works(f"pull {toy.key} --registry {root} --trust {trust}")
    folder = toy.path.parent / "more"
    shutil.copytree(one.cache.path, folder)
    more = Filled.__new__(Filled)
    more.__dict__ |= {**one.__dict__, "cache": Cache(folder), "logits": dict(one.logits)}
    more.logits["train", 2] = one.draw(more.cache.train)
    for part in range(more.cache.train.parts):
        more.write(more.cache.train, 2, part)
    works(f"push {folder} --registry {root}")
    line = f"pull {toy.key} --registry {root} --trust {trust}"
    refused(line, "does not cover (views from 2 on are not: take those before by --views)")
    works(f"{line} --views 0:2")
    assert run(f"verify {toy.key} --registry {root} --trust {trust} --depth contents").exit_code == 0
    shutil.rmtree(caches_folder())
    refused(f"verify {toy.key} --registry {root} --trust {trust} --depth contents", "views from 2 on are not")
    said = works(f"sign {root}/caches/{toy.key} --key {alice}")
    assert f"with {len(more.cache.commits())} commits" in said
    works(line)
    works(f"verify {toy.key} --trust {trust} --depth contents")


def test_who_pushes_what_others_have_published_vouches_for_equal_bytes_alone(
    toy: Cache, one: Filled, alice: Path, trust: str, root: str, tmp_path: Path
) -> None:
    """Commits by another writer that name the same files are signed as they lie there, and no others."""
    bob = shutil.copytree(one.cache.path, tmp_path / "bob")
    for file in (bob / "commits").glob("*.json"):  # the very same records, by somebody else
        file.write_bytes(file.read_bytes().replace(b'"host":"test"', b'"host":"bobs"'))
    push(bob, root, say=quiet)
    said = works(f"push {toy.path} --registry {root} --sign {alice}")
    assert "by others" not in said
    works(f"pull {toy.key} --registry {root} --trust {trust} --out {tmp_path}/p")
    assert content(tmp_path / "p") != content(toy.path)
    # Other bytes: of the same rows here, which the signer cannot know.
    changed = bob / "commits" / "v00001-p0000.json"
    about_it = json.loads(changed.read_bytes())
    for stored_file in about_it["files"].values():
        stored_file["size"] += 1
    objects, path = open_objects(root), f"caches/{toy.key}/commits/v00001-p0000.json"
    objects.remove([path])
    objects.create(path, json.dumps(about_it, sort_keys=True, separators=(",", ":")).encode())
    said = works(f"push {toy.path} --registry {root} --sign {alice}")
    assert "note: 1 parts there are by others, with other bytes, and your signature does not cover them" in said
    shutil.rmtree(tmp_path / "home")
    refused(f"pull {toy.key} --registry {root} --trust {trust}", "v00001-p0000.json is not the file that alice@lab")


def test_signatures_by_several_and_from_several_places(toy: Cache, alice: Path, root: str, tmp_path: Path) -> None:
    """They are copied with the cache, once, under numbers that are free; settings name whom to trust."""
    bob = write_key(tmp_path / "keys" / "bob")
    push(toy.path, root, range(1), say=quiet, key=key_of(bob))
    copy = tmp_path / "copy"
    pull(toy.key, root, out=str(copy), say=quiet)
    works(f"sign {toy.path} --key {alice}")
    works(f"sign {copy} --key {alice}")  # another state under the same number
    push(copy, root, say=quiet)
    push(toy.path, root, say=quiet)
    there = place_of(open_registry(root).open(toy.key))
    assert len(signatures_by(there, key_of(alice).public.id)[0]) == 2
    Path("kdcache.toml").write_text(f'trusted = "{trust_in(tmp_path / "signers", alice, bob)}"\nregistry = "{root}"')
    said = works(f"pull {toy.key}")
    assert "is signed by alice@lab" in said and "bob@lab" in said
    works(f"verify {toy.key} --depth contents")
    Path("kdcache.toml").write_text(f'[verify]\ntrust = "{trust_in(tmp_path / "signers", tmp_path / "keys" / "eve")}"')
    refused(f"verify {toy.key} --depth contents", "whom")


def test_a_web_server_needs_no_list_of_signatures(toy: Cache, alice: Path, trust: str, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    push(toy.path, str(tmp_path / "shared"), say=quiet)
    with web_server(tmp_path / "shared") as address:
        refused(f"pull {toy.key} --registry {address} --trust {trust}", "is not signed")
        push(toy.path, str(tmp_path / "shared"), say=quiet, key=key_of(alice))
        works(f"pull {toy.key} --registry {address} --trust {trust}")
        refused(f"sign {address}/caches/{toy.key} --key {alice}", "can only be read")
    works(f"verify {toy.key} --trust {trust} --depth contents")


def test_commands_that_cannot_sign_say_so(toy: Cache, alice: Path, trust: str, tmp_path: Path) -> None:
    secret = write_key(tmp_path / "keys" / "secret", "words")
    refused(f"sign {toy.path} --key {secret}", "there is no terminal to ask on (Passphrase of ")
    refused(f"push {toy.path} --registry {tmp_path}/shared --sign {alice}.pub", "is a public key")
    assert not (tmp_path / "shared").exists()
    refused(f"push {toy.path} --sign {secret}", "no registry is named")
    works(f"pack {toy.path} --to hdf5 --out {tmp_path}/c.h5")
    refused(f"sign {tmp_path}/c.h5 --key {alice}", "sign the cache that it was packed from, then pack it again")
    works(f"sign {toy.path} --key {alice}")
    works(f"rm {toy.path} --yes")
    assert not toy.path.exists()
