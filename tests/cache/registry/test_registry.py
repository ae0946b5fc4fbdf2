"""A shared registry in a folder, in a bucket and on a web server: what is published is found, whole, and checked."""

import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdcache.cache import Cache, KdcacheError, open_cache
from kdcache.cache import errors as e
from kdcache.cache.home import caches_folder, open_registry
from kdcache.cache.identity import MAX_JSON_BYTES, canonical
from kdcache.cache.registry.backends import open_objects
from kdcache.cache.registry.kinds import network
from kdcache.cache.registry.kinds.network import NetworkObjects
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.share import pull, push
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import Filled, identity, same
from kdcache.tests.helpers.registries import about, content, quiet, refused, run, stored
from kdcache.tests.helpers.servers import Files, Ranges, web_server

pytestmark = pytest.mark.usefixtures("impatient", "own_home")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A cache with 3 views: not to be changed."""
    return Filled(tmp_path_factory.mktemp("toy") / "c", about(), views=3)


# ---- push and pull ----


@pytest.mark.parametrize("record", [{"k": None}, {"k": 4, "labels": 2, "tail_std": True}, {"k": 1, "labels": 0}])
def test_what_is_pulled_is_what_was_pushed_byte_for_byte(tmp_path, root, record):
    written = Filled(tmp_path / "c", about(**record))
    pushed = push(written.cache.path, root, say=quiet)
    assert (pushed.views, pushed.there, pushed.kept) == (2, 0, [])
    pulled = pull(written.cache.key, root, say=quiet)
    assert (pulled.bytes, pulled.new) == (pushed.bytes, pushed.new)
    assert Path(pulled.where) == caches_folder() / written.cache.key
    assert content(Path(pulled.where)) == content(written.cache.path)
    assert verify(open_cache(written.cache.key)).passed


def test_in_a_bucket_lies_what_lies_in_a_folder(toy, bucket):
    push(toy.cache.path, bucket, say=quiet)
    prefix = f"caches/{toy.cache.key}/"
    there = {path.removeprefix(prefix): data for path, data in stored(bucket).items()}
    assert {path: data for path, data in there.items() if not path.startswith("published/")} == content(toy.cache.path)


def test_pushed_and_pulled_again_nothing_goes(toy, root):
    first = push(toy.cache.path, root, say=quiet)
    before = stored(root)
    again = push(toy.cache.path, root, say=quiet)
    assert (again.bytes, again.new, again.there, again.kept) == (0, 0, first.new, [])
    assert stored(root) == before
    pull(toy.cache.key, root, say=quiet)
    again = pull(toy.cache.key, root, say=quiet)
    assert (again.bytes, again.new, again.there) == (0, 0, first.new)


def test_some_views_then_the_others(toy, root):
    assert push(toy.cache.path, root, range(2), say=quiet).views == 2
    assert open_registry(root).cache(toy.cache.key).views == (0, 1)
    pull(toy.cache.key, root, views=range(1, 2), say=quiet)
    here = open_cache(toy.cache.key)
    assert here.views == (1,) and same(here.read(1), toy.cache.read(1)) and here.prior.equal(toy.cache.prior)
    with pytest.raises(KdcacheError, match="no complete view 2"):
        pull(toy.cache.key, root, views=range(1, 3), say=quiet)
    push(toy.cache.path, root, say=quiet)
    pull(toy.cache.key, root, say=quiet)
    assert content(here.path) == content(toy.cache.path)


def test_a_push_that_was_stopped_goes_on_and_is_seen_whole_at_all_times(toy, root, monkeypatch):
    """Stopped after each of its writes in turn; a reader sees complete views only, equal to those written."""

    class Stop(Exception):
        pass

    left, step = 0, 7 if "://" in root else 1

    def stopping(write):
        def wrapped(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop
            return write(*args, **options)

        return wrapped

    monkeypatch.setattr(NetworkObjects, "create", stopping(NetworkObjects.create))
    monkeypatch.setattr(SplitStore, "adopt", stopping(SplitStore.adopt))
    monkeypatch.setattr("kdcache.cache.registry.transfer._THREADS", 1)
    seen, writes = set(), 0
    while True:
        left = writes = writes + step
        with contextlib.suppress(Stop):
            push(toy.cache.path, root, say=quiet)
            break
        left = 10**9
        registry = open_registry(root)
        if registry.has(toy.cache.key):
            cache = registry.cache(toy.cache.key)
            seen.add(cache.views)
            assert all(same(cache.read(view), toy.cache.read(view)) for view in cache.views)
    assert () in seen and len(seen) > 1
    left = 10**9
    pull(toy.cache.key, root, say=quiet)
    assert content(caches_folder() / toy.cache.key) == content(toy.cache.path)


def another(path, share=0.9):
    """A cache of the same identity and labels whose records differ, as another machine's do (here by far more)."""

    class Another(Filled):
        def draw(self, store):
            return share * super().draw(store)

    return Another(path, about()).cache


def test_of_two_publishers_the_first_commit_wins_and_the_other_is_told(tmp_path, root):
    mine = Filled(tmp_path / "mine", about()).cache
    theirs = another(tmp_path / "theirs")
    assert mine.key == theirs.key
    push(mine.path, root, say=quiet)
    before = stored(root)
    lines = []
    lost = push(theirs.path, root, say=lines.append)
    assert lost.new == 0 and "v00000-p0000" in lost.kept and any("stay" in line for line in lines)
    assert stored(root) == before
    registry = open_registry(root)
    assert same(registry.cache(mine.key).read(1), mine.read(1))


def test_publishers_at_once_never_mix(tmp_path, root):
    """Each shard is wholly one publisher's."""
    ours = [Filled(tmp_path / "0", about()).cache, another(tmp_path / "1"), another(tmp_path / "2", 0.8)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda cache: push(cache.path, root, say=quiet), ours))
    found = open_registry(root).cache(ours[0].key)
    for store, name in found.contents(found.views):
        each = [getattr(c, "train" if store.split == "train" else "evaluation").commit_bytes(name) for c in ours]
        assert store.commit_bytes(name) in each
        store.load(name)
    assert verify(found).passed


def test_bytes_of_a_publisher_who_died_do_not_stand_in_the_way(tmp_path, bucket, monkeypatch):
    """What was put and never committed stays, and is never read."""
    mine, dead = Filled(tmp_path / "mine", about()).cache, another(tmp_path / "dead")
    real = NetworkObjects.create
    monkeypatch.setattr(NetworkObjects, "create", lambda o, path, data: "commits/v0" in path or real(o, path, data))
    push(dead.path, bucket, say=quiet)
    monkeypatch.setattr(NetworkObjects, "create", real)
    left = {path for path in stored(bucket) if "/c/" in path}
    assert open_registry(bucket).cache(mine.key).views == ()
    push(mine.path, bucket, say=quiet)
    assert {path for path in stored(bucket) if "/other/" in path}
    assert left <= stored(bucket).keys()
    got = pull(mine.key, bucket, out=str(tmp_path / "got"), say=quiet)
    assert got.views == 2 and same(Cache(tmp_path / "got").read(1), mine.read(1))
    cache = open_registry(bucket).cache(mine.key)
    assert same(cache.read(0), mine.read(0)) and verify(cache, contents=False).passed


def test_damage_here_is_not_published(tmp_path, root):
    cache = Filled(tmp_path / "c", about()).cache
    chunk = cache.path / "views/v00001/gaps/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(e.CorruptError, match="v00001"):
        push(cache.path, root, say=quiet)
    assert 1 not in open_registry(root).cache(cache.key).views


def test_a_packed_cache_is_to_be_unpacked_first(tmp_path, toy, root):
    run(f"pack {toy.cache.path} --to hdf5 --out {tmp_path}/c.h5")
    refused(f"push {tmp_path}/c.h5 --registry {root}", "kdcache unpack")


def test_a_cache_at_an_address_is_pulled_before_it_is_packed(tmp_path, toy, bucket, monkeypatch):
    push(toy.cache.path, bucket, say=quiet)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # nothing may be made in a folder named after the address
    address = f"{bucket}/caches/{toy.cache.key}"
    refused(f"pack {address} --to hdf5", f"run kdcache pull {address} first")
    assert not list((tmp_path / "here").iterdir())


def test_a_server_that_overwrites_is_refused(toy, bucket, monkeypatch):
    real = network.obstore.put
    monkeypatch.setattr(network.obstore, "put", lambda *a, mode=None, **o: real(*a, **o))
    with pytest.raises(e.InputError, match="overwrites"):
        push(toy.cache.path, bucket, say=quiet)


def test_digits_of_a_key_and_addresses_are_found(toy, root):
    push(toy.cache.path, root, name="toy-v1", say=quiet)
    key = toy.cache.key
    registry = open_registry(root)
    assert registry.find(key[:6]) == registry.find("toy-v1") == key
    for what in (key[:8], "toy-v1", key):
        assert open_cache(what, root).key == key
    if "://" in root:
        assert open_cache(f"{root}/caches/{key}").key == open_cache(f"{root}/names/toy-v1").key == key
        with pytest.raises(e.InputError, match="ends in"):
            open_cache(root)
    for missing in ("abcdef12", "no-such-name", "f" * 64):
        with pytest.raises(e.NotFoundError, match="see kdcache ls"):
            open_cache(missing, root)


def test_what_is_here_needs_no_registry_to_be_named(toy, tmp_path):
    """Six digits and more are no name, so that one that is not mounted, or far away, is not asked."""
    here = caches_folder() / toy.cache.key
    shutil.copytree(toy.cache.path, here)
    for digits in (6, 12, 64):
        assert open_cache(toy.cache.key[:digits], str(tmp_path / "not/mounted")).path == here
    with pytest.raises(e.NotFoundError, match="is it mounted"):
        open_cache(toy.cache.key[:5], str(tmp_path / "not/mounted"))


# ---- names, ls ----


def test_names_move_on_purpose_alone(tmp_path, toy, root):
    newer = Filled(tmp_path / "n", about(k=5)).cache
    push(toy.cache.path, root, name="best", say=quiet)
    push(toy.cache.path, root, name="best", say=quiet)
    with pytest.raises(e.InputError, match="--move"):
        push(newer.path, root, name="best", say=quiet)
    assert open_registry(root).find("best") == toy.cache.key
    push(newer.path, root, name="best", move=True, say=quiet)
    assert open_registry(root).find("best") == newer.key
    for bad in ("../x", "a/b", "", "-x", "abcdef", "a\nb", "x" * 101, ".hidden", "é"):
        with pytest.raises(e.InputError, match="no name"):
            push(newer.path, root, name=bad, say=quiet)


def test_ls_says_what_is_shared_and_by_whom(toy, root):
    push(toy.cache.path, root, name="toy-v1", say=quiet)
    text = run(f"ls --registry {root}").output
    words = ("toy:teacher on toy", "3 views", "top 4 of 12", "teacher's top-1", "toy-v1", " by ")
    for word in (toy.cache.key[:12], *words):
        assert word in text, text
    (found,) = json.loads(run(f"ls --json --registry {root}").output)
    assert found["names"] == ["toy-v1"] and found["published"]["views"] == 3 and found["registry"] == root
    assert found["bytes"] > 1000
    assert run("ls", KDCACHE_REGISTRY=root).output == text


def test_ls_names_what_is_damaged_and_shows_the_rest(toy, shared):
    root, folder, _ = shared
    (damaged,) = (folder / "published").iterdir()
    good = Filled(root.parent / "good", about(k=5)).cache
    push(good.path, str(root), say=quiet)
    damaged.write_text("{")
    (root / "caches" / ("e" * 64)).mkdir()
    (root / "caches" / ("e" * 64) / "identity.json").write_text("{")
    result = run(f"ls --registry {root}")
    assert result.exit_code == 0 and good.key[:12] in result.output
    assert result.output.count("not a cache") == 2 and damaged.name in result.output


def test_settings_name_the_registry(tmp_path, toy, root):
    Path("kdcache.toml").write_text(f'registry = "{root}"\n')
    assert run(f"push {toy.cache.path} --name toy-v1").exit_code == 0
    assert run("pull toy-v1").exit_code == 0
    assert Cache(caches_folder() / toy.cache.key).views == (0, 1, 2)
    Path("kdcache.toml").unlink()
    refused("pull toy-v1", "no registry is named")
    refused(f"push {toy.cache.path}", "KDCACHE_REGISTRY")


# ---- a web server ----


@pytest.mark.parametrize("handler", [Files, Ranges])
def test_a_plain_web_server_is_read_without_a_listing(tmp_path, toy, handler, monkeypatch):
    monkeypatch.setattr("kdcache.cache.registry.kinds.network._AT_ONCE", 8)
    shared, key = tmp_path / "shared", toy.cache.key
    push(toy.cache.path, str(shared), name="toy-v1", say=quiet)
    with web_server(shared, handler) as address:
        for what in (f"{address}/names/toy-v1", f"{address}/caches/{key}"):
            cache = open_cache(what)
            assert cache.views == (0, 1, 2) and same(cache.read(2), toy.cache.read(2))
        refused(f"ls --registry {address}", "cannot be listed")
        pulled = pull("toy-v1", address, views=range(2), say=quiet)
        assert pulled.views == 2 and Cache(Path(pulled.where)).views == (0, 1)
        refused(f"push {toy.cache.path} --registry {address}", "can only be read")
        refused(f"pull {key[:8]} --registry {address}", "cannot be listed")
        info = json.loads(run(f"info {address}/caches/{key} --json").output)
        assert info["views"] == 3 and info["path"] == f"{address}/caches/{key}" and info["bytes"] > 1000


def test_many_views_of_several_parts_are_probed(tmp_path, monkeypatch):
    """More than are asked for at once."""
    monkeypatch.setattr("kdcache.cache.registry.kinds.network._AT_ONCE", 4)
    written = Filled(tmp_path / "c", identity(part=12), views=5)
    push(written.cache.path, str(tmp_path / "shared"), say=quiet)
    with web_server(tmp_path / "shared") as address:
        cache = open_cache(f"{address}/caches/{written.cache.key}")
        assert cache.views == tuple(range(5)) and verify(cache).passed


# ---- what others may have put there ----


@pytest.fixture
def shared(tmp_path, toy):
    """A folder registry with the toy cache: the folder, the cache's in it, and a line that reads all of it."""
    push(toy.cache.path, str(tmp_path / "shared"), say=quiet)
    folder = tmp_path / "shared/caches" / toy.cache.key
    return tmp_path / "shared", folder, f"pull {toy.cache.key} --registry {tmp_path / 'shared'}"


def test_an_identity_that_is_not_of_its_key_is_refused(shared):
    _, folder, line = shared
    (folder / "identity.json").write_bytes(canonical(about(k=5)))
    refused(line, "tampered")


def test_a_huge_identity_is_not_read(shared):
    _, folder, line = shared
    with (folder / "identity.json").open("wb") as f:
        f.truncate(10 * 10**9)
    refused(line, f"longer than the {MAX_JSON_BYTES} bytes")


def test_a_huge_identity_in_a_bucket_is_not_read(bucket):
    open_objects(bucket).create(f"caches/{'a' * 64}/identity.json", b" " * (MAX_JSON_BYTES + 1))
    refused(f"pull {'a' * 64} --registry {bucket}", "more than the")


def test_a_swapped_shard_with_a_valid_shape_is_refused(toy, shared):
    _, folder, line = shared
    shutil.copy(folder / "views/v00001/gaps/c/0/0", folder / "views/v00000/gaps/c/0/0")
    assert "v00000-p0000" in refused(line, "not what was committed")
    here = Cache(caches_folder() / toy.cache.key)
    assert 0 not in here.views


def test_a_swapped_shard_in_a_bucket_is_refused(toy, bucket):
    push(toy.cache.path, bucket, say=quiet)
    there, prefix = open_objects(bucket), f"caches/{toy.cache.key}"
    there.replace(f"{prefix}/views/v00000/gaps/c/0/0", there.read(f"{prefix}/views/v00001/gaps/c/0/0", 1 << 20))
    refused(f"pull {toy.cache.key} --registry {bucket}", "v00000-p0000")
    with pytest.raises(e.CorruptError, match="not what was committed"):
        open_registry(bucket).cache(toy.cache.key).read(0)


def test_links_are_not_followed(tmp_path, toy, shared):
    root, folder, line = shared
    elsewhere = tmp_path / "elsewhere"
    (folder / "views/v00002").rename(elsewhere)
    (folder / "views/v00002").symlink_to(elsewhere)
    refused(line, "symbolic link")
    refused(f"push {toy.cache.path} --registry {root}", "symbolic link")
    (folder / "identity.json").rename(elsewhere / "identity.json")
    (folder / "identity.json").symlink_to(elsewhere / "identity.json")
    refused(line, "symbolic link")
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    refused(line, "symbolic link")


def test_a_name_that_points_out_of_the_registry_is_refused(shared):
    root, _, _ = shared
    (root / "names").mkdir()
    for key in ("../../secret", "/etc", "a" * 63):
        named = {"by": "x", "format": 1, "key": key, "time": "t"}
        (root / "names/bad").write_text(json.dumps(named, sort_keys=True, separators=(",", ":")))
        refused(f"pull bad --registry {root}", "names no key")
    refused(f"pull ../x --registry {root}", "no name")


def test_control_characters_are_shown_not_obeyed(tmp_path):
    usual = about()
    teacher = usual.teacher.model_copy(update={"architecture": "\x1b]0;x\x07\x1b[2J"})
    cache = Filled(tmp_path / "c", usual.model_copy(update={"teacher": teacher})).cache
    root = tmp_path / "shared"
    push(cache.path, str(root), say=quiet)
    (root / "caches/\x1b[31m").mkdir()
    for line in (f"ls --registry {root}", f"info {root}/caches/{cache.key}"):
        text = run(line).output
        assert "\\x1b[2J" in text and all(c.isprintable() or c == "\n" for c in text)
    assert "\x1b" not in refused("pull '\x1b[2J' --registry " + str(root), "no name")


def test_an_older_state_is_refused_where_a_newer_one_was_seen(toy, shared, monkeypatch, tmp_path):
    root, folder, line = shared
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    for commit in (older / "commits").glob("v00002-*"):
        commit.unlink()
    assert open_registry(str(root)).cache(toy.cache.key).views == (0, 1, 2)
    shutil.rmtree(folder)
    older.rename(folder)
    assert "v00002" in refused(line, "older state")
    # Where nothing newer was seen it is fewer views and no more.
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home2"))
    assert open_registry(str(root)).cache(toy.cache.key).views == (0, 1)


@pytest.mark.parametrize(
    "url",
    ["s3://id:p4ss@bucket/kd", "https://user:p4ss@example.org/kd", "https://example.org/kd?X-Amz-Signature=p4ss",
     "az://b/kd#p4ss"],
)  # fmt: skip
def test_an_address_with_a_secret_is_refused_and_not_repeated(url):
    for line in (f"ls --registry {url}", f"pull x --registry {url}"):
        assert "p4ss" not in refused(line, "credentials")


def test_no_such_place(tmp_path, toy, s3):
    refused(f"push {toy.cache.path} --registry ftp://x/y", "no place for a registry")
    refused(f"push {toy.cache.path} --registry {tmp_path}/not/mounted", "is it mounted?")
    assert "s3cr3t" not in refused(f"push {toy.cache.path} --registry s3://no-such-bucket/kd", "no such bucket")


def test_readers_need_no_right_to_write(toy, shared, tmp_path):
    root, _, line = shared
    everything = [root, *root.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {p: p.stat().st_mtime_ns for p in everything}
    assert same(open_registry(str(root)).cache(toy.cache.key).read(0), toy.cache.read(0))
    assert run(line).exit_code == 0 and run(f"ls --registry {root}").exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in [root, *root.rglob("*")]} == before
    for path in everything:
        path.chmod(0o755 if path.is_dir() else 0o644)
