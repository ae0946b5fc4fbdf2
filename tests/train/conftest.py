"""For tests of training: a home with a teacher and caches of it, made once for all files."""

import os
import shutil

import pytest

from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.tests.helpers.training import quiet
from kdcache.train.config import TeachConfig
from kdcache.train.teach import teach


@pytest.fixture(scope="session")
def _first_home(tmp_path_factory):
    """The home that each file gets a copy of: teaching and building take longer than most tests."""
    folder = tmp_path_factory.mktemp("first-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(folder))
        patch.setattr(os, "fsync", lambda fd: None)
        teach(TeachConfig("resnet8", epochs=4), quiet)
        for name, precision in (("default", "float16"), ("exact", "float32")):
            build(BuildConfig("resnet8", views=3, precision=precision, out=str(folder / name)), quiet)
        build(BuildConfig("resnet8", views=2, topk=3, tail_std=True, out=str(folder / "top3")), quiet)
    return folder


@pytest.fixture(scope="module")
def home(_first_home, tmp_path_factory, no_fsync):
    """A taught teacher and caches of it: dense as stored by default, dense float32, and all of top 3."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(_first_home, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def data():
    return open_data("digits", "train")
