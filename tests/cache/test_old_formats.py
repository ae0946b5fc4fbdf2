"""Caches that earlier versions wrote stay readable: tests/data holds one of each format, and the logits behind it.

A folder is never made again once its format has been released. cache (and cache.h5, the same packed): top 4 of 20
classes in uint8 with tail-std, two views in two parts; dense.h5: all classes in float16. In format-2, whose views are
mixed, dense.h5 has five views, of two pairings; tests/helpers/formats.py has made it.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.parameters import draw_as
from kdcache.tests.helpers.formats import make
from kdcache.tests.helpers.places import DATA

FORMATS = sorted(DATA.glob("format-*"))
# By folder and file: the key, the views, and a hash of the parameters that the commits of training shards name.
HELD = {
    "format-1/cache": ("99eff46d45935128a13b495e8a45fd456b775e53b5bbe57f191e5b98d35db73b", 2, "ee47304f59981777"),
    "format-1/cache.h5": ("99eff46d45935128a13b495e8a45fd456b775e53b5bbe57f191e5b98d35db73b", 2, "ee47304f59981777"),
    "format-1/dense.h5": ("f120d2ff297842065b6a8d2c8757aa84e6e1998f450a8f46c3f88f8bd60afc5d", 2, "ee47304f59981777"),
    "format-2/cache": ("70b57e887801a3a89b291ab2234efa9f770c009254f92f2548685aea9460e43b", 2, "32d5efcf364e95d1"),
    "format-2/cache.h5": ("70b57e887801a3a89b291ab2234efa9f770c009254f92f2548685aea9460e43b", 2, "32d5efcf364e95d1"),
    "format-2/dense.h5": ("fde359396c3f007e732568d2a11f0c8a97e9a33958e9109811616b4df1c91af9", 5, "9009af8483ef7523"),
}


def softmax64(z, t):
    e = np.exp((z - z.max(1, keepdims=True)) / t)
    return e / e.sum(1, keepdims=True)


def splits(path):
    """Records, logits in float64 and labels of the evaluation split and of each view."""
    cache, truth = open_cache(path), np.load(path.parent / "logits.npz")
    yield cache.read_evaluation(), truth["evaluation"].astype(np.float64), truth["evaluation_labels"]
    assert cache.views == tuple(range(HELD[f"{path.parent.name}/{path.name}"][1]))
    for view in cache.views:
        labels = truth["train_labels"]  # of mixed views, in each view those of the partners too
        yield cache.read(view), truth["train"][view].astype(np.float64), labels[view] if labels.ndim == 3 else labels


@pytest.mark.parametrize(
    "path", [f / name for f in FORMATS for name in ("cache", "cache.h5")], ids=lambda p: f"{p.parent.name}-{p.name}"
)
def test_top_k_records_mean_what_they_did(path):
    for records, z, labels in splits(path):
        assert np.array_equal(records.labels.numpy(), labels)
        order = np.argsort(-z, axis=1, kind="stable")[:, :4]
        assert np.array_equal(records.classes.numpy(), order)
        kept = np.concatenate([order, labels], 1)
        for t in (1.0, 4.0):
            got, want = records.dense(t, "uniform").double().numpy(), softmax64(z, t)
            # Steps of 1/8 nat for gaps and tails.
            np.testing.assert_allclose(
                np.take_along_axis(got, kept, 1), np.take_along_axis(want, kept, 1), rtol=0.13, atol=1e-4
            )
        std = z.std(1, ddof=1, keepdims=True)
        got = records.standardised(2.0, "uniform").dense().double().numpy()
        want = softmax64(z / std, 2.0)
        np.testing.assert_allclose(
            np.take_along_axis(got, kept, 1), np.take_along_axis(want, kept, 1), rtol=0.03, atol=1e-4
        )
        assert records.prior.shape == (3, 20) and records.prior.sum(1).numpy() == pytest.approx(1, abs=1e-5)
    assert verify(open_cache(path)).passed


@pytest.mark.parametrize("path", [f / "dense.h5" for f in FORMATS], ids=lambda p: f"{p.parent.name}-{p.name}")
def test_dense_records_mean_what_they_did(path):
    for records, z, labels in splits(path):
        assert np.array_equal(records.labels.numpy(), labels)
        np.testing.assert_allclose(records.dense(1.0).double().numpy(), softmax64(z, 1.0), rtol=0.01, atol=1e-6)
    assert verify(open_cache(path)).passed


@pytest.mark.parametrize("folder", FORMATS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_reading_one_leaves_it_as_it_is(folder, tmp_path):
    path = Path(shutil.copytree(folder, tmp_path / "old")) / "cache"
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert open_cache(path).finished and verify(open_cache(path)).passed
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def parameters(cache):
    """The digests of view parameters by the name of the shard."""
    names = [shard_name(view, part) for view in cache.views for part in range(cache.train.parts)]
    return {name: cache.train.commit(name).parameters for name in names}


@pytest.mark.parametrize("name", HELD)
def test_keys_and_parameters_are_what_they_were(name):
    cache = open_cache(DATA / name)
    found = hashlib.sha256(json.dumps(parameters(cache)).encode()).hexdigest()
    assert (cache.key, len(cache.views), found[:16]) == HELD[name]
    assert cache.identity.format == int(name[7])


@pytest.mark.parametrize("name", [name for name in HELD if name.startswith("format-2")])
def test_the_views_of_format_2_are_drawn_as_they_were(name):
    """Every operation, both sequences, pairs and how they are mixed: a change would make such caches useless."""
    cache = open_cache(DATA / name)
    store, views = cache.train, cache.identity.views
    for shard, digest in parameters(cache).items():
        view, part = int(shard[1:6]), int(shard[-4:])
        assert draw_as(views, view, store.rows(part), store.sizes).digest() == digest, shard


def test_what_made_format_2_makes_it_again(tmp_path):
    make(tmp_path)
    for name in ("cache", "cache.h5", "dense.h5"):
        again, old = open_cache(tmp_path / name), open_cache(DATA / "format-2" / name)
        assert again.key == old.key and parameters(again) == parameters(old)
        assert np.array_equal(again.train.labels, old.train.labels) and np.array_equal(
            again.train.sizes, old.train.sizes
        )
