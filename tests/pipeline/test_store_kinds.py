"""Each kind of store in the table does what all of them must do."""

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from kdcache.cache import Cache
from kdcache.cache.errors import InputError
from kdcache.cache.home import WITH_IMAGES
from kdcache.cache.records.choices import FileStore, StoreName
from kdcache.pipeline.pack import pack
from kdcache.pipeline.stores import STORES, Store, open_store
from kdcache.tests.contracts.stores import StoreContract, built
from kdcache.tests.helpers.ffcv import quiet
from kdcache.train.plan.feeds import CacheFeed, feed_of

__all__ = ["built"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


class TestFolder(StoreContract):
    name = "zarr"


class TestHDF5(StoreContract):
    name = "hdf5"


class TestFFCV(StoreContract):
    name = "ffcv"


class ToyStore(Cache):
    """A folder with a name of its own, as a new kind of store."""


def _pack_toy(cache: Cache, out: Path, views: Any, data: Any, say: Any) -> None:
    if out.exists():
        if ToyStore(out).views != views:
            raise InputError(f"{out} holds something else")
        return
    shutil.copytree(cache.path, out)
    for view in set(cache.views) - set(views):
        for commit in (out / "commits").glob(f"v{view:05d}-*"):
            commit.unlink()


class TestToy(StoreContract):
    """What a new kind costs: a row in the table, and a class like this."""

    name = "toy"

    @pytest.fixture(autouse=True)
    def _row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(STORES, "toy", Store(".toy", ToyStore, _pack_toy))

    def test_the_command_packs_into_it(self, built: tuple[Cache, Any], tmp_path: Path) -> None:
        found = pack(built[0].path, "toy", str(tmp_path / "p.toy"), range(0, 2), say=quiet)  # type: ignore[arg-type]
        assert (found.views, found.key) == (2, built[0].key) and found.path == tmp_path / "p.toy"

    def test_a_student_learns_from_it(self, built: tuple[Cache, Any], tmp_path: Path) -> None:
        cache, data = built
        _pack_toy(cache, tmp_path / "p.toy", cache.views, data, quiet)
        feed = feed_of(open_store(str(tmp_path / "p.toy")))
        assert isinstance(feed, CacheFeed) and (feed.labels() == cache.train.labels).all()
        _, labels, records = next(iter(feed.loader(data, 4, False, quiet)))
        assert len(labels) == len(records.target_gap) == 4


def test_what_can_be_asked_for_stands_in_the_table() -> None:
    assert list(STORES) == list(get_args(StoreName))
    assert [name for name, store in STORES.items() if store.pack] == list(get_args(FileStore))
    assert [store.suffix for store in STORES.values() if store.open is not Cache] == list(WITH_IMAGES)
