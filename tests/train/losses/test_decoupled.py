"""Losses that take the divergence from the teacher apart: what is particular to each."""

import torch

from kdcache.cache import encode
from kdcache.tests.helpers.losses import B, errors, finite, gkd64, sample, value_and_gradient
from kdcache.train.losses import GKD, IKL


def test_gkd_is_exact_where_the_group_lies_within_the_top_k_and_cut_at_k_elsewhere():
    s, t, y = sample()
    one = torch.ones(B, 1, dtype=torch.float64)
    for k in (3, 10, 39):
        records = encode(t, y, k, (1.0,), "float32")
        got = value_and_gradient(lambda v: GKD()(v, y, records), s)  # noqa: B023
        want = value_and_gradient(
            lambda v: gkd64(v, t.double(), y[:, None], one, 1.0, 1.0, 1.0, 0.9, 1.0, k),  # noqa: B023
            s.double(),
        )
        # The tail's mass is a float16 logarithm.
        value, gradient = errors(got, want)
        assert value < 1e-3 and gradient < 1e-3


def test_a_gradient_that_float16_cannot_hold_is_the_exact_one_in_float32():
    """As hypothesis found it: 4 v_1 (gap_1 - mean gap) = 4 * 0.5 * 0.5 * 65534."""
    loss, labels = IKL(0.0, 4.0, 4.0, 100.0, "teacher", 1), torch.tensor([0])
    records = encode(torch.zeros(1, 2), labels)
    s = torch.tensor([[30.0, -65504.0]], dtype=torch.float16)
    _, gradient = value_and_gradient(lambda v: loss(v, labels, records), s.float())
    torch.testing.assert_close(gradient[0], torch.tensor([65534.0, -65534.0]), check_dtype=False)
    assert finite(lambda v: loss(v, labels, records), s)
