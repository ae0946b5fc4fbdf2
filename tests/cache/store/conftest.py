"""Caches in a folder and packed, which the tests of this folder read, damage and pack."""

import shutil
from pathlib import Path

import pytest

from kdcache.tests.helpers.caches import Filled, identity
from kdcache.tests.helpers.stores import hdf5_file


@pytest.fixture
def filled(tmp_path):
    """A cache of one's own in a folder, with two views."""
    return Filled(tmp_path / "cache", identity())


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A cache with 2 views, and the file packed from it: not to be changed."""
    place = tmp_path_factory.mktemp("toy")
    written = Filled(place / "c", identity(part=16))
    hdf5_file(written.cache, place)
    return written, place / "c.h5"


@pytest.fixture
def packed(toy, tmp_path):
    """A packed file of one's own."""
    return Path(shutil.copy(toy[1], tmp_path / "c.h5"))
