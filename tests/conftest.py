"""Fixtures of several files: a home of one's own, one thread, and empty registries of each kind that can be written."""

import os
import signal
import tempfile

import pytest

# Helpers and contracts hold assertions too: pytest shall explain those that fail, as it does in test files.
pytest.register_assert_rewrite("kdcache.tests.helpers", "kdcache.tests.contracts")

BUCKETS = 100

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; what we start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """What the library `datasets` copies goes into a folder of the tests: it reads these names when it is imported."""
    folder = tempfile.TemporaryDirectory(prefix="hugging_face_")
    config.add_cleanup(folder.cleanup)
    os.environ["HF_HOME"] = folder.name
    os.environ.pop("HF_DATASETS_CACHE", None)


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


# Tests that train, build whole caches, wait for other processes or try very many cases: `make quick` goes without them.
# What a test's address begins with, below tests/; a single test elsewhere can say so itself: @pytest.mark.slow.
SLOW = (
    "bench/test_fuzz",
    "bench/test_gpu.py::test_a_dry_run",
    "cache/registry/test_bucket",
    "cache/registry/test_registry",
    "cache/registry/test_remote",
    "cache/registry/test_signed",
    "cache/store/test_leases",
    "cache/store/test_damage",
    "cache/store/test_packing",
    "cache/test_care.py::test_rm_that_is_stopped_anywhere",
    "cache/test_shared_folders",
    "cli/",
    "machines/",
    "pipeline/build",
    "pipeline/cluster/test_ray",
    "pipeline/data/test_containers",
    "pipeline/data/test_decode.py::test_a_short_run_of_the_fuzz",
    "pipeline/data/test_decode.py::test_one_changed_byte_in_a_png",
    "pipeline/data/test_forms",
    "pipeline/data/test_hf",
    "pipeline/ensembles/test_mix",
    "pipeline/ffcv",
    "pipeline/imports",
    "pipeline/process/test_progress",
    "pipeline/sheet",
    "pipeline/teachers/test_checkpoints",
    "pipeline/teachers/test_examples",
    "pipeline/teachers/test_teacher",
    "pipeline/teachers/test_timm_arguments",
    "pipeline/teachers/test_weightstore",
    "pipeline/teachers/test_zoos",
    "pipeline/test_trust",
    "pipeline/views/operations/test_compiled.py::test_only_who_changes_pixels",
    "test_front_page.py::test_the_lines",
    "test_packaging",
    "test_pages.py::test_the_blocks_of_a_page_run",
    "train/bench",
    "train/evaluation/analysis/test_predictions",
    "train/evaluation/test_parts",
    "train/evaluation/test_validation",
    "train/export",
    "train/loaders",
    "train/loop",
    "train/plan",
    "train/losses/test_contract.py::test_any_shape_and_range",
    "train/report",
    "train/test_",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker("slow")


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """The current directory is empty, and KDCACHE_HOME is a folder in it."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def one_thread():
    """Torch computes with one thread: for tensors as small as the tests', more only wait for each other."""
    import torch  # slow, and some files do without it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def no_fsync():
    """Files are not synced to the disk, which takes most of the time of writing small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def impatient(one_thread, no_fsync):
    """Requests to servers are given up after a few seconds."""
    from kdcache.cache.registry.kinds import network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "PATIENCE", 8.0)
        patch.setattr(network, "AT_FIRST", 1.0)
        yield
