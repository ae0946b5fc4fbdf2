"""A cache on disk: what is written is read back, and what was damaged, forged or not committed never is."""

import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings

from kdcache.cache import Cache, open_cache
from kdcache.cache import errors as e
from kdcache.cache.files import publish, replace_file
from kdcache.cache.packing import pack_hdf5
from kdcache.cache.store.chunks import as_arrays
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import WRITER, Filled, identity, same, shapes

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is written is read back ----


@settings(max_examples=15, deadline=None)
@given(shapes())
def test_records_come_back_as_they_were_encoded(tmp_path_factory, about):
    path = tmp_path_factory.mktemp("cache")
    written = Filled(path / "c", about)
    cache = open_cache(path / "c")
    assert cache.views == (0, 1) and cache.key == about.key
    for view in cache.views:
        got = cache.read(view)
        assert same(got, written.encode(cache.train, view)[0])
        assert got.labels.equal(written.labels_in(cache.train, view).to(got.labels.dtype))
    assert same(cache.read_evaluation(), written.encode(cache.evaluation, 0)[0])
    if about.record.k is None:
        assert cache.prior is None
    else:
        # Summed in another order here.
        torch.testing.assert_close(cache.prior, written.prior(), rtol=1e-6, atol=1e-12)
    assert verify(cache).passed
    shutil.rmtree(path)


@pytest.mark.parametrize(("k", "mixed"), [(None, False), (4, False), (4, True)])
def test_plain_zarr_shows_named_arrays_with_the_same_values(tmp_path, k, mixed):
    cache = Filled(tmp_path / "c", identity(k=k, mixed=mixed)).cache
    dims = {
        "classes": ("sample", "rank"),
        "gaps": ("sample", "rank_from_2" if k else "class"),
        "target_gap": ("sample", "label"),
        "tail": ("sample", "temperature"),
    }
    for path, records in ((cache.path, cache.read(1)), (cache.path / "eval", cache.read_evaluation())):
        group = zarr.open_group(path / "views" / f"v{int(path == cache.path):05d}", mode="r")
        assert group.metadata.zarr_format == 3
        found = dict(group.arrays())
        assert set(found) == set(as_arrays(records)) - (set() if k else {"tail"})
        for name, array in found.items():
            assert array.metadata.dimension_names == dims[name]
            np.testing.assert_array_equal(array[:], getattr(records, name).numpy())
        labels = zarr.open_array(path / "labels", mode="r")
        assert labels.metadata.dimension_names == ("sample", "label")
        np.testing.assert_array_equal(labels[:], records.labels.numpy()[:, :1])
    if k:
        assert group["tail"].attrs["temperatures"] == [1.0, 4.0]
        np.testing.assert_array_equal(zarr.open_array(cache.path / "prior", mode="r")[:], cache.prior.numpy())


def test_plain_zarr_sees_a_hole_as_what_no_record_holds(filled):
    store = filled.cache.train
    filled.logits["train", 2] = filled.draw(store)
    filled.write(store, 2, 0)
    group = zarr.open_group(filled.cache.path / "views" / "v00002", mode="r")
    assert (group["classes"][8:] == 255).all() and np.isnan(group["gaps"][8:]).all()
    assert np.isnan(group["tail"][8:]).all() and np.isfinite(group["gaps"][:8]).all()


# ---- only commits make visible ----


def test_a_view_is_there_when_all_its_shards_are_committed(filled):
    store, cache = filled.cache.train, filled.cache
    filled.logits["train", 2] = filled.draw(store)
    for part in range(store.parts):
        assert Cache(cache.path).views == (0, 1)
        with pytest.raises(e.NotFoundError, match=rf"view 2 is not complete.*{3 - part} of 3 parts.*--views 3"):
            Cache(cache.path).read(2)
        filled.write(store, 2, part)
    assert Cache(cache.path).views == (0, 1, 2)
    (cache.path / "commits" / "v00002-p0001.json").unlink()
    with pytest.raises(e.NotFoundError, match="1 of 3 parts missing"):
        cache.read(2)
    with pytest.raises(e.NotFoundError, match="kdcache build with --views 8"):
        cache.read(7)


def test_files_without_their_commit_are_replaced_and_committed_ones_never(filled):
    store, path = filled.cache.train, filled.cache.path
    chunk = path / "views/v00002/gaps/c/0/0"
    publish(chunk, b"left by a builder that was killed", path / "scratch")
    filled.logits["train", 2] = filled.draw(store)
    for part in range(store.parts):
        filled.write(store, 2, part)
    assert same(filled.cache.read(2), filled.encode(store, 2)[0])
    before = chunk.read_bytes()
    filled.logits["train", 2] = filled.draw(store)
    assert not filled.write(store, 2, 0)
    assert chunk.read_bytes() == before


def test_a_name_that_no_shard_has_is_none(filled):
    commits = filled.cache.path / "commits"
    for name in (
        "v00005-p0000.json.tmp",
        "v5-p0.json",
        "v00005-p000٠.json",
        "v000005-p0000.json",
    ):
        shutil.copy(commits / "v00001-p0000.json", commits / name)
    assert filled.cache.train.committed() == {0: {0, 1, 2}, 1: {0, 1, 2}}
    shutil.copy(commits / "v00001-p0000.json", commits / "v00001-p0007.json")
    (problem,) = verify(filled.cache).problems
    assert "v00001-p0007.json: there is no part 7" in problem


def test_many_parts_and_views_are_found_again(tmp_path):
    cache = Cache.create(tmp_path / "c", identity(samples=10_002, part=1))
    commits = cache.path / "commits"
    commits.mkdir()
    for name in ("v123456-p10001", "v00000-p10000"):
        (commits / f"{name}.json").touch()
    assert cache.train.committed() == {123_456: {10_001}, 0: {10_000}}


def test_the_prior_is_fixed_by_view_0_and_never_silently_missing(tmp_path):
    written = Filled(tmp_path / "c", identity(), views=1)
    cache = written.cache
    early = Cache(tmp_path / "c")
    commit = cache.path / "commits" / "prior.json"
    kept = commit.read_bytes()
    commit.unlink()
    for read in (lambda c: c.read(0), lambda c: c.prior):
        with pytest.raises(e.NotFoundError, match="lacks its prior: run kdcache build again"):
            read(Cache(cache.path))
    assert not Cache(cache.path).finished
    shard = cache.path / "commits" / "v00000-p0000.json"
    shard.rename(tmp_path / "kept")
    assert early.prior is None and early.read_evaluation().prior is None
    (tmp_path / "kept").rename(shard)
    Cache(cache.path).write_prior(WRITER)
    assert json.loads(commit.read_bytes()) == json.loads(kept)
    assert early.prior is not None and Cache(cache.path).finished


# ---- files and folders ----


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(e.InputError, match="not empty and is no cache"):
        Cache.create(tmp_path, identity())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    # A builder that was stopped at once leaves its scratch folder, and must not be in its own way.
    (tmp_path / "c" / "scratch").mkdir(parents=True)
    (tmp_path / "c" / "scratch" / "123-abc").write_bytes(b"half an identity")
    cache = Cache.create(tmp_path / "c", identity())
    with cache.writing():
        assert not (tmp_path / "c" / "scratch" / "123-abc").exists()
    assert [p.name for p in (tmp_path / "c").rglob("*") if p.is_file()] == ["identity.json"]
    with pytest.raises(e.MismatchError, match=r"record\.k: the cache has 4, asked for 3"):
        Cache.create(tmp_path / "c", identity(k=3))


def test_another_builder_may_create_the_cache_at_any_moment(tmp_path, monkeypatch):
    about = identity()

    def overtaken(fd):
        monkeypatch.undo()
        with Cache.create(tmp_path / "c", about).writing():
            pass
        os.fsync(fd)

    monkeypatch.setattr(os, "fsync", overtaken)
    assert Cache.create(tmp_path / "c", about).identity == about


def test_a_scratch_folder_that_leads_elsewhere_is_not_cleared(filled, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    shutil.rmtree(filled.cache.path / "scratch")
    (filled.cache.path / "scratch").symlink_to(mine)
    with pytest.raises(e.CorruptError, match="scratch is a symbolic link"), filled.cache.writing():
        pass
    assert (mine / "thesis.tex").exists()


def test_published_files_are_never_changed(tmp_path):
    path, scratch = tmp_path / "a" / "b", tmp_path / "scratch"
    publish(path, b"one", scratch)
    publish(path, b"one", scratch)
    with pytest.raises(e.CorruptError, match="never overwritten"):
        publish(path, b"two", scratch)
    assert path.read_bytes() == b"one"
    publish(path, b"two", scratch, replace=True)
    assert path.read_bytes() == b"two"
    # A link is no file of ours even where it leads to the same bytes: readers would refuse it.
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    publish(path, b"two", scratch, replace=True)
    assert not path.is_symlink() and path.read_bytes() == b"two"
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("write", [lambda p, d: publish(p, d, p.parent), replace_file])
def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path, write):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(tmp_path / "x", b"a" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_cache_that_is_being_written(filled, monkeypatch):
    size = filled.cache.size()
    assert size == sum(p.stat().st_size for p in filled.cache.path.rglob("*") if p.is_file())
    gone = filled.cache.path / "scratch" / "gone"
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda path: [*walk(path), (str(gone.parent), [], [gone.name])])
    assert filled.cache.size() == size


@pytest.mark.parametrize("packed", [False, True])
def test_some_records_of_a_view_are_those_of_the_whole(tmp_path, packed):
    """Of parts that hold none of them nothing is read, and each other part is checked as a whole."""
    cache = Filled(tmp_path / "c", identity(samples=100, part=16, precision="uint8", tail_std=True)).cache
    if packed:
        pack_hdf5(cache, tmp_path / "c.h5", cache.views)
    read = Cache(tmp_path / "c.h5" if packed else tmp_path / "c")
    whole, out = cache.read(1), None
    for samples in (np.arange(100), np.arange(3, 100, 7), np.arange(4, 100, 7), np.array([16]), np.arange(0)):
        out = read.read(1, out if out is not None and len(out) == len(samples) else None, samples, threads=2)
        assert same(out, whole[torch.from_numpy(samples)])
    if not packed:
        (file,) = (tmp_path / "c/views/v00001/gaps/c/1").glob("*")
        file.write_bytes(file.read_bytes()[:-1])
        assert len(read.read(1, samples=np.array([0, 15, 32]))) == 3
        with pytest.raises(e.CorruptError, match=r"gaps/c/1/0 .*v00001-p0001"):
            read.read(1, samples=np.array([0, 16]))
