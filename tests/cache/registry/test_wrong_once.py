"""A server that sent something wrong once and is right again: nothing wrong was kept."""

import re
from pathlib import Path

import pytest

from kdcache.cache import open_cache
from kdcache.cache.errors import KdcacheError
from kdcache.cache.home import caches_folder, home, open_registry
from kdcache.cache.registry.kinds import network
from kdcache.cache.registry.kinds.local import FolderObjects
from kdcache.cache.registry.kinds.network import NetworkObjects
from kdcache.pipeline.share import pull, push
from kdcache.pipeline.teachers import weightstore
from kdcache.pipeline.teachers.weights import saved, weights_hash
from kdcache.tests.helpers.caches import Filled, identity, same
from kdcache.tests.helpers.registries import content, quiet
from kdcache.tests.helpers.servers import Files, web_server

pytestmark = pytest.mark.usefixtures("own_home", "no_fsync", "one_thread")


@pytest.fixture(scope="module")
def served(tmp_path_factory, no_fsync):
    """A folder registry, a cache in it, and its teacher's weights."""
    import torch

    state = {"fc.weight": torch.arange(6.0).reshape(2, 3)}
    about = identity(part=12)
    about = about.model_copy(update={"teacher": about.teacher.model_copy(update={"weights": weights_hash(state)})})
    folder = tmp_path_factory.mktemp("served")
    cache = Filled(folder / "c", about, views=2).cache
    push(cache.path, str(folder / "shared"), name="nm", say=quiet, teacher=False)
    open_registry(str(folder / "shared")).teachers.add(about.teacher.weights, saved(state, {}))
    return folder / "shared", cache


def a_bit(content):
    at = len(content) * 2 // 3
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def a_digit(field):
    """One hexadecimal digit of a field of the JSON is another one."""

    def spoil(content):
        return re.sub(
            rb'("%s":"[0-9a-f]{5})(.)' % field.encode(), lambda m: m[1] + b"%x" % (int(m[2], 16) ^ 1), content
        )

    return spoil


DAMAGES = {
    "cut": lambda content: content[:-3],
    "a page": lambda content: b"<html>502</html>",
    "a bit": a_bit,
    "sha256": a_digit("sha256"),
    "rows": a_digit("rows"),
    "key": a_digit("key"),
}


class Spoiling(Files):
    """Sends what `spoil` makes of the files that `pattern` finds, as often as `times` says."""

    pattern, spoil, times, spoilt = "", None, 0, 0

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not re.search(self.pattern, self.path) or not path.is_file() or Spoiling.times == 0:
            return super().do_GET()
        Spoiling.times -= 1
        Spoiling.spoilt += 1
        body = Spoiling.spoil(path.read_bytes())
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def believed(monkeypatch):
    """One answer is believed, as that of a server with https is, since its bytes come as they were sent."""
    real = NetworkObjects.__init__

    def init(self, *args, **options):
        real(self, *args, **options)
        self.sealed = True

    monkeypatch.setattr(NetworkObjects, "__init__", init)
    monkeypatch.setattr(network, "_AT_ONCE", 4)


def spoiling(monkeypatch, pattern, damage, times):
    for name, value in {
        "pattern": pattern,
        "spoil": staticmethod(DAMAGES[damage]),
        "times": times,
        "spoilt": 0,
    }.items():
        monkeypatch.setattr(Spoiling, name, value)


ALWAYS = 10**6
KINDS = {
    "identity": (r"/identity\.json$", ("cut", "a page", "a bit")),
    "name": (r"/names/nm$", ("cut", "a page")),
    "labels' commit": (r"/caches/\w+/commits/labels\.json$", ("rows",)),
    "shard's commit": (r"/v00001-p0000\.json$", ("cut", "a page", "a bit", "sha256", "rows", "key")),
    "evaluation's commit": (r"/eval/commits/v00000-p0000\.json$", ("cut",)),
    "chunk": (r"/views/v00001/gaps/c/0/0$", ("cut", "a page", "a bit")),
}
# What is wrong with the first answer alone.
ONCE = {"identity": ("cut",), "name": ("a page",), "shard's commit": ("sha256", "rows"), "chunk": ("a bit",)}


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_pull_succeeds_and_the_first_leaves_nothing_wrong(kind, served, tmp_path, monkeypatch):
    shared, cache = served
    pattern, damages = KINDS[kind]
    for damage in damages:
        monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / damage.replace(" ", "-")))
        spoiling(monkeypatch, pattern, damage, ALWAYS)
        with web_server(shared, Spoiling) as address:
            try:
                pull("nm", address, say=quiet)
            except KdcacheError:
                pass
            else:  # a bit may lie where it does no harm, as in who wrote a commit
                assert damage == "a bit" and kind.endswith("commit")
            assert Spoiling.spoilt
            Spoiling.times = 0
            pull("nm", address, say=quiet)
        if not (damage == "a bit" and kind.endswith("commit")):
            assert content(caches_folder() / cache.key) == content(cache.path), damage


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("kind", ONCE)
def test_what_is_found_wrong_is_asked_for_again_at_once(kind, served, tmp_path, monkeypatch):
    """Once wrong, then right: the first command succeeds."""
    shared, cache = served
    for damage in ONCE[kind]:
        monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / damage.replace(" ", "-")))
        spoiling(monkeypatch, KINDS[kind][0], damage, 1)
        with web_server(shared, Spoiling) as address:
            pull("nm", address, say=quiet)
        assert Spoiling.spoilt == 1 and content(caches_folder() / cache.key) == content(cache.path), damage


@pytest.mark.usefixtures("believed")
def test_what_was_kept_of_a_reader_from_afar_is_asked_for_again(served, tmp_path, monkeypatch):
    """A cache that is read straight from the registry, whose commits are kept here."""
    shared, cache = served
    for damage in ("cut", "sha256", "key"):
        monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / damage))
        spoiling(monkeypatch, r"/v00001-p0000\.json$", damage, ALWAYS)
        with web_server(shared, Spoiling) as address:
            with pytest.raises(KdcacheError):
                open_cache("nm", address).read(1)
            Spoiling.times = 0
            assert same(open_cache("nm", address).read(1), cache.read(1))
        # What lies here may be damaged too, or be that of a cache that was removed and built again.
        (kept,) = home().glob("remote/registries/*/*/commits/v00001-p0000.json")
        whole = kept.read_bytes()
        for wrong in (b"", whole[:-1], DAMAGES["sha256"](whole)):
            kept.write_bytes(wrong)
            with web_server(shared, Spoiling) as address:
                assert same(open_cache(f"{address}/names/nm").read(1), cache.read(1))


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("damage", ["cut", "a page", "a bit"])
def test_weights_that_came_wrong_are_asked_for_again(damage, served, monkeypatch):
    shared, cache = served
    teacher = cache.identity.teacher
    spoiling(monkeypatch, r"/teachers/", damage, 1)
    with web_server(shared, Spoiling) as address:
        found = weightstore.find_weights(teacher, [open_registry(address)], quiet)
        assert found is not None and Spoiling.spoilt == 1
        found.unlink()
        Spoiling.times = ALWAYS
        with pytest.raises(KdcacheError, match="ask whoever keeps the registry"):
            weightstore.find_weights(teacher, [open_registry(address)], quiet)
        assert not found.exists()
        Spoiling.times = 0
        assert weightstore.find_weights(teacher, [open_registry(address)], quiet) == found


def test_who_published_a_cache_is_asked_again(served, monkeypatch):
    folder, cache = served
    shared, real, wrong = open_registry(str(folder)), FolderObjects.read, ["cut", "a page"]

    def once(self, path, limit):
        found = real(self, path, limit)
        return DAMAGES[wrong.pop()](found) if "/published/" in path and wrong else found

    monkeypatch.setattr(FolderObjects, "read", once)
    assert shared.published(cache.key).key == cache.key and not wrong
