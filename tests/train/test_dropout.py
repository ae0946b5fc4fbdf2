"""Drop path and dropout are active while a network learns, and never while it answers."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.training import metrics_of, quiet
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run, student_of
from kdcache.train.export.config import ExportConfig
from kdcache.train.export.export import export
from kdcache.train.run import train

WATCHED = """
import torch
from torch import nn

calls = []

class Watched(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(192, classes)
    def forward(self, x):
        calls.append((self.drop.training, torch.is_grad_enabled()))
        return self.last(self.drop(x.flatten(1)))

class OfTeacher(Watched):
    pass

student, teacher = Watched, OfTeacher
"""
VIT = "timm/vit_tiny_patch16_224:depth=2,embed_dim=32,img_size=16,num_heads=2,patch_size=8"
DROPS = ",drop_path_rate=0.5,drop_rate=0.5,proj_drop_rate=0.5"


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("watched_by_test.py").write_text(WATCHED)
    import watched_by_test

    yield watched_by_test.calls
    sys.modules.pop("watched_by_test")


def test_dropout_is_active_in_steps_alone(home, watched):
    """42 steps of an epoch of 1,442 less a fifth that is held out; all other calls are answers."""
    name = "watched_by_test:student"
    options = {"student": name, "epochs": 2, "batch_size": 128, "validation": 0.2}
    train(TrainConfig("nkd", str(home / "default"), out="run", ema=0.9, **options), quiet)
    steps = 2 * (1154 // 128)
    assert watched.count((True, True)) == steps and {c for c in watched if c[0]} == {(True, True)}
    assert watched.count((False, False)) > 2 * 2  # both splits after both epochs, and when it was tried out
    watched.clear()
    found = evaluate_run("run", student=name)
    assert found["top1"] == metrics_of(Path("run"))[-1]["top1"] and evaluate_run("run", student=name) == found
    result = export(ExportConfig("run", "torchscript", student=name), quiet)
    assert result.check.same_top1 == 355 and watched and not any(training for training, _ in watched)


def test_a_teacher_answers_without_dropout_in_a_build_and_online(home, watched):
    """Online too, where the student in the same step has it."""
    name = "watched_by_test:teacher"
    build(BuildConfig(name, views=1, allow_low_accuracy=True, out="cache"), quiet)
    assert watched and not any(training or grad for training, grad in watched)
    watched.clear()
    options = {"student": "resnet8", "epochs": 1, "batch_size": 512, "teacher": name}
    train(TrainConfig("kd", "cache", out="run", online=True, **options), quiet)
    assert watched and not any(training or grad for training, grad in watched)


def test_timms_drop_rates_change_nothing_but_the_learning(home, tmp_path):
    """A student with them answers as the same weights do in a network that has none, in eval and exported."""
    pytest.importorskip("timm")
    out = tmp_path / "run"
    options = {"student": VIT + DROPS, "epochs": 1, "batch_size": 256, "lr": 0.01}
    train(TrainConfig("kd", str(home / "default"), out=str(out), **options), quiet)
    state, notes = read_weights(out / "last.safetensors")
    model = student_of(out, state, notes)
    plain = build_network(VIT, 10, 16)
    plain.load_state_dict(state)
    images = torch.rand(16, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.network.eval()(images), plain.eval()(images))
        model.network.train()
        assert not torch.equal(model.network(images), model.network(images))
    assert evaluate_run(str(out)) == evaluate_run(str(out))
    images = len(open_data("digits", "eval"))
    for to in ["torchscript"] + ["onnx"] * bool(find_spec("onnxruntime")):
        check = export(ExportConfig(str(out), to), quiet).check
        assert (check.images, check.same_top1) == (images, images)
        assert np.isfinite(check.max_logit) and check.max_logit_difference < 1e-4
