"""Losses and their gradients against dense float64 forms written from the formulas alone."""

import pytest
import torch

from kdcache.cache import KdcacheError, encode
from kdcache.cache.identity import RecordIdentity
from kdcache.train.losses import CE, KD, LOSSES, NKD, make_loss, require_served

B, C = 64, 40


def logits(seed, scale=3.0):
    return torch.randn(B, C, generator=torch.Generator().manual_seed(seed)) * scale


def ce64(s, y):
    return -torch.log_softmax(s, 1)[torch.arange(len(y)), y]


def kd64(s, t, y, alpha, beta, T):
    p, q = torch.softmax(t / T, 1), torch.softmax(s / T, 1)
    kl = (p * (p.log() - q.log())).sum(1)
    return (alpha * ce64(s, y) + beta * T**2 * kl).mean()


def nkd64(s, t, y, gamma, T):
    rows = []
    for i, label in enumerate(y.tolist()):
        others = [c for c in range(s.shape[1]) if c != label]
        p, q = torch.softmax(t[i], 0), torch.softmax(s[i], 0)
        p_others = torch.softmax(t[i][others] / T, 0)
        q_others = torch.softmax(s[i][others] / T, 0)
        rows.append(-q[label].log() - p[label] * q[label].log() - gamma * T**2 * (p_others * q_others.log()).sum())
    return torch.stack(rows).mean()


CASES = {
    "kd small": (KD(0.1, 0.9, 4.0), lambda s, t, y: kd64(s, t, y, 0.1, 0.9, 4.0)),
    "kd large": (KD(), lambda s, t, y: kd64(s, t, y, 0.5, 0.5, 1.0)),
    "kd alone": (KD(0.0, 1.0, 2.0), lambda s, t, y: kd64(s, t, y, 0.0, 1.0, 2.0)),
    "nkd small": (NKD(3.5, 3.0), lambda s, t, y: nkd64(s, t, y, 3.5, 3.0)),
    "nkd large": (NKD(), lambda s, t, y: nkd64(s, t, y, 1.5, 1.0)),
    "ce": (CE(), lambda s, t, y: ce64(s, y).mean()),
}


def value_and_gradient(f, s):
    s = s.clone().requires_grad_()
    value = f(s)
    value.backward()
    return value.detach().double(), s.grad.double()


def errors(loss, reference, k, precision="float32", seed=0):
    s, t = logits(seed), logits(seed + 100)
    y = torch.randint(C, (B,), generator=torch.Generator().manual_seed(seed))
    y[: B // 2] = t[: B // 2].argmax(1)
    records = encode(t, y, k, (1.0, 2.0, 3.0, 4.0), precision)
    got, grad = value_and_gradient(lambda v: loss(v, y, records), s)
    want, want_grad = value_and_gradient(lambda v: reference(v, t.double(), y), s.double())
    return abs(got - want) / abs(want), (grad - want_grad).norm() / want_grad.norm()


@pytest.mark.parametrize("name", CASES)
def test_dense_float32_records_are_exact(name):
    value, gradient = errors(*CASES[name], k=None)
    assert value < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_dense_records_as_stored_by_default(name):
    value, gradient = errors(*CASES[name], k=None, precision=None)
    assert value < 1e-3 and gradient < 5e-3


@pytest.mark.parametrize("name", CASES)
def test_top_k_is_near_and_nearer_with_more(name):
    """Stated bounds for flat random tails (measured: kd at T = 4 is worst, 0.09 and 0.20 at K = 10 of 40)."""
    few, many = errors(*CASES[name], k=10), errors(*CASES[name], k=C - 2)
    assert few[0] < 0.1 and few[1] < 0.25
    assert many[0] < 1e-3 and many[1] < 1e-2


def test_label_probability_is_exact_outside_the_top_k():
    t, y = logits(3), logits(3).argmin(1)
    got = encode(t, y, 3, (1.0,)).softened(1.0).target()[:, 0].double()
    want = torch.softmax(t.double(), 1).gather(1, y[:, None])[:, 0]
    # float16 gaps of up to 32 nats: an eleventh bit is 1/64 nat.
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", CASES)
def test_extreme_logits_give_finite_values_and_gradients(name, scale, k):
    s, t = logits(1, scale), logits(2, scale)
    y = t.argmax(1)
    records = encode(t, y, k)
    value, gradient = value_and_gradient(lambda v: CASES[name][0](v, y, records), s)
    assert bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all())


def test_two_classes_and_a_batch_of_one():
    t, y = torch.tensor([[9.0, -9.0]]), torch.tensor([0])
    for k in (None, 1):
        for loss in (KD(), NKD()):
            value, gradient = value_and_gradient(lambda v: loss(v, y, encode(t, y, k)), torch.tensor([[0.1, 0.4]]))  # noqa: B023
            assert bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all())


def test_float32_inside_autocast():
    t, s = logits(5), logits(6)
    y = t.argmax(1)
    for k in (None, 10):
        records = encode(t, y, k)
        for loss in (KD(), NKD(), CE()):
            outside = loss(s.bfloat16().float(), y, records)
            with torch.autocast("cpu", torch.bfloat16):
                inside = loss(s.bfloat16(), y, records)
            assert inside.dtype == torch.float32
            torch.testing.assert_close(inside, outside, rtol=1e-6, atol=0)


def test_presets_go_by_image_size_and_options_override():
    assert make_loss("nkd", 32) == NKD(3.5, 3.0) == make_loss("nkd", 64)
    assert make_loss("nkd", 224) == NKD(1.5, 1.0)
    assert make_loss("kd", 32) == KD(0.1, 0.9, 4.0)
    assert make_loss("nkd:gamma=2,tail=uniform", 224) == NKD(2.0, 1.0, "uniform")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nkdd", "unknown loss 'nkdd': take one of ce, kd, nkd"),
        ("nkd:gama=1", "no option 'gama': it has gamma, temperature, tail"),
        ("nkd:gamma=x", "is no number"),
        ("nkd:tail=zero", "unknown tail"),
        ("kd:temperature=0", "positive"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(spec, message):
    with pytest.raises(KdcacheError, match=message):
        make_loss(spec, 32)


def record(**changes):
    base = {"classes": 100, "k": 5, "temperatures": (1.0, 2.0), "precision": "float16", "labels": 1}
    return RecordIdentity(**{**base, **changes})


def test_a_cache_that_cannot_serve_is_refused_with_the_flags_that_help():
    with pytest.raises(KdcacheError, match=r"at temperature 4; this cache holds 1,2: .*--temperatures 1,2,4"):
        require_served(KD(temperature=4.0), record())
    with pytest.raises(KdcacheError, match="built with --unlabelled"):
        require_served(NKD(), record(labels=0))
    require_served(KD(temperature=4.0), record(k=None, temperatures=()))
    require_served(KD(alpha=0.0), record(labels=0))
    assert set(LOSSES) == {"ce", "kd", "nkd"}
