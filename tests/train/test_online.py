"""Students from records learn the same as with the teacher there."""

from dataclasses import replace

import pytest
import torch

from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.records.records import Records
from kdcache.pipeline.build.answers import view_parameters
from kdcache.tests.helpers.building import record_batches
from kdcache.tests.helpers.training import BATCH, quiet, student, teacher_of
from kdcache.train.config import TrainConfig
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader
from kdcache.train.loaders.slabs import Held, Slabs
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import fit
from kdcache.train.losses import IKL
from kdcache.train.losses.options import make_loss
from kdcache.train.run import train


@pytest.mark.parametrize("name", ["nkd", "kd"])
def test_cached_equals_online_step_by_step(home, data, name):
    """Along one online run, at the same weights: the loss and its gradient from records and from the live teacher."""
    teacher = teacher_of(home).teacher
    online = OnlineLoader(open_cache(home / "exact"), data, teacher, BATCH)
    cached = {k: CachedLoader(open_cache(home / k), data, BATCH) for k in ("exact", "default")}
    model, loss = student(), make_loss(name, 10)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = 0
    for epoch in range(4):
        for loader in (online, *cached.values()):
            loader.set_epoch(epoch)
        both = {k: loader.steps() for k, loader in cached.items()}
        for images, labels, records in online.steps():
            logits = model(images)
            value = loss(logits, labels, records)
            grad = gradient(model, value)
            for k, iterator in both.items():
                pixels, same_labels, stored = next(iterator)
                assert torch.equal(pixels, images) and torch.equal(same_labels, labels)
                other = loss(logits, labels, stored)
                error = float((other - value).detach().abs() / value.detach())
                cosine = float(torch.nn.functional.cosine_similarity(gradient(model, other), grad, dim=0))
                assert error < (1e-5 if k == "exact" else 1e-2), (k, steps)
                assert cosine > (0.999999 if k == "exact" else 0.999), (k, steps)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            steps += 1
    assert steps == 4 * (len(data) // BATCH)


def gradient(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.reshape(-1) for g in grads]).double()


class SlabsFromTheTeacher:
    """A loader whose records the live teacher answers now, in the build's own batches, without any of a cache's."""

    def __init__(self, cache, source, batch):
        self._inner = CachedLoader(cache, source.train, batch)
        self._inner._slabs = Slabs(self, reuse=False)
        self._source = source

    def draw(self, view):
        return view_parameters(self._source.train, self._source.identity, view, range(len(self._source.train)))

    def compare(self, view, drawn, hurry):
        pass

    def read(self, wanted, drawn, spare, hurry, samples=None):
        rows = range(len(self._source.train))
        batches = record_batches(self._source, "train", wanted.view, rows, 256)
        parts = [records for records, _ in batches]
        return Held(
            Records(
                None, *(torch.cat([getattr(p, f) for p in parts]) for f in ("gaps", "target_gap", "tail", "labels")),
                10, (),
            )
        )  # fmt: skip

    def set_epoch(self, epoch):
        self._inner.set_epoch(epoch)

    def __len__(self):
        return len(self._inner)

    def steps(self, start=0):
        return self._inner.steps(start)


def test_a_run_from_the_cache_is_bit_equal_to_one_from_the_same_encode(home):
    source = teacher_of(home, precision="float32")
    cache = open_cache(home / "exact")
    finals = []
    for loader in (CachedLoader(cache, source.train, BATCH), SlabsFromTheTeacher(cache, source, BATCH)):
        model = student()
        fit(model, make_loss("nkd", 10), loader, Recipe(epochs=3, lr=0.05), lambda m: {}, say=quiet)
        finals.append(model.state_dict())
    for name, tensor in finals[0].items():
        assert torch.equal(tensor, finals[1][name]), name


def test_online_the_class_prior_of_ikl_is_the_live_teachers_where_the_cache_has_not_all_classes(home, data, tmp_path):
    """The same students as beside the dense cache of the same views, which holds these answers."""
    config = TrainConfig("ikl:pairs=prior", cache=str(home / "top3"), epochs=2, batch_size=256, views=2)
    with pytest.raises(KdcacheError, match="holds the top 3: build one with --topk 10"):
        train(replace(config, out=str(tmp_path / "cached")), quiet)
    said = []
    of = {}
    for name in ("top3", "exact"):
        one = replace(config, cache=str(home / name), online=True, out=str(tmp_path / name))
        of[name] = train(one, said.append)
    assert [line for line in said if "class prior" in line] == [
        "the teacher answers view 0 once, for the class prior of ikl"
    ]
    assert of["top3"]["loss"] == pytest.approx(of["exact"]["loss"], rel=1e-4)
    assert of["top3"]["nll"] == pytest.approx(of["exact"]["nll"], rel=1e-2)


@pytest.mark.parametrize("world", [1, 3])
def test_a_live_teachers_class_prior_is_the_mean_of_its_answers_to_view_0_by_class(home, data, world):
    cache, teacher = open_cache(home / "top3"), teacher_of(home).teacher
    parts = [OnlineLoader(cache, data, teacher, 200, rank=rank, world=world) for rank in range(world)]
    loss = IKL(pairs="prior", temperature2=2.0)
    loss.prepare(records for loader in parts for records in loader.answers(0))
    exact = open_cache(home / "exact").read(0)
    p, y = torch.softmax(exact.logits().double() / 2.0, 1), exact.labels[:, 0].long()
    want = torch.stack([p[y == label].mean(0) for label in range(10)])
    torch.testing.assert_close(loss._prior.double(), want, rtol=1e-4, atol=1e-6)


def test_online_training_runs_and_fresh_views_go_on(home, tmp_path):
    config = {"cache": str(home / "default"), "epochs": 2, "online": True, "batch_size": 256}
    same = train(TrainConfig("nkd", out=str(tmp_path / "a"), **config), quiet)
    fresh = train(TrainConfig("nkd", out=str(tmp_path / "b"), views=1, **config), quiet)
    later = train(TrainConfig("nkd", out=str(tmp_path / "c"), views=1, fresh_views=True, **config), quiet)
    assert later["loss"] == same["loss"] != fresh["loss"]
