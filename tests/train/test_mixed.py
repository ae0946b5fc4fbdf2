"""Caches of strong and mixed views: students learn from them as with the teacher there."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.records.pairs import partners
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.pack import pack
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import same
from kdcache.tests.helpers.training import BATCH, metrics_of, quiet, student, teacher_of
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader, PlainLoader
from kdcache.train.losses.options import LOSSES, make_loss
from kdcache.train.run import train
from kdcache.train.teach import build_and_teach, teach

POLICY = "crop,flip,randaugment(2,9),erase(0.25),mixup(0.2),cutmix(1)"


@pytest.fixture(scope="module")
def mixed(home):
    for name, precision in (("mixed", "float16"), ("mixed-exact", "float32")):
        build(BuildConfig("resnet8", augment=POLICY, views=5, precision=precision, out=str(home / name)), quiet)
    return home


def test_such_a_cache_is_of_format_2_and_evaluation_is_not_mixed(mixed):
    cache = open_cache(mixed / "mixed")
    assert (cache.identity.format, cache.identity.record.labels, cache.identity.views.mixed) == (2, 2, True)
    assert cache.train.labels.shape[1] == 1 and cache.read_evaluation().labels.shape[1] == 1
    assert cache.read_evaluation().target_gap.shape[1] == 1
    own, n = cache.train.labels[:, 0], cache.train.samples
    for view in (0, 3, 4):
        records = cache.read(view)
        assert records.target_gap.shape == (n, 2) and records.label_weights is None
        of_partner = own[partners(0, view, range(n), n)]
        assert np.array_equal(records.labels.numpy(), np.stack([own, of_partner], 1))


def test_the_teacher_answers_the_same_again(mixed):
    report = verify(open_cache(mixed / "mixed-exact"), teacher_of(mixed, augment=POLICY, precision="float32"))
    assert not report.problems and report.replayed and report.total_variation < 1e-6


def test_a_batch_holds_both_of_every_pair_and_the_shares_of_labels(mixed, data):
    loader = CachedLoader(open_cache(mixed / "mixed"), data, BATCH)
    images, labels, records = next(iter(loader))
    assert images.shape[0] == BATCH and labels.shape == records.label_weights.shape == (BATCH, 2)
    assert torch.allclose(records.label_weights.sum(1), torch.ones(BATCH))
    swapped = labels.view(-1, 2, 2).flip(1).flip(2).reshape(-1, 2)  # pairs stand next to each other
    assert torch.equal(labels, swapped)


def test_an_epoch_goes_on_from_any_batch(mixed, data):
    """As a run does that was stopped: the cached loader, the online one, and the one that teaches."""
    cache, teacher = open_cache(mixed / "mixed-exact"), teacher_of(mixed).teacher
    for make in (
        lambda: CachedLoader(cache, data, BATCH),
        lambda: OnlineLoader(cache, data, teacher, BATCH, fresh_views=True),
        lambda: PlainLoader(data, POLICY, BATCH, 8, seed=3, device=torch.device("cpu")),
    ):
        whole, rest = make(), make()
        for loader in (whole, rest):
            loader.set_epoch(6)
        for batch, later in zip(list(whole.steps())[7:], rest.steps(7), strict=True):
            assert torch.equal(batch[0], later[0]) and torch.equal(batch[1], later[1])
            assert torch.equal(batch[2].label_weights, later[2].label_weights)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_see_together_what_one_process_sees(mixed, data, world):
    cache = open_cache(mixed / "mixed")
    alone = next(CachedLoader(cache, data, BATCH).steps())
    parts = [next(CachedLoader(cache, data, BATCH, rank, world).steps()) for rank in range(world)]
    for i in (0, 1):
        assert torch.equal(torch.cat([part[i] for part in parts]), alone[i])


@pytest.mark.parametrize("name", ["nkd", "kd:alpha=0", "ce", "ikl", "bdkd"])
def test_cached_equals_online_step_by_step(mixed, data, name):
    """Along one online run, at the same weights: pixels, labels, the loss and its gradient."""
    teacher = teacher_of(mixed).teacher
    exact, default = (open_cache(mixed / k) for k in ("mixed-exact", "mixed"))
    online = OnlineLoader(exact, data, teacher, BATCH)
    model, loss = student(), make_loss(name, 10)
    if loss.needs.first_view:
        loss.prepare(online.answers(0))
    for epoch in (0, 4):
        loaders = online, CachedLoader(exact, data, BATCH), CachedLoader(default, data, BATCH)
        for loader in loaders:
            loader.set_epoch(epoch)
        for live, exactly, stored in zip(*(loader.steps() for loader in loaders), strict=True):
            assert all(torch.equal(live[i], other[i]) for other in (exactly, stored) for i in (0, 1))
            logits = model(live[0])
            value = loss(logits, live[1], live[2])
            grad = gradient(model, value)
            assert torch.equal(loss(logits, *exactly[1:]), value)
            other = loss(logits, *stored[1:])
            assert abs(float((other - value).detach() / value.detach())) < 1e-2
            assert float(torch.nn.functional.cosine_similarity(gradient(model, other), grad, dim=0)) >= 0.999


def gradient(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.reshape(-1) for g in grads]).double()


def test_a_whole_run_equals_that_with_the_teacher_there(mixed, tmp_path):
    config = {"epochs": 2, "batch_size": BATCH, "cache": str(mixed / "mixed-exact")}
    train(TrainConfig("nkd", out=str(tmp_path / "cached"), **config), quiet)
    train(TrainConfig("nkd", out=str(tmp_path / "online"), online=True, fresh_views=True, **config), quiet)
    assert metrics_of(tmp_path / "cached") == metrics_of(tmp_path / "online")
    cached, online = (load_file(tmp_path / run / "last.safetensors") for run in ("cached", "online"))
    assert all(torch.equal(cached[name], online[name]) for name in cached)


def test_crops_of_mixed_views_hold_both_of_every_pair_with_the_shares_of_each_view(mixed, data):
    cache, teacher = open_cache(mixed / "mixed-exact"), teacher_of(mixed).teacher
    of_view = [CachedLoader(cache, data, BATCH // 2), CachedLoader(cache, data, BATCH // 2)]
    loader, live = (
        CachedLoader(cache, data, BATCH, views=4, crops_per_decode=2),
        OnlineLoader(cache, data, teacher, BATCH, views=4, crops_per_decode=2),
    )
    for one in (loader, live):
        one.set_epoch(2)
    samples = loader.sampler.batches(2, partners(0, 2, range(len(data)), len(data)))[0]
    (images, labels, records), (same, of_same, answers) = next(loader.steps()), next(live.steps())
    assert torch.equal(images, same) and torch.equal(labels, of_same)
    assert torch.equal(records.label_weights, answers.label_weights)
    for j, one in enumerate(of_view):
        one._order.batches = lambda epoch, partners: [samples]
        one.set_epoch(2 + j)
        pixels, y, want = next(one.steps())
        assert torch.equal(images[j::2], pixels) and torch.equal(labels[j::2], y)
        assert torch.equal(records.label_weights[j::2], want.label_weights)
        assert torch.equal(records.gaps[j::2], want.gaps)


def test_crops_are_not_taken_of_views_that_pair_otherwise(mixed, data):
    cache = open_cache(mixed / "mixed")
    for crops, views in ((2, 5), (3, 3), (4, 5)):
        if crops == views:  # all of one pairing
            CachedLoader(cache, data, 12, views=views, crops_per_decode=crops)
            continue
        with pytest.raises(KdcacheError, match="take 2 or 4 for --crops-per-decode, and a multiple of it for --views"):
            CachedLoader(cache, data, 16, views=views, crops_per_decode=crops)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_learns_from_mixed_labels_or_refuses_before_training(mixed, tmp_path, name):
    config = TrainConfig(name, epochs=1, cache=str(mixed / "mixed"), out=str(tmp_path / "run"))
    if make_loss(name, 10).needs.mixed:
        assert np.isfinite(train(config, quiet)["loss"])
        return
    with pytest.raises(KdcacheError, match="has no meaning for mixed labels, which this cache holds"):
        train(config, quiet)
    assert not (tmp_path / "run").exists()


def test_held_out_images_are_not_mixed_into_others(mixed, tmp_path):
    config = TrainConfig("kd", cache=str(mixed / "mixed"), out=str(tmp_path / "run"), validation=0.2)
    with pytest.raises(KdcacheError, match="leave --validation out"):
        train(config, quiet)


def test_a_teacher_is_taught_on_mixed_views_of_its_own(home, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(home))
    path, top1 = teach(TeachConfig("resnet20", augment="crop,flip,trivial,cutmix(1)", epochs=2), quiet)
    assert path.exists() and top1 > 0.2


def test_what_ffcv_has_no_place_for_is_refused_before_the_build(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(mixed))
    config = BuildConfig("resnet8", augment=POLICY, views=1, out=str(tmp_path / "c"))
    with pytest.raises(KdcacheError, match="--store ffcv has no place for mixed views"):
        build_and_teach(config, say=quiet, store="ffcv")
    assert not (tmp_path / "c").exists()
    with pytest.raises(KdcacheError, match="train from the cache itself, or pack it --to hdf5"):
        pack(mixed / "mixed", "ffcv", out=str(tmp_path / "c.beton"), say=quiet)
    packed = pack(mixed / "mixed", "hdf5", out=str(tmp_path / "c.h5"), say=quiet)
    there, here = open_cache(packed.path).read(4), open_cache(mixed / "mixed").read(4)
    assert same(there, here) and torch.equal(there.labels, here.labels)
