"""Distillation losses from records, beside the papers' formulas.

Notation: y label; T temperature; p, q the teacher's and the student's softmax at T (without T: at 1); t, s their
logits; p~, q~ as p, q over the classes other than y; CE = -log q_y; H(a, b) = -sum a log b; sg = no gradient.
Shapes: B batch, C classes, L labels a sample. Every loss is called as

    loss(student_logits [B, C], labels [B], records)                    scalar, the mean over the batch
    loss(student_logits [B, C], labels [B, L], records, weights [B, L]) for mixed images (mixup, cutmix)

in float32, differentiable in the student only. What a loss needs of a cache it declares in `needs`. Mixed labels mean
the weighted sum in every term that is a cross-entropy to the labels; other terms with a label say what they take.
A loss that has `set_epoch(epoch)` is told the epoch, counted from 1, before each; until then a warm-up counts as over,
so that other loops need not know of it. One that has `prepare(records)` gets the training records of view 0 once.
Under several ranks (group.py) a loss is the mean over the rank's own rows, and what it takes of the batch as a whole it
takes of all ranks' rows: all of them have to call it. Weighted by the ranks' shares of the batch (group.weight), the
gradients that DDP averages are then those of one process.
The table of names, options and presets is in options.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdcache.cache.errors import InputError, UnservedError
from kdcache.cache.records import Records, Softened, Tail
from kdcache.train import group

DenseTail = Literal["prior", "uniform", "renorm", "drop"]  # those with a probability for every class
SpreadTail = Literal["prior", "uniform"]  # those with a positive one

_LEAST_SPREAD = 1e-30


@dataclass(frozen=True)
class Needs:
    """What a loss reads.

    labels; target_gap: the teacher's own answer for them, which imports lack; the teacher at these temperatures (none:
    not softened); dense: all classes; standardised: the teacher's logits standardised to this tau; features: the
    student's, one stage before the last; mixed: it has a meaning for two labels.
    """

    labels: bool = True
    target_gap: bool = False
    temperatures: tuple[float, ...] = ()
    dense: bool = False
    standardised: float | None = None
    features: bool = False
    mixed: bool = True


class Loss(Protocol):
    """What the trainer calls."""

    name: ClassVar[str]

    @property
    def needs(self) -> Needs: ...

    def __call__(
        self, logits: Tensor, labels: Tensor, records: Records | None, weights: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class CE:
    """CE, with optional label smoothing: plain training, no teacher."""

    name: ClassVar[str] = "ce"
    label_smoothing: float = 0.0

    @property
    def needs(self) -> Needs:
        return Needs()

    def __call__(
        self, logits: Tensor, labels: Tensor, records: Records | None = None, weights: Tensor | None = None
    ) -> Tensor:
        logits = logits.float()
        if labels.dim() == 1:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        log_q = F.log_softmax(logits, 1)
        ce = (1 - self.label_smoothing) * _label_ce(log_q, labels, weights)
        return (ce - self.label_smoothing * log_q.mean(1)).mean()


@dataclass(frozen=True)
class KD:
    """alpha CE + beta T^2 KL(p^T, q^T): Hinton et al. 2015 (arXiv 1503.02531)."""

    name: ClassVar[str] = "kd"
    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0
    tail: Tail = "prior"

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        teacher = records.softened(self.temperature, self.tail)
        log_q = F.log_softmax(logits / self.temperature, 1)
        kl = (-teacher.entropy() - teacher.cross(log_q)).mean()
        return self.beta * self.temperature**2 * kl + _plus_ce(self.alpha, logits, labels, weights)


@dataclass(frozen=True)
class NKD:
    """CE - p_y log q_y + gamma T^2 H(p~^T, q~^T): Yang et al. 2023 (arXiv 2303.13005, eq. 7; first in 2208.10139).

    p_y and q_y are at temperature 1. The authors' module leaves CE to its caller; this is the whole loss. Mixed
    labels: as the authors, y is the heavier label; mixed=both: both terms for each label, by its weight.
    """

    name: ClassVar[str] = "nkd"
    gamma: float = 1.5
    temperature: float = 1.0
    tail: Tail = "prior"
    mixed: Literal["heavier", "both"] = "heavier"

    @property
    def needs(self) -> Needs:
        return Needs(target_gap=True, temperatures=tuple(sorted({1.0, self.temperature})))

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        soft = records.softened(self.temperature, self.tail)
        p = (soft if self.temperature == 1 else records.softened(1.0, self.tail)).target()
        log_q = F.log_softmax(logits, 1)
        loss = ce = _label_ce(log_q, labels, weights)
        scaled = logits / self.temperature
        for y, which, weight in self._targets(labels, weights):
            p_y = p.gather(1, which.unsqueeze(1)).squeeze(1) if which is not None else p[:, 0]
            ce_y = ce if which is None else _label_ce(log_q, y, None)
            others = soft.cross_others(_log_others(scaled, y), which)
            loss = loss + weight * (p_y * ce_y - self.gamma * self.temperature**2 * others)
        return loss.mean()

    def _targets(
        self, labels: Tensor, weights: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | float]]:
        """Each label [B] that counts as y, its column in the records (None: the first), and its weight."""
        if labels.dim() == 1:
            yield labels, None, 1.0
            return
        weights = _weights(labels, weights)
        if self.mixed == "heavier":
            which = weights.argmax(1)
            yield labels.gather(1, which.unsqueeze(1)).squeeze(1), which, 1.0
            return
        for column in range(labels.shape[1]):
            yield labels[:, column], torch.full_like(labels[:, 0], column), weights[:, column]


@dataclass(frozen=True)
class TFNKD:
    """CE - sg[q_y + V - mean_B q_y] log q_y, V = 1: teacher-free NKD, Yang et al. 2022 (arXiv 2208.10139).

    The student's own q_y, shifted to have mean V, stands for the teacher's. Mixed labels: V is each label's weight,
    and the means are over the batch's heavier and over its lighter labels.
    """

    name: ClassVar[str] = "tf-nkd"

    @property
    def needs(self) -> Needs:
        return Needs()

    def __call__(
        self, logits: Tensor, labels: Tensor, records: Records | None = None, weights: Tensor | None = None
    ) -> Tensor:
        log_q = F.log_softmax(logits.float(), 1)
        return (_label_ce(log_q, labels, weights) + _own_target(log_q, labels, weights, power=1)).mean()


@dataclass
class USKD:
    """CE - alpha sg[q_y^2 + V - mean_B q_y^2] log q_y + beta H(zeta~, q~) + mu H(y_ls, w).

    Universal self-distillation, Yang et al. 2023 (arXiv 2303.13005). No teacher. w [B, C] = softmax of a linear head
    on the student's features one stage before the last; y_ls = 0.9 one-hot + 0.1 / C. zeta is Zipf's 1 / rank over all
    classes, y left out, renormalised, without gradient. rank=code: by w_i / (1 - w_y) + log q_i / (1 - log q_y), as
    the authors' code, with 1e-6 added to both divisors; rank=paper: q in place of log q, as the paper's text.
    Mixed labels: V as in tf-nkd, y_ls the weighted sum; every label of positive weight is left out of zeta~ and q~.

    What a trainer does (needs.features):
      1. puts a forward hook on the module one stage before the last (kdcache's networks: `stages[-2]`; torchvision's
         resnets: `layer3`), whose output [B, F, H, W] it averages over H and W to features [B, F], not detached;
      2. before it makes the optimiser: `loss.make_head(F, C, device)` under the run's seed (it draws from torch's
         generator), and gives `loss.parameters()` to the optimiser beside the model's;
      3. calls `loss(logits, labels, records, weights, features=features)`;
      4. keeps `loss.state_dict()` in the resumable state and gives it to `loss.load_state_dict()` after make_head.
    The head belongs to training alone: it is not part of the student's weights.
    """

    name: ClassVar[str] = "uskd"
    alpha: float = 1.0
    beta: float = 0.1
    mu: float = 0.005
    rank: Literal["code", "paper"] = "code"
    head: nn.Linear | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(features=True)

    def make_head(self, channels: int, classes: int, device: torch.device | str = "cpu") -> None:
        """The linear head that gives w, newly initialised."""
        self.head = nn.Linear(channels, classes).to(device)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._head().parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self._head().state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._head().load_state_dict(state)

    def _head(self) -> nn.Linear:
        if self.head is None:
            raise UnservedError("uskd has no head yet: call make_head(channels, classes) first")
        return self.head

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        records: Records | None = None,
        weights: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        if features is None:
            raise UnservedError("uskd needs the student's features [B, F] one stage before the last")
        head = self._head()
        logits = logits.float()
        with torch.autocast(logits.device.type, enabled=False):
            log_w = F.log_softmax(F.linear(features.float(), head.weight, head.bias), 1)
        log_q = F.log_softmax(logits, 1)
        share = torch.zeros_like(log_q).scatter_add_(1, *_columns(labels, weights))  # of each class in the labels
        named = share > 0
        zeta = self._zipf(log_w.detach().exp(), log_q.detach(), named)
        # Where all classes are named there are no others: any finite q~ will do, zeta is 0.
        others = logits.masked_fill(named & ~named.all(1, keepdim=True), -torch.inf)
        log_others = logits - torch.logsumexp(others, 1, keepdim=True)
        weak = 0.9 * share + 0.1 / logits.shape[1]
        loss = _label_ce(log_q, labels, weights) + self.alpha * _own_target(log_q, labels, weights, power=2)
        return (loss - self.beta * (zeta * log_others).sum(1) - self.mu * (weak * log_w).sum(1)).mean()

    def _zipf(self, w: Tensor, log_q: Tensor, named: Tensor) -> Tensor:
        q = log_q if self.rank == "code" else log_q.exp()

        def part(x: Tensor) -> Tensor:
            return x / (1 - (x * named).sum(1, keepdim=True) + 1e-6)

        order = torch.sort(part(w) + part(q), dim=1, descending=True, stable=True).indices
        places = torch.arange(1, w.shape[1] + 1, device=w.device, dtype=w.dtype).expand_as(w)
        zeta = (1 / torch.zeros_like(w).scatter_(1, order, places)).masked_fill(named, 0.0)
        return zeta / zeta.sum(1, keepdim=True).clamp(min=1e-30)


def _whole() -> Tensor:
    # On the CPU whatever the device: such a scalar goes along with a kernel's arguments, and no copy is waited for.
    return torch.ones((), dtype=torch.float32, device="cpu")


@dataclass
class DKD:
    """CE + w T^2 [alpha KL((p_y, 1 - p_y)^T, (q_y, 1 - q_y)^T) + beta KL(p~^T, q~^T)], w = min(epoch / warmup, 1).

    Zhao et al. 2022 (arXiv 2203.08679). The first term is exact from top-k records. The authors tune beta by pair
    of networks (2 for resnet56 -> resnet20).
    """

    name: ClassVar[str] = "dkd"
    alpha: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0
    warmup: int = 1
    tail: Tail = "prior"
    _ramp: Tensor = field(default_factory=_whole, init=False, repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(target_gap=True, temperatures=(self.temperature,), mixed=False)

    def set_epoch(self, epoch: int) -> None:
        _set_ramp(self._ramp, epoch, self.warmup)

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        _require_single(self.name, labels)
        logits = logits.float()
        soft = records.softened(self.temperature, self.tail)
        parts = _decoupled(soft, logits / self.temperature, labels, self.alpha, self.beta)
        return F.cross_entropy(logits, labels) + self._ramp * self.temperature**2 * parts.mean()


@dataclass
class IKL:
    """CE + w [alpha H(p^T, q^T) + beta / 4 sum_jk v_j v_k ((t_j - t_k) - (s_j - s_k))^2], w = min(epoch / warmup, 1).

    Improved KL, Cui et al. 2023 (arXiv 2305.13948). pairs=teacher: v = softmax(t / temperature2) of the sample;
    pairs=prior: the mean of that over the training samples of class y (view 0). As sum v = 1, the pair sum is twice
    the variance of t - s under v: O(C), not O(C^2). There is no T^2, as in the authors' code.
    """

    name: ClassVar[str] = "ikl"
    alpha: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0
    temperature2: float = 1.0
    pairs: Literal["teacher", "prior"] = "prior"
    warmup: int = 1
    _ramp: Tensor = field(default_factory=_whole, init=False, repr=False, compare=False)
    _prior: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(dense=True)

    def set_epoch(self, epoch: int) -> None:
        _set_ramp(self._ramp, epoch, self.warmup)

    def prepare(self, records: Records | Iterable[Records]) -> None:
        """Take the class prior [C, C], a row for each label, from the records of view 0, whole or in parts.

        Under several ranks all have to call this, each with all records or each with its share.
        """
        if self.pairs != "prior":
            return
        sums: Tensor | None = None
        for part in _slices(records, 8192) if isinstance(records, Records) else records:
            v = torch.softmax(part.logits().double() / self.temperature2, 1)
            if sums is None:
                sums = v.new_zeros(v.shape[1], v.shape[1])
            sums.index_add_(0, part.labels[:, 0].long(), v)
        if sums is None:
            raise InputError("ikl:pairs=prior has no records to take its class prior from")
        sums = group.total(sums)
        total = sums.sum(1, keepdim=True)
        self._prior = torch.where(total > 0, sums / total.clamp(min=1), 1 / len(sums)).float()

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits, t = logits.float(), records.logits()
        cross = -records.softened(self.temperature).cross(F.log_softmax(logits / self.temperature, 1))
        v = self._pair_weights(t, labels, weights)
        gap = t - logits
        gap = gap - (v * gap).sum(1, keepdim=True)
        variance = (v * gap**2).sum(1)
        ce = _label_ce(F.log_softmax(logits, 1), labels, weights)
        return (ce + self._ramp * (self.alpha * cross + self.beta / 2 * variance)).mean()

    def _pair_weights(self, t: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        if self.pairs == "teacher":
            return torch.softmax(t / self.temperature2, 1)
        if self._prior is None:
            raise UnservedError("ikl:pairs=prior needs prepare(records of view 0) first, or take pairs=teacher")
        self._prior = self._prior.to(t.device)
        y, share = _columns(labels, weights)
        return (share.unsqueeze(2) * self._prior[y]).sum(1)


@dataclass(frozen=True)
class DIST:
    """alpha CE + beta T^2 [(1 - mean_B Pearson of rows of p^T, q^T) + (1 - mean_C Pearson of columns)].

    Huang et al. 2022 (arXiv 2205.10536). As in the authors' code, `eps` is added to the product of the two norms that a
    correlation is divided by, which takes most of the weight from classes that are improbable throughout a batch;
    eps=0 is Pearson's own. A row or column without variance (a batch of 1) has correlation 0.
    """

    name: ClassVar[str] = "dist"
    alpha: float = 1.0
    beta: float = 2.0
    temperature: float = 1.0
    eps: float = 1e-8

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, dense=True)

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        p = torch.softmax(records.logits() / self.temperature, 1)
        q = torch.softmax(logits / self.temperature, 1)
        apart = (1 - _pearson(p, q, 1, self.eps).mean()) + (1 - _pearson(p, q, 0, self.eps).mean())
        return self.beta * self.temperature**2 * apart + _plus_ce(self.alpha, logits, labels, weights)


@dataclass(frozen=True)
class CMKD:
    """alpha CE + beta mean_B [(1 - d) (1 - Pearson(p^T, q^T)) + d (1 - Spearman(t, s))].

    After Niu et al. 2024 (arXiv 2410.06561). The paper's, by its abstract: a Pearson and a Spearman loss between the
    outputs of teacher and student, whose weights follow each sample's difficulty. Our reading, every constant an
    option: logits are standardised first; the difficulty is the teacher's entropy at T = 1 over log C, and
    d = low + (high - low) of that, so that of a teacher that is unsure the order counts more than the values; the
    ranks are sums over classes of sigmoid((x_j - x_k) / softness), which can be differentiated: O(B C^2) work, in
    slices of the batch so that memory stays small; eps as in dist.
    """

    name: ClassVar[str] = "cmkd"
    alpha: float = 1.0
    beta: float = 2.0
    temperature: float = 1.0
    softness: float = 0.1
    low: float = 0.0
    high: float = 1.0
    standardise: bool = True
    eps: float = 1e-8

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, dense=True)

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits, t = logits.float(), records.logits()
        difficulty = records.softened(1.0).entropy() / math.log(t.shape[1])
        d = self.low + (self.high - self.low) * difficulty
        x, z = (_standardised(logits), _standardised(t)) if self.standardise else (logits, t)
        p, q = (torch.softmax(v / self.temperature, 1) for v in (z, x))
        spearman = _pearson(self._ranks(z), self._ranks(x), 1, self.eps)
        apart = ((1 - d) * (1 - _pearson(p, q, 1, self.eps)) + d * (1 - spearman)).mean()
        return self.beta * apart + _plus_ce(self.alpha, logits, labels, weights)

    def _ranks(self, x: Tensor) -> Tensor:
        def ranks(rows: Tensor) -> Tensor:
            return torch.sigmoid_(rows.unsqueeze(2) - rows.unsqueeze(1)).sum(2)

        parts = torch.split(x / self.softness, max(1, 2**21 // x.shape[1] ** 2))
        return torch.cat([checkpoint(ranks, rows, use_reentrant=False, preserve_rng_state=False) for rows in parts])


@dataclass
class LogitStd:
    """alpha CE + weight tau^2 KL of softmax(t' / tau), softmax(s' / tau); t', s' = (x - mean) / (1e-7 + std) by row.

    Logit standardisation, Sun et al. 2024 (arXiv 2403.01427); std is the unbiased one. base=dkd: DKD's two terms in
    place of KL, `target` and `others` their weights (alpha and beta there), with its warm-up w; as in the authors' code
    DKD's own settings hold, both terms times `weight`. A row of equal logits has no shape: it counts as zeros and gets
    no gradient.
    """

    name: ClassVar[str] = "logit-std"
    base: Literal["kd", "dkd"] = "kd"
    alpha: float = 1.0
    weight: float = 9.0
    tau: float = 2.0
    target: float = 1.0
    others: float = 0.5
    warmup: int = 1
    tail: Tail = "prior"
    _ramp: Tensor = field(default_factory=_whole, init=False, repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        dkd = self.base == "dkd"
        return Needs(labels=self.alpha != 0 or dkd, target_gap=dkd, standardised=self.tau, mixed=not dkd)

    def set_epoch(self, epoch: int) -> None:
        _set_ramp(self._ramp, epoch, self.warmup)

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        soft = records.standardised(self.tau, self.tail)
        scaled = _standardised(logits) / self.tau
        if self.base == "dkd":
            _require_single(f"{self.name}:base=dkd", labels)
            inner = self._ramp * _decoupled(soft, scaled, labels, self.target, self.others)
        else:
            inner = -soft.entropy() - soft.cross(F.log_softmax(scaled, 1))
        return self.weight * self.tau**2 * inner.mean() + _plus_ce(self.alpha, logits, labels, weights)


@dataclass(frozen=True)
class MSE:
    """alpha CE + beta mean over B and C of (t - s)^2, both centred by row: Kim et al. 2021 (arXiv 2105.08919).

    Centred, since records hold logits up to a constant, which a softmax does not see.
    """

    name: ClassVar[str] = "mse"
    alpha: float = 0.0
    beta: float = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, dense=True)

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        gap = _centred(records.logits()) - _centred(logits)
        return self.beta * (gap**2).mean() + _plus_ce(self.alpha, logits, labels, weights)


@dataclass(frozen=True)
class WSLD:
    """CE + alpha T^2 sg[1 - exp(-CE_s / (CE_t + 1e-7))] H(p^T, q^T): Zhou et al. 2021 (arXiv 2102.00650).

    CE_s, CE_t: the student's and the teacher's cross-entropy to the label, at T = 1; exact from top-k records.
    """

    name: ClassVar[str] = "wsld"
    alpha: float = 2.5
    temperature: float = 2.0
    tail: Tail = "prior"

    @property
    def needs(self) -> Needs:
        return Needs(target_gap=True, temperatures=tuple(sorted({1.0, self.temperature})))

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        ce = _label_ce(F.log_softmax(logits, 1), labels, weights)
        log_p = records.softened(1.0, self.tail).log_target()
        ce_t = -log_p[:, 0] if labels.dim() == 1 else -(_weights(labels, weights) * log_p).sum(1)
        factor = -torch.expm1(-ce.detach() / (ce_t.clamp(min=0) + 1e-7))
        soft = records.softened(self.temperature, self.tail)
        cross = -soft.cross(F.log_softmax(logits / self.temperature, 1))
        return (ce + self.alpha * self.temperature**2 * factor * cross).mean()


@dataclass(frozen=True)
class GKD:
    """alpha CE + T^2 [primary KL of p^T, q^T within the group G + binary KL of (p_G, 1 - p_G)^T, (q_G, 1 - q_G)^T].

    Grouped KD, Zhao et al. 2023 (arXiv 2304.04462, for faces; the abstract names the parts, the weights are ours). G
    is the teacher's most probable classes, as few as hold `mass` of p^T. What is outside G counts by its sum alone,
    so no tail is modelled: exact where G lies within the top k. Where it does not, G is the k stored classes.
    """

    name: ClassVar[str] = "gkd"
    alpha: float = 1.0
    primary: float = 1.0
    binary: float = 1.0
    mass: float = 0.9
    temperature: float = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        scaled = logits / self.temperature
        ids, p, below = records.softened(self.temperature).ranked()
        inside = (p.cumsum(1) - p) < self.mass
        p_in, p_out = (p * inside).sum(1), (p * ~inside).sum(1) + below

        s = scaled.gather(1, ids)
        lse_in = torch.logsumexp(s.masked_fill(~inside, -torch.inf), 1)
        lse_out = torch.logsumexp(scaled.scatter(1, ids, s.masked_fill(inside, -torch.inf)), 1)
        # Where G is everything there is no outside: its probability is 0 on both sides.
        lse_out = torch.where(torch.isinf(lse_out), lse_in.detach(), lse_out)
        whole = torch.logsumexp(scaled, 1)

        p_within = p * inside / p_in.unsqueeze(1)
        within = _p_log_p(p_within) - p_within * (s - lse_in.unsqueeze(1))
        between = _p_log_p(p_in) + _p_log_p(p_out)
        between = between - p_in * (lse_in - whole) - p_out * (lse_out - whole)
        loss = (self.primary * within.sum(1) + self.binary * between).mean()
        return self.temperature**2 * loss + _plus_ce(self.alpha, logits, labels, weights)


@dataclass(frozen=True)
class SkewKL:
    """alpha CE + beta T^2 KL(p^T, skew p^T + (1 - skew) q^T): Ko et al. 2024 (arXiv 2402.03898).

    The mixture is not linear in q, so an unstored class needs its own p: from top-k records this loss builds the dense
    teacher [B, C], with the tail as modelled.
    """

    name: ClassVar[str] = "skew-kl"
    alpha: float = 0.0
    beta: float = 1.0
    skew: float = 0.1
    temperature: float = 1.0
    tail: DenseTail = "prior"

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        p = records.dense(self.temperature, self.tail)
        log_q = F.log_softmax(logits / self.temperature, 1)
        mixture = _log_mixture(self.skew, p, log_q)
        kl = (_p_log_p(p) - p * mixture).sum(1).mean()
        return self.beta * self.temperature**2 * kl + _plus_ce(self.alpha, logits, labels, weights)


@dataclass(frozen=True)
class SkewRKL:
    """alpha CE + beta T^2 KL(q^T, (1 - skew) p^T + skew q^T): Ko et al. 2024 (arXiv 2402.03898). Dense as skew-kl."""

    name: ClassVar[str] = "skew-rkl"
    alpha: float = 0.0
    beta: float = 1.0
    skew: float = 0.1
    temperature: float = 1.0
    tail: DenseTail = "prior"

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        p = records.dense(self.temperature, self.tail)
        log_q = F.log_softmax(logits / self.temperature, 1)
        mixture = _log_mixture(1 - self.skew, p, log_q)
        kl = (log_q.exp() * (log_q - mixture)).sum(1).mean()
        return self.beta * self.temperature**2 * kl + _plus_ce(self.alpha, logits, labels, weights)


@dataclass(frozen=True)
class BDKD:
    """alpha CE + beta T^2 mean_B [f KL(p^T, q^T) + r KL(q^T, p^T)]; online the teacher learns too, from `of_teacher`.

    After Amara et al. 2022 (arXiv 2212.12965), of which we had the abstract and summaries. The paper's: forward and
    reverse KL weighted sample by sample, by the gap between the two networks' entropies, the forward one more where
    the student is over-confident; teacher and student learn together (online), the teacher's own loss regularised by
    the reverse KL. Our reading, every constant an option: f = heavy and r = light where H(q^T) < H(p^T), else the
    other way round, weights without gradient; the teacher's loss is teacher_alpha CE + regulariser T^2 KL(q^T, p^T),
    each network taking the other's answer in the same step as given; the teacher starts from new weights
    (start=scratch) or from those that the cache was built by (start=taught). Offline, from a cache, the student's side
    alone is left.
    """

    name: ClassVar[str] = "bdkd"
    alpha: float = 1.0
    beta: float = 1.0
    temperature: float = 1.0
    heavy: float = 2.0
    light: float = 1.0
    tail: SpreadTail = "prior"
    # Of the teacher, online alone:
    teacher_alpha: float = 1.0
    regulariser: float = 1.0
    start: Literal["scratch", "taught"] = "scratch"

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def of_teacher(self, teacher: Tensor, labels: Tensor, student: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of a teacher that learns, from both networks' logits [B, C]; differentiable in the teacher only."""
        teacher, student = teacher.float(), student.detach().float()
        log_p, log_q = (F.log_softmax(logits / self.temperature, 1) for logits in (teacher, student))
        reverse = (log_q.exp() * (log_q - log_p)).sum(1).mean()
        ce = _plus_ce(self.teacher_alpha, teacher, labels, weights)
        return self.regulariser * self.temperature**2 * reverse + ce

    def __call__(self, logits: Tensor, labels: Tensor, records: Records, weights: Tensor | None = None) -> Tensor:
        logits = logits.float()
        soft = records.softened(self.temperature, self.tail)
        log_q = F.log_softmax(logits / self.temperature, 1)
        q = log_q.exp()
        minus_h_q, h_p = (q * log_q).sum(1), soft.entropy()
        forward, reverse = -h_p - soft.cross(log_q), minus_h_q - soft.cross_of(q)
        sure = -minus_h_q.detach() < h_p
        f, r = torch.where(sure, self.heavy, self.light), torch.where(sure, self.light, self.heavy)
        loss = (f * forward + r * reverse).mean()
        return self.beta * self.temperature**2 * loss + _plus_ce(self.alpha, logits, labels, weights)


def _slices(records: Records, rows: int) -> Iterator[Records]:
    return (records[start : start + rows] for start in range(0, len(records), rows))


def _weights(labels: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        raise InputError(f"mixed labels {list(labels.shape)} need weights of the same shape")
    return weights.float()


def _columns(labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels and their weights, both [B, L]; a single label weighs 1."""
    if labels.dim() == 2:
        return labels, _weights(labels, weights)
    return labels.unsqueeze(1), torch.ones_like(labels, dtype=torch.float32).unsqueeze(1)


def _label_ce(log_q: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """[B] -log q_y, or the weighted sum of it over the labels."""
    if labels.dim() == 1:
        return F.nll_loss(log_q, labels, reduction="none")
    log_q_y: Tensor = (_weights(labels, weights) * log_q.gather(1, labels)).sum(1)
    return -log_q_y


def _plus_ce(alpha: float, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor | float:
    """alpha CE; without it the labels are not looked at, and may be missing."""
    return alpha * CE()(logits, labels, None, weights) if alpha else 0.0


def _own_target(log_q: Tensor, labels: Tensor, weights: Tensor | None, power: int) -> Tensor:
    """[B] -sg[q_y^power + V - mean_B q_y^power] log q_y, summed over the labels of positive weight V."""
    y, v = _columns(labels, weights)
    if labels.dim() == 2:  # the heavier label first, so that a mean is over like labels
        v, order = torch.sort(v, dim=1, descending=True, stable=True)
        y = y.gather(1, order)
    log_q_y = log_q.gather(1, y)
    q_y = log_q_y.detach().exp() ** power
    target = torch.where(v > 0, q_y + v - group.mean(q_y), 0.0)
    loss: Tensor = -(target * log_q_y).sum(1)
    return loss


def _log_others(scaled: Tensor, y: Tensor) -> Tensor:
    """[B, C] log-softmax over the classes other than y [B]; y's own entry is finite and not meant to be read."""
    at = y.unsqueeze(1)
    return F.log_softmax(scaled.scatter(1, at, -torch.inf), 1).scatter(1, at, 0.0)


def _decoupled(soft: Softened, scaled: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    """[B] DKD's alpha KL of (p_y, 1 - p_y) and (q_y, 1 - q_y) + beta KL(p~, q~) for student logits over T."""
    at = y.unsqueeze(1)
    lse = torch.logsumexp(scaled, 1, keepdim=True)
    lse_others = torch.logsumexp(scaled.scatter(1, at, -torch.inf), 1, keepdim=True)
    log_q_y, log_q_rest = (scaled.gather(1, at) - lse).squeeze(1), (lse_others - lse).squeeze(1)
    p_y, p_rest = soft.target()[:, 0], soft.rest()
    binary = _p_log_p(p_y) + _p_log_p(p_rest) - p_y * log_q_y - p_rest * log_q_rest
    others = -soft.entropy_others() - soft.cross_others(scaled - lse_others)
    return alpha * binary + beta * others


def _p_log_p(p: Tensor) -> Tensor:
    """p log p, 0 where p is 0."""
    out: Tensor = torch.special.xlogy(p, p)
    return out


def _log_mixture(share: float, p: Tensor, log_q: Tensor) -> Tensor:
    """log(share p + (1 - share) q), finite where p or q underflow."""
    return torch.logaddexp(p.log() + math.log(share), log_q + math.log1p(-share))


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _standardised(x: Tensor) -> Tensor:
    """(x - mean) / (1e-7 + unbiased std) by row; 0 without gradient for a row of equal values."""
    centred = _centred(x)
    safe = torch.where(_varies(x, centred, 1)[0], centred, 0.0)
    squares = (safe**2).sum(1, keepdim=True) / (x.shape[1] - 1)
    return safe / (1e-7 + torch.where(squares > 0, squares, 1.0).sqrt())


def _pearson(x: Tensor, y: Tensor, dim: int, eps: float) -> Tensor:
    """Correlation of x and y along dim (0: over all ranks' rows), eps added to the product of their norms.

    0 without gradient where one of them is constant.
    """
    scaled: list[Tensor] = []
    norms: list[Tensor] = []
    floor: Tensor | float = eps
    for v in (x, y):
        centred = v - (group.mean(v) if dim == 0 else v.mean(dim, keepdim=True))
        varies, spread = _varies(v, centred, dim)
        # Scaled first: the square of a small probability would underflow.
        spread = torch.where(varies, spread, 1.0)
        scaled.append(torch.where(varies, centred, 0.0) / spread)
        squares = _sum(scaled[-1] ** 2, dim, keepdim=True)
        norms.append(torch.where(squares > 0, squares, 1.0).sqrt())
        floor = floor / spread
    return _sum(scaled[0] * scaled[1] / (norms[0] * norms[1] + floor), dim)


def _varies(x: Tensor, centred: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Whether the values along dim differ by more than float32's rounding, and their largest distance from the mean.

    Nor do they where that is tiny: gradients divided by it would be infinite.
    """
    extremes = torch.stack([v.detach().abs().amax(dim, keepdim=True) for v in (centred, x)])
    spread, size = group.largest(extremes) if dim == 0 else extremes
    return (spread > 1e-6 * size) & (spread > _LEAST_SPREAD), spread


def _sum(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    out = x.sum(dim, keepdim=keepdim)
    return group.total(out) if dim == 0 else out


def _set_ramp(ramp: Tensor, epoch: int, warmup: int) -> None:
    """In place: a compiled loop would take a number, or another tensor, for a reason to compile anew every epoch."""
    ramp.fill_(min(epoch / warmup, 1.0))


def _require_single(name: str, labels: Tensor) -> None:
    if labels.dim() != 1:
        raise UnservedError(f"{name} has no meaning for mixed labels: take another loss, or views without mixing")
