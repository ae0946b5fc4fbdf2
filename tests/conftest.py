"""For all files; fixtures of several: registries of each kind that can be written, all of them empty."""

import signal

import pytest

BUCKETS = 100

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; what we start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def s3():
    """The address of an S3 server."""
    from kdcache.tests.cache.registry.test_registry import s3_server  # slow to import, and few files need it

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
