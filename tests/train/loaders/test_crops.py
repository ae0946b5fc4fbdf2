"""Loaders that take every image in several views at once: the same records, as often, and what cannot be."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdcache.cache import KdcacheError, open_cache
from kdcache.pipeline.views.parameters import draw_as
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers.training import BATCH, teacher_of
from kdcache.train.config import TrainConfig
from kdcache.train.evaluation.validation import held_out_part
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader
from kdcache.train.loaders.order import EpochOrder, Epochs
from kdcache.train.plan.feeds import FFCVFeed
from kdcache.train.run import train


class Bare(Epochs):
    """The epochs of a loader that has nothing else."""

    def __init__(self, samples, batch, views, crops, mixed=False):
        self._order, self._views = EpochOrder(samples, batch, 0, 1, 0, mixed, crops), views
        self._require_crops("the cache", mixed)

    def taken(self, epochs):
        """How often each (view, sample) is taken."""
        return Counter(
            (view, sample)
            for epoch in range(epochs)
            for batch in self._order.batches(epoch)
            for sample in batch.tolist()
            for view in self._views_of(epoch)
        )


@pytest.mark.parametrize(("crops", "views", "turns"), [(2, 4, 4), (3, 4, 4), (4, 4, 2), (2, 3, 3), (4, 6, 3)])
def test_after_whole_rounds_each_view_of_each_sample_was_taken_as_often_as_without(crops, views, turns):
    numbers = tuple(range(10, 10 + views))
    one, other = (Bare(240, 24, numbers, m).taken(crops * turns) for m in (1, crops))
    assert one == other
    assert max(one.values()) - min(one.values()) <= 1


def test_of_the_next_round_a_view_more_is_read_in_each_epoch(home, data):
    reader = CachedLoader(open_cache(home / "default"), data, BATCH, crops_per_decode=2)._reader
    for epoch, now, after in ((0, [0, 1], [2]), (1, [0, 1], [2, 0]), (2, [2, 0], [1]), (3, [2, 0], [1, 2])):
        assert [of.view for of in reader.wanted(epoch)] == now and [of.view for of in reader.after(epoch)] == after


@pytest.mark.parametrize(("crops", "kind"), [(2, "exact"), (3, "default")])
def test_each_image_comes_in_its_views_with_the_records_of_each(home, data, crops, kind):
    cache = open_cache(home / kind)
    loader = CachedLoader(cache, data, 12 * crops, crops_per_decode=crops)
    renderer, answers = Renderer(data, None, torch.device("cpu"), cache.identity.views.policy), {}
    for epoch in (0, 1, crops):
        views = loader._views_of(epoch)
        assert views == [cache.views[(epoch // crops * crops + j) % len(cache.views)] for j in range(crops)]
        loader.set_epoch(epoch)
        for samples, (images, labels, records) in zip(loader.sampler.batches(epoch), loader.steps(), strict=True):
            assert len(images) == len(labels) == len(records) == 12 * crops
            for j, view in enumerate(views):
                drawn = draw_as(cache.identity.views, view, range(len(data)), data.sizes)
                want = answers.setdefault(view, cache.read(view))[torch.from_numpy(samples)]
                (pixels,) = renderer.batches(drawn, [samples])
                assert torch.equal(images[j::crops], pixels) and torch.equal(labels[j::crops], want.labels[:, 0].long())
                for name in ("classes", "gaps", "target_gap", "tail", "labels"):
                    got, of_view = getattr(records, name), getattr(want, name)
                    assert (got is None and of_view is None) or torch.equal(got[j::crops], of_view)
            assert records.prior is None or torch.equal(records.prior, cache.prior)
            break


def test_ranks_share_a_batch_and_an_epoch_goes_on_from_any_batch(home, data):
    cache = open_cache(home / "default")
    alone, *parts = (CachedLoader(cache, data, BATCH, *of, crops_per_decode=2) for of in ((0, 1), (0, 2), (1, 2)))
    for epoch, start in ((2, 0), (3, 4)):
        for loader in (alone, *parts):
            loader.set_epoch(epoch)
        whole = list(alone.steps())
        for (images, labels, records), *theirs in zip(whole[start:], *(p.steps(start) for p in parts), strict=True):
            assert torch.equal(torch.cat([of[0] for of in theirs]), images)
            assert torch.equal(torch.cat([of[1] for of in theirs]), labels)
            assert torch.equal(torch.cat([of[2].gaps for of in theirs]), records.gaps)


@pytest.mark.parametrize("fresh", [False, True])
def test_the_live_teacher_answers_the_same_crops(home, data, fresh):
    cache, teacher = open_cache(home / "exact"), teacher_of(home).teacher
    cached = CachedLoader(cache, data, BATCH, crops_per_decode=2)
    live = OnlineLoader(cache, data, teacher, BATCH, fresh_views=fresh, crops_per_decode=2)
    for epoch in (1,) if fresh else (1, 2):
        for loader in (cached, live):
            loader.set_epoch(epoch)
        for (images, labels, records), (same, of_same, answers) in zip(cached.steps(), live.steps(), strict=True):
            assert torch.equal(images, same) and torch.equal(labels, of_same)
            torch.testing.assert_close(records.dense(1.0), answers.dense(1.0), rtol=1e-4, atol=1e-6)


def test_some_samples_are_taken_in_crops_too(home, data):
    some = np.flatnonzero(~held_out_part(data, 0.3))
    loader = CachedLoader(open_cache(home / "exact"), data, 100, samples=some, crops_per_decode=2)
    taken = np.concatenate([batch for epoch in range(2) for batch in loader.sampler.batches(epoch)])
    assert len(np.unique(taken)) == len(taken) == len(some) // 100 * 100 and set(taken) <= set(some.tolist())


def test_more_crops_than_views_are_refused(home, data):
    cache = open_cache(home / "default")
    for more, there in (({}, 3), ({"views": 2}, 2)):
        with pytest.raises(KdcacheError, match=f"--crops-per-decode 4 takes 4 views at once, and {there} of .*default"):
            CachedLoader(cache, data, 128, crops_per_decode=4, **more)


def test_what_ffcv_decodes_is_refused():
    feed = FFCVFeed(SimpleNamespace(where="digits.beton"))
    with pytest.raises(KdcacheError, match=r"is of no use for digits\.beton, which FFCV decodes once for every crop"):
        feed.loader(None, 128, False, print, crops_per_decode=2)


def test_a_run_tells_what_its_batches_and_epochs_hold_and_is_resumed_as_it_was(home, tmp_path):
    said, out = [], tmp_path / "run"
    config = TrainConfig("ce", cache=str(home / "default"), student="resnet8", crops_per_decode=3, out=str(out))
    assert train(replace(config, epochs=4, batch_size=300), said.append)["epochs"] == 4
    told = [line for line in said if line.startswith("each batch")]
    assert told == [
        "each batch of 300 holds 100 images in 3 views, an epoch has 4 steps, and 3 epochs take every image once in "
        "each of those views; 4 is no multiple of 3, so 1/3 of the images are taken in 3 views more than the others"
    ]
    (out / "summary.json").unlink()
    train(TrainConfig(out=str(out), resume=True), said.append)
    assert told[0] in said[-3:] and json.loads((out / "config.json").read_text())["crops_per_decode"] == 3
