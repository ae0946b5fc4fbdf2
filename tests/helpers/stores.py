"""The kinds of stores that a cache folder is turned into, and what is in them."""

from kdcache.cache import Cache
from kdcache.cache import packing as packing
from kdcache.cache.packing import pack_hdf5, unpack_hdf5
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.tests.helpers.images import toy_data


def folder(cache, place):
    return cache


def hdf5_file(cache, place):
    assert pack_hdf5(cache, place / "c.h5", cache.views)
    return Cache(place / "c.h5")


def unpacked(cache, place):
    unpack_hdf5(hdf5_file(cache, place), place / "u")
    return Cache(place / "u")


def beton(cache, place):
    return FFCVFile(pack_ffcv(cache, toy_data(cache, place), place / "c.beton", None, lambda line: None))


# Each makes, of a cache folder, what has `identity`, `views` and `read(view)`; CACHES can do all that a folder can.
CACHES = {"folder": folder, "hdf5": hdf5_file, "unpacked": unpacked}
STORES = {**CACHES, "ffcv": beton}


def read_all(cache):
    assert cache.train.sizes.min() > 0 < cache.evaluation.sizes.min()
    return [cache.read_evaluation(), *(cache.read(v) for v in cache.views)]


def tree(path):
    """Contents by name, without what a build keeps for itself."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if not name.startswith("scratch/")}
