"""Caches in a folder and packed, which the tests of this folder read, damage and pack."""

import shutil
from pathlib import Path

import pytest

from kdcache.tests.helpers.caches import BOTH, FORMATS, Filled, identity
from kdcache.tests.helpers.stores import hdf5_file


@pytest.fixture(params=BOTH)
def filled(request, tmp_path):
    """A cache of one's own in a folder, with two views."""
    return Filled(tmp_path / "cache", identity(**FORMATS[request.param]))


@pytest.fixture(scope="module")
def toy(request, tmp_path_factory):
    """A cache with 2 views, and the file packed from it: not to be changed. Its format is 1 but where tests ask."""
    place = tmp_path_factory.mktemp("toy")
    written = Filled(place / "c", identity(part=16, **FORMATS[getattr(request, "param", "format-1")]))
    hdf5_file(written.cache, place)
    return written, place / "c.h5"


@pytest.fixture
def packed(toy, tmp_path):
    """A packed file of one's own."""
    return Path(shutil.copy(toy[1], tmp_path / "c.h5"))
