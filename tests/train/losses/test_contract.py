"""Every loss of the table, and one that is added to it here, goes through the contract; and inputs of any shape."""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdcache.cache import encode
from kdcache.cache.records.records import Tail
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.tests.contracts.losses import CASES, Case, LossContract, of
from kdcache.tests.helpers.losses import F, ce, finite, logits, sample, soft
from kdcache.tests.helpers.places import ROOT
from kdcache.tests.helpers.training import Same
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import fit
from kdcache.train.losses import CE, Batch, ByParts, Needs, Parts, option, part
from kdcache.train.losses.base import Partnered
from kdcache.train.losses.options import LOSSES, make_loss, options_of


class TestLosses(LossContract):
    cases = CASES


def test_every_loss_has_a_case():
    assert {case.loss.name for case in CASES.values()} == set(LOSSES)


def test_the_parts_in_the_docs_are_those_that_are_logged():
    page = (ROOT / "docs" / "losses.md").read_text().split("## What is logged")[1].split("## ")[0]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `") and "--loss" not in line]
    told = {name.strip(" `"): set(re.findall(r"`(\w+)`", parts)) for name, parts in rows}
    found = {name: set() for name in LOSSES}
    s, t, y = sample()
    for case in CASES.values():
        if "alpha" in options_of(case.loss):
            case = replace(case, loss=replace(case.loss, alpha=1.0))
        found[case.loss.name] |= set(case.ready().parts(s, y, encode(t, y)).named)
    assert told == found


# A loss is added by its class, a line in the table and a row of the contract.


@dataclass(frozen=True)
class Brier(ByParts):
    """alpha CE + beta sum_c (p^T_c - q^T_c)^2."""

    name: ClassVar[str] = "brier"
    alpha: float = option(1.0)
    beta: float = option(2.0, cifar=4.0)
    temperature: float = option(1.0)
    tail: Tail = "uniform"

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def terms(self, batch: Batch) -> Parts:
        p = batch.records.dense(self.temperature, self.tail)
        apart = ((p - torch.softmax(batch.logits / self.temperature, 1)) ** 2).sum(1)
        return batch.plus_ce(part("brier", apart).mean().times(self.beta), self.alpha)


def brier64(s, t, y, w, alpha, beta, T):
    return (alpha * ce(s, y, w) + beta * ((soft(t, T) - soft(s, T)) ** 2).sum(1)).mean()


class TestAddedLoss(LossContract):
    cases: ClassVar = {
        "brier": Case(Brier(), of(brier64, 1.0, 2.0, 1.0)),
        "brier alone": Case(Brier(0.0, 1.0, 2.0), of(brier64, 0.0, 1.0, 2.0)),
    }

    @pytest.fixture(autouse=True)
    def table(self, monkeypatch):
        monkeypatch.setitem(LOSSES, "brier", Brier)

    def test_it_has_its_preset_and_trains(self):
        loss = make_loss("brier:alpha=0.5", 100)
        assert loss == Brier(alpha=0.5, beta=4.0)
        s, t, y = sample()
        images = torch.randint(0, 256, (len(s), 3, 2, 2), generator=torch.Generator().manual_seed(0)).byte()

        model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, s.shape[1])), (0.5,) * 3, (0.25,) * 3)
        lines = fit(model, loss, Same([(images, y, encode(t, y))]), Recipe(3, 0.1), lambda _: {}, say=lambda _: None)
        assert lines[0]["loss"] == pytest.approx(lines[0]["loss_ce"] + lines[0]["loss_brier"], rel=1e-5)
        assert lines[2]["loss"] < lines[0]["loss"]


# Hard cases


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_any_shape_and_range_gives_finite_values_and_gradients(data):
    case = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    rows, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    # e^-88 is below the smallest normal float32, e^-104 below the smallest of all. t's deviation has to fit float16.
    common = st.sampled_from([0.0, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4, 4.5e4, -4.5e4]) | st.floats(-20, 20, width=16)
    values = common | st.floats(-106, -84, width=32)

    def matrix(of):
        flat = data.draw(st.lists(of, min_size=rows * classes, max_size=rows * classes))
        return torch.tensor(flat).reshape(rows, classes)

    s, t = matrix(values | st.sampled_from([65504.0, -65504.0])).to(dtype), matrix(values)
    if data.draw(st.booleans()):  # classes that are improbable throughout the batch
        low = torch.tensor(data.draw(st.lists(st.floats(-106, -84, width=32), min_size=rows, max_size=rows)))
        s[:, 0], t[:, 0] = low.to(dtype), low
    y = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    loss = case.ready(classes, encode(t, y), logits(3, 1.0, rows, F).to(dtype))
    k = None if loss.needs.dense else data.draw(st.sampled_from([None, 1, classes - 1]))
    records = encode(t, y, k, tail_std=True)
    weights = None
    if loss.needs.mixed and data.draw(st.booleans()):
        lam = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
        y = torch.stack([y, torch.roll(y, 1)], 1)
        weights = torch.tensor([lam, 1 - lam]).expand(rows, 2)
        records = encode(t, y, k, tail_std=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=data.draw(st.booleans())):
        assert finite(lambda v: loss(v, y, records, weights), s)
        if isinstance(loss.loss, Partnered):
            assert finite(lambda v: loss.loss.of_teacher(v, y, t, weights), s)


def test_two_classes_and_a_batch_of_one():
    t, y = torch.tensor([[9.0, -9.0]]), torch.tensor([0])
    for k in (None, 1):
        for case in CASES.values():
            loss = case.ready(2, encode(t, y), logits(3, 1.0, 1, F))
            records = encode(t, y, None if loss.needs.dense else k, tail_std=True)
            assert finite(lambda v: loss(v, y, records), torch.tensor([[0.1, 0.4]]))  # noqa: B023


# Warm-ups


@pytest.mark.parametrize(
    "spec", ["dkd:warmup=4", "logit-std:base=dkd,warmup=4", "ikl:pairs=teacher,warmup=4"], ids=["dkd", "std", "ikl"]
)
def test_warm_up_counts_epochs_from_one(spec):
    loss = make_loss(spec, 10)
    s, t, y = sample()
    records = encode(t, y)
    whole, plain = loss(s, y, records), loss.alpha * CE()(s, y) if loss.name == "logit-std" else CE()(s, y)
    for epoch, share in ((1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)):
        loss.set_epoch(epoch)
        torch.testing.assert_close(loss(s, y, records), plain + share * (whole - plain))


COMPILED = {
    "dkd": "dkd:warmup=20",
    "ikl": "ikl:pairs=teacher,warmup=20",
    "logit-std": "logit-std:base=dkd,warmup=20",
}


def test_every_loss_that_goes_by_the_epoch_is_compiled_in_a_test():
    assert {name for name, loss in LOSSES.items() if hasattr(loss, "set_epoch")} == set(COMPILED)


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_is_compiled_once_for_all_epochs_of_a_warm_up(name):
    """Torch gives up where it would have to compile a ninth time."""
    from torch._dynamo.testing import CompileCounter  # slow

    loss, counter = make_loss(COMPILED[name], 10), CompileCounter()
    torch._dynamo.reset()
    s, t, y = sample()
    records = encode(t, y)
    step = torch.compile(lambda v: loss(v, y, records), backend=counter, fullgraph=True)
    for epoch in range(1, 13):
        loss.set_epoch(epoch)
        torch.testing.assert_close(step(s), loss(s, y, records))
    assert counter.frame_count == 1
