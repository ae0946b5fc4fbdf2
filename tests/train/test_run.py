"""Whole runs: what they leave behind, what they say, and what stops them."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.cache import KdcacheError, open_cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.tests.helpers.places import ROOT
from kdcache.tests.helpers.training import BATCH, quiet, student, teacher_of
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader
from kdcache.train.loop.cotrain import LearningTeacher
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import Training
from kdcache.train.losses.features import FeatureTap
from kdcache.train.losses.options import LOSSES, make_loss
from kdcache.train.losses.prepare import prepared
from kdcache.train.run import train


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


@pytest.mark.parametrize(("lr", "guesses"), [(None, False), (20.0, True)])
def test_a_student_that_guesses_is_told_of(home, tmp_path, lr, guesses):
    said = []
    train(TrainConfig("ce", cache=str(home / "top3"), epochs=2, lr=lr, out=str(tmp_path / "run")), said.append)
    notes = [line for line in said if line.startswith("note: it guesses (")]
    assert len(notes) == guesses
    assert all(" are by chance): lower --lr (now 20), or train it for more --epochs" in note for note in notes)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(home, tmp_path, name):
    config = {"epochs": 2, "batch_size": 256, "data": "digits"}
    dense = train(TrainConfig(name, cache=str(home / "default"), out=str(tmp_path / "dense"), **config), quiet)
    assert math.isfinite(dense["loss"]) and math.isfinite(dense["nll"])
    if make_loss(name, 10).needs.dense:
        with pytest.raises(KdcacheError, match="holds the top 3: build one with --topk 10"):
            train(TrainConfig(name, cache=str(home / "top3"), out=str(tmp_path / "top3"), **config), quiet)
    else:
        once = {**config, "epochs": 1}
        sparse = train(TrainConfig(name, cache=str(home / "top3"), out=str(tmp_path / "top3"), **once), quiet)
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


@pytest.mark.parametrize("name", LOSSES)
def test_no_step_brings_a_value_to_the_host(home, data, name):
    """Nor does a loader after its first step: a GPU would be waited for."""
    caches = {kind: open_cache(home / kind) for kind in ("default", "top3")}
    if make_loss(name, 10).needs.dense:
        del caches["top3"]
    loaders = {kind: CachedLoader(cache, data, BATCH) for kind, cache in caches.items()}
    recipes = {kind: Recipe(1, 0.01, optimiser=o, **ALL) for kind, o in zip(loaders, ("sgd", "adamw"), strict=False)}
    muon = "muon" if hasattr(torch.optim, "Muon") else "sgd"  # torch has it since 2.9
    recipes["online"] = Recipe(1, 0.01, optimiser=muon, **ALL)
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


def test_the_views_that_are_used_are_said(home, tmp_path):
    said = []
    config = TrainConfig("ce", str(home / "default"), epochs=1, batch_size=512)
    train(replace(config, out=str(tmp_path / "a"), views=2), said.append)
    train(replace(config, out=str(tmp_path / "b")), said.append)
    train(replace(config, out=str(tmp_path / "c"), online=True, fresh_views=True), said.append)
    found = [re.search(r"\((\d[\w ]* views|\d views|a new view every epoch)\), 1 epochs", text) for text in said]
    assert [m[1] for m in found if m] == ["2 of 3 views", "3 views", "a new view every epoch"]


def test_devices_that_are_not_there():
    for name in ("cuda:7", "gpu"):
        with pytest.raises(KdcacheError, match=rf"device '{name}' cannot be used here: .*; take cpu, cuda or cuda:N"):
            train(TrainConfig("ce", device=name), quiet)


def test_a_loss_that_is_not_finite_stops_the_run(home, tmp_path):
    config = TrainConfig("ce", cache=str(home / "default"), epochs=2, lr=1e12, out=str(tmp_path / "run"))
    with pytest.raises(KdcacheError, match="not finite in epoch 1: lower --lr"):
        train(config, quiet)


def test_the_loop_in_the_readme_runs(home, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    (loop,) = (b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "CachedLoader" in b)
    assert len(loop.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    key = build(BuildConfig("resnet8", views=1), quiet).key
    names: dict[str, object] = {}
    exec(compile(loop.replace("CACHE", key[:12]), "README.md", "exec"), names)
    assert float(names["loss"].detach()) > 0
    assert not list(tmp_path.iterdir())
