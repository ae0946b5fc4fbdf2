"""For all files; fixtures of several: registries of each kind that can be written, all of them empty."""

import os
import signal

import pytest

BUCKETS = 100

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; what we start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def s3():
    """The address of an S3 server."""
    from kdcache.tests.helpers.servers import s3_server

    with s3_server([f"bucket{i}" for i in range(BUCKETS)]) as address:
        yield address


@pytest.fixture
def bucket(s3, count=iter(range(BUCKETS))):  # noqa: B008  one each: what is in them outlives the server
    """An empty bucket's address."""
    return f"s3://bucket{next(count)}/team/kd"


@pytest.fixture(params=["folder", "bucket"])
def root(request, tmp_path):
    """An empty registry of each kind that can be written."""
    return str(tmp_path / "shared") if request.param == "folder" else request.getfixturevalue("bucket")


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """The current directory is empty, and KDCACHE_HOME is a folder in it."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def impatient():
    """Requests to servers are given up soon, nothing is synced to the disk, and one thread computes."""
    import torch

    from kdcache.cache.registry import objects

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(objects, "PATIENCE", 8.0)
        patch.setattr(objects, "AT_FIRST", 1.0)
        yield
    torch.set_num_threads(threads)
