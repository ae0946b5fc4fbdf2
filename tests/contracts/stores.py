"""What every kind of store must do. A store's tests are a subclass with its name in the table."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cache import Cache, KdcacheError
from kdcache.cache.errors import NotFoundError
from kdcache.pipeline.stores import STORES, Stored, open_store
from kdcache.tests.helpers.caches import same
from kdcache.tests.helpers.ffcv import Drawn, quiet
from kdcache.tests.helpers.images import arrays_data

VIEWS = 3
FIRST, SPREAD = ("crop,flip", "random"), ("crop,flip,gray(0.2),erase(0.25)", "spread")


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Any]:
    """A cache folder as it is built, of two parts and three views, and its images. Not to be changed.

    Its format is 1 but where a test asks for another policy and sequence.
    """
    policy, sequence = getattr(request, "param", FIRST)
    data = arrays_data(20, 5, 7)
    place = tmp_path_factory.mktemp("built")
    return Drawn(place / "c", data, policy, views=VIEWS, part=12, k=4, sequence=sequence).cache, data


class StoreContract:
    """name: that in STORES. The file of a subclass imports the fixture `built` too."""

    name: str

    def packed(self, built: tuple[Cache, Any], out: Path, views: tuple[int, ...] = tuple(range(VIEWS))) -> Path:
        """A store of this kind in the folder `out`."""
        cache, data = built
        store = STORES[self.name]
        path = out / f"c{store.suffix}"
        if store.pack is None:
            shutil.copytree(cache.path, path)
        else:
            store.pack(cache, path, views, data, quiet)
        return path

    def require_equal(self, store: Stored, cache: Cache, views: tuple[int, ...]) -> None:
        assert (store.key, store.identity, store.views) == (cache.key, cache.identity, views)
        assert store.prior is not None and cache.prior is not None and store.prior.equal(cache.prior)
        for mine, theirs in ((store.train, cache.train), (store.evaluation, cache.evaluation)):
            assert np.array_equal(mine.labels, theirs.labels)
        assert same(store.read_evaluation(), cache.read_evaluation())
        assert all(same(store.read(view), cache.read(view)) for view in views)

    @pytest.mark.parametrize("built", [FIRST, SPREAD], indirect=True, ids=["format-1", "spread"])
    def test_it_holds_what_was_built(self, built: tuple[Cache, Any], tmp_path: Path) -> None:
        path = self.packed(built, tmp_path)
        store = open_store(str(path))
        assert type(store) is STORES[self.name].open and store.where == str(path) and store.path == path
        self.require_equal(store, built[0], (0, 1, 2))
        store.train.require_sizes(built[1].sizes)

    def test_opened_again_elsewhere_it_is_the_same(self, built: tuple[Cache, Any], tmp_path: Path) -> None:
        moved = tmp_path / f"moved{STORES[self.name].suffix}"
        self.packed(built, tmp_path).rename(moved)
        for _ in range(2):
            self.require_equal(open_store(str(moved)), built[0], (0, 1, 2))

    def test_a_view_that_is_not_there_is_named(self, built: tuple[Cache, Any], tmp_path: Path) -> None:
        path = self.packed(built, tmp_path)
        with pytest.raises(NotFoundError, match=rf"view 7 .*{path.name}|{path.name}.* view 7"):
            open_store(str(path)).read(7)

    def test_chosen_views_alone_are_packed(self, built: tuple[Cache, Any], tmp_path: Path) -> None:
        if STORES[self.name].pack is not None:
            self.require_equal(open_store(str(self.packed(built, tmp_path, (0, 2)))), built[0], (0, 2))

    def test_packed_again_it_is_left_as_it_is_and_never_overwritten(
        self, built: tuple[Cache, Any], tmp_path: Path
    ) -> None:
        if STORES[self.name].pack is None:
            return
        path = self.packed(built, tmp_path)
        before = path.stat()
        assert self.packed(built, tmp_path) == path and path.stat().st_mtime_ns == before.st_mtime_ns
        with pytest.raises(KdcacheError, match=rf"{path.name} .*(never overwritten|something else)"):
            self.packed(built, tmp_path, (0, 1))
        assert path.stat().st_mtime_ns == before.st_mtime_ns and [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_damage_anywhere_is_read_as_nothing_but_an_error_that_names_the_file(
        self, built: tuple[Cache, Any], tmp_path: Path
    ) -> None:
        """A byte is changed in each of some 40 places; what is read then is refused or right."""
        path = self.packed(built, tmp_path)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
        places = [(file, 0) for file in files[:: max(1, len(files) // 40)]]
        if path.is_file():
            places = [(path, int(at)) for at in np.linspace(0, path.stat().st_size - 1, 40)]
        refused: list[str] = []
        for file, at in places:
            content = bytearray(file.read_bytes())
            content[at] ^= 0x55
            good, _ = file.read_bytes(), file.write_bytes(content)
            try:
                self.require_equal(open_store(str(path)), built[0], (0, 1, 2))
            except KdcacheError as error:
                refused.append(str(error))
            file.write_bytes(good)
        assert refused and all(str(path) in line and "\n" not in line for line in refused)
        self.require_equal(open_store(str(path)), built[0], (0, 1, 2))
