"""What is counted of answers, against sums over dense probabilities in float64."""

import numpy as np
import pytest
import torch

from kdcache.cache.records.encoding import encode
from kdcache.train.report.facts.tally import BINS, ENTROPY_BINS, Tally

N, C = 300, 12
NAMES = [f"c{i}" for i in range(C)]


def probabilities(z, t):
    e = np.exp((z - z.max(1, keepdims=True)) / t)
    return e / e.sum(1, keepdims=True)


def ece64(confidence, right):
    """Guo et al. 2017: bins that are open below and closed above."""
    total = 0.0
    for low in range(BINS):
        inside = (confidence > low / BINS) & (confidence <= (low + 1) / BINS)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return total


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(3)
    return rng.normal(0, 2, (N, C)), rng.integers(0, C, N)


def counted(drawn, t, k=None, precision="float32"):
    z, y = drawn
    labels = torch.from_numpy(y).unsqueeze(1)
    records = encode(torch.from_numpy(z.astype(np.float32)), labels, k=k, temperatures=(t,), precision=precision)
    tally = Tally(C, t, labelled=True)
    answers = [tally.add(records[at : at + 64]) for at in range(0, N, 64)]
    return tally.facts(NAMES, k or C), answers


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_dense_records_give_what_float64_gives(drawn, t):
    (z, y), (found, answers) = drawn, counted(drawn, t)
    p = probabilities(z, t)
    order, right = np.argsort(-z, 1), z.argmax(1) == y
    entropy, nll = -(p * np.log(p)).sum(1), -np.log(p[np.arange(N), y])
    near = {"rel": 1e-3}
    assert found["images"] == N and found["top1"] == pytest.approx(right.mean())
    assert found["top5"] == pytest.approx((order[:, :5] == y[:, None]).any(1).mean())
    assert found["nll"] == pytest.approx(nll.mean(), **near)
    assert found["ece"] == pytest.approx(ece64(p.max(1), right), abs=1e-5)
    assert found["confidence"] == pytest.approx(p.max(1).mean(), **near)
    assert found["entropy"]["mean"] == pytest.approx(entropy.mean(), **near)
    assert sum(found["entropy"]["counts"]) == N and len(found["entropy"]["counts"]) == ENTROPY_BINS
    assert found["ranks"] == pytest.approx(np.sort(p, 1)[:, ::-1].cumsum(1).mean(0), abs=1e-5)
    assert torch.cat([a.entropy for a in answers]).numpy() == pytest.approx(entropy, abs=1e-4)
    assert torch.cat([a.nll for a in answers]).numpy() == pytest.approx(nll, abs=2e-3)
    assert np.array_equal(torch.cat([a.right for a in answers]).numpy(), right)


def test_classes_and_confusions_are_counted(drawn):
    (z, y), (found, _) = drawn, counted(drawn, 1.0)
    matrix = np.zeros((C, C), int)
    np.add.at(matrix, (y, z.argmax(1)), 1)
    assert np.array_equal(found["confusions"]["matrix"], matrix)
    assert found["per_class"]["names"] == tuple(NAMES)
    assert found["per_class"]["correct"] == tuple(np.diag(matrix)) and sum(found["per_class"]["images"]) == N
    assert sum(one["images"] for one in found["bins"]) == N


def test_top_k_records_know_the_label_and_the_tail(drawn):
    """The entropy is that of the modelled tail, so that only a bound can be held."""
    (z, y), (found, _) = drawn, counted(drawn, 1.0, k=4)
    p = probabilities(z, 1.0)
    assert found["nll"] == pytest.approx(-np.log(p[np.arange(N), y]).mean(), rel=5e-3)
    assert found["top5"] is None and len(found["ranks"]) == 4
    assert found["ranks"] == pytest.approx(np.sort(p, 1)[:, ::-1][:, :4].cumsum(1).mean(0), abs=2e-3)
    assert found["entropy"]["mean"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=0.1)


def test_without_one_label_nothing_is_said_of_accuracy(drawn):
    records = encode(torch.from_numpy(drawn[0].astype(np.float32)), None, k=None)
    tally = Tally(C, 1.0, labelled=False)
    answered = tally.add(records)
    assert answered.nll is None and answered.right is None
    assert tally.facts(NAMES, C).keys() == {"images", "temperature", "confidence", "entropy", "ranks"}
