"""The same cache from every kind of store: equal records, and no damage, forgery or interruption that is read."""

import json
import multiprocessing
import shlex
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings

from kdcache.cache import Cache, KdcacheError, open_cache
from kdcache.cache import errors as e
from kdcache.cache import packing as packing
from kdcache.cache.home import list_caches
from kdcache.cache.packing import choose_views, pack_hdf5
from kdcache.cache.store import chunks
from kdcache.cli import main
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import BOTH, Filled, identity, same, shapes
from kdcache.tests.helpers.stores import CACHES, STORES, hdf5_file, read_all, tree

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


# ---- what is written is read back ----


@settings(max_examples=6, deadline=None)
@given(shapes())
def test_every_store_gives_the_same(tmp_path_factory, about):
    place = tmp_path_factory.mktemp("stores")
    written = Filled(place / "c", about)
    for name, make in STORES.items():
        (place / name).mkdir()
        if name == "ffcv" and about.views.mixed:
            with pytest.raises(e.InputError, match=r"has mixed views .*: train from the cache itself, or pack it --to"):
                make(written.cache, place / name)
            continue
        store = make(written.cache, place / name)
        assert store.identity == about and store.views == (0, 1)
        for view in store.views:
            got = store.read(view)
            assert same(got, written.encode(written.cache.train, view)[0])
            assert got.labels.equal(written.labels_in(written.cache.train, view).to(got.labels.dtype))
            assert (got.prior is None) == about.record.dense
            assert got.prior is None or got.prior.equal(written.cache.prior)
        if name in CACHES:
            assert same(store.read_evaluation(), written.encode(written.cache.evaluation, 0)[0])
            assert np.array_equal(store.evaluation.labels, written.cache.evaluation.labels)
            assert store.finished and verify(store).passed
    assert tree(place / "unpacked" / "u") == tree(place / "c")  # to the byte, commits and all
    shutil.rmtree(place)


@pytest.mark.parametrize("k", [None, 4])
def test_h5py_alone_reads_the_arrays(tmp_path, k):
    cache = Filled(tmp_path / "c", identity(k=k, temperatures=(1.0, 4.0) if k else ())).cache
    hdf5_file(cache, tmp_path)
    with h5py.File(tmp_path / "c.h5") as f:
        assert bytes(f["identity.json"][:]) == (cache.path / "identity.json").read_bytes()
        for name in ("commits/v00001-p0002.json", "eval/commits/labels.json"):
            assert bytes(f[name][:]) == (cache.path / name).read_bytes()
        for store, name in cache.contents(cache.views):
            for where, spec, part in store.chunks(name):
                found = f["/".join(filter(None, ["" if store is cache.train else "eval", where, spec.name]))]
                assert (found.shape, found.dtype, found.chunks) == (spec.shape, spec.dtype, spec.chunk_shape)
                assert (found.compression, found.shuffle, found.fletcher32) == ("gzip", True, True)
                assert tuple(d.label for d in found.dims) == spec.dims
                assert dict(found.attrs).keys() == {"DIMENSION_LABELS", *dict(spec.attributes)}
                np.testing.assert_array_equal(found.fillvalue, spec.fill)
                rows = found[spec.interval(part)]
                if where:
                    records = cache.read(int(where[-5:])) if store is cache.train else cache.read_evaluation()
                    np.testing.assert_array_equal(rows, chunks.as_arrays(records)[spec.name][spec.interval(part)])
        np.testing.assert_array_equal(f["labels"][:], cache.train.labels)
        if k:
            np.testing.assert_array_equal(f["prior"][:], cache.prior.numpy())
            assert list(f["views/v00000/tail"].attrs["temperatures"]) == [1.0, 4.0]


@pytest.mark.parametrize("toy", BOTH, indirect=True)
def test_packing_twice_gives_the_same_bytes(toy, tmp_path):
    pack_hdf5(toy[0].cache, tmp_path / "again.h5", (0, 1))
    assert (tmp_path / "again.h5").read_bytes() == toy[1].read_bytes()
    # And packing what is packed.
    pack_hdf5(Cache(toy[1]), tmp_path / "third.h5", (0, 1))
    assert (tmp_path / "third.h5").read_bytes() == toy[1].read_bytes()


def test_chosen_views_are_all_there_is_and_the_prior_stays(tmp_path):
    written = Filled(tmp_path / "c", identity(), views=4)
    pack_hdf5(written.cache, tmp_path / "c.h5", choose_views(written.cache, range(2, 4)))
    cache = Cache(tmp_path / "c.h5")
    assert cache.views == (2, 3) and cache.finished and verify(cache).passed
    assert same(cache.read(3), written.cache.read(3)) and cache.prior.equal(written.cache.prior)
    with pytest.raises(e.NotFoundError, match=r"view 0 is not complete in .*c\.h5 .*kdcache unpack"):
        cache.read(0)
    assert cache.size() < written.cache.size()


def test_only_what_is_complete_is_packed(tmp_path):
    written = Filled(tmp_path / "c", identity(), views=2)
    cache = written.cache
    written.logits["train", 2] = written.draw(cache.train)
    written.write(cache.train, 2, 0)
    assert choose_views(cache, None) == (0, 1)
    for views in (range(2, 3), range(0, 4)):
        with pytest.raises(e.NotFoundError, match="has no complete view 2: choose --views among its 2 complete ones"):
            choose_views(cache, views)
    for name in ("commits/prior.json", "eval/commits/v00000-p0001.json"):
        kept = (cache.path / name).read_bytes()
        (cache.path / name).unlink()
        with pytest.raises(KdcacheError, match="run kdcache build again"):
            choose_views(Cache(cache.path), None)
        (cache.path / name).write_bytes(kept)


# ---- readers in other processes ----


def _sum(cache):
    return [float(r.gaps.float().sum()) for r in read_all(cache)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_cache_is_read_in_other_processes_at_once(toy, method):
    shards = [(view, part) for view in (0, 1) for part in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where threads are: those are meant here
        with ProcessPoolExecutor(2 if method == "fork" else 1, multiprocessing.get_context(method)) as processes:
            for cache in (toy[0].cache, Cache(toy[1])):
                want = [cache.train.check_shard(*shard) for shard in shards]
                futures = [processes.submit(cache.train.check_shard, *shard) for shard in shards]
                for found, shard in zip([f.result(100) for f in futures], want, strict=True):
                    assert found.keys() == shard.keys() and all(np.array_equal(found[n], shard[n]) for n in shard)


def test_threads_read_one_cache_at_once(toy):
    for cache in (toy[0].cache, Cache(toy[1])):
        want = _sum(cache)
        with ThreadPoolExecutor(8) as threads:
            assert all(found == want for found in threads.map(lambda _, c=cache: _sum(c), range(24)))


def test_a_packed_file_needs_no_right_to_write_and_may_lie_behind_a_link(packed, tmp_path):
    want = _sum(Cache(packed))
    packed.chmod(0o400)
    (tmp_path / "link.h5").symlink_to(packed)
    assert _sum(Cache(tmp_path / "link.h5")) == want


# ---- found by key ----


def test_a_packed_cache_is_found_by_its_key(toy, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    key, caches = toy[0].cache.key, tmp_path / "home" / "caches"
    caches.mkdir(parents=True)
    shutil.copy(packed, caches / f"{key}.h5")
    (caches / f".{key}.h5.packing").touch()
    (caches / f"{key}.beton").touch()
    assert open_cache(key[:8]).path == caches / f"{key}.h5"
    good, bad = list_caches()
    assert [c.packed for c in good] == [True] and bad == []
    shutil.copytree(toy[0].cache.path, caches / key)
    assert open_cache(key[:8]).path == caches / key
    good, bad = list_caches()
    assert [c.packed for c in good] == [False, True] and bad == []
    (caches / "other.h5").write_bytes(b"mine")
    assert len(list_caches()[1]) == 1


# ---- the command line ----

TEACHER = """
import numpy as np, torch
from torch import nn

def images(split):
    rng = np.random.default_rng(split == "train")
    labels = np.arange(150 if split == "train" else 40) % 5
    patterns = np.random.default_rng(2).integers(0, 256, (5, 8, 8, 3))
    noisy = patterns[labels] + rng.normal(0, 60, (len(labels), 8, 8, 3))
    return np.clip(noisy, 0, 255).astype("u1"), labels, tuple("abcde")

def net(classes):
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, classes))
"""


def run(line, status=0):
    result = CliRunner().invoke(main, shlex.split(line), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def test_build_pack_train_and_unpack(tmp_path, monkeypatch):
    (tmp_path / "kd_stores.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    data = "--data kd_stores:images"
    build = f"build --teacher kd_stores:net {data} --topk 3 --allow-low-accuracy --batch-size 32"
    facts = json.loads(run(f"{build} --views 3 --store hdf5 --out c --json").stdout)
    assert facts["packed"] | {"seconds": 0} == {
        "path": "c.h5", "key": facts["key"], "views": 3, "bytes": Path("c.h5").stat().st_size, "seconds": 0,
    }  # fmt: skip
    assert "holds these views already" in run("pack c --to hdf5").stderr
    few = json.loads(run("pack c --to hdf5 --views 1:3 --json").stdout)
    assert (few["path"], few["views"]) == ("c-views-1-3.h5", 2)
    assert "about" in run("pack c --to hdf5 --views 0:1 --out one.h5").stderr
    for views in ("3:3", "2", "a:b", "1:", "-1:2", "0:100001"):
        assert "is not a range A:B of views" in run(f"pack c --to hdf5 --views {views}", 2).stderr
    assert "no complete view 3" in run("pack c --to hdf5 --views 2:9", 2).stderr
    shutil.move("c", "away")

    assert json.loads(run("info c.h5 --json").stdout)["store"] == "hdf5"
    assert "3 complete" in run("info c.h5").stdout
    assert "passed" in run(f"verify c.h5 {data} --teacher kd_stores:net").stdout
    train = f"train --student resnet8 {data} --cache c.h5 --epochs 2 --batch-size 32 --out run --json"
    summary = json.loads(run(train).stdout)
    assert summary["top1"] == json.loads(run(f"eval run {data} --json").stdout)["top1"]
    assert "kdcache unpack c.h5" in run(f"{build} --views 4 --out c.h5", 2).stderr

    assert json.loads(run("unpack c.h5 --json").stdout)["views"] == 3
    again = json.loads(run(f"{build} --views 4 --json").stdout)
    assert (again["views"], again["teacher_images"]) == (4, 150) and again["key"] == facts["key"]
    shutil.copy("c.h5", tmp_path / "home" / "caches" / f"{facts['key']}.h5")
    assert run("ls").stdout.count("\n") == 2
    # A folder and its packed copy are one cache to choose from.
    run(f"train --student resnet8 {data} --epochs 1 --batch-size 32 --out second")
    assert "is a folder already" in run("unpack away", 2).stderr
    with Path("c.h5").open("r+b") as f:
        f.seek(600)
        f.write(b"damage")
    assert "is not what was packed" in run("verify c.h5 --depth contents", 1).stdout
