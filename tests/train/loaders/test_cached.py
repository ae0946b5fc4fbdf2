"""The loaders without FFCV: records beside their pixels, epochs and views in turn, nothing that a GPU waits for."""

import shutil

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.records.records import Records
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers.training import BATCH, teacher_of
from kdcache.train.evaluation.validation import held_out_part
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader, PlainLoader
from kdcache.train.loaders.order import epoch_batches


def test_ranks_share_each_batch_and_every_epoch_has_its_own_order():
    whole = epoch_batches(1000, 96, seed=3, epoch=5)
    assert len(whole) == 10 and len(np.unique(np.concatenate(whole))) == 960
    for i, batch in enumerate(whole):
        parts = [epoch_batches(1000, 96, 3, 5, rank, 4)[i] for rank in range(4)]
        assert np.array_equal(np.concatenate(parts), batch)
    assert not np.array_equal(whole[0], epoch_batches(1000, 96, 3, 6)[0])
    assert not np.array_equal(whole[0], epoch_batches(1000, 96, 4, 5)[0])


def test_records_belong_to_the_pixels_beside_them(home, data):
    """The teacher, asked about the loader's own images, gives the loader's records, in every view."""
    cache, source = open_cache(home / "exact"), teacher_of(home)
    loader = CachedLoader(cache, data, BATCH)
    for epoch in range(4):
        loader.set_epoch(epoch)
        assert len(loader) == len(data) // BATCH
        for images, labels, records in loader.steps():
            assert torch.equal(labels, records.labels[:, 0].long())
            want = torch.softmax(source.teacher.logits(images), 1)
            torch.testing.assert_close(records.dense(1.0), want, rtol=1e-4, atol=1e-6)


def test_memory_of_a_slab_is_used_again_but_not_under_an_iterator(home, data):
    cache = open_cache(home / "exact")
    loader, memory = CachedLoader(cache, data, BATCH), set()
    for epoch in range(7):
        loader.set_epoch(epoch)
        assert all(records.gaps.shape == (BATCH, 10) for *_, records in loader.steps())
        memory |= {slab.held.records.gaps.data_ptr() for slab in loader._slabs._slabs.values()}
    assert len(memory) == 2
    loader.set_epoch(7)
    early = loader.steps()
    found = [next(early)]
    for epoch in range(8, 12):
        loader.set_epoch(epoch)
        list(loader.steps())
    found += early
    fresh = CachedLoader(cache, data, BATCH)
    fresh.set_epoch(7)
    for (_, labels, records), (_, want_labels, want) in zip(found, fresh.steps(), strict=True):
        assert torch.equal(labels, want_labels) and torch.equal(records.gaps, want.gaps)


def test_a_view_that_could_not_be_read_is_read_again(home, data, tmp_path):
    place = tmp_path / "cache"
    shutil.copytree(home / "default", place)
    loader = CachedLoader(open_cache(place), data, BATCH)
    views = place / "views"
    views.rename(tmp_path / "elsewhere")
    with pytest.raises(KdcacheError, match="missing"):
        list(loader.steps())
    (tmp_path / "elsewhere").rename(views)
    assert len(list(loader.steps())) == len(loader) and loader.epoch == 0


def test_iterating_gives_normalised_images(home, data):
    loader = CachedLoader(open_cache(home / "default"), "digits", BATCH)
    images, labels, records = next(iter(loader))
    loader.set_epoch(0)
    pixels, _, _ = next(loader.steps())
    assert images.dtype == torch.float32 and labels.dtype == torch.int64 and isinstance(records, Records)
    mean = torch.tensor(data.mean).view(1, 3, 1, 1)
    std = torch.tensor(data.std).view(1, 3, 1, 1)
    torch.testing.assert_close(images, (pixels / 255 - mean) / std)


def kinds_of_loader(home, data):
    """One loader of each kind that is made without FFCV, from a cache of three views where it has one."""
    cache = open_cache(home / "default")
    yield "cached", lambda **o: CachedLoader(cache, data, BATCH, **o)
    yield "online", lambda **o: OnlineLoader(cache, data, teacher_of(home).teacher, BATCH, **o)
    yield "fresh", lambda **o: OnlineLoader(cache, data, teacher_of(home).teacher, BATCH, fresh_views=True, **o)
    yield "plain", lambda **o: PlainLoader(data, "crop", BATCH, 8, seed=0, device=torch.device("cpu"), **o)


def first_of(loader):
    """The pixels and labels of the first batch of an epoch, as one array."""
    images, labels, _ = next(loader.steps())
    return torch.cat([images.flatten(1).long(), labels.unsqueeze(1)], 1)


def test_every_loader_goes_on_to_the_next_epoch_by_itself(home, data):
    for kind, make in kinds_of_loader(home, data):
        told, own = make(), make()
        want = []
        for epoch in range(5):
            told.set_epoch(epoch)
            want.append(first_of(told))
        assert len({x.numpy().tobytes() for x in want}) == 5, kind
        for epoch in range(5):
            assert torch.equal(first_of(own), want[epoch]), kind
            assert (own.epoch, own.view) == (epoch, epoch % 3 if kind in ("cached", "online") else epoch)
        own.sampler.set_epoch(2)  # as Lightning does
        assert (own.epoch, own.view) == (2, 2)
        assert torch.equal(first_of(own), want[2]) and torch.equal(first_of(own), want[3]), kind


def test_an_iterator_that_is_only_made_takes_no_epoch_and_two_at_once_take_two(home, data):
    """Lightning makes one to see whether it can. What could not be read has not been taken either."""
    want = {}
    for epoch in range(3):
        told = CachedLoader(open_cache(home / "default"), data, BATCH)
        told.set_epoch(epoch)
        want[epoch] = [labels for _, labels, _ in told]
    loader = CachedLoader(open_cache(home / "default"), data, BATCH)
    iter(loader)
    one, other = iter(loader), iter(loader)
    got = [(a[1], b[1]) for a, b in zip(one, other, strict=True)]
    assert all(torch.equal(a, x) and torch.equal(b, y) for (a, b), x, y in zip(got, want[0], want[1], strict=True))
    assert torch.equal(next(iter(loader))[1], want[2][0]) and loader.epoch == 2


def test_the_rest_of_an_epoch_takes_that_epoch(home, data):
    loader = CachedLoader(open_cache(home / "default"), data, BATCH)
    loader.set_epoch(1)
    whole = [labels for _, labels, _ in loader.steps()]
    loader.set_epoch(1)
    rest = [labels for _, labels, _ in loader.steps(7)]
    assert all(map(torch.equal, rest, whole[7:])) and len(rest) == len(whole) - 7 and loader.epoch == 1
    assert not torch.equal(next(loader.steps())[1], whole[0]) and loader.epoch == 2


def test_ranks_go_on_together(home, data):
    cache = open_cache(home / "default")
    alone = CachedLoader(cache, data, BATCH)
    parts = [CachedLoader(cache, data, BATCH, rank, 2) for rank in range(2)]
    for _ in range(3):
        for (_, labels, _), *theirs in zip(alone, *parts, strict=True):
            assert torch.equal(torch.cat([part[1] for part in theirs]), labels)


def test_a_teacher_is_not_taught_on_the_views_that_it_is_asked_about(home, data):
    cache = open_cache(home / "default")
    policy, seed = cache.identity.views.policy, cache.identity.views.seed
    taught, asked = (
        PlainLoader(data, policy, BATCH, 8, seed=seed, device=torch.device("cpu")),
        CachedLoader(cache, data, BATCH),
    )
    for _ in range(3):
        (images, labels, _), (other, same, _) = next(taught.steps()), next(asked.steps())
        assert torch.equal(labels, same) and (images != other).flatten(1).any(1).float().mean() > 0.5


def test_epochs_take_views_in_turn(home, data, monkeypatch):
    cache = open_cache(home / "default")
    read = []
    monkeypatch.setattr(cache, "read", lambda view, out: read.append(view) or cache.train.read(view, None))
    loader = CachedLoader(cache, data, BATCH, views=2)
    for epoch in range(4):
        loader.set_epoch(epoch)
        list(loader.steps())
    assert sorted(read) == [0, 1]  # two slabs fit, so neither is read twice
    with pytest.raises(KdcacheError, match="3 complete views, not 4"):
        CachedLoader(cache, data, BATCH, views=4)


def test_other_pixels_are_refused(home, data, monkeypatch):
    cache = open_cache(home / "default")
    with pytest.raises(KdcacheError, match=r"built from other data than digits: .*fingerprint: the cache has"):
        CachedLoader(cache, open_data("digits", "train", unlabelled=True), BATCH)
    from kdcache.train.loaders import cached as module

    drawn = module.view_of_all
    monkeypatch.setattr(module, "view_of_all", lambda views, view, *rest: drawn(views, view + 1, *rest))
    with pytest.raises(KdcacheError, match=r"view 0, part 0 .* other view parameters"):
        list(CachedLoader(cache, data, BATCH).steps())


def test_a_batch_larger_than_the_data_is_refused(home, data):
    with pytest.raises(KdcacheError, match="a batch of 2000 does not fit the data's 1442 samples"):
        CachedLoader(open_cache(home / "default"), data, 2000)


def test_a_loader_of_some_samples_gives_no_others(home, data):
    """The views are the cache's own: each image, put back by its box, is that of one of the samples, once an epoch."""
    some = np.flatnonzero(~held_out_part(data, 0.3))
    cache = open_cache(home / "exact")
    drawn = draw(cache.identity.views.policy, 0, 1, range(len(data)), data.sizes)
    whole = Renderer(data, None, torch.device("cpu"), cache.identity.views.policy)
    (pixels,) = whole.batches(drawn, [np.arange(len(data))])
    answers = cache.read(1)
    loader = CachedLoader(cache, data, 100, samples=some)
    loader.set_epoch(1)
    places = [place for batch in epoch_batches(len(some), 100, 0, 1) for place in some[batch]]
    assert len(set(places)) == 100 * len(loader) == len(some) // 100 * 100
    for start, (images, labels, records) in zip(range(0, len(places), 100), loader.steps(), strict=True):
        at = torch.from_numpy(np.array(places[start : start + 100]))
        assert torch.equal(images, pixels[at]) and torch.equal(records.gaps, answers[at].gaps)
        assert torch.equal(labels, torch.from_numpy(data.labels)[at, 0])


@pytest.mark.parametrize("kind", ["online", "crops", "plain"])
def test_no_step_copies_to_the_device(home, data, kind):
    """After a loader's first one: a GPU would be waited for. The device is one that holds no values."""

    class Teacher:
        device, input_size = torch.device("meta"), 8

        def logits(self, images):
            return images.new_empty((len(images), 10), dtype=torch.float32)

    if kind != "plain":
        crops = 2 if kind == "crops" else 1
        steps = OnlineLoader(open_cache(home / "default"), data, Teacher(), BATCH, crops_per_decode=crops).steps()
    else:
        steps = PlainLoader(data, "crop,flip", BATCH, 8, seed=0, device=Teacher.device).steps()
    next(steps)
    with NoCopies():
        images, labels, _ = next(steps)
    assert images.is_meta and labels.is_meta


class NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.is_meta and any(_on_cpu(a) for a in args)), func
        return out


def _on_cpu(argument):
    return isinstance(argument, torch.Tensor) and argument.device.type == "cpu" and argument.dim() > 0
