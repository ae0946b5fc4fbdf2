"""Metrics against independent references: calibration, also where a probability lies at the edge of a bin."""

import numpy as np
import pytest
import torch

from kdcache.tests.helpers.lazily import Lazily
from kdcache.train.evaluation.metrics import metrics, reliability

calibration = Lazily("sklearn.calibration")
BINS = 15


def logits_of(confidence, classes=7):
    """float64 logits whose most probable class, the first, has this probability."""
    p = np.full((len(confidence), classes), ((1 - confidence) / (classes - 1))[:, None])
    p[:, 0] = confidence
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(p))


def ece64(confidence, right):
    """Guo et al. 2017, eq. 3, image by image: bin m holds what is above (m - 1) / 15 and at most m / 15."""
    total = 0.0
    for m in range(1, BINS + 1):
        inside = [(c, r) for c, r in zip(confidence, right, strict=True) if (m - 1) / BINS < c <= m / BINS]
        total += abs(sum(r - c for c, r in inside))
    return total / len(confidence)


def test_ece_counts_a_probability_of_one_in_the_last_bin():
    """The last bin has 0.95, right, and 1, wrong: together they are off by half of what they are one by one."""
    z = logits_of(np.array([0.95, 1.0]))
    got = metrics(z.float(), torch.tensor([0, 1]))
    assert got["ece"] == pytest.approx(abs((1 - 0.95) + (0 - 1)) / 2, abs=1e-6)
    # float32 has 1 where the others are 17 nats below.
    z = torch.tensor([[0.0, -2.944439], [0.0, -30.0]])
    assert metrics(z, torch.tensor([0, 1]))["ece"] == pytest.approx(0.475, abs=1e-6)
    assert reliability(z, torch.tensor([0, 1]))[-1].tolist() == pytest.approx([2, 0.975, 0.5])


@pytest.mark.parametrize("classes", [3, 5, 15, 30])
def test_a_probability_at_an_edge_belongs_to_the_bin_below(classes):
    """Equal logits have 1 / C exactly: 5 / 15, 3 / 15 and 1 / 15 are edges, 1 / 30 lies in the first bin."""
    bins = reliability(torch.zeros(4, classes), torch.tensor([0, 0, 0, 1]))
    at = int(np.ceil(BINS / classes)) - 1
    assert bins[:, 0].nonzero().tolist() == [[at]] and bins[at].tolist() == pytest.approx([4, 1 / classes, 0.75])


def test_calibration_equals_scikit_learn_and_the_paper():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.uniform(1 / 7, 1, 2000), rng.beta(20, 1, 500), np.ones(50)])
    confidence = confidence[confidence > 0.15]
    right = rng.random(len(confidence)) < confidence**2
    z, y = logits_of(confidence), torch.from_numpy(np.where(right, 0, 3))
    found = reliability(z, y)
    assert found.dtype == torch.float64 and found[:, 0].sum() == len(z)
    accuracy, sure = calibration.calibration_curve(right, confidence, n_bins=BINS)
    filled = found[found[:, 0] > 0]
    np.testing.assert_allclose(filled[:, 1], sure, rtol=1e-9)
    np.testing.assert_allclose(filled[:, 2], accuracy, rtol=1e-12)
    assert metrics(z, y)["ece"] == pytest.approx(ece64(confidence, right), abs=1e-9)


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
