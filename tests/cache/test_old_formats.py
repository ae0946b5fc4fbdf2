"""Caches that earlier versions wrote stay readable: tests/data holds one of each format, and the logits behind it.

A folder is never made again once its format has been released. cache (and cache.h5, the same packed): top 4 of 20
classes in uint8 with tail-std, two views in two parts; dense.h5: all classes in float16.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.places import DATA

FORMATS = sorted(DATA.glob("format-*"))


def softmax64(z, t):
    e = np.exp((z - z.max(1, keepdims=True)) / t)
    return e / e.sum(1, keepdims=True)


def splits(path):
    """Records, logits in float64 and labels of the evaluation split and of each view."""
    cache, truth = open_cache(path), np.load(path.parent / "logits.npz")
    yield cache.read_evaluation(), truth["evaluation"].astype(np.float64), truth["evaluation_labels"]
    assert cache.views == (0, 1)
    for view in cache.views:
        yield cache.read(view), truth["train"][view].astype(np.float64), truth["train_labels"]


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
