"""uint8 records whose errors of rounding are carried, against sums in float64 made row by row from the full logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import encode
from kdcache.cache.records.records import NO_TAIL, STEP
from kdcache.cache.records.rounding import FARTHEST, TOLERANCE
from kdcache.cache.store.chunks import as_arrays, encode_part
from kdcache.cache.store.layout import ArraySpec


def read_sum(records, row, t):
    """Z at t relative to the largest logit, as docs/stores.md has it, in float64 from one row's codes."""
    ids = records.classes[row].tolist()
    gaps = dict(zip(ids, [0.0, *(np.cumsum(records.gaps[row].numpy().astype(int)) * STEP)], strict=True))
    last = gaps[ids[-1]]
    gaps |= dict(zip(records.labels[row].tolist(), records.target_gap[row].double().tolist(), strict=True))
    code = int(records.tail[row, records.temperatures.index(t)])
    tail = -np.inf if code == NO_TAIL else np.log(records.num_classes - len(ids)) - last / t - STEP * code
    return sum(np.exp(-gap / t) for gap in gaps.values()) + np.exp(tail)


def exact_sum(z, t):
    return np.exp((z.astype(np.float64) - z.max()) / t).sum()


@st.composite
def answers(draw):
    """Logits [B, C] float32 with ties and huge gaps among them, labels [B, L], K and the temperatures stored."""
    rows, classes, labels = draw(st.integers(1, 4)), draw(st.integers(3, 16)), draw(st.integers(0, 2))
    values = st.floats(-6, 6, width=32) | st.sampled_from([0.0, 1.0, -1e4])
    z = draw(st.lists(values, min_size=rows * classes, max_size=rows * classes))
    y = draw(st.lists(st.integers(0, classes - 1), min_size=rows * labels, max_size=rows * labels))
    k = draw(st.integers(1, classes - 1))
    stored = draw(st.sampled_from([(1.0, 4.0), (2.0,), (4.0, 2.0), (1.5, 1.0)]))
    return np.array(z, np.float32).reshape(rows, classes), np.array(y, np.int64).reshape(rows, labels), k, stored


@settings(max_examples=120, deadline=None)
@given(answers())
def test_the_sum_is_within_the_tolerance_or_no_worse_than_without_carrying(case):
    z, y, k, stored = case
    carried, single = (encode(torch.from_numpy(z), torch.from_numpy(y), k, stored, carry=c) for c in (True, False))
    t = 1.0 if 1.0 in stored else min(stored)
    for row, logits in enumerate(z):
        want = exact_sum(logits, t)
        off = [abs(read_sum(records, row, t) / want - 1) for records in (carried, single)]
        # The tail's code is the nearest by its logarithm, which can lose 0.4% of the tail's mass to another.
        assert off[0] <= max(off[1], TOLERANCE) + 0.005
    for name in ("classes", "target_gap", "labels"):
        assert getattr(carried, name).equal(getattr(single, name))


@settings(max_examples=120, deadline=None)
@given(answers())
def test_gaps_never_fall_and_no_number_moves_far(case):
    z, y, k, stored = case
    carried, single = (encode(torch.from_numpy(z), torch.from_numpy(y), k, stored, carry=c) for c in (True, False))
    below = z.astype(np.float64) - z.max(1, keepdims=True).astype(np.float64)
    gaps = np.sort(-below, 1)[:, 1:k]
    near = gaps < 20  # a distance of more than 255 steps to the gap before is cut off
    decoded = carried.decoded_gaps().numpy()
    assert (np.diff(decoded, axis=1, prepend=0) >= 0).all()
    assert (np.abs(decoded - gaps)[near] <= (FARTHEST + 0.5) * STEP + 1e-4).all()
    assert torch.equal(carried.tail == NO_TAIL, single.tail == NO_TAIL)
    for row in np.flatnonzero(near.all(1)):
        left = np.delete(below[row], [*carried.classes[row].tolist(), *y[row]])
        for at, t in enumerate(stored):
            if int(carried.tail[row, at]) < NO_TAIL - 1:
                most = np.log(z.shape[1] - k) - (decoded[row, -1] / t if k > 1 else 0)
                want = np.logaddexp.reduce(left / t)
                # What the head lacks is taken up to half a step, and rounding adds as much.
                assert abs(float(carried.decoded_tail(at)[row]) - min(want, most)) <= STEP + 1e-3


def like_a_teacher(sharper):
    """Logits [2000, 1000] about as peaked as those of ImageNet's, and labels [2000, 1] drawn by them."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 1000, generator=generator) * (1.2 + torch.rand(2000, 1, generator=generator))
    z[:, :20] += 8 * torch.rand(2000, 20, generator=generator)
    z *= sharper
    return z, torch.multinomial(torch.softmax(z, 1), 1, generator=generator)


def size(records):
    """Bytes a record in chunks as they are stored."""
    found = 0
    for name, rows in as_arrays(records).items():
        spec = ArraySpec(name, rows.shape, len(rows), str(rows.dtype), ("sample", "column"))
        found += len(encode_part(spec, 0, rows)) / len(rows)
    return found


@pytest.mark.parametrize("sharper", [0.8, 1.0])
@pytest.mark.parametrize("k", [10, 20])
def test_the_label_is_within_a_hundredth_for_99_of_100_records(sharper, k):
    z, y = like_a_teacher(sharper)
    log_p = torch.log_softmax(z.double(), 1)

    def measured(carry):
        records = encode(z, y, k, carry=carry)
        off = (records.softened(1.0).log_target().double() - log_p.gather(1, y)).expm1().abs()
        q = records.dense(1.0, "uniform").double()
        return float(off.quantile(0.99)), float((log_p.exp() * (log_p - q.log())).sum(1).mean()), size(records)

    (carried, divergence, stored), (single, single_divergence, single_stored) = measured(True), measured(False)
    assert carried < 0.01 < 0.025 < single
    assert divergence < single_divergence + 0.0005 and stored < single_stored + 0.03


def test_what_is_not_worth_moving_stays_as_it_is():
    """Sums within the tolerance, classes too light to matter, and a K of 1, which has nothing to move."""
    z = torch.tensor([[4.0, 3.0, 2.0, 1.0, -20.0], [9.0, 1.06, 0.94, -1.06, -20.0]])
    for k in (1, 4):
        carried, single = (encode(z, torch.tensor([0, 0]), k, (1.0,), carry=c) for c in (True, False))
        assert carried.gaps.equal(single.gaps) and carried.tail.equal(single.tail)


def test_a_label_needs_nothing_to_make_up_for_its_code():
    """Its own gap is read in place of the code, which here is off by half a step."""
    z = torch.tensor([[0.0, -0.43, -1.0, -1.25, -1.5, -12.0, -12.0]])
    carried, single = (
        {label: encode(z, torch.tensor([label]), 5, (1.0,), carry=c) for label in (0, 1)} for c in (True, False)
    )
    assert carried[1].gaps.equal(single[1].gaps) and not carried[0].gaps.equal(single[0].gaps)
    for label in (0, 1):
        want = torch.softmax(z.double(), 1)[0, label]
        assert float(carried[label].softened(1.0).target()[0, 0]) == pytest.approx(float(want), rel=TOLERANCE)
