"""The part of the training images that is held out chooses the best weights."""

import numpy as np
import pytest
import torch

from kdcache.cache import KdcacheError
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.training import metrics_of, quiet
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run, student_of
from kdcache.train.evaluation.validation import held_out_part
from kdcache.train.run import train


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
