"""Every place that a registry can lie in, by the contract of all; and a new one, which is a class and a line."""

import hashlib
import time

import pytest

from kdcache.cache.errors import CorruptError, InputError, NotFoundError
from kdcache.cache.registry.backends import BACKENDS, open_objects
from kdcache.cache.registry.kinds import network
from kdcache.cache.registry.kinds.network import Remote
from kdcache.tests.contracts.registries import BackendContract, ReadingContract
from kdcache.tests.helpers.registries import refused
from kdcache.tests.helpers.servers import web_server

pytestmark = pytest.mark.usefixtures("impatient", "own_home")


class TestFolder(BackendContract):
    scheme = None

    @pytest.fixture
    def address(self, tmp_path):
        return str(tmp_path / "shared")


class TestBucket(BackendContract):
    scheme = "s3"

    @pytest.fixture
    def address(self, bucket):
        return bucket


class TestWeb(ReadingContract):
    scheme = "http"

    @pytest.fixture
    def address(self, tmp_path, monkeypatch):
        monkeypatch.setattr(network, "_AT_ONCE", 8)
        with web_server(tmp_path / "shared") as address:
            yield address

    @pytest.fixture
    def behind(self, tmp_path):
        return open_objects(str(tmp_path / "shared"))

    def test_it_is_only_read_from(self, objects):
        assert not objects.writable and not objects.listable


class Memory:
    """Objects in a dict of this process, with the time at which each was made."""

    listable = writable = True
    places = {}  # noqa: RUF012  by address: whoever opens one again finds what is there

    def __init__(self, url):
        self.url = self.address = url
        self._objects = self.places.setdefault(url, {})

    def require_there(self):
        pass

    def require_create_only(self, path):
        pass

    def folder(self, path):
        return None

    def place(self, prefix, identity, mirror, store):
        return Remote(self, prefix, identity, mirror, store)

    def read(self, path, limit):
        data = self._at(path)[0]
        if len(data) > limit:
            raise CorruptError(f"{self.url}/{path} has {len(data)} bytes, more than the {limit} allowed")
        return data

    def fetch(self, path, size, sha256):
        data = self.read(path, size)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CorruptError(f"{self.url}/{path} is not what was committed")
        return data

    def size(self, path):
        return len(self._objects[path][0]) if path in self._objects else None

    def create(self, path, data):
        return self._objects.setdefault(path, (bytes(data), time.time()))[0] == data

    def replace(self, path, data):
        self._objects[path] = data, time.time()

    def remove(self, paths):
        for path in paths:
            self._objects.pop(path, None)

    def sizes(self, folder):
        return {path: len(data) for path, (data, _) in self._below(folder).items()}

    def folders(self, folder, holding):
        found = (path.partition("/") for path in self._below(folder))
        return sorted(name for name, _, rest in found if rest == holding)

    def newest(self, folder):
        return max(self.times(folder).values(), default=0)

    def times(self, folder):
        return {path: made for path, (_, made) in self._below(folder).items()}

    def changed(self, path):
        return self._at(path)[1]

    def _at(self, path):
        if path not in self._objects:
            raise NotFoundError(f"{self.url}/{path} is missing")
        return self._objects[path]

    def _below(self, folder):
        start = f"{folder}/"
        return {
            path.removeprefix(start): found for path, found in list(self._objects.items()) if path.startswith(start)
        }


@pytest.fixture
def _memory(monkeypatch):
    monkeypatch.setitem(BACKENDS, "memory", Memory)
    monkeypatch.setattr(Memory, "places", {})


@pytest.mark.usefixtures("_memory")
class TestMemory(BackendContract):
    scheme = "memory"

    @pytest.fixture
    def address(self):
        return "memory://team/kd"


def test_every_backend_of_the_table_has_a_row():
    """One that several schemes share needs one row."""
    rows = {row.scheme for row in (TestFolder, TestBucket, TestWeb)}
    assert None in rows and {BACKENDS[scheme] for scheme in rows - {None}} == set(BACKENDS.values())


def test_a_line_in_the_table_is_what_makes_an_address_known(request):
    with pytest.raises(InputError, match="no place for a registry") as caught:
        open_objects("memory://team/kd")
    assert all(f"{scheme}://" in str(caught.value) for scheme in BACKENDS)
    request.getfixturevalue("_memory")
    refused("pull toy-v1 --registry memory://team/kd", "memory://team/kd has no cache named toy-v1")
