"""Students from records: the same as with the teacher there, and the same after an interruption."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache import cli
from kdcache.cache import KdcacheError, open_cache
from kdcache.cache.records import Records
from kdcache.cli import main
from kdcache.pipeline.build.answers import view_parameters
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.kinds.named import digits
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.pipeline.views.policy import draw
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers.building import record_batches
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.evaluate import evaluate_run, student_of
from kdcache.train.evaluation.metrics import metrics
from kdcache.train.evaluation.validation import held_out_part
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader, PlainLoader
from kdcache.train.loaders.order import epoch_batches
from kdcache.train.loop import runfolder
from kdcache.train.loop.cotrain import LearningTeacher
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.runfolder import config_of
from kdcache.train.loop.trainer import Training, fit, seeded
from kdcache.train.losses import IKL, NKD
from kdcache.train.losses.features import FeatureTap
from kdcache.train.losses.options import LOSSES, make_loss
from kdcache.train.losses.prepare import prepared
from kdcache.train.run import train
from kdcache.train.teach import teach

BATCH = 128


def quiet(_):
    pass


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A taught teacher and caches of it: dense as stored by default, dense float32, and all of top 3."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(folder))
        teach(TeachConfig("resnet8", epochs=4), quiet)
        for name, precision in (("default", "float16"), ("exact", "float32")):
            build(BuildConfig("resnet8", views=3, precision=precision, out=str(folder / name)), quiet)
        build(BuildConfig("resnet8", views=2, topk=3, tail_std=True, out=str(folder / "top3")), quiet)
        yield folder


@pytest.fixture(scope="module")
def data():
    return open_data("digits", "train")


def teacher_of(home, **changes):
    return open_source(BuildConfig("resnet8", **changes), quiet)


def student(seed=0):
    model = Classifier(seeded(seed, lambda: build_network("resnet8", 10, 8)), (0.3,) * 3, (0.4,) * 3)
    return model.to(memory_format=torch.channels_last)


# The loader


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
        memory |= {slab.result()[0].gaps.data_ptr() for slab in loader._slabs.values()}
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


def test_a_teacher_that_was_half_taught_on_them_is_not_gone_on_with(home):
    def stop(text):
        if text.startswith("epoch 2/"):
            raise KeyboardInterrupt

    config = TeachConfig("resnet14", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        teach(config, stop)
    (file,) = home.glob("teachers/*/resnet14.run/config.json")
    now = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in now.items() if k != "stream"}))
    with pytest.raises(KdcacheError, match=r"stream: the run has views, asked for teaching \(--force teaches it from"):
        teach(config, quiet)
    shutil.rmtree(file.parent)


def test_epochs_take_views_in_turn(home, data, monkeypatch):
    cache = open_cache(home / "default")
    read = []
    monkeypatch.setattr(type(cache), "read", lambda self, view, out: read.append(view) or self.train.read(view, None))
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

    drawn = module.draw
    monkeypatch.setattr(module, "draw", lambda policy, seed, *rest: drawn(policy, seed + 1, *rest))
    with pytest.raises(KdcacheError, match=r"view 0, part 0 .* other view parameters"):
        list(CachedLoader(cache, data, BATCH).steps())


def test_a_batch_larger_than_the_data_is_refused(home, data):
    with pytest.raises(KdcacheError, match="a batch of 2000 does not fit the data's 1442 samples"):
        CachedLoader(open_cache(home / "default"), data, 2000)


# Cached equals online


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
    """A loader whose records the live teacher answers now, in the build's own batches, without any cache."""

    def __init__(self, cache, source, batch):
        self._inner = CachedLoader(cache, source.train, batch)
        self._inner._read = self._read
        self._source = source

    def _read(self, view, spare):
        rows = range(len(self._source.train))
        batches = record_batches(self._source, "train", view, rows, 256)
        parts = [records for records, _ in batches]
        whole = Records(
            None, *(torch.cat([getattr(p, f) for p in parts]) for f in ("gaps", "target_gap", "tail", "labels")), 10, ()
        )
        parameters = view_parameters(self._source.train, self._source.identity, view, rows)
        return whole, parameters

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


# A teacher that learns too


@pytest.mark.parametrize(("regulariser", "start"), [(2.0, "scratch"), (0.0, "taught")])
def test_bdkd_online_trains_both_networks_as_its_formulas_say(home, data, tmp_path, regulariser, start):
    """An epoch beside a loop written from the formulas alone; without regulariser the teacher learns as if alone."""
    options = f"temperature=2,heavy=1.5,light=0.5,teacher_alpha=0.7,regulariser={regulariser},start={start}"
    config = {"cache": str(home / "default"), "epochs": 1, "batch_size": 256, "lr": 0.02, "seed": 3, "online": True}
    summary = train(TrainConfig(f"bdkd:{options}", out=str(tmp_path / "run"), **config), quiet)

    s, t = (Classifier(seeded(of, lambda: build_network("resnet8", 10, 8)), data.mean, data.std) for of in (3, -4))
    if start == "taught":
        t = teacher_of(home).teacher.model
    cache = open_cache(home / "default")
    loader = CachedLoader(cache, data, 256, seed=3)
    both = [m.to(memory_format=torch.channels_last).train() for m in (s, t)]
    before = [flat(m.parameters()) for m in both]
    sgd = [torch.optim.SGD(m.parameters(), 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True) for m in both]
    for step, (images, y, _) in enumerate(loader.steps()):
        for optimiser in sgd:
            optimiser.param_groups[0]["lr"] = 0.02 * (step + 1) / len(loader)
            optimiser.zero_grad()
        z, v = (m(images) for m in both)
        p, q = torch.softmax(v / 2, 1), torch.softmax(z / 2, 1)
        forward = (p.detach() * (p.detach() / q).log()).sum(1)
        reverse = (q * (q / p.detach()).log()).sum(1)
        sure = (torch.special.entr(q).sum(1) < torch.special.entr(p).sum(1)).detach()
        student = torch.where(sure, 1.5 * forward + 0.5 * reverse, 0.5 * forward + 1.5 * reverse)
        teacher = (q.detach() * (q.detach() / p).log()).sum(1)
        ce = [torch.nn.functional.cross_entropy(x, y) for x in (z, v)]
        (ce[0] + 4 * student.mean() + 0.7 * ce[1] + 4 * regulariser * teacher.mean()).backward()
        for optimiser in sgd:
            optimiser.step()
    for name, model, at_first in zip(("last", "teacher-last"), both, before, strict=True):
        state, notes = read_weights(tmp_path / "run" / f"{name}.safetensors")
        got, want = flat(state[k] for k, _ in model.network.named_parameters()), flat(model.parameters())
        assert (got - want).norm() < 0.01 * (want - at_first).norm()
        assert notes["metrics"]["top1"] == summary["top1" if name == "last" else "teacher_top1"]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_a_run_with_a_learning_teacher(home, tmp_path):
    out = tmp_path / "run"
    config = {"cache": str(home / "default"), "epochs": 3, "online": True}
    said = []
    train(TrainConfig("bdkd", out=str(out), **config), said.append)
    lines = metrics_of(out)
    measured = {"top1", "top5", "nll", "brier", "ece"}
    assert all({*measured, *(f"teacher_{m}" for m in measured), "teacher_loss"} <= set(line) for line in lines)
    assert all("ece" in text.split("teacher:")[0] and "ece" in text.split("teacher:")[1] for text in said[1:4])
    # Agreement is with the teacher of the run, not with that of the cache.
    found, figures = evaluate_run(str(out)), ("top1", "teacher_top1", "agreement", "kl", "teacher_ece")
    assert {k: found[k] for k in figures} == pytest.approx({k: lines[-1][k] for k in figures})
    # Its weights are a teacher's.
    teacher = teacher_of(home, weights=str(out / "teacher-last.safetensors")).teacher
    images = torch.as_tensor(open_data("digits", "eval").pixels).permute(0, 3, 1, 2)
    right = teacher.logits(images).argmax(1) == torch.from_numpy(open_data("digits", "eval").labels[:, 0])
    assert float(right.float().mean()) == pytest.approx(lines[-1]["teacher_top1"])
    (out / "teacher-last.safetensors").unlink()
    with pytest.raises(KdcacheError, match=r"learnt beside a teacher.*teacher-last\.safetensors"):
        evaluate_run(str(out))


@pytest.mark.parametrize("loss", [("nkd",), ("bdkd", "--online")])
def test_evaluated_now_and_then_it_learns_the_same(home, tmp_path, loss):
    command = ["train", "--cache", str(home / "default"), "--epochs", "3", "--loss", *loss, "--out"]
    for out, every in (("all", ()), ("few", ("--evaluate-every", "2"))):
        result = CliRunner().invoke(main, [*command, str(tmp_path / out), *every], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    seen, few = metrics_of(tmp_path / "all"), metrics_of(tmp_path / "few")
    assert few[1:] == seen[1:]
    assert few[0] == {k: v for k, v in seen[0].items() if k in ("epoch", "teacher_loss") or k.startswith("loss")}


def test_what_a_learning_teacher_cannot_do_is_refused(home, tmp_path):
    config = {"cache": str(home / "default"), "epochs": 1, "out": str(tmp_path / "run")}
    with pytest.raises(KdcacheError, match="teacher that learns: give --online"):
        train(TrainConfig("bdkd:regulariser=2", **config), quiet)
    with pytest.raises(KdcacheError, match="give --loss bdkd:start=taught"):
        train(TrainConfig("bdkd", online=True, weights="x.safetensors", **config), quiet)
    with pytest.raises(KdcacheError, match="not finite: lower --lr"):
        train(TrainConfig("bdkd", online=True, lr=1e12, **config), quiet)
    build(BuildConfig("resnet8", views=1, unlabelled=True, out=str(home / "none"), weights=taught(home)), quiet)
    with pytest.raises(KdcacheError, match="built with --unlabelled"):
        train(TrainConfig("bdkd:alpha=0", online=True, **{**config, "cache": str(home / "none")}), quiet)


def taught(home):
    (file,) = (home / "teachers").rglob("*.safetensors")
    return str(file)


# Whole runs


def test_a_run_folder_holds_what_it_should(home, tmp_path):
    out = tmp_path / "run"
    summary = train(TrainConfig("nkd", cache=str(home / "top3"), epochs=3, out=str(out)), quiet)
    names = {p.name for p in out.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "summary.json", "last.safetensors", "state.pt", "tensorboard",
    }  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    measured = {"top1", "top5", "nll", "brier", "ece", "agreement", "kl"}
    assert all(measured | {"loss", "seconds"} <= set(line) for line in lines)
    assert measured <= set(summary) and {k: summary[k] for k in measured} == {k: lines[-1][k] for k in measured}
    assert list((out / "tensorboard").glob("events.*"))
    assert json.loads((out / "config.json").read_text())["cache"] == open_cache(home / "top3").key
    again = evaluate_run(str(out))
    assert measured <= set(again) and again["weights"] == str(out / "last.safetensors")
    # What is reported is not chosen by what it is reported on.
    assert again["top1"] == summary["top1"] == lines[-1]["top1"]
    assert again["nll"] == pytest.approx(lines[-1]["nll"], rel=1e-6) and not [k for k in summary if "best" in k]
    with pytest.raises(KdcacheError, match="holds a run already: give --resume"):
        train(TrainConfig("nkd", cache=str(home / "top3"), epochs=3, out=str(out)), quiet)
    with pytest.raises(KdcacheError, match=r"is another run and is not resumed: .*epochs: the run has 3, asked for 4"):
        train(TrainConfig("nkd", cache=str(home / "top3"), epochs=4, out=str(out), resume=True), quiet)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(home, tmp_path, name):
    config = {"epochs": 2, "batch_size": 256, "data": "digits"}
    dense = train(TrainConfig(name, cache=str(home / "default"), out=str(tmp_path / "dense"), **config), quiet)
    assert math.isfinite(dense["loss"]) and math.isfinite(dense["nll"])
    if make_loss(name, 10).needs.dense:
        with pytest.raises(KdcacheError, match="holds the top 3: build one with --topk 10"):
            train(TrainConfig(name, cache=str(home / "top3"), out=str(tmp_path / "top3"), **config), quiet)
    else:
        sparse = train(TrainConfig(name, cache=str(home / "top3"), out=str(tmp_path / "top3"), **config), quiet)
        assert math.isfinite(sparse["loss"])


def test_a_head_of_the_losss_own_is_trained_and_resumed(home, tmp_path):
    config = {"cache": str(home / "default"), "batch_size": 256, "epochs": 2}
    whole = train(TrainConfig("uskd", out=str(tmp_path / "whole"), **config), quiet)
    train(TrainConfig("uskd", out=str(tmp_path / "part"), **config), quiet)
    state = torch.load(tmp_path / "part" / "state.pt", weights_only=True)
    assert set(state["training"]["loss"]) == {"weight", "bias"}
    again = train(TrainConfig("uskd", out=str(tmp_path / "part"), resume=True, **config), quiet)
    assert again["loss"] == whole["loss"]


@pytest.mark.parametrize(
    ("name", "size", "channels"), [("resnet20", 32, 32), ("resnet18", 64, 256), ("wrn_16_2", 32, 64)]
)
def test_features_come_from_the_stage_before_the_last(name, size, channels):
    model = Classifier(build_network(name, 10, size), (0.5,) * 3, (0.5,) * 3)
    tap = FeatureTap(model, size)
    model(torch.zeros((2, 3, size, size), dtype=torch.uint8))
    assert tap.channels == channels and tap.features.shape == (2, channels)


AVERAGED = ("--ema", "0.9", "--accumulate", "2", "--optimiser", "adamw")


@pytest.mark.parametrize(("epochs", "loss"), [(3, ("nkd", *AVERAGED)), (2, ("bdkd", "--online"))])
def test_killed_within_an_epoch_and_resumed_equals_uninterrupted(home, tmp_path, epochs, loss):
    command = [
        *(sys.executable, "-m", "kdcache.cli", "train", "--cache", str(home / "default"), "--loss", *loss),
        *("--epochs", str(epochs), "--out"),
    ]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed), "--save-every", "0"], stderr=subprocess.DEVNULL)
    while (at := stopped_at(process, killed))["epoch"] < 1 or at["batch"] == 0:
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == at["epoch"] < epochs
    resumed = subprocess.run([*command, str(killed), "--resume"], check=True, capture_output=True, text=True)
    assert f"after epoch {at['epoch']} and {at['batch']} batches of {epochs}" in resumed.stderr
    a, b = (metrics_of(folder) for folder in (killed, tmp_path / "whole"))
    assert len(a) == epochs and a == b
    files = {p.name for p in (tmp_path / "whole").glob("*.safetensors")}
    assert len(files) == (2 if "bdkd" in loss else 1) and files == {p.name for p in killed.glob("*.safetensors")}
    for file in files:
        weights, whole = (read_weights(f / file)[0] for f in (killed, tmp_path / "whole"))
        assert all(torch.equal(weights[name], whole[name]) for name in whole), file


def stopped_at(process, folder):
    """How far a run had come when it was last kept; it is held still meanwhile."""
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    file = folder / "state.pt"
    return torch.load(file, weights_only=True)["training"] if file.exists() else {"epoch": 0, "batch": 0}


def metrics_of(folder):
    """What must be equal of a run: everything but times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("kind", ["online", "plain"])
def test_no_step_copies_to_the_device(home, data, kind):
    """After a loader's first one: a GPU would be waited for. The device is one that holds no values."""

    class Teacher:
        device, input_size = torch.device("meta"), 8

        def logits(self, images):
            return images.new_empty((len(images), 10), dtype=torch.float32)

    if kind == "online":
        steps = OnlineLoader(open_cache(home / "default"), data, Teacher(), BATCH).steps()
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


@pytest.mark.parametrize("name", LOSSES)
def test_no_step_brings_a_value_to_the_host(home, data, name):
    """Nor does a loader after its first step: a GPU would be waited for."""
    caches = {kind: open_cache(home / kind) for kind in ("default", "top3")}
    if make_loss(name, 10).needs.dense:
        del caches["top3"]
    loaders = {kind: CachedLoader(cache, data, BATCH) for kind, cache in caches.items()}
    recipes = {kind: Recipe(1, 0.01, optimiser=o, **ALL) for kind, o in zip(loaders, ("sgd", "adamw"), strict=False)}
    recipes["online"] = Recipe(1, 0.01, optimiser="muon", **ALL)
    partner = LearningTeacher(student(1), 8, make_loss(name, 10), recipes["online"], {}) if name == "bdkd" else None
    loaders["online"] = OnlineLoader(caches["default"], data, partner or teacher_of(home).teacher, BATCH)
    for kind, loader in loaders.items():
        model, beside = student(), partner if kind == "online" else None
        loss = prepared(make_loss(name, 10), caches.get(kind, caches["default"]), model, 8, kind == "online", quiet)
        training = Training(model, loss, recipes[kind], len(loader), beside)
        model.train()
        steps = loader.steps()
        training.learn(*next(steps))
        training.update()
        with NoHost():
            training.learn(*next(steps))
            training.update()


ALL = {"amp": "bf16", "clip": 1.0, "ema": 0.9}


class NoHost(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


def test_a_cache_that_goes_away_is_one_line_and_the_run_goes_on_once_it_is_back(home, tmp_path):
    config = TrainConfig("nkd", cache=str(tmp_path / "cache"), epochs=4, out=str(tmp_path / "run"), batch_size=256)
    whole = train(replace(config, cache=str(home / "exact"), out=str(tmp_path / "whole")), quiet)
    shutil.copytree(home / "exact", tmp_path / "cache")

    def say(text):
        if text.startswith("epoch 1/"):
            (tmp_path / "cache").rename(tmp_path / "aside")

    with pytest.raises(KdcacheError, match="cache has gone: bring the disk or folder back, and go on with --resume"):
        train(config, say)
    (tmp_path / "aside").rename(tmp_path / "cache")
    for file in (tmp_path / "cache" / "views" / "v00002").rglob("c/0/*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    resumed = replace(config, resume=True)
    with pytest.raises(KdcacheError, match=r"v00002/.* is missing .* run kdcache build again"):
        train(resumed, quiet)
    shutil.copytree(home / "exact", tmp_path / "cache", dirs_exist_ok=True)
    again = train(resumed, quiet)
    assert {k: v for k, v in again.items() if "second" not in k and k != "run"} == {
        k: v for k, v in whole.items() if "second" not in k and k != "run"
    }


def test_a_run_is_not_resumed_with_other_settings(home, tmp_path):
    config = TrainConfig("ce", cache=str(home / "default"), epochs=1, out=str(tmp_path / "run"), batch_size=512)
    train(config, quiet)
    others = {"optimiser": "adamw", "amp": "fp16", "accumulate": 2, "clip": 1.0, "ema": 0.9, "compile": True}
    for name, value in others.items():
        with pytest.raises(KdcacheError, match=rf"is another run and is not resumed: .*{name}: the run has"):
            train(replace(config, resume=True, **{name: value}), quiet)


@pytest.mark.parametrize("restarted", [True, False])
def test_a_run_in_the_default_folder_keeps_its_views(home, tmp_path, monkeypatch, restarted):
    """Restarted by torchrun or resumed, though its cache has more of them now."""
    monkeypatch.chdir(tmp_path)
    config = TrainConfig("kd", str(home / "default"), student="resnet8", epochs=1)
    train(replace(config, views=2), quiet)
    if restarted:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(replace(config, resume=not restarted), quiet)["epochs"] == 1


# Of a run of the first version: all that its config.json held.
FIRST = {
    "cache", "data", "student", "loss", "loss_options", "epochs", "batch_size", "lr", "weight_decay", "momentum",
    "warmup", "seed", "views", "image_size", "online", "fresh_views", "amp",
}  # fmt: skip


def test_a_run_of_an_older_version_is_resumed(home, tmp_path, monkeypatch):
    """Settings that came later are compared with what held before them, those of the loss too."""
    monkeypatch.setattr(NKD, "options_before", lambda: {"gamma": 9.0})
    out, config = tmp_path / "run", TrainConfig("nkd:gamma=9", str(home / "default"), epochs=1, batch_size=512)
    want = train(replace(config, out=str(out)), quiet)
    later = json.loads((out / "config.json").read_text())
    older = {k: v for k, v in later.items() if k in FIRST}
    del older["loss_options"]["gamma"]
    (out / "config.json").write_text(json.dumps(older))
    again = TrainConfig(cache=config.cache, out=str(out), resume=True)
    assert train(again, quiet)["loss"] == want["loss"]
    for name, value, had in (
        ("ema", 0.9, "None"), ("optimiser", "adamw", "sgd"), ("accumulate", 2, "1"), ("validation", 0.1, "None"),
        ("loss", "nkd:gamma=8", ".*'gamma': 9.0"),
    ):  # fmt: skip
        with pytest.raises(KdcacheError, match=rf"not resumed: {name}\w*: the run has {had}.*, asked for "):
            train(replace(again, **{name: value}), quiet)
    # Every setting has such a value, or is not compared.
    assert set(later) <= FIRST | set(config_of(out)) | runfolder._FREE


UNUSUAL = (
    *("--loss", "nkd:gamma=2,mixed=both", "--student", "resnet8", "--views", "2", "--seed", "3", "--lr", "0.003"),
    *("--optimiser", "adamw", "--ema", "0.9", "--accumulate", "2", "--clip", "1", "--batch-size", "100"),
    *("--validation", "0.1", "--weight-decay", "0.1", "--warmup", "0.5", "--evaluate-every", "2", "--epochs", "3"),
)


def test_the_folder_is_all_that_is_needed_to_resume(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").symlink_to(home / "default")

    def invoke(*args, **env):
        return CliRunner().invoke(main, ["train", *args], env=env, catch_exceptions=False)

    assert invoke("--cache", "c", *UNUSUAL, "--out", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_say", lambda text: text.startswith("epoch 2/3") and signal.raise_signal(signal.SIGTERM))
        assert invoke("--cache", "c", *UNUSUAL, "--out", "run").exit_code == 130
    differing = invoke("--resume", "--out", "run", "--epochs", "4", "--clip", "1", "--seed", "0")
    assert differing.exit_code == 2, differing.output
    names = "not resumed: epochs: the run has 3, asked for 4; seed: the run has 3, asked for 0"
    assert differing.stderr.splitlines()[-1].endswith(names)
    monkeypatch.chdir(home)  # from anywhere
    settings = {"KDCACHE_STUDENT": "resnet20", "KDCACHE_EPOCHS": "3", "KDCACHE_LOSS": "kd"}
    resumed = invoke("--resume", "--out", str(tmp_path / "run"), **settings)
    assert resumed.exit_code == 0, resumed.output
    (note,) = (text for text in resumed.stderr.splitlines() if text.startswith("note: /"))
    assert "its own student resnet8, loss nkd:gamma=2.0" in note and "epochs" not in note
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    for file in ("last", "best"):
        weights, whole = (read_weights(tmp_path / f / f"{file}.safetensors")[0] for f in ("run", "whole"))
        assert all(torch.equal(weights[name], whole[name]) for name in whole), file


def test_a_function_that_only_the_folder_names_is_not_called(home, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(TrainConfig("ce", str(home / "default"), epochs=1, batch_size=512, out=str(out)), quiet)
    had = json.loads((out / "config.json").read_text())
    for name in ("data", "student"):
        (out / "config.json").write_text(json.dumps({**had, name: "os:abort"}))
        with pytest.raises(KdcacheError, match=rf"names the \w+ 'os:abort', .*: .* give --{name} os:abort"):
            train(TrainConfig(out=str(out), resume=True), quiet)
    monkeypatch.setattr("kdcache.train.plan.plan.open_data", lambda spec, *_, **__: pytest.fail(f"{spec} is opened"))
    (out / "config.json").write_text(json.dumps({**had, "data": "my:images"}))
    with pytest.raises(
        pytest.fail.Exception, match="my:images is opened"
    ):  # also where a setting of the user's names it
        train(TrainConfig(out=str(out), resume=True, data="my:images"), quiet, given=set())
    wrong = {"data": 5, "student": ["a"], "epochs": "many", "loss_options": 3, "cache_path": 7, "amp": "fp8"}
    for name, value in wrong.items():
        (out / "config.json").write_text(json.dumps({**had, name: value}))
        with pytest.raises(KdcacheError, match=r"run/config\.json is not what kdcache writes .*: give another --out"):
            train(TrainConfig(out=str(out), resume=True), quiet)
    for name in ("cache", "data", "loss_options"):
        (out / "config.json").write_text(json.dumps({k: v for k, v in had.items() if k not in (name, "cache_path")}))
        with pytest.raises(KdcacheError, match=rf"is not what kdcache writes \(no '{name}'\)"):
            train(TrainConfig(out=str(out), resume=True), quiet)


def test_the_views_that_are_used_are_said(home, tmp_path):
    said = []
    config = TrainConfig("ce", str(home / "default"), epochs=1, batch_size=512)
    train(replace(config, out=str(tmp_path / "a"), views=2), said.append)
    train(replace(config, out=str(tmp_path / "b")), said.append)
    train(replace(config, out=str(tmp_path / "c"), online=True, fresh_views=True), said.append)
    found = [re.search(r"\((\d[\w ]* views|\d views|a new view every epoch)\), 1 epochs", text) for text in said]
    assert [m[1] for m in found if m] == ["2 of 3 views", "3 views", "a new view every epoch"]


# A part of the training images held out


def test_the_part_held_out_is_the_same_for_every_run_and_of_every_class(data):
    labels = data.labels[:, 0]
    for fraction in (0.1, 0.5):
        held = held_out_part(data, fraction)
        want = np.floor(fraction * np.bincount(labels) + 0.5)
        assert np.array_equal(np.bincount(labels[held]), want) and np.array_equal(held, held_out_part(data, fraction))
    # A larger part has the smaller one in it, and none lies where another fraction of the order would.
    assert (held_out_part(data, 0.5) | ~held_out_part(data, 0.1)).all()
    assert len(np.unique(np.diff(np.flatnonzero(held_out_part(data, 0.1))))) > 10
    for fraction, kept in ((1e-6, "none"), (1 - 1e-6, "all")):
        with pytest.raises(KdcacheError, match=rf"holds out {kept} of digits's 1,442 training images"):
            held_out_part(data, fraction)
    with pytest.raises(KdcacheError, match="--validation chooses weights by top-1, which needs labels"):
        held_out_part(open_data("digits", "train", unlabelled=True), 0.1)


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


def test_the_best_weights_are_those_of_the_part_held_out(home, data, tmp_path):
    out = tmp_path / "run"
    config = TrainConfig("nkd", str(home / "default"), epochs=4, batch_size=128, lr=0.3, out=str(out), validation=0.2)
    summary = train(config, quiet)
    lines = metrics_of(out)
    best = max(reversed(lines), key=lambda line: line["validation_top1"])
    assert summary["best"] == best and summary["top1"] == lines[-1]["top1"]
    held = held_out_part(data, 0.2)
    images, labels = data.pixels[torch.from_numpy(held)], torch.from_numpy(data.labels[held, 0])
    for file, line in (("last", lines[-1]), ("best", best)):
        model = student_of(out, *read_weights(out / f"{file}.safetensors")).eval()
        with torch.no_grad():
            right = model(images.permute(0, 3, 1, 2)).argmax(1) == labels
        assert float(right.float().mean()) == pytest.approx(line["validation_top1"], abs=1e-6)
        assert evaluate_run(str(out / f"{file}.safetensors"))["top1"] == line["top1"]
    assert evaluate_run(str(out))["weights"] == str(out / "last.safetensors")


def test_a_part_held_out_of_a_run_with_a_learning_teacher(home, tmp_path):
    out = tmp_path / "run"
    train(TrainConfig("bdkd", str(home / "default"), epochs=2, online=True, out=str(out), validation=0.2), quiet)
    lines = metrics_of(out)
    assert all({"validation_top1", "teacher_validation_top1", "validation_agreement"} <= set(line) for line in lines)
    best = max(reversed(lines), key=lambda line: line["teacher_validation_top1"])
    assert read_weights(out / "teacher-best.safetensors")[1]["metrics"]["top1"] == best["teacher_top1"]


OTHER = """
import numpy as np
from kdcache.pipeline.data.kinds.named import digits

def reversed_names(split):
    images, labels, names = digits(split == "train")
    return images, 9 - labels, names[::-1]

def some(split):
    images, labels, names = digits(split == "train")
    chosen = (labels == 7) | (labels == 2)
    return images[chosen], (labels[chosen] == 2).astype(int), ("7", "2")

def foreign(split):
    images, labels, names = digits(split == "train")
    return images, labels, tuple("012345678") + ("nine",)
"""


def test_a_student_is_evaluated_on_other_data_with_its_classes(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("other_digits.py").write_text(OTHER)
    train(TrainConfig("nkd", str(home / "default"), epochs=2, out="run"), quiet)
    own, reordered = evaluate_run("run"), evaluate_run("run", data="other_digits:reversed_names")
    measured = ("top1", "top5", "nll", "brier", "ece")
    assert {k: reordered[k] for k in measured} == {k: own[k] for k in measured}
    assert reordered["images"] == 355 and reordered["data"] == "other_digits:reversed_names"
    assert "agreement" in own and "agreement" not in reordered
    evaluation = open_data("digits", "eval")
    chosen = np.isin(evaluation.labels[:, 0], (2, 7))
    model = student_of(Path("run"), *read_weights(Path("run/last.safetensors"))).eval()
    with torch.no_grad():
        answers = model(evaluation.pixels[torch.from_numpy(chosen)].permute(0, 3, 1, 2)).argmax(1)
    right = (answers == torch.from_numpy(evaluation.labels[chosen, 0])).float().mean()
    assert evaluate_run("run", data="other_digits:some")["top1"] == pytest.approx(float(right))
    with pytest.raises(KdcacheError, match=r"not trained on other_digits:foreign's classes 'nine': its own are '0', "):
        evaluate_run("run", data="other_digits:foreign")


@pytest.mark.parametrize("splits", [True, False])
def test_a_folder_of_other_images_is_evaluated_whole_unless_it_has_splits(home, tmp_path, splits):
    """Twelve images of each of three classes; where they are split, a third of them is the evaluation split."""
    train(TrainConfig("ce", str(home / "default"), epochs=1, batch_size=512, out=str(tmp_path / "run")), quiet)
    images, labels, _ = digits(True)
    for c in (8, 1, 3):
        for i, image in enumerate(images[labels == c][:12]):
            folder = tmp_path / "pics" / (("val" if i % 3 == 0 else "train") if splits else "") / str(c)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    found = evaluate_run(str(tmp_path / "run"), data=f"imagefolder:{tmp_path / 'pics'}", workers=0)
    assert found["images"] == (12 if splits else 36)


def test_devices_that_are_not_there():
    for name in ("cuda:7", "gpu"):
        with pytest.raises(KdcacheError, match=rf"device '{name}' cannot be used here: .*; take cpu, cuda or cuda:N"):
            train(TrainConfig("ce", device=name), quiet)


def test_a_loss_that_is_not_finite_stops_the_run(home, tmp_path):
    config = TrainConfig("ce", cache=str(home / "default"), epochs=2, lr=1e12, out=str(tmp_path / "run"))
    with pytest.raises(KdcacheError, match="not finite in epoch 1: lower --lr"):
        train(config, quiet)


def test_metrics_against_a_reference():
    rng = np.random.default_rng(0)
    z, y = rng.normal(0, 2, (500, 7)), rng.integers(0, 7, 500)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == y
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    got = metrics(torch.tensor(z).float(), torch.tensor(y))
    assert got["top1"] == pytest.approx(right.mean())
    assert got["top5"] == pytest.approx(np.mean([y[i] in np.argsort(-z[i])[:5] for i in range(500)]))
    assert got["nll"] == pytest.approx(-np.log(p[np.arange(500), y]).mean(), rel=1e-5)
    assert got["ece"] == pytest.approx(ece, abs=1e-5)
    assert got["brier"] == pytest.approx(((p - np.eye(7)[y]) ** 2).sum(1).mean(), rel=1e-5)


def test_brier_at_its_ends():
    y = torch.arange(4)
    sure = 1e4 * torch.eye(4)
    assert metrics(sure, y)["brier"] == pytest.approx(0, abs=1e-6)
    assert metrics(sure, y.roll(1))["brier"] == pytest.approx(2, abs=1e-6)
    assert metrics(torch.zeros(4, 4), y)["brier"] == pytest.approx(0.75)


def test_the_loop_in_the_readme_runs(home, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (loop,) = (b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "CachedLoader" in b)
    assert len(loop.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    key = build(BuildConfig("resnet8", views=1), quiet).key
    names: dict[str, object] = {}
    exec(compile(loop.replace("CACHE", key[:12]), "README.md", "exec"), names)
    assert float(names["loss"].detach()) > 0
    assert not list(tmp_path.iterdir())
