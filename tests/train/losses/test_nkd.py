"""NKD and its forms without a teacher: what is particular to each."""

import pytest
import torch
from torch import nn

from kdcache.cache import KdcacheError, encode
from kdcache.tests.helpers.losses import FEATURES, C, F, logits, mixed_sample
from kdcache.train.losses import NKD, TFNKD, USKD, WSLD


def test_the_heavier_label_may_be_the_second():
    s, t, y, w = mixed_sample()
    records = encode(t, y, 5, precision="float32")
    swapped = encode(t, y.flip(1), 5, precision="float32")
    for loss in (NKD(), NKD(mixed="both"), TFNKD(), WSLD(temperature=1.0)):
        torch.testing.assert_close(loss(s, y, records, w), loss(s, y.flip(1), swapped, w.flip(1)))


def test_uskd_trains_its_head_and_the_features_and_restores_it():
    loss = USKD()
    with pytest.raises(KdcacheError, match="make_head"):
        loss(logits(1), logits(1).argmax(1), None, features=FEATURES)
    loss.make_head(F, C)
    features = FEATURES.clone().requires_grad_()
    s = logits(1).requires_grad_()
    loss(s, s.argmax(1), None, features=features).backward()
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in loss.parameters())
    assert float(features.grad.norm()) > 0 and float(s.grad.norm()) > 0
    assert len(list(loss.parameters())) == 2
    other = USKD()
    other.make_head(F, C)
    other.load_state_dict(loss.state_dict())
    got, want = (u(s, s.argmax(1), features=features) for u in (other, loss))
    torch.testing.assert_close(got, want)
    with pytest.raises(KdcacheError, match="needs the student's features"):
        loss(s, s.argmax(1), None)
    assert isinstance(loss.head, nn.Linear)
