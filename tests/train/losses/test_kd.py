"""Losses that compare probabilities as wholes: what is particular to each."""

import pytest
import torch

from kdcache.cache import encode
from kdcache.tests.helpers.losses import (
    B,
    bdkd_teacher64,
    errors,
    kl,
    logits,
    mixed_sample,
    sample,
    soft,
    value_and_gradient,
)
from kdcache.train.losses import BDKD


@pytest.mark.parametrize("constants", [(1.0, 1.0, 1.0), (0.3, 2.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0)])
def test_the_loss_of_bdkds_teacher(constants):
    """Differentiable in the teacher alone: online, the student's answer is given."""
    alpha, regulariser, T = constants
    s, t, y = sample()
    loss = BDKD(temperature=T, teacher_alpha=alpha, regulariser=regulariser)
    student = s.clone().requires_grad_()
    got = value_and_gradient(lambda v: loss.of_teacher(v, y, student), t)
    assert student.grad is None
    one = torch.ones(B, 1, dtype=torch.float64)
    want = value_and_gradient(lambda v: bdkd_teacher64(v, s.double(), y[:, None], one, *constants), t.double())
    assert max(errors(got, want)) < 1e-5
    _, _, y, w = mixed_sample()
    want = value_and_gradient(lambda v: bdkd_teacher64(v, s.double(), y, w.double(), *constants), t.double())
    assert max(errors(value_and_gradient(lambda v: loss.of_teacher(v, y, s, w), t), want)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert loss.of_teacher(t.bfloat16(), y[:, 0], s.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tail", ["prior", "uniform"])
def test_sums_over_a_modelled_tail_equal_those_over_its_dense_form(tail, reverse):
    """bdkd never builds the dense teacher: its two divergences are those from the dense form."""
    s, t, y = sample()
    records = encode(t, y, 5, (2.0,))
    if tail == "prior":
        prior = torch.softmax(logits(8, 1.0, rows=1), 1)
        records = type(records)(**{**vars(records), "prior": prior})
    p, q = records.dense(2.0, tail).double(), soft(s.double(), 2.0)
    heavy, light = (0.0, 1.0) if reverse else (1.0, 0.0)
    sure = (q * q.log()).sum(1) > (p * p.log()).sum(1)
    want = 4 * torch.where(sure != reverse, kl(p, q), kl(q, p)).mean()
    got = BDKD(0.0, 1.0, 2.0, heavy, light, tail)(s, y, records)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_label_probability_is_exact_outside_the_top_k():
    t, y = logits(3), logits(3).argmin(1)
    records = encode(t, y, 3, (1.0,), "float16").softened(1.0)
    full = torch.softmax(t.double(), 1)
    want = full.gather(1, y[:, None])[:, 0]
    # float16 gaps of up to 32 nats: an eleventh bit is 1/64 nat.
    torch.testing.assert_close(records.target()[:, 0].double(), want, rtol=0.02, atol=0)
    torch.testing.assert_close(records.log_target()[:, 0].double(), want.log(), rtol=1e-3, atol=0)
    torch.testing.assert_close(records.rest().double(), full.scatter(1, y[:, None], 0).sum(1), rtol=1e-3, atol=0)
