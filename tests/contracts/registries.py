"""What every place that a registry can lie in must do. A backend's tests are a subclass that says where one is."""

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kdcache.cache.errors import CorruptError, KdcacheError, NotFoundError
from kdcache.cache.home import open_registry
from kdcache.cache.registry.backends import open_objects
from kdcache.cache.registry.objects import Objects
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.share import pull, push
from kdcache.tests.helpers.caches import BOTH, FORMATS, Filled, same
from kdcache.tests.helpers.registries import about, content, quiet, stored

DATA = bytes(range(256)) * 400
CHUNK = "views/v00001/gaps/c/0/0"


def refused(kind: type[KdcacheError], objects: Objects, call: Callable[[], object]) -> str:
    """The message of the error that a call raises: one line that names the place."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and objects.url in message
    return message


class ReadingContract:
    """What holds for places that can only be read, too.

    A subclass has a fixture `address`: that of an empty place. scheme: of the address; None for the path of a folder.
    """

    scheme: str | None

    @pytest.fixture
    def objects(self, address: str) -> Objects:
        return open_objects(address)

    @pytest.fixture
    def behind(self, objects: Objects) -> Objects:
        """The objects that the place is filled through."""
        return objects

    @pytest.fixture
    def cache(self, request: pytest.FixtureRequest, tmp_path: Path, behind: Objects) -> Cache:
        """A cache with two views that was published there, as it was built. Its format is 1 but where a test asks."""
        built = Filled(tmp_path / "built", about(**FORMATS[getattr(request, "param", "format-1")])).cache
        push(built.path, behind.url, name="toy-v1", say=quiet)
        return built

    def test_its_address_opens_it(self, address: str, objects: Objects) -> None:
        assert objects.url == objects.address == address
        assert (address.partition("://")[0] if "://" in address else None) == self.scheme

    def test_bytes_come_back_whole_and_no_more_than_the_limit(self, behind: Objects, objects: Objects) -> None:
        for data in (DATA, b"", b"\n"):
            path = f"caches/a/{len(data)}"
            assert behind.create(path, data)
            assert objects.read(path, len(data)) == objects.read(path, 1 << 20) == data
            assert objects.size(path) == len(data)
        message = refused(CorruptError, objects, lambda: objects.read(f"caches/a/{len(DATA)}", len(DATA) - 1))
        assert str(len(DATA) - 1) in message

    def test_what_is_not_there_is_not_found(self, behind: Objects, objects: Objects) -> None:
        behind.create("caches/a/there", DATA)
        for path in ("caches/a/ther", "caches/a/there2", "caches/b/there", "other"):
            assert objects.size(path) is None
            assert path in refused(NotFoundError, objects, lambda path=path: objects.read(path, 1 << 20))
            assert path in refused(NotFoundError, objects, lambda path=path: objects.changed(path))

    def test_it_knows_when_an_object_was_made(self, behind: Objects, objects: Objects) -> None:
        behind.create("caches/a/there", DATA)
        assert abs(objects.changed("caches/a/there") - time.time()) < 60

    def test_a_cache_is_read_there_and_bytes_of_another_digest_are_refused(
        self, cache: Cache, behind: Objects, objects: Objects
    ) -> None:
        path, other = f"caches/{cache.key}/{CHUNK}", f"caches/{cache.key}/{CHUNK.replace('v00001', 'v00000')}"
        right, valid = behind.read(path, 1 << 20), behind.read(other, 1 << 20)
        assert len(valid) == len(right)
        for wrong in (right[:-1] + bytes([right[-1] ^ 1]), valid):  # what decodes well has no checksum to fail by
            behind.replace(path, wrong)
            there = open_registry(objects.url).cache(cache.key)
            assert there.views == (0, 1) and same(there.read(0), cache.read(0))
            assert CHUNK in refused(CorruptError, objects, lambda there=there: there.read(1))
        behind.replace(path, right)
        assert same(open_registry(objects.url).cache(cache.key).read(1), cache.read(1))

    @pytest.mark.parametrize("cache", BOTH, indirect=True)
    def test_what_was_pushed_is_pulled_byte_for_byte(
        self, tmp_path: Path, cache: Cache, behind: Objects, objects: Objects
    ) -> None:
        there = {path.removeprefix(f"caches/{cache.key}/"): data for path, data in stored(behind.url).items()}
        assert {path: data for path, data in there.items() if not path.startswith("published/")} == content(cache.path)
        pulled = pull("toy-v1", objects.url, out=str(tmp_path / "pulled"), say=quiet)
        assert (pulled.key, pulled.views, pulled.kept) == (cache.key, 2, [])
        assert content(tmp_path / "pulled") == content(cache.path)


class BackendContract(ReadingContract):
    """What holds for places that can be written, and listed."""

    def test_it_can_be_written_and_listed(self, objects: Objects) -> None:
        assert objects.writable and objects.listable

    def test_an_object_is_created_once(self, objects: Objects) -> None:
        assert objects.create("names/a", b"first")
        assert objects.create("names/a", b"first")
        assert not objects.create("names/a", b"second")
        objects.require_there()
        objects.require_create_only("names/a")
        assert objects.read("names/a", 100) == b"first"

    def test_of_threads_that_create_one_object_one_wins_and_the_others_learn_it(self, objects: Objects) -> None:
        at_once, writers = threading.Barrier(8), range(8)

        def create(writer: int) -> bool:
            at_once.wait()
            return objects.create("names/a", bytes([writer]) * 1000)

        with ThreadPoolExecutor(len(writers)) as threads:
            won = [writer for writer, done in zip(writers, threads.map(create, writers), strict=True) if done]
        assert len(won) == 1 and objects.read("names/a", 1000) == bytes(won) * 1000
        assert objects.sizes("names") == {"a": 1000}

    def test_an_object_is_replaced(self, objects: Objects) -> None:
        for data in (b"first", DATA, b""):
            objects.replace("names/a", data)
            assert objects.read("names/a", len(data)) == data and objects.sizes("names") == {"a": len(data)}

    def test_lists_hold_what_is_there_and_nothing_else(self, objects: Objects) -> None:
        assert objects.sizes("caches") == {} and objects.folders("caches", "first") == []
        assert objects.newest("caches") == 0
        names = ("b/first", "b/deep/er/x", "a/first", "ab/first", "file")
        for count, name in enumerate(names):
            objects.create(f"caches/{name}", b"x" * count)
        objects.create("names/a", b"")
        assert objects.sizes("caches") == {name: count for count, name in enumerate(names)}
        assert objects.sizes("caches/a") == {"first": 2} and objects.sizes("caches/b/deep") == {"er/x": 1}
        assert objects.folders("caches", "first") == ["a", "ab", "b"]
        assert abs(objects.newest("caches/b") - time.time()) < 60
        assert objects.newest("caches/c") == 0 and objects.sizes("caches/c") == {}
        times = objects.times("caches/b")
        assert times.keys() == {"first", "deep/er/x"} and max(times.values()) == objects.newest("caches/b")
        assert objects.times("caches/c") == {}

    def test_what_is_removed_is_gone_and_the_rest_stays(self, objects: Objects) -> None:
        for name in ("a/first", "a/x", "b/first", "b/x"):
            objects.create(f"caches/{name}", DATA)
        objects.remove([])
        objects.remove(["caches/a/x", "caches/a/first", "caches/b/never"])
        assert objects.size("caches/a/x") is None and objects.folders("caches", "first") == ["b"]
        assert objects.sizes("caches") == {"b/first": len(DATA), "b/x": len(DATA)}
        assert objects.create("caches/a/x", b"anew") and objects.read("caches/a/x", 10) == b"anew"

    def test_keys_and_names_are_found(self, objects: Objects) -> None:
        key = hashlib.sha256(b"").hexdigest()
        objects.create(f"caches/{key}/identity.json", b"{}")
        registry = open_registry(objects.url)
        registry.give_name("best", key, move=False)
        assert registry.keys() == [key] and registry.has(key) and not registry.has("0" * 64)
        assert registry.names == {"best": key} and registry.find("best") == registry.find(key[:8]) == key
        registry.remove_name("best")
        assert open_registry(objects.url).names == {}
