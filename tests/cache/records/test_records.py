"""encode and the teacher's distribution read back, against a float64 reference written row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import KdcacheError, encode
from kdcache.cache.records.encoding import class_prior, tail_distribution
from kdcache.cache.records.records import NO_TAIL, STEP


def softmax64(z, t=1.0):
    e = np.exp((np.asarray(z, np.float64) - np.max(z)) / t)
    return e / e.sum()


def reference(z, label, k, t, tail, prior=None):
    """[C] what a top-k record with one label means, from the full logits; the bucket's mass as a second value."""
    p = softmax64(z, t)
    order = sorted(range(len(z)), key=lambda c: (-z[c], c))
    kept = set(order[:k]) | {label}
    rest = [c for c in range(len(z)) if c not in kept]
    mass = sum(p[c] for c in rest)
    out = np.array([p[c] if c in kept else 0.0 for c in range(len(z))])
    if tail == "renorm":
        return out / out.sum(), 0.0
    if tail in ("prior", "uniform") and rest:
        weights = np.ones(len(z)) if tail == "uniform" or prior is None else np.asarray(prior, np.float64)
        total = sum(weights[c] for c in rest)
        for c in rest:
            out[c] = mass * weights[c] / total
    return out, mass


@st.composite
def cases(draw):
    classes = draw(st.integers(2, 12))
    rows = draw(st.integers(1, 5))
    values = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0])
    z = np.array(draw(st.lists(values, min_size=rows * classes, max_size=rows * classes)), np.float32)
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    return z.reshape(rows, classes), np.array(labels), draw(st.integers(1, classes)), draw(st.sampled_from([1.0, 3.0]))


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["prior", "uniform", "renorm", "drop"]), st.booleans())
def test_dense_is_what_the_record_means(case, tail, with_prior):
    z, labels, k, t = case
    records = encode(torch.from_numpy(z), torch.from_numpy(labels), k, (1.0, 3.0), "float32")
    prior = None
    if with_prior and records.classes is not None:
        prior = class_prior(tail_distribution(torch.from_numpy(z), records))
    got = records.dense(t, tail, prior).double().numpy()
    for i in range(len(z)):
        row = None if prior is None else prior[(1.0, 3.0).index(t)].numpy()
        want, _ = reference(z[i], labels[i], k, t, tail if k < z.shape[1] else "prior", row)
        # float16 keeps 11 bits of a tail or label gap of up to 90 nats.
        np.testing.assert_allclose(got[i], want, rtol=0.08, atol=2e-4)
        assert got[i].sum() == pytest.approx(want.sum(), abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["prior", "uniform", "renorm", "drop"]), st.booleans())
def test_sums_over_the_distribution_equal_those_over_its_dense_form(case, tail, with_prior):
    z, labels, k, t = case
    records = encode(torch.from_numpy(z), torch.from_numpy(labels), k, (1.0, 3.0))
    prior = None
    if with_prior and records.classes is not None:
        prior = class_prior(tail_distribution(torch.from_numpy(z), records))
        records = type(records)(**{**vars(records), "prior": prior})
    soft = records.softened(t, tail)
    p = records.dense(t, tail).double()
    y = torch.from_numpy(labels)[:, None]
    x = torch.log_softmax(torch.from_numpy(z[:, ::-1].copy()), 1)
    torch.testing.assert_close(soft.cross(x).double(), (p * x).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(soft.target()[:, 0].double(), p.gather(1, y)[:, 0], rtol=2e-2, atol=1e-6)
    if tail != "drop":
        torch.testing.assert_close(soft.entropy().double(), -torch.special.xlogy(p, p).sum(1), rtol=1e-4, atol=1e-4)
    others = p.scatter(1, y, 0.0)
    # The dense form loses the others in float32 where the label has nearly all mass; dropped mass is in neither.
    enough = (others.sum(1) > 1e-4) & (tail != "drop")
    others = others / others.sum(1, keepdim=True)
    torch.testing.assert_close(soft.cross_others(x).double()[enough], (others * x).sum(1)[enough], rtol=2e-3, atol=2e-3)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_coded_gaps_and_tails_are_within_half_a_step(case):
    z, labels, k, _ = case
    if k == z.shape[1]:
        return
    order = np.argsort(-z.astype(np.float64), axis=1, kind="stable")
    ordered = np.take_along_axis(z.astype(np.float64), order, 1)
    gaps = ordered[:, :1] - ordered[:, 1:k]
    # Above 255 steps between neighbours a gap is cut off.
    fits = (np.diff(gaps, axis=1, prepend=0) < 255 * STEP - 1).all(1)
    # As earlier versions rounded, and as verify still does; test_rounding.py has what builds do.
    records = encode(torch.from_numpy(z), torch.from_numpy(labels), k, (1.0, 3.0), carry=False)
    assert records.gaps.dtype == records.tail.dtype == torch.uint8
    assert np.array_equal(records.classes.numpy(), order[:, :k])
    decoded = records.decoded_gaps().double().numpy()
    assert (np.abs(decoded - gaps)[fits] <= STEP / 2 + 1e-5).all()
    for at, t in enumerate((1.0, 3.0)):
        for i, got in enumerate(records.decoded_tail(at).tolist()):
            left = [c for c in order[i, k:] if c != labels[i]]
            if not left:
                assert got == -np.inf
                continue
            want = np.logaddexp.reduce([(float(z[i, c]) - ordered[i, 0]) / t for c in left])
            last = decoded[i, -1] / t if k > 1 else 0.0
            lowest = np.log(z.shape[1] - k) - last - (NO_TAIL - 1) * STEP
            highest = np.log(z.shape[1] - k) - last
            assert abs(got - np.clip(want, lowest, highest)) <= STEP / 2 + 1e-4


def test_a_stored_label_takes_its_own_exact_gap():
    z = torch.tensor([[3.0, 2.33, 0.0, -1.0, 1.0]])
    soft = encode(z, torch.tensor([1]), 3, (1.0, 4.0)).softened(4.0)
    log_p = soft.log_target()[0, 0] - soft.dense()[0, 0].log()
    assert float(log_p) == pytest.approx(-0.67 / 4, abs=1e-4)
    torch.testing.assert_close(soft.dense()[:, 1], soft.target()[:, 0])


def standardised64(z, tau):
    z = np.asarray(z, np.float64)
    return softmax64((z - z.mean()) / (1e-7 + z.std(ddof=1)), tau)


@pytest.mark.parametrize(("k", "precision"), [(None, None), (6, None), (6, "float16"), (6, "float32")])
def test_logits_standardised_by_row(k, precision):
    z = torch.randn(64, 30, generator=torch.Generator().manual_seed(0)) * 4
    y = z.argmin(1)
    records = encode(z, y, k, (1.0,), precision, tail_std=True)
    soft = records.standardised(2.0, "uniform")
    want = torch.from_numpy(np.stack([standardised64(row, 2.0) for row in z.numpy()]))
    # Half a step of 1/8 nat over 2 std, of about 4, is 0.8%; without codes there are float16's tails and stds.
    rtol = 0.025 if k and precision is None else 0.002
    at = y[:, None] if k is None else torch.cat([records.classes.long(), y[:, None]], 1)
    torch.testing.assert_close(soft.dense().double().gather(1, at), want.gather(1, at), rtol=rtol, atol=1e-6)
    torch.testing.assert_close(soft.dense().sum(1), torch.ones(64), rtol=1e-5, atol=0)
    if k:
        left_out = torch.ones_like(z, dtype=torch.bool).scatter(1, at, False)
        mass = (want * left_out).sum(1)
        torch.testing.assert_close((soft.dense() * left_out).sum(1).double(), mass, rtol=0.025, atol=1e-6)
        prior = class_prior(tail_distribution(z, records))
        assert prior.shape == (2, 30)
        rest = z.double().masked_fill(~left_out, -torch.inf)
        spread = torch.softmax(rest / (2 * z.double().std(1, keepdim=True)), 1).mean(0)
        torch.testing.assert_close(prior[1].double(), 0.999 * spread + 0.001 / 30, rtol=2e-3, atol=0)


def test_equal_logits_have_no_shape_when_standardised():
    for k in (None, 2):
        p = encode(torch.zeros(1, 5), torch.tensor([0]), k, tail_std=True).standardised().dense()
        torch.testing.assert_close(p, torch.full((1, 5), 0.2), rtol=0.07, atol=0)


def test_bucket_is_one_class_of_its_own():
    z = torch.tensor([[3.0, 2.0, 0.0, -1.0, 1.0]])
    records = encode(z, torch.tensor([3]), 2, (1.0,), "float32")
    logq = torch.log_softmax(torch.tensor([[0.5, 1.0, -2.0, 0.3, 0.1]]), 1).double()
    p, mass = reference(z[0].numpy(), 3, 2, 1.0, "drop")
    q = logq.exp()[0].numpy()
    want = sum(p[c] * np.log(q[c]) for c in (0, 1, 3)) + mass * np.log(q[2] + q[4])
    soft = records.softened(1.0, "bucket")
    assert float(soft.cross(logq.float())[0]) == pytest.approx(want, rel=1e-3)
    entropy = -sum(v * np.log(v) for v in (p[0], p[1], p[3], mass))
    assert float(soft.entropy()[0]) == pytest.approx(entropy, rel=1e-3)
    with pytest.raises(KdcacheError, match="no dense form"):
        records.dense(1.0, "bucket")


def test_ties_go_by_id_and_types_by_class_count():
    records = encode(torch.tensor([[1.0, 5.0, 5.0, 1.0, 5.0]]), torch.tensor([0]), 4)
    assert records.classes.tolist() == [[1, 2, 4, 0]]
    assert records.classes.dtype == torch.uint8
    assert encode(torch.zeros(1, 256), None, 2).classes.dtype == torch.uint16
    assert encode(torch.zeros(1, 70_000), None, 2).classes.dtype == torch.uint32


def test_label_probability_is_positive_where_a_subtraction_would_not_be():
    """1 - p_y from a float16 log-sum-exp goes to zero or below; sums of positive terms do not."""
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.normal(0, 6, (4096, 100)).astype(np.float32))
    y = z.argmax(1)
    z[torch.arange(4096), y] += 12
    soft = encode(z, y, 5, (1.0,)).softened(1.0)
    assert bool((soft.target() <= 1).all())
    others = -soft.cross_others(torch.log_softmax(torch.zeros_like(z), 1))
    assert bool(torch.isfinite(others).all()) and bool((others > 0).all())


def test_two_labels_are_counted_once_each():
    z = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, -1.0]])
    for labels in ([4, 5], [4, 4], [0, 4], [0, 0]):
        records = encode(z, torch.tensor([labels]), 2, (1.0,), "float32")
        full = torch.softmax(z.double(), 1)
        torch.testing.assert_close(records.softened(1.0).target().double(), full[:, labels], rtol=1e-3, atol=1e-6)
        assert float(records.dense(1.0).sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(KdcacheError, match="not finite"):
        encode(torch.tensor([[0.0, bad]]), None)


def test_a_standard_deviation_that_float16_cannot_hold_is_refused():
    z = torch.tensor([[1.0, 0.0, -1.0]])
    held = encode(z * 65504, None, 2, tail_std=True)  # the deviation of (1, 0, -1) is 1
    assert held.tail_std is not None and float(held.tail_std[0, 0]) == 65504
    with pytest.raises(
        KdcacheError, match=r"above 65,504, more than --tail-std can store: .*--topk 3 --precision float32"
    ):
        encode(torch.cat([z, z * 65600]), None, 2, tail_std=True)
    encode(z * 65600, None, 2)
    want = torch.softmax(z.double() / 2, 1)
    dense = encode(z * 65600, None, precision="float32")
    torch.testing.assert_close(dense.standardised().dense().double(), want, rtol=1e-5, atol=0)


def test_what_cannot_be_stored_or_read_says_why():
    z = torch.zeros(2, 10)
    with pytest.raises(KdcacheError, match="k = 11 does not fit 10"):
        encode(z, None, 11)
    with pytest.raises(KdcacheError, match="10 classes"):
        encode(z, torch.tensor([0, 10]))
    with pytest.raises(KdcacheError, match=r"temperature 5 is not stored \(stored: 1,2\).*--temperatures 1,2,5"):
        encode(z, None, 3, (1.0, 2.0)).softened(5.0)
    with pytest.raises(KdcacheError, match=r"standardised to tau 2 are not stored: build with --tail-std"):
        encode(z, None, 3).standardised()
    with pytest.raises(KdcacheError, match=r"standardised to tau 3 .*serves tau 2"):
        encode(z, None, 3, tail_std=True).standardised(3.0)
    with pytest.raises(KdcacheError, match="uint8 is for top-k"):
        encode(z, None, precision="uint8")
    with pytest.raises(KdcacheError, match="unknown tail"):
        encode(z, None, 3).dense(1.0, "zero")


def test_huge_gaps_stay_finite():
    z = torch.tensor([[1e5, 0.0, -1e5], [0.0, 0.0, 0.0]])
    for k in (None, 2):
        records = encode(z, torch.tensor([2, 1]), k)
        assert bool(torch.isfinite(records.gaps).all()) and bool(torch.isfinite(records.target_gap).all())
        assert bool(torch.isfinite(records.dense(1.0)).all())


def test_gather_and_predictions():
    z = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    for k in (None, 3):
        records = encode(z, z.argmin(1), k)
        index = torch.tensor([4, 0, 4])
        torch.testing.assert_close(records[index].dense(1.0), records.dense(1.0)[index])
        assert records.predictions().tolist() == z.argmax(1).tolist()
