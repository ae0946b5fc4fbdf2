"""Every loss and its gradient against a dense float64 form written from the formulas alone; then the hard cases."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import one_hot

from kdcache.cache import KdcacheError, encode
from kdcache.cache.identity import RecordIdentity
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
from kdcache.train.losses.options import (
    LOSSES,
    described,
    make_loss,
    options_of,
    spec_of,
)
from kdcache.train.losses.prepare import head_mass_warning, require_served

B, C, F = 64, 40, 6


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices as small as these gain nothing by threads, and waiting for them on a busy machine costs minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# References: s student logits, t teacher logits [B, C]; y labels and w their weights, both [B, L]. Written from the
# formulas before the product's code, row by row where that is clearer.


def soft(x, T=1.0):
    return torch.softmax(x / T, 1)


def kl(p, q):
    return (torch.special.xlogy(p, p) - p * q.log()).sum(1)


def ce(s, y, w):
    return -(w * torch.log_softmax(s, 1).gather(1, y)).sum(1)


def without(row, label):
    return torch.cat([row[:label], row[label + 1 :]])


def heavier(y, w):
    return y.gather(1, w.argmax(1, keepdim=True))[:, 0].tolist()


def ce64(s, t, y, w, smoothing=0.0):
    return ((1 - smoothing) * ce(s, y, w) - smoothing * torch.log_softmax(s, 1).mean(1)).mean()


def kd64(s, t, y, w, alpha, beta, T):
    return (alpha * ce(s, y, w) + beta * T**2 * kl(soft(t, T), soft(s, T))).mean()


def nkd_row(s, t, label, gamma, T):
    p, q = torch.softmax(t, 0), torch.softmax(s, 0)
    p_others, q_others = torch.softmax(without(t, label) / T, 0), torch.softmax(without(s, label) / T, 0)
    return -p[label] * q[label].log() - gamma * T**2 * (p_others * q_others.log()).sum()


def nkd64(s, t, y, w, gamma, T, both=False):
    rows = []
    for i in range(len(s)):
        if both:
            rows += [sum(w[i, j] * nkd_row(s[i], t[i], int(y[i, j]), gamma, T) for j in range(y.shape[1]))]
        else:
            rows += [nkd_row(s[i], t[i], heavier(y, w)[i], gamma, T)]
    return (ce(s, y, w) + torch.stack(rows)).mean()


def by_weight(y, w):
    order = torch.sort(w, dim=1, descending=True, stable=True).indices
    return y.gather(1, order), w.gather(1, order)


def tf_nkd64(s, t, y, w, scale=1.0, power=1):
    y, w = by_weight(y, w)
    q_y = soft(s).gather(1, y)
    target = torch.where(w > 0, q_y**power + w - (q_y**power).mean(0), 0.0).detach()
    return (ce(s, y, w) - scale * (target * q_y.log()).sum(1)).mean()


def uskd64(s, t, y, w, features, weight, bias, alpha, beta, mu, paper=False):
    """The sum over the losses' parts; ranks by sorting each row's scores as a list."""
    w_fc = torch.softmax(features @ weight.T + bias, 1)
    y_ls = 0.9 * (one_hot(y, s.shape[1]) * w[:, :, None]).sum(1) + 0.1 / s.shape[1]
    weak = -(y_ls * w_fc.log()).sum(1)
    rows = []
    for i in range(len(s)):
        named = {int(y[i, j]) for j in range(y.shape[1]) if w[i, j] > 0}
        q = (torch.softmax(s[i], 0) if paper else torch.log_softmax(s[i], 0)).detach()
        of_q, of_w = 1 - sum(float(q[c]) for c in named), 1 - sum(float(w_fc[i, c]) for c in named)
        score = [float(w_fc[i, c]) / (of_w + 1e-6) + float(q[c]) / (of_q + 1e-6) for c in range(s.shape[1])]
        rank = {c: r + 1 for r, c in enumerate(sorted(range(s.shape[1]), key=lambda c: (-score[c], c)))}
        others = [c for c in range(s.shape[1]) if c not in named]
        zeta = torch.tensor([1 / rank[c] for c in others], dtype=torch.float64)
        rows.append(-(zeta / zeta.sum() * torch.log_softmax(s[i][others], 0)).sum())
    return tf_nkd64(s, t, y, w, alpha, 2) + (beta * torch.stack(rows) + mu * weak).mean()


def decoupled(s, t, y, alpha, beta, T):
    p, q = soft(t, T), soft(s, T)
    rows = []
    for i, label in enumerate(y[:, 0].tolist()):
        p2 = torch.stack([p[i, label], without(p[i], label).sum()])
        q2 = torch.stack([q[i, label], without(q[i], label).sum()])
        p_others, q_others = (torch.softmax(without(x[i], label) / T, 0) for x in (t, s))
        rows.append(alpha * kl(p2[None], q2[None])[0] + beta * kl(p_others[None], q_others[None])[0])
    return torch.stack(rows)


def dkd64(s, t, y, w, alpha, beta, T, ramp=1.0):
    return (ce(s, y, w) + ramp * T**2 * decoupled(s, t, y, alpha, beta, T)).mean()


def ikl64(s, t, y, w, alpha, beta, T, T2, prior=None, ramp=1.0):
    v = soft(t, T2) if prior is None else (prior[y] * w[:, :, None]).sum(1)
    delta = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
    pairs = (v[:, :, None] * v[:, None, :] * delta**2).sum((1, 2))
    cross = -(soft(t, T) * soft(s, T).log()).sum(1)
    return (ce(s, y, w) + ramp * (alpha * cross + beta / 4 * pairs)).mean()


def pearson(a, b, eps):
    """As the authors of DIST: eps beside the product of the norms."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm() + eps)


def dist64(s, t, y, w, alpha, beta, T, eps):
    p, q = soft(t, T), soft(s, T)
    rows = torch.stack([pearson(p[i], q[i], eps) for i in range(len(p))]).mean()
    columns = torch.stack([pearson(p[:, c], q[:, c], eps) for c in range(p.shape[1])]).mean()
    return alpha * ce(s, y, w).mean() + beta * T**2 * ((1 - rows) + (1 - columns))


def zscore(x):
    return (x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True))


def cmkd64(s, t, y, w, alpha, beta, T, softness, low, high, standardise=True, eps=1e-8):
    a, b = (zscore(s), zscore(t)) if standardise else (s, t)
    rows = []
    for i in range(len(s)):
        p = torch.softmax(t[i], 0)
        difficulty = -(p * p.log()).sum() / torch.tensor(float(s.shape[1])).log()
        rank_t, rank_s = (torch.sigmoid((x[i][:, None] - x[i][None, :]) / softness).sum(1) for x in (b, a))
        spearman = low + (high - low) * difficulty
        linear = pearson(torch.softmax(b[i] / T, 0), torch.softmax(a[i] / T, 0), eps)
        rows.append((1 - spearman) * (1 - linear) + spearman * (1 - pearson(rank_t, rank_s, eps)))
    return (alpha * ce(s, y, w) + beta * torch.stack(rows)).mean()


def logit_std64(s, t, y, w, alpha, weight, tau, parts=None):
    a, b = zscore(s), zscore(t)
    inner = kl(soft(b, tau), soft(a, tau)) if parts is None else decoupled(a, b, y, *parts, tau)
    return (alpha * ce(s, y, w) + weight * tau**2 * inner).mean()


def mse64(s, t, y, w, alpha, beta):
    a, b = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    return (alpha * ce(s, y, w)).mean() + beta * ((a - b) ** 2).mean()


def wsld64(s, t, y, w, alpha, T):
    factor = (1 - torch.exp(-ce(s, y, w) / (ce(t, y, w) + 1e-7))).detach()
    return (ce(s, y, w) - alpha * T**2 * factor * (soft(t, T) * soft(s, T).log()).sum(1)).mean()


def gkd64(s, t, y, w, alpha, primary, binary, mass, T, k=C):
    p, q = soft(t, T), soft(s, T)
    rows = []
    for i in range(len(s)):
        order = sorted(range(s.shape[1]), key=lambda c: (-float(t[i, c]), c))
        group, total = [], 0.0
        for c in order[:k]:
            if total < mass:
                group.append(c)
                total += float(p[i, c])
        rest = [c for c in order if c not in group]
        inside = kl((p[i][group] / p[i][group].sum())[None], (q[i][group] / q[i][group].sum())[None])[0]
        p2, q2 = (torch.stack([x[i][group].sum(), x[i][rest].sum()]) for x in (p, q))
        between = kl(p2[None], q2[None])[0] if rest else 0.0
        rows.append(primary * inside + binary * between)
    return (alpha * ce(s, y, w) + T**2 * torch.stack(rows)).mean()


def skew64(s, t, y, w, alpha, beta, lam, T, reverse):
    p, q = soft(t, T), soft(s, T)
    inner = kl(q, (1 - lam) * p + lam * q) if reverse else kl(p, lam * p + (1 - lam) * q)
    return (alpha * ce(s, y, w) + beta * T**2 * inner).mean()


def bdkd64(s, t, y, w, alpha, beta, T, heavy, light):
    p, q = soft(t, T), soft(s, T)
    sure = (-(q * q.log()).sum(1) < -(p * p.log()).sum(1)).detach()
    forward = torch.where(sure, heavy, light)
    backward = torch.where(sure, light, heavy)
    return (alpha * ce(s, y, w) + beta * T**2 * (forward * kl(p, q) + backward * kl(q, p))).mean()


def bdkd_teacher64(t, s, y, w, alpha, regulariser, T):
    return (alpha * ce(t, y, w) + regulariser * T**2 * kl(soft(s, T), soft(t, T))).mean()


# What the tests run on.


def logits(seed, scale=3.0, rows=B, classes=C):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


FEATURES = logits(77, 1.0, classes=F)


def uskd(features=FEATURES, classes=C, **options):
    """USKD with a head of known weights, and features bound."""
    loss = USKD(**options)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        loss.make_head(features.shape[1], classes)

    def call(s, y, records=None, weights=None):
        return loss(s, y, records, weights, features=features)

    call.loss, call.needs = loss, loss.needs
    return call


def uskd_reference(call, **options):
    weight, bias = (p.detach().double() for p in call.loss.parameters())
    return lambda s, t, y, w: uskd64(s, t, y, w, FEATURES.double(), weight, bias, **options)


def ramped(loss, epoch):
    loss.set_epoch(epoch)
    return loss


PRIOR_TEACHER, PRIOR_LABELS = logits(900, rows=300), torch.arange(300) % (C - 1)


def prior_ikl(**options):
    loss = IKL(pairs="prior", **options)
    loss.prepare(encode(PRIOR_TEACHER, PRIOR_LABELS, None, precision="float32"))
    return loss


def class_prior64(T2):
    means = [soft(PRIOR_TEACHER.double()[PRIOR_LABELS == c], T2).mean(0) for c in range(C - 1)]
    return torch.stack([*means, torch.full((C,), 1 / C, dtype=torch.float64)])


def with_options(f, *args, **kwargs):
    return lambda s, t, y, w: f(s, t, y, w, *args, **kwargs)


U, U_PAPER = uskd(), uskd(alpha=0.1, beta=0.3, mu=0.1, rank="paper")
CASES = {
    "ce": (CE(), with_options(ce64)),
    "ce smooth": (CE(0.1), with_options(ce64, 0.1)),
    "kd small": (KD(0.1, 0.9, 4.0), with_options(kd64, 0.1, 0.9, 4.0)),
    "kd large": (KD(), with_options(kd64, 0.5, 0.5, 1.0)),
    "kd alone": (KD(0.0, 1.0, 2.0), with_options(kd64, 0.0, 1.0, 2.0)),
    "nkd small": (NKD(3.5, 3.0), with_options(nkd64, 3.5, 3.0)),
    "nkd large": (NKD(), with_options(nkd64, 1.5, 1.0)),
    "nkd both": (NKD(mixed="both"), with_options(nkd64, 1.5, 1.0, both=True)),
    "tf-nkd": (TFNKD(), with_options(tf_nkd64)),
    "uskd": (U, uskd_reference(U, alpha=1.0, beta=0.1, mu=0.005)),
    "uskd paper": (U_PAPER, uskd_reference(U_PAPER, alpha=0.1, beta=0.3, mu=0.1, paper=True)),
    "dkd small": (ramped(DKD(1.0, 8.0, 4.0, 20), 5), with_options(dkd64, 1.0, 8.0, 4.0, 0.25)),
    "dkd large": (DKD(), with_options(dkd64, 1.0, 0.5, 1.0)),
    "ikl small": (
        ramped(IKL(1.0, 4.0, 4.0, 100.0, "teacher", 20), 30),
        with_options(ikl64, 1.0, 4.0, 4.0, 100.0),
    ),
    "ikl prior": (
        ramped(prior_ikl(beta=0.5, warmup=2), 1),
        with_options(ikl64, 1.0, 0.5, 1.0, 1.0, class_prior64(1.0), 0.5),
    ),
    "dist small": (DIST(1.0, 2.0, 4.0), with_options(dist64, 1.0, 2.0, 4.0, 1e-8)),
    "dist large": (DIST(), with_options(dist64, 1.0, 2.0, 1.0, 1e-8)),
    "dist exact": (DIST(eps=0.0), with_options(dist64, 1.0, 2.0, 1.0, 0.0)),
    "cmkd": (CMKD(), with_options(cmkd64, 1.0, 2.0, 1.0, 0.1, 0.0, 1.0)),
    "cmkd raw": (
        CMKD(0.5, 1.0, 4.0, standardise=False, softness=2.0, low=0.2, high=0.6),
        with_options(cmkd64, 0.5, 1.0, 4.0, 2.0, 0.2, 0.6, False, 1e-8),
    ),
    "logit-std": (LogitStd(), with_options(logit_std64, 1.0, 9.0, 2.0)),
    "logit-std dkd": (LogitStd(base="dkd", others=8.0), with_options(logit_std64, 1.0, 9.0, 2.0, (1.0, 8.0))),
    "mse": (MSE(), with_options(mse64, 0.0, 1.0)),
    "mse and ce": (MSE(0.5, 0.1), with_options(mse64, 0.5, 0.1)),
    "wsld small": (WSLD(2.25, 4.0), with_options(wsld64, 2.25, 4.0)),
    "wsld large": (WSLD(), with_options(wsld64, 2.5, 2.0)),
    "gkd": (GKD(), with_options(gkd64, 1.0, 1.0, 1.0, 0.9, 1.0)),
    "gkd half": (GKD(0.0, 2.0, 0.5, 0.5, 4.0), with_options(gkd64, 0.0, 2.0, 0.5, 0.5, 4.0)),
    "gkd whole": (GKD(mass=1.0), with_options(gkd64, 1.0, 1.0, 1.0, 1.0, 1.0)),
    "skew-kl": (SkewKL(), with_options(skew64, 0.0, 1.0, 0.1, 1.0, False)),
    "skew-rkl": (SkewRKL(0.5, 2.0, 0.3, 4.0), with_options(skew64, 0.5, 2.0, 0.3, 4.0, True)),
    "bdkd": (BDKD(), with_options(bdkd64, 1.0, 1.0, 1.0, 2.0, 1.0)),
    "bdkd small": (BDKD(0.1, 0.9, 4.0, 1.0, 0.25), with_options(bdkd64, 0.1, 0.9, 4.0, 1.0, 0.25)),
}
TOP_K = [name for name in CASES if not CASES[name][0].needs.dense and CASES[name][0].needs.temperatures]
MIXED = [name for name in CASES if CASES[name][0].needs.mixed]


def value_and_gradient(f, s):
    s = s.clone().requires_grad_()
    value = f(s)
    value.backward()
    assert value.shape == () and s.grad is not None
    return value.detach().double(), s.grad.double()


def finite(f, s):
    """Whether value and gradient are finite; but a gradient that is beyond float16 by float32's account may be inf."""
    value, gradient = value_and_gradient(f, s)
    held = torch.isfinite(gradient)
    if s.dtype == torch.float16 and not held.all():
        exact = value_and_gradient(f, s.float())[1]
        held |= exact.isfinite() & (exact.abs() > torch.finfo(torch.float16).max)
    return bool(torch.isfinite(value)) and bool(held.all())


def errors(got, want):
    return abs(got[0] - want[0]) / abs(want[0]), (got[1] - want[1]).norm() / want[1].norm()


def sample(seed=0):
    s, t = logits(seed), logits(seed + 100)
    y = torch.randint(C, (B,), generator=torch.Generator().manual_seed(seed))
    y[: B // 2] = t[: B // 2].argmax(1)
    return s, t, y


def compared(name, k=None, precision="float32", seed=0):
    loss, reference = CASES[name]
    s, t, y = sample(seed)
    records = encode(t, y, k, (1.0, 2.0, 3.0, 4.0), precision)
    one = torch.ones(B, 1, dtype=torch.float64)
    want = value_and_gradient(lambda v: reference(v, t.double(), y[:, None], one), s.double())
    return errors(value_and_gradient(lambda v: loss(v, y, records), s), want)


def test_every_loss_has_a_case():
    assert {getattr(loss, "loss", loss).name for loss, _ in CASES.values()} == set(LOSSES)


@pytest.mark.parametrize("name", CASES)
def test_dense_float32_records_are_exact(name):
    value, gradient = compared(name)
    assert value < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_dense_records_as_stored_by_default(name):
    value, gradient = compared(name, precision=None)
    assert value < 1e-3 and gradient < 5e-3


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_is_near_and_nearer_with_more(name):
    """Stated bounds for flat random tails, K = 10 of 40 classes; bench/losses.py has those of real logits."""
    few, many = compared(name, k=10), compared(name, k=C - 2)
    # bdkd: the logarithm of p in its reverse KL weighs small probabilities as much as large ones.
    value, gradient, last = (0.15, 0.45, 0.06) if name.startswith("bdkd") else (0.1, 0.25, 0.01)
    assert few[0] < value and few[1] < gradient
    assert many[0] < 1e-3 and many[1] < last


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


# Mixed labels.


def mixed_sample():
    s, t, y = sample(4)
    other = (y + 1 + torch.randint(C - 1, (B,), generator=torch.Generator().manual_seed(9))) % C
    lam = torch.rand(B, generator=torch.Generator().manual_seed(2))
    return s, t, torch.stack([y, other], 1), torch.stack([lam, 1 - lam], 1)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_labels_equal_the_weighted_form(name):
    loss, reference = CASES[name]
    s, t, y, w = mixed_sample()
    records = encode(t, y, None, precision="float32")
    want = value_and_gradient(lambda v: reference(v, t.double(), y, w.double()), s.double())
    value, gradient = errors(value_and_gradient(lambda v: loss(v, y, records, w), s), want)
    assert value < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("name", MIXED)
def test_a_weight_of_one_is_the_single_label(name, k):
    loss = CASES[name][0]
    if k and loss.needs.dense:
        k = None
    s, t, y, _ = mixed_sample()
    w = torch.tensor([1.0, 0.0]).expand(B, 2)
    got = value_and_gradient(lambda v: loss(v, y, encode(t, y, k, tail_std=True), w), s)
    # The same two labels in the records: in top-k records the second is a further stored class.
    want = value_and_gradient(lambda v: loss(v, y[:, 0], encode(t, y, k, tail_std=True)), s)
    assert max(errors(got, want)) < 1e-6


def test_the_heavier_label_may_be_the_second():
    s, t, y, w = mixed_sample()
    records = encode(t, y, 5, precision="float32")
    swapped = encode(t, y.flip(1), 5, precision="float32")
    for loss in (NKD(), NKD(mixed="both"), TFNKD(), WSLD(temperature=1.0)):
        torch.testing.assert_close(loss(s, y, records, w), loss(s, y.flip(1), swapped, w.flip(1)))


@pytest.mark.parametrize("loss", [DKD(), LogitStd(base="dkd")])
def test_losses_without_a_meaning_for_two_labels_refuse(loss):
    s, t, y, w = mixed_sample()
    assert not loss.needs.mixed
    with pytest.raises(KdcacheError, match="no meaning for mixed labels"):
        loss(s, y, encode(t, y), w)


def test_mixed_labels_without_weights_are_refused():
    s, _, y, _ = mixed_sample()
    with pytest.raises(KdcacheError, match="need weights"):
        CE()(s, y)


# Hard cases.


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", CASES)
def test_extreme_logits_give_finite_values_and_gradients(name, scale, k):
    loss = CASES[name][0]
    if k and loss.needs.dense:
        k = None
    s, t = logits(1, scale), logits(2, scale)
    # The teacher is sure of the label, sure against it, and the student of and against it.
    for y in (t.argmax(1), t.argmin(1), s.argmax(1), s.argmin(1)):
        assert finite(lambda v: loss(v, y, encode(t, y, k, tail_std=True)), s)  # noqa: B023
        assert finite(lambda v: loss(v, y, encode(t, y, k, tail_std=True)), torch.zeros(B, C))  # noqa: B023


SMALL = {name: loss for name, (loss, _) in CASES.items() if name not in ("ikl prior", "uskd", "uskd paper")}
MADE = ["ikl prior", "uskd", "uskd paper"]  # for the classes at hand


def test_a_gradient_that_float16_cannot_hold_is_the_exact_one_in_float32():
    """As hypothesis found it: 4 v_1 (gap_1 - mean gap) = 4 * 0.5 * 0.5 * 65534."""
    loss, labels = IKL(0.0, 4.0, 4.0, 100.0, "teacher", 1), torch.tensor([0])
    records = encode(torch.zeros(1, 2), labels)
    s = torch.tensor([[30.0, -65504.0]], dtype=torch.float16)
    _, gradient = value_and_gradient(lambda v: loss(v, labels, records), s.float())
    torch.testing.assert_close(gradient[0], torch.tensor([65534.0, -65534.0]), check_dtype=False)
    assert finite(lambda v: loss(v, labels, records), s)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_any_shape_and_range_gives_finite_values_and_gradients(data):
    name = data.draw(st.sampled_from(sorted([*SMALL, *MADE])))
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
    if name in SMALL:
        loss = SMALL[name]
    elif name == "ikl prior":
        loss = IKL(pairs="prior")
        loss.prepare(encode(t, y))
    else:
        loss = uskd(logits(3, 1.0, rows, F).to(dtype), classes, rank="paper" if "paper" in name else "code")
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
        if isinstance(loss, BDKD):
            assert finite(lambda v: loss.of_teacher(v, y, t, weights), s)


def test_two_classes_and_a_batch_of_one():
    t, y = torch.tensor([[9.0, -9.0]]), torch.tensor([0])
    for k in (None, 1):
        for loss in SMALL.values():
            records = encode(t, y, None if loss.needs.dense else k, tail_std=True)
            assert finite(lambda v: loss(v, y, records), torch.tensor([[0.1, 0.4]]))  # noqa: B023


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_float32_inside_autocast(name, half):
    loss = CASES[name][0]
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


@pytest.mark.parametrize("name", CASES)
def test_only_the_student_gets_a_gradient(name):
    loss = CASES[name][0]
    s, t, y = sample()
    t.requires_grad_()
    for k in (None,) if loss.needs.dense else (None, 5):
        records = encode(t, y, k, tail_std=True)
        assert not any(x.requires_grad for x in (records.gaps, records.target_gap, records.tail))
        loss(s.clone().requires_grad_(), y, records).backward()
        assert t.grad is None


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


# uskd's head, warm-up and the class prior of ikl.


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


@pytest.mark.parametrize("loss", [DKD(warmup=4), LogitStd(base="dkd", warmup=4), IKL(pairs="teacher", warmup=4)])
def test_warm_up_counts_epochs_from_one(loss):
    s, t, y = sample()
    records = encode(t, y)
    whole, plain = loss(s, y, records), (0.0 if loss.name == "logit-std" else 1.0) * CE()(s, y)
    if loss.name == "logit-std":
        plain = loss.alpha * CE()(s, y)
    for epoch, share in ((1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)):
        loss.set_epoch(epoch)
        torch.testing.assert_close(loss(s, y, records), plain + share * (whole - plain))


COMPILED = {
    "dkd": DKD(warmup=20),
    "ikl": IKL(pairs="teacher", warmup=20),
    "logit-std": LogitStd(base="dkd", warmup=20),
}


def test_every_loss_that_goes_by_the_epoch_is_compiled_in_a_test():
    assert {name for name, loss in LOSSES.items() if hasattr(loss, "set_epoch")} == set(COMPILED)


@pytest.mark.parametrize("loss", COMPILED.values(), ids=COMPILED)
def test_a_compiled_step_is_compiled_once_for_all_epochs_of_a_warm_up(loss):
    """Torch gives up where it would have to compile a ninth time."""
    counter = CompileCounter()
    torch._dynamo.reset()
    s, t, y = sample()
    records = encode(t, y)
    step = torch.compile(lambda v: loss(v, y, records), backend=counter, fullgraph=True)
    for epoch in range(1, 13):
        loss.set_epoch(epoch)
        torch.testing.assert_close(step(s), loss(s, y, records))
    assert counter.frame_count == 1


def test_ikl_with_the_class_prior_asks_for_it():
    s, t, y = sample()
    with pytest.raises(KdcacheError, match="prepare"):
        IKL()(s, y, encode(t, y))


# Names, options, presets and what a cache can serve.


CIFAR_PRESETS = {
    "nkd": NKD(3.5, 3.0),
    "kd": KD(0.1, 0.9, 4.0),
    "uskd": USKD(0.1, 0.1, 0.1),
    "dkd": DKD(1.0, 8.0, 4.0, 20),
    "ikl": IKL(1.0, 4.0, 4.0, 100.0, "teacher", 20),
    "dist": DIST(1.0, 2.0, 4.0),
    "wsld": WSLD(2.25, 4.0),
    "logit-std": LogitStd("kd", 0.1, 9.0, 2.0),
    "logit-std:base=dkd": LogitStd("dkd", 1.0, 9.0, 2.0, 1.0, 8.0, 20),
}
IMAGENET_PRESETS = {
    "nkd": NKD(1.5, 1.0),
    "kd": KD(0.5, 0.5, 1.0),
    "uskd": USKD(1.0, 0.1, 0.005),
    "dkd": DKD(1.0, 0.5, 1.0, 1),
    "ikl": IKL(1.0, 0.5, 1.0, 1.0, "prior", 1),
    "dist": DIST(1.0, 2.0, 1.0),
    "wsld": WSLD(2.5, 2.0),
    "logit-std": LogitStd("kd", 1.0, 9.0, 2.0),
    "logit-std:base=dkd": LogitStd("dkd", 1.0, 9.0, 2.0, 1.0, 0.5, 1),
}


@pytest.mark.parametrize("spec", CIFAR_PRESETS)
def test_presets_go_by_the_number_of_classes(spec):
    """Those made for CIFAR-100 hold near its number of classes; ten, as many as CIFAR-10 has, are too few."""
    for classes in (50, 100, 200):
        assert make_loss(spec, classes) == CIFAR_PRESETS[spec]
    for classes in (2, 10, 49, 201, 1000):
        assert make_loss(spec, classes) == IMAGENET_PRESETS[spec]


def test_options_override_presets():
    assert make_loss("nkd:gamma=2,tail=uniform,mixed=both", 1000) == NKD(2.0, 1.0, "uniform", "both")
    assert make_loss("dkd:beta=2,warmup=3", 100) == DKD(1.0, 2.0, 4.0, 3)
    assert make_loss("cmkd:standardise=false", 100).standardise is False
    online = make_loss("bdkd:start=taught,teacher_alpha=0.5,regulariser=0", 100)
    assert online == BDKD(start="taught", teacher_alpha=0.5, regulariser=0.0)
    assert options_of(make_loss("dkd", 100)) == {
        "alpha": 1.0, "beta": 8.0, "temperature": 4.0, "warmup": 20, "tail": "prior",
    }  # fmt: skip


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_spelled_out_is_that_loss(name, classes):
    loss = make_loss(name, classes)
    assert loss.name == name and make_loss(spec_of(loss), 1000) == loss
    assert "\n" not in described(name, classes) and described(name, classes).startswith(spec_of(loss))


def test_the_line_at_start_says_which_preset_and_why():
    assert described("nkd", 10) == (
        "nkd:gamma=1.5,temperature=1,tail=prior,mixed=heavier (as published for ImageNet, since there are 10 classes; "
        "from 50 to 200 as for CIFAR-100: gamma=3.5,temperature=3)"
    )
    assert described("nkd:gamma=2", 100) == (
        "nkd:gamma=2,temperature=3,tail=prior,mixed=heavier (as published for CIFAR-100, since there are 100 classes; "
        "below 50 and above 200 as for ImageNet: temperature=1)"
    )
    # Nothing was chosen where all was given, or where there is one setting.
    assert described("nkd:gamma=2,temperature=2", 10) == "nkd:gamma=2,temperature=2,tail=prior,mixed=heavier"
    assert described("tf-nkd", 10) == "tf-nkd"
    assert described("logit-std:base=dkd", 10).endswith("CIFAR-100: others=8,warmup=20)")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nkdd", "unknown loss 'nkdd': take one of ce, kd, nkd"),
        ("nkd:gama=1", "no option 'gama': it has gamma, temperature, tail, mixed"),
        ("tf-nkd:gamma=1", "tf-nkd has no option 'gamma': it has none"),
        ("nkd:gamma=x", "gamma='x' is no number"),
        ("nkd:gamma=nan", "gamma=nan must be finite"),
        ("nkd:gamma=inf", "gamma=inf must be finite"),
        ("nkd:gamma=-1", "not negative"),
        ("nkd:gamma=1,gamma=2", "gamma is given twice"),
        ("nkd:tail=zero", "tail='zero' is not one of prior, uniform"),
        ("skew-kl:tail=bucket", "'bucket' is not one of prior, uniform, renorm, drop"),
        ("bdkd:tail=drop", "'drop' is not one of prior, uniform"),
        ("bdkd:start=cold", "start='cold' is not one of scratch, taught"),
        ("nkd:mixed=all", "mixed='all' is not one of heavier, both"),
        ("kd:temperature=0", "temperature=0 must be positive"),
        ("dkd:warmup=2.5", "warmup='2.5' is no whole number"),
        ("dkd:warmup=0", "warmup=0 must be positive"),
        ("cmkd:standardise=maybe", "standardise='maybe' is neither true nor false"),
        ("ce:label_smoothing=2", "label_smoothing=2 must lie between 0 and 1"),
        ("gkd:mass=0", "mass=0 must be positive"),
        ("gkd:mass=1.5", "mass=1.5 must lie between 0 and 1"),
        ("skew-rkl:skew=1", "skew=1 must lie between 0 and 1, without both"),
        ("skew-kl:skew=0", "skew=0 must be positive"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(spec, message):
    with pytest.raises(KdcacheError, match=message) as caught:
        make_loss(spec, 100)
    assert "\n" not in str(caught.value)


def record(**changes):
    base = {"classes": 100, "k": 5, "temperatures": (1.0, 2.0), "precision": "float16", "labels": 1, "tail_std": False}
    return RecordIdentity(**{**base, **changes})


def test_a_cache_that_cannot_serve_is_refused_with_the_flags_that_help():
    with pytest.raises(KdcacheError, match=r"at temperature 4; this cache holds 1,2: .*--temperatures 1,2,4"):
        require_served(KD(temperature=4.0), record())
    with pytest.raises(KdcacheError, match="built with --unlabelled"):
        require_served(NKD(), record(labels=0))
    with pytest.raises(KdcacheError, match=r"logit-std needs .* tau 2: build .* --tail-std .* or with --topk 100"):
        require_served(LogitStd(), record())
    with pytest.raises(KdcacheError, match=r"standardised to tau 3: .*serves tau=2"):
        require_served(LogitStd(tau=3.0), record(tail_std=True))
    require_served(LogitStd(), record(tail_std=True))
    for name in ("ikl", "dist", "cmkd", "mse"):
        with pytest.raises(KdcacheError, match=rf"{name} needs all 100 .* holds the top 5: build one with --topk 100"):
            require_served(make_loss(name, 1000), record())
    for name in ("ikl", "dist", "cmkd", "mse", "logit-std"):
        require_served(make_loss(name, 1000), record(k=None, temperatures=()))
    with pytest.raises(KdcacheError, match=r"dkd has no meaning for mixed labels.*without mixup or cutmix"):
        require_served(DKD(), record(labels=2))
    require_served(KD(temperature=4.0), record(k=None, temperatures=()))
    require_served(KD(alpha=0.0), record(labels=0))
    require_served(SkewKL(), record(labels=0))
    for name in ("ce", "tf-nkd", "uskd"):
        require_served(make_loss(name, 1000), record(temperatures=(9.0,)))


@pytest.mark.parametrize("loss", [IKL(), DIST(), CMKD(), MSE(), LogitStd()])
def test_dense_losses_refuse_top_k_records(loss):
    s, t, y = sample()
    with pytest.raises(KdcacheError, match="--topk 40"):
        loss(s, y, encode(t, y, 5))


def test_a_small_head_is_warned_of():
    _, t, y = sample()
    few = encode(t * 0.3, y, 2)
    warning = head_mass_warning(KD(0.1, 0.9, 4.0), few)
    assert warning is not None and "T = 4" in warning and "--topk" in warning and "\n" not in warning
    assert head_mass_warning(KD(), encode(t, y, 20)) is None
    assert head_mass_warning(KD(0.1, 0.9, 4.0), encode(t * 0.3, y)) is None
    assert head_mass_warning(CE(), few) is None
    # Which tail is trained on changes nothing about what is missing.
    assert head_mass_warning(KD(0.1, 0.9, 4.0, "renorm"), few) == warning


def test_the_errors_in_the_docs_are_those_that_were_measured():
    """docs/losses.md beside bench/results/losses.json, for K = 20: value / gradient, of the whole loss and alone."""
    root = Path(__file__).parents[3]
    measured = json.loads((root / "bench" / "results" / "losses.json").read_text())["accuracy"]
    page = (root / "docs" / "losses.md").read_text().split("## From top-k records")[1].split("## Every loss trains")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    told = {row[0].split("`")[1]: [cell for cell in row[1:] if cell] for row in rows if "`--loss`" not in row[0]}
    want = {}
    for spec in dict.fromkeys(one["loss"] for one in measured):
        of = {one["tail"]: one for one in measured if (one["loss"], one["k"]) == (spec, 20)}
        parts = [part for tail in ("none", "prior", "uniform") if tail in of for part in (of[tail], of[tail]["term"])]
        want[spec] = [f"{part['value']:.3f} / {part['gradient']:.3f}" for part in parts]
    assert told == want
