"""What is told of a student's answers, against scikit-learn and float64: by class, calibration, agreement."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from kdcache.cache.records.encoding import encode
from kdcache.tests.helpers.lazily import Lazily
from kdcache.train.evaluation.analysis.analysis import agreement, analyse, described, most_probable
from kdcache.train.evaluation.analysis.calibration import LARGEST, SMALLEST, fitted_temperature, halves, scaling
from kdcache.train.evaluation.analysis.classes import MATRIX_UP_TO, confusions, names_of_classes, per_class
from kdcache.train.evaluation.judge import Answers

optimize, special = Lazily("scipy.optimize"), Lazily("scipy.special")
reference = Lazily("sklearn.metrics")


def drawn(n=900, classes=7, seed=0, sure=3.0):
    """float32 logits of a student that is right more often than not, and too sure; int64 labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    z = rng.normal(0, 1, (n, classes))
    z[np.arange(n), labels] += 1.5
    return (sure * z).astype(np.float32), labels


def tensors(z, y):
    return torch.from_numpy(z), torch.from_numpy(y)


def test_classes_and_confusions_equal_scikit_learn():
    z, y = drawn()
    y[y == 4] = 3  # a class without images, which is still predicted
    predicted = z.argmax(1)
    found, mixed_up = per_class(predicted, y, list("abcdefg")), confusions(predicted, y, 7)
    want = reference.confusion_matrix(y, predicted, labels=range(7))
    assert np.array_equal(mixed_up.matrix, want)
    assert found.images == tuple(want.sum(1)) and found.predicted == tuple(want.sum(0))
    recall = reference.precision_recall_fscore_support(y, predicted, labels=range(7), zero_division=np.nan)[1]
    assert found.accuracy[4] is None and found.images[4] == 0 and found.predicted[4] > 0
    some = [c for c in range(7) if c != 4]
    assert [found.accuracy[c] for c in some] == pytest.approx(recall[some].tolist())
    wrong = want - np.diag(np.diag(want))
    assert sum(one.images for one in mixed_up.largest) + mixed_up.others == wrong.sum()
    assert all(wrong[one.label, one.prediction] == one.images for one in mixed_up.largest)
    assert [one.images for one in mixed_up.largest] == sorted(wrong[wrong > 0].tolist(), reverse=True)


def test_many_classes_have_no_matrix_and_few_confusions():
    z, y = drawn(2000, MATRIX_UP_TO + 1)
    found = confusions(z.argmax(1), y, MATRIX_UP_TO + 1)
    assert found.matrix is None and len(found.largest) == 100 and found.others > 0
    assert found.others + sum(one.images for one in found.largest) == (z.argmax(1) != y).sum()
    one, *_ = found.largest
    assert one.images == ((y == one.label) & (z.argmax(1) == one.prediction)).sum()


def nll64(z, y, temperature=1.0):
    return -special.log_softmax(z.astype(np.float64) / temperature, 1)[np.arange(len(y)), y].mean()


@pytest.mark.parametrize("sure", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_one_that_scipy_finds(sure):
    z, y = drawn(sure=sure)
    best = optimize.minimize_scalar(
        lambda log: nll64(z, y, np.exp(log)), bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}
    )
    assert fitted_temperature(*tensors(z, y)) == pytest.approx(np.exp(best.x), rel=1e-5)


def test_calibration_before_and_after_equals_scikit_learn():
    z, y = drawn()
    found, first = scaling(*tensors(z, y)), halves(y)
    # Every class is halved, and each half is judged by what was fitted to the other.
    assert abs(np.bincount(y[first]) - np.bincount(y[~first])).max() <= 1
    for half, temperature in ((first, found.of_halves[0]), (~first, found.of_halves[1])):
        assert nll64(z[half], y[half], temperature) <= min(
            nll64(z[half], y[half], temperature * f) for f in (0.99, 1.01)
        )
    after = z / np.where(first, found.of_halves[1], found.of_halves[0])[:, None]
    for one, logits in ((found.before, z), (found.after, after)):
        p = special.softmax(logits.astype(np.float64), 1)
        assert one.nll == pytest.approx(reference.log_loss(y, p, labels=range(7)), rel=1e-5)
        assert one.brier == pytest.approx(sum(reference.brier_score_loss(y == c, p[:, c]) for c in range(7)), rel=1e-5)
        assert sum(b.images for b in one.bins) == len(y) and len(one.bins) == 15
        gaps = [b.images * abs(b.accuracy - b.confidence) for b in one.bins]
        assert one.ece == pytest.approx(sum(gaps) / len(y), abs=1e-6)
        sure = p.max(1)
        inside = (sure > 14 / 15) & (sure <= 1)
        assert one.bins[-1].images == inside.sum()
        assert one.bins[-1].accuracy == pytest.approx((p.argmax(1) == y)[inside].mean())
    assert found.after.ece < found.before.ece / 2 and found.after.nll < found.before.nll
    assert scaling(*tensors(z, y)) == found


def test_a_temperature_without_an_end_stops_at_the_bounds():
    y = torch.arange(20) % 4
    right = torch.nn.functional.one_hot(y, 4).float()
    assert fitted_temperature(right, y) == SMALLEST
    assert fitted_temperature(right, y.roll(1)) == LARGEST
    assert fitted_temperature(torch.zeros(20, 4), y) in (SMALLEST, LARGEST)  # any is as good
    assert scaling(right[:1], y[:1]) is None
    assert scaling(right[:2], y[:2]).of_halves == (SMALLEST, SMALLEST)


@pytest.mark.parametrize("k", [None, 5, 3])
def test_agreement_is_with_one_and_with_five_of_the_teachers_classes(k):
    z, y = drawn(300, 9)
    t, _ = drawn(300, 9, seed=1)
    teacher = encode(torch.from_numpy(t), torch.from_numpy(y), k, precision="float32")
    found = agreement(Answers(torch.from_numpy(z), torch.from_numpy(y), teacher))
    order = np.argsort(-t.astype(np.float64), 1)
    assert np.array_equal(most_probable(teacher, 3).numpy(), order[:, :3])
    assert (found.images, found.top1) == (300, pytest.approx((z.argmax(1) == order[:, 0]).mean()))
    near = (order[:, :5] == z.argmax(1)[:, None]).any(1).mean()
    assert found.top5 == (None if k == 3 else pytest.approx(near))
    assert found.accuracy == pytest.approx((z.argmax(1) == y).mean())
    if k is None:
        p, q = special.softmax(t.astype(np.float64), 1), special.log_softmax(z.astype(np.float64), 1)
        assert found.kl == pytest.approx((p * (np.log(p) - q)).sum(1).mean(), rel=1e-4)
    agreed = sum(b.images * b.accuracy for b in found.bins) / 300
    assert agreed == pytest.approx(found.top1)


def test_the_analysis_is_plain_data_with_and_without_labels_and_teacher():
    z, y = tensors(*drawn())
    teacher = encode(z.flip(1), y, precision="float32")
    names = names_of_classes(7, ["x<b>", "y", "z"], [6, None, 0])
    assert names == ("z", "1", "2", "3", "4", "5", "x<b>")
    whole = analyse(Answers(z, y, teacher), names, Answers(z, torch.empty(0, dtype=torch.int64), teacher))
    assert json.loads(json.dumps(asdict(whole), allow_nan=False))["per_class"]["names"][6] == "x<b>"
    assert whole.training.accuracy is None and whole.evaluation.accuracy is not None
    assert len(described(whole)) == 5 and max(map(len, described(whole))) < 200
    bare = analyse(Answers(z, torch.empty(0, dtype=torch.int64), None), names)
    assert not any(vars(bare).values()) and described(bare) == []
    right = analyse(Answers(torch.eye(7), torch.arange(7), None), names)
    assert right.confusions.largest == () and set(right.per_class.accuracy) == {1.0} and len(described(right)) == 1
