"""Correlations: classes and rows of which they can say little."""

import pytest
import torch

from kdcache.cache import encode
from kdcache.tests.helpers.losses import B, C, dist64, errors, finite, logits, value_and_gradient
from kdcache.train.losses import CMKD, DIST, LogitStd
from kdcache.train.losses.options import make_loss


def confident(depth, rows=16, classes=12):
    """Logits of a student and a teacher whose last three classes are improbable throughout: e^-depth or a bit less."""
    s, t = logits(11, 4.0, rows, classes), logits(12, 4.0, rows, classes)
    for x, seed in ((s, 13), (t, 14)):
        x[:, -3:] = x.amax(1, keepdim=True) - depth - 1.5 * logits(seed, 1.0, rows, 3).abs()
    return s, t


@pytest.mark.parametrize("depth", [10, 20, 60, 98, 102])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-8, 1e-3])
def test_correlations_of_a_class_that_is_improbable_throughout_a_batch(eps, depth):
    """e^-98 and less: below the smallest normal float32, where a float32 gradient without eps would be infinite."""
    s, t = confident(depth)
    y, one = t.argmax(1), torch.ones(len(t), 1, dtype=torch.float64)
    records = encode(t, y, precision="float32")
    want = value_and_gradient(lambda v: dist64(v, t.double(), y[:, None], one, 0.0, 2.0, 1.0, eps), s.double())
    value, gradient = got = value_and_gradient(lambda v: DIST(alpha=0.0, eps=eps)(v, y, records), s)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    if eps or depth < 69:  # e^-69 is 1e-30
        assert max(errors(got, want)) < 1e-5
    assert finite(lambda v: CMKD(alpha=0.0, standardise=False, eps=eps)(v, y, records), s)


def test_the_authors_eps_is_the_default_and_takes_weight_from_improbable_classes():
    assert (DIST().eps, CMKD().eps) == (1e-8, 1e-8) == (make_loss("dist", 10).eps, make_loss("cmkd", 10).eps)
    s, t = confident(20)
    y, records = t.argmax(1), encode(t, t.argmax(1), precision="float32")
    with_eps, without_eps = (
        value_and_gradient(lambda v: DIST(alpha=0.0, eps=eps)(v, y, records), s)[1][:, -3:].norm()  # noqa: B023
        for eps in (1e-8, 0.0)
    )
    assert 0 < with_eps < 1e-3 * without_eps


def test_equal_logits_tell_correlations_nothing():
    """A row without shape has no correlation: it is 0 with a gradient of 0, not that of 0 / 1e-7."""
    t = logits(1)
    records = encode(t, t.argmax(1))
    for loss in (DIST(alpha=0.0), CMKD(alpha=0.0), LogitStd(alpha=0.0)):
        _, gradient = value_and_gradient(lambda v: loss(v, t.argmax(1), records), torch.full((B, C), 7.0))  # noqa: B023
        assert float(gradient.abs().max()) < 1
