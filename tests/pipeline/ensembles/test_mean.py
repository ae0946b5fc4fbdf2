"""The mean of several teachers' answers is what float64 has it, from dense and from top-k records."""

import numpy as np
import pytest
import torch

from kdcache.cache.errors import InputError
from kdcache.cache.records.encoding import class_prior, encode, tail_distribution
from kdcache.pipeline.ensembles.mean import log_probabilities, mean_of
from kdcache.tests.helpers.caches import identity
from kdcache.tests.helpers.ensembles import softmax64

pytestmark = pytest.mark.usefixtures("one_thread")
B, C = 64, 12


def answers(number, labels=1, **how):
    """Logits, labels, and the records of one teacher with their own prior."""
    rng = np.random.default_rng(number)
    z = torch.from_numpy(rng.normal(0, 3, (B, C)).astype(np.float32))
    y = torch.from_numpy(np.random.default_rng(9).integers(0, C, (B, labels)))
    records = encode(z, y, **{"temperatures": (1.0, 4.0), **how})
    if records.classes is not None:
        object.__setattr__(records, "prior", class_prior(tail_distribution(z, records)))
    return z.numpy(), y, records


@pytest.mark.parametrize("labels", [0, 1, 2])
@pytest.mark.parametrize("precision", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("k", [1, 4, C - 1])
def test_top_k_records_are_read_as_a_student_reads_them(k, precision, labels):
    _, _, records = answers(0, labels, k=k, precision=precision)
    p = log_probabilities(records).exp()
    torch.testing.assert_close(p, records.dense(1.0).double(), rtol=2e-3 if precision != "float32" else 1e-3, atol=1e-7)
    torch.testing.assert_close(p.sum(1), torch.ones(B).double())


def test_no_probability_is_too_small_for_its_logarithm():
    """A float32 softmax makes 0 of what is 104 nats below the largest."""
    z = torch.zeros(1, C)
    z[0, 1:] = -torch.arange(1, C) * 500.0
    for k in (None, 4):
        records = encode(z, None, k=k, precision="float32", temperatures=(1.0,))
        if k:
            object.__setattr__(records, "prior", torch.full((1, C), 1 / C))
        log = log_probabilities(records)
        assert torch.isfinite(log).all()
        torch.testing.assert_close(log[:, :4], z[:, :4].double())


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.3, 0.5)])
def test_dense_records_give_the_mean(weights):
    made = [answers(n, k=None, precision="float32") for n in range(len(weights))]
    record = identity(classes=C, k=None, precision="float32").record
    found = mean_of([records for *_, records in made], weights, record, sums=False)
    want = sum(w * softmax64(z) for w, (z, *_) in zip(weights, made, strict=True))
    p = softmax64(found.records.logits().numpy())
    assert np.abs(p - want).max() < 1e-6 and np.abs(p / want - 1).max() < 1e-5
    y = made[0][1].numpy()
    gap = np.log(want.max(1, keepdims=True)) - np.log(np.take_along_axis(want, y, 1))
    np.testing.assert_allclose(found.records.target_gap.numpy(), gap, rtol=1e-3, atol=1e-3)


def test_top_k_records_of_the_mean_hold_what_a_teacher_has_stored():
    """Classes, gaps, label and tail against the mean of the read probabilities, worked out row by row."""
    weights, k = (0.6, 0.4), 4
    made = [answers(n, k=k, precision="float32") for n in range(2)]
    record = identity(classes=C, k=k, precision="float32").record
    found = mean_of([records for *_, records in made], weights, record, sums=True)
    p = sum(w * log_probabilities(r).exp().numpy() for w, (*_, r) in zip(weights, made, strict=True))
    for row in range(B):
        y = int(made[0][1][row, 0])
        known = {*made[0][2].classes[row].tolist(), *made[1][2].classes[row].tolist(), y}
        ranked = sorted(known, key=lambda c: -p[row, c])[:k]
        assert found.records.classes[row].tolist() == ranked
        np.testing.assert_allclose(found.records.gaps[row], -np.log(p[row, ranked[1:]] / p[row, ranked[0]]), rtol=1e-4)
        rest = [c for c in range(C) if c not in (*ranked, y)]
        for at, t in enumerate((1.0, 4.0)):
            tail = np.log(((p[row, rest] / p[row, ranked[0]]) ** (1 / t)).sum())
            np.testing.assert_allclose(found.records.tail[row, at], tail, atol=2e-3)
    z = torch.from_numpy(np.log(p))
    torch.testing.assert_close(found.sums, tail_distribution(z, found.records))


def test_answers_that_are_no_numbers_are_refused():
    *_, records = answers(0, k=None, precision="float32")
    records.gaps[3, 2] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        mean_of([records, records], (0.5, 0.5), identity(classes=C, k=None, precision="float32").record)
