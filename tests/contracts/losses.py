"""What every loss of the table keeps to: its float64 form, its parts, its needs, its specification, and hard inputs.

A new loss gets a row in CASES, with its float64 form in tests/helpers/losses.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.cache import KdcacheError, encode
from kdcache.tests.helpers import losses as form
from kdcache.tests.helpers.losses import (
    FEATURES,
    PRIOR_LABELS,
    PRIOR_TEACHER,
    B,
    C,
    F,
    errors,
    finite,
    logits,
    mixed_sample,
    sample,
    value_and_gradient,
)
from kdcache.train.losses import (
    BDKD,
    CE,
    CMKD,
    DIST,
    DKD,
    GKD,
    IKL,
    KD,
    MSE,
    NKD,
    TFNKD,
    USKD,
    WSLD,
    LogitStd,
    SkewKL,
    SkewRKL,
)
from kdcache.train.losses.base import Featured, Learnt, Paced, Surveying
from kdcache.train.losses.options import described, make_loss, options_of, read_spec, spec_of


@dataclass(frozen=True)
class Case:
    """A loss and its float64 form of (s, t, y, w).

    epoch: what it is told before it is called. near: bounds for value and gradient from the top 10 of 40 classes, and
    for the gradient from the top 38.
    """

    loss: Any
    reference: Callable
    epoch: int | None = None
    near: tuple[float, float, float] = (0.1, 0.25, 0.01)

    def ready(self, classes=C, first=None, features=FEATURES):
        """The loss as training has it: with its head, its look at the records `first` of view 0, and its epoch."""
        loss = replace(self.loss)  # one of its own
        if isinstance(loss, Featured):
            with torch.random.fork_rng():
                torch.manual_seed(5)
                loss.make_head(features.shape[1], classes)
        if isinstance(loss, Surveying):
            loss.prepare(encode(PRIOR_TEACHER, PRIOR_LABELS, None, precision="float32") if first is None else first)
        if self.epoch is not None:
            loss.set_epoch(self.epoch)
        return Ready(loss, features)


class Ready:
    """A loss that is called without its features."""

    def __init__(self, loss, features):
        self.loss, self.needs, self._more = loss, loss.needs, {"features": features} if loss.needs.features else {}

    def __call__(self, s, y, records=None, weights=None):
        return self.loss(s, y, records, weights, **self._more)

    def parts(self, s, y, records=None, weights=None):
        return self.loss.parts(s, y, records, weights, **self._more)


def of(f, *args, **kwargs):
    return lambda s, t, y, w: f(s, t, y, w, *args, **kwargs)


def of_uskd(**options):
    """With the weights of the head that `ready` makes."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        weight, bias = (p.detach().double() for p in nn.Linear(F, C).parameters())
    return of(form.uskd64, FEATURES.double(), weight, bias, **options)


# bdkd: the logarithm of p in its reverse KL weighs small probabilities as much as large ones.
BDKD_NEAR = (0.15, 0.45, 0.06)
CASES = {
    "ce": Case(CE(), of(form.ce64)),
    "ce smooth": Case(CE(0.1), of(form.ce64, 0.1)),
    "kd small": Case(KD(0.1, 0.9, 4.0), of(form.kd64, 0.1, 0.9, 4.0)),
    "kd large": Case(KD(), of(form.kd64, 0.5, 0.5, 1.0)),
    "kd alone": Case(KD(0.0, 1.0, 2.0), of(form.kd64, 0.0, 1.0, 2.0)),
    "nkd small": Case(NKD(3.5, 3.0), of(form.nkd64, 3.5, 3.0)),
    "nkd large": Case(NKD(), of(form.nkd64, 1.5, 1.0)),
    "nkd both": Case(NKD(mixed="both"), of(form.nkd64, 1.5, 1.0, both=True)),
    "tf-nkd": Case(TFNKD(), of(form.tf_nkd64)),
    "uskd": Case(USKD(), of_uskd(alpha=1.0, beta=0.1, mu=0.005)),
    "uskd paper": Case(USKD(0.1, 0.3, 0.1, "paper"), of_uskd(alpha=0.1, beta=0.3, mu=0.1, paper=True)),
    "dkd small": Case(DKD(1.0, 8.0, 4.0, 20), of(form.dkd64, 1.0, 8.0, 4.0, 0.25), epoch=5),
    "dkd large": Case(DKD(), of(form.dkd64, 1.0, 0.5, 1.0)),
    "ikl small": Case(IKL(1.0, 4.0, 4.0, 100.0, "teacher", 20), of(form.ikl64, 1.0, 4.0, 4.0, 100.0), epoch=30),
    "ikl prior": Case(
        IKL(beta=0.5, pairs="prior", warmup=2),
        of(form.ikl64, 1.0, 0.5, 1.0, 1.0, form.class_prior64(1.0), 0.5),
        epoch=1,
    ),
    "dist small": Case(DIST(1.0, 2.0, 4.0), of(form.dist64, 1.0, 2.0, 4.0, 1e-8)),
    "dist large": Case(DIST(), of(form.dist64, 1.0, 2.0, 1.0, 1e-8)),
    "dist exact": Case(DIST(eps=0.0), of(form.dist64, 1.0, 2.0, 1.0, 0.0)),
    "cmkd": Case(CMKD(), of(form.cmkd64, 1.0, 2.0, 1.0, 0.1, 0.0, 1.0)),
    "cmkd raw": Case(
        CMKD(0.5, 1.0, 4.0, standardise=False, softness=2.0, low=0.2, high=0.6),
        of(form.cmkd64, 0.5, 1.0, 4.0, 2.0, 0.2, 0.6, False, 1e-8),
    ),
    "logit-std": Case(LogitStd(), of(form.logit_std64, 1.0, 9.0, 2.0)),
    "logit-std dkd": Case(LogitStd(base="dkd", others=8.0), of(form.logit_std64, 1.0, 9.0, 2.0, (1.0, 8.0))),
    "mse": Case(MSE(), of(form.mse64, 0.0, 1.0)),
    "mse and ce": Case(MSE(0.5, 0.1), of(form.mse64, 0.5, 0.1)),
    "wsld small": Case(WSLD(2.25, 4.0), of(form.wsld64, 2.25, 4.0)),
    "wsld large": Case(WSLD(), of(form.wsld64, 2.5, 2.0)),
    "gkd": Case(GKD(), of(form.gkd64, 1.0, 1.0, 1.0, 0.9, 1.0)),
    "gkd half": Case(GKD(0.0, 2.0, 0.5, 0.5, 4.0), of(form.gkd64, 0.0, 2.0, 0.5, 0.5, 4.0)),
    "gkd whole": Case(GKD(mass=1.0), of(form.gkd64, 1.0, 1.0, 1.0, 1.0, 1.0)),
    "skew-kl": Case(SkewKL(), of(form.skew64, 0.0, 1.0, 0.1, 1.0, False)),
    "skew-rkl": Case(SkewRKL(0.5, 2.0, 0.3, 4.0), of(form.skew64, 0.5, 2.0, 0.3, 4.0, True)),
    "bdkd": Case(BDKD(), of(form.bdkd64, 1.0, 1.0, 1.0, 2.0, 1.0), near=BDKD_NEAR),
    "bdkd small": Case(BDKD(0.1, 0.9, 4.0, 1.0, 0.25), of(form.bdkd64, 0.1, 0.9, 4.0, 1.0, 0.25), near=BDKD_NEAR),
}

# Which cases a test runs on goes by the name of its argument.
CHOSEN = {
    "case": lambda needs: True,
    "top_k": lambda needs: bool(not needs.dense and needs.temperatures),
    "mixed": lambda needs: needs.mixed,
}


class LossContract:
    """A subclass names its cases; each of them goes through all tests whose argument chooses it."""

    cases: dict[str, Case]

    def pytest_generate_tests(self, metafunc):
        for argument in CHOSEN.keys() & set(metafunc.fixturenames):
            chosen = {name: case for name, case in self.cases.items() if CHOSEN[argument](case.loss.needs)}
            metafunc.parametrize(argument, chosen.values(), ids=chosen)

    # Values and gradients

    def compared(self, case, k=None, precision="float32"):
        s, t, y = sample()
        loss, records = case.ready(), encode(t, y, k, (1.0, 2.0, 3.0, 4.0), precision)
        one = torch.ones(B, 1, dtype=torch.float64)
        want = value_and_gradient(lambda v: case.reference(v, t.double(), y[:, None], one), s.double())
        return errors(value_and_gradient(lambda v: loss(v, y, records), s), want)

    def test_dense_float32_records_are_exact(self, case):
        value, gradient = self.compared(case)
        assert value < 1e-5 and gradient < 1e-5

    def test_dense_records_as_stored_by_default(self, case):
        value, gradient = self.compared(case, precision=None)
        assert value < 1e-3 and gradient < 5e-3

    def test_top_k_is_near_and_nearer_with_more(self, top_k):
        """Stated bounds for flat random tails, K = 10 of 40 classes; bench/losses.py has those of real logits."""
        few, many = self.compared(top_k, k=10), self.compared(top_k, k=C - 2)
        value, gradient, last = top_k.near
        assert few[0] < value and few[1] < gradient
        assert many[0] < 1e-3 and many[1] < last

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    def test_float32_inside_autocast(self, case, half):
        loss = case.ready()
        t, s = logits(5), logits(6).to(half)
        y = t.argmax(1)
        for k in (None,) if loss.needs.dense else (None, 10):
            records = encode(t, y, k, tail_std=True)
            outside = value_and_gradient(lambda v: loss(v, y, records), s.float())  # noqa: B023
            with torch.autocast("cpu", half):
                inside = value_and_gradient(lambda v: loss(v.to(half), y, records), s.float())  # noqa: B023
                assert loss(s, y, records).dtype == torch.float32
            torch.testing.assert_close(inside[0], outside[0], rtol=1e-6, atol=0)
            # The gradient passes the half precision cast of the logits once.
            assert (inside[1] - outside[1]).norm() < 0.01 * outside[1].norm()

    def test_only_the_student_gets_a_gradient(self, case):
        loss = case.ready()
        s, t, y = sample()
        t.requires_grad_()
        for k in (None,) if loss.needs.dense else (None, 5):
            records = encode(t, y, k, tail_std=True)
            assert not any(x.requires_grad for x in (records.gaps, records.target_gap, records.tail))
            loss(s.clone().requires_grad_(), y, records).backward()
            assert t.grad is None

    @pytest.mark.parametrize("k", [None, 3])
    @pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
    def test_extreme_logits_give_finite_values_and_gradients(self, case, scale, k):
        loss = case.ready()
        if k and loss.needs.dense:
            k = None
        s, t = logits(1, scale), logits(2, scale)
        # The teacher is sure of the label, sure against it, and the student of and against it.
        for y in (t.argmax(1), t.argmin(1), s.argmax(1), s.argmin(1)):
            assert finite(lambda v: loss(v, y, encode(t, y, k, tail_std=True)), s)  # noqa: B023
            assert finite(lambda v: loss(v, y, encode(t, y, k, tail_std=True)), torch.zeros(B, C))  # noqa: B023

    # Parts

    def test_the_parts_add_up_to_the_loss(self, case):
        loss, (s, t, y) = case.ready(), sample()
        s.requires_grad_()
        for k in (None,) if loss.needs.dense else (None, 5):
            records = encode(t, y, k, tail_std=True)
            parts, value = loss.parts(s, y, records), loss(s, y, records)
            assert torch.equal(parts.total, value) and value.requires_grad
            for name, part in parts.named.items():
                assert name.isidentifier() and part.shape == () and part.dtype == torch.float32, name
                assert not part.requires_grad
            torch.testing.assert_close(sum(parts.named.values()), value.detach(), rtol=1e-5, atol=1e-6)

    # Needs

    def test_mixed_labels_equal_the_weighted_form(self, mixed):
        s, t, y, w = mixed_sample()
        loss, records = mixed.ready(), encode(t, y, None, precision="float32")
        want = value_and_gradient(lambda v: mixed.reference(v, t.double(), y, w.double()), s.double())
        value, gradient = errors(value_and_gradient(lambda v: loss(v, y, records, w), s), want)
        assert value < 1e-5 and gradient < 1e-5
        assert set(loss.parts(s, y, records, w).named) == set(loss.parts(s, y[:, 0], records).named)

    @pytest.mark.parametrize("k", [None, 5])
    def test_a_weight_of_one_is_the_single_label(self, mixed, k):
        loss = mixed.ready()
        if k and loss.needs.dense:
            k = None
        s, t, y, _ = mixed_sample()
        w = torch.tensor([1.0, 0.0]).expand(B, 2)
        got = value_and_gradient(lambda v: loss(v, y, encode(t, y, k, tail_std=True), w), s)
        # The same two labels in the records: in top-k records the second is a further stored class.
        want = value_and_gradient(lambda v: loss(v, y[:, 0], encode(t, y, k, tail_std=True)), s)
        assert max(errors(got, want)) < 1e-6

    @pytest.mark.parametrize("k", [None, 5])
    def test_two_labels_of_one_class_are_the_single_label(self, mixed, k):
        loss = mixed.ready()
        if k and loss.needs.dense:
            k = None
        s, t, y, w = mixed_sample()
        twice = y[:, :1].expand(B, 2).contiguous()
        got = value_and_gradient(lambda v: loss(v, twice, encode(t, twice, k, tail_std=True), w), s)
        want = value_and_gradient(lambda v: loss(v, y[:, 0], encode(t, y[:, 0], k, tail_std=True)), s)
        assert max(errors(got, want)) < 1e-6

    def test_mixed_labels_of_which_some_pairs_have_one_class_equal_the_weighted_form(self, mixed):
        s, t, y, w = mixed_sample()
        y[::3, 1] = y[::3, 0]
        loss, records = mixed.ready(), encode(t, y, None, precision="float32")
        want = value_and_gradient(lambda v: mixed.reference(v, t.double(), y, w.double()), s.double())
        assert max(errors(value_and_gradient(lambda v: loss(v, y, records, w), s), want)) < 1e-5

    def test_mixed_labels_without_a_meaning_or_without_weights_are_refused(self, case):
        s, t, y, w = mixed_sample()
        loss = case.ready()
        if not loss.needs.mixed:
            with pytest.raises(KdcacheError, match="no meaning for mixed labels"):
                loss(s, y, encode(t, y), w)
        elif loss.needs.labels:
            with pytest.raises(KdcacheError, match="need weights"):
                loss(s, y, encode(t, y))

    def test_what_it_does_not_need_may_be_missing_and_what_it_needs_is_asked_for(self, case):
        loss, (s, t, y) = case.ready(), sample()
        needs, records = loss.needs, encode(t, y)
        if not needs.labels:
            torch.testing.assert_close(loss(s, y[:, None][:, :0], encode(t, None)), loss(s, y, records))
        if needs.dense or needs.temperatures or needs.standardised:
            with pytest.raises(KdcacheError, match="give the batch's records"):
                loss(s, y)
        else:
            assert torch.equal(loss(s, y), loss(s, y, records))
        if needs.dense or needs.standardised:
            with pytest.raises(KdcacheError, match=f"--topk {C}"):
                loss(s, y, encode(t, y, 5))
        if needs.features:
            with pytest.raises(KdcacheError, match="features"):
                loss.loss(s, y, records)
        assert needs.features == isinstance(loss.loss, Featured) == isinstance(loss.loss, Learnt)
        if needs.first_view:
            with pytest.raises(KdcacheError, match="prepare"):
                replace(loss.loss)(s, y, records)

    # Specifications

    def test_it_comes_back_from_its_specification(self, case):
        loss, name = case.loss, case.loss.name
        assert make_loss(spec_of(loss), 1000) == make_loss(spec_of(loss), 100) == loss
        assert read_spec(spec_of(loss)) == (type(loss), options_of(loss))
        for classes in (10, 100):
            preset = make_loss(name, classes)
            text = described(name, classes)
            assert "\n" not in text and text.startswith(spec_of(preset))
            assert set(options_of(preset)) == {f.name for f in fields(loss) if f.init}
            assert make_loss(spec_of(preset), 1000) == preset

    # Warm-ups

    def test_an_epoch_may_be_told_twice_and_none_told_is_like_the_last(self, case):
        s, t, y = sample()
        records, whole = encode(t, y, tail_std=True), replace(case, epoch=None).ready()
        if not isinstance(whole.loss, Paced):
            assert case.epoch is None and not hasattr(whole.loss, "set_epoch")
            return
        want = whole(s, y, records)
        for epoch in (1, 1, 10_000):
            whole.loss.set_epoch(epoch)
            assert torch.equal(replace(case, epoch=epoch).ready()(s, y, records), whole(s, y, records))
        assert torch.equal(whole(s, y, records), want)
