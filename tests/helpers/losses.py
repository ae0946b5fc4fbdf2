"""The losses in float64 from the formulas alone, what tests of losses run on, and how far two results are apart.

References take s and t, the student's and the teacher's logits [B, C], and y and w, labels and their weights, both
[B, L]. They were written before the product's code, row by row where that is clearer.
"""

import itertools

import torch
from torch.nn.functional import one_hot

B, C, F = 64, 40, 6


def logits(seed, scale=3.0, rows=B, classes=C):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


FEATURES = logits(77, 1.0, classes=F)
# View 0, from which a class prior is taken; the last class has no sample.
PRIOR_TEACHER, PRIOR_LABELS = logits(900, rows=300), torch.arange(300) % (C - 1)


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
    """The heavier label first; a label that comes again has all of its weight at its first place."""
    w = w.clone()
    for i, j, k in itertools.product(range(len(y)), range(y.shape[1]), range(y.shape[1])):
        if j < k and y[i, j] == y[i, k]:
            w[i, j], w[i, k] = w[i, j] + w[i, k], 0.0
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


def class_prior64(T2):
    means = [soft(PRIOR_TEACHER.double()[PRIOR_LABELS == c], T2).mean(0) for c in range(C - 1)]
    return torch.stack([*means, torch.full((C,), 1 / C, dtype=torch.float64)])


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


def mixed_sample():
    s, t, y = sample(4)
    other = (y + 1 + torch.randint(C - 1, (B,), generator=torch.Generator().manual_seed(9))) % C
    lam = torch.rand(B, generator=torch.Generator().manual_seed(2))
    return s, t, torch.stack([y, other], 1), torch.stack([lam, 1 - lam], 1)
