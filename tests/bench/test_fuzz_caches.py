"""A short run of bench/fuzz_caches.py: damaged and hostile caches end in the same values or in a KdcacheError."""

import random
import shutil
import warnings

import pytest

from kdcache.cache.packing import pack_hdf5
from kdcache.tests.helpers.places import bench_script


@pytest.fixture(scope="module")
def fuzz():
    return bench_script("fuzz_caches")


@pytest.fixture(params=["folder", "hdf5"])
def box(request, fuzz, tmp_path):
    cache = fuzz.small_cache(tmp_path / "folder")
    shutil.rmtree(cache.path / "scratch", ignore_errors=True)
    if request.param == "folder":
        return fuzz.Sandbox(cache.path)
    pack_hdf5(cache, tmp_path / "cache.h5", cache.views)
    return fuzz.Sandbox(tmp_path / "cache.h5")


def test_a_flipped_bit_is_found_and_named_or_changes_nothing(fuzz, box):
    rng = random.Random(1)
    for _ in range(40):
        outcome, kind = fuzz.flip(box, rng)
        assert outcome in ("found", "harmless"), kind
        # Nothing but what only people and plain zarr read can change unseen.
        assert outcome == "found" or kind.startswith(("commit", "zarr.json"))
        box.restore()


def test_any_damage_is_refused_or_changes_nothing(fuzz, box):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where threads are: those are meant here
        found = fuzz.in_processes(box, range(10**6, 10**6 + 120))
    assert sum(found.values()) == 120
    for (outcome, kind), cases in found.items():
        good = ("refused", "same", "fewer views") + (("other values",) if kind == "forged" else ())
        assert outcome in good, (outcome, kind, cases)
