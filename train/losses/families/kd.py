"""Losses that compare the student's probabilities with the teacher's as wholes, and plain cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.cache.records.records import Tail
from kdcache.train.losses.base import (
    INNER_SHARE,
    POSITIVE,
    SHARE,
    Batch,
    ByParts,
    DenseTail,
    Needs,
    Parts,
    SpreadTail,
    option,
    p_log_p,
    part,
)


@dataclass(frozen=True)
class CE(ByParts):
    """CE, with optional label smoothing: plain training without a teacher."""

    name: ClassVar[str] = "ce"
    label_smoothing: float = option(0.0, SHARE)

    @property
    def needs(self) -> Needs:
        return Needs()

    def terms(self, batch: Batch) -> Parts:
        return part("ce", batch.ce(self.label_smoothing))


@dataclass(frozen=True)
class KD(ByParts):
    """alpha CE + beta T^2 KL(p^T, q^T): Hinton et al. 2015 (arXiv 1503.02531)."""

    name: ClassVar[str] = "kd"
    alpha: float = option(0.5, cifar=0.1)
    beta: float = option(0.5, cifar=0.9)
    temperature: float = option(1.0, POSITIVE, cifar=4.0)
    tail: Tail = "prior"

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def terms(self, batch: Batch) -> Parts:
        teacher = batch.records.softened(self.temperature, self.tail)
        log_q = F.log_softmax(batch.logits / self.temperature, 1)
        kl = part("kd", -teacher.entropy() - teacher.cross(log_q)).mean()
        return batch.plus_ce(kl.times(self.beta * self.temperature**2), self.alpha)


@dataclass(frozen=True)
class MSE(ByParts):
    """alpha CE + beta mean over B and C of (t - s)^2, both centred by row: Kim et al. 2021 (arXiv 2105.08919).

    They are centred because records hold logits up to a constant, to which a softmax is blind.
    """

    name: ClassVar[str] = "mse"
    alpha: float = option(0.0)
    beta: float = option(1.0)

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, dense=True)

    def terms(self, batch: Batch) -> Parts:
        t, s = (x - x.mean(1, keepdim=True) for x in (batch.records.logits(), batch.logits))
        return batch.plus_ce(part("mse", ((t - s) ** 2).mean()).times(self.beta), self.alpha)


@dataclass(frozen=True)
class WSLD(ByParts):
    """CE + alpha T^2 sg[1 - exp(-CE_s / (CE_t + 1e-7))] H(p^T, q^T): Zhou et al. 2021 (arXiv 2102.00650).

    CE_s and CE_t are the student's and the teacher's cross-entropy to the label at T = 1; both are exact from top-k
    records.
    """

    name: ClassVar[str] = "wsld"
    alpha: float = option(2.5, cifar=2.25)
    temperature: float = option(2.0, POSITIVE, cifar=4.0)
    tail: Tail = "prior"

    @property
    def needs(self) -> Needs:
        return Needs(target_gap=True, temperatures=tuple(sorted({1.0, self.temperature})))

    def terms(self, batch: Batch) -> Parts:
        ce = batch.label_ce(F.log_softmax(batch.logits, 1))
        log_p = batch.records.softened(1.0, self.tail).log_target()
        ce_t = -log_p[:, 0] if batch.labels.dim() == 1 else -(batch.columns()[1] * log_p).sum(1)
        factor = -torch.expm1(-ce.detach() / (ce_t.clamp(min=0) + 1e-7))
        soft = batch.records.softened(self.temperature, self.tail)
        cross = -soft.cross(F.log_softmax(batch.logits / self.temperature, 1))
        return part("ce", ce) + part("soft", self.alpha * self.temperature**2 * factor * cross)


@dataclass(frozen=True)
class _Skewed(ByParts):
    """What skewed divergences share. From top-k records they build the dense teacher [B, C] with its tail modelled."""

    alpha: float = option(0.0)
    beta: float = option(1.0)
    skew: float = option(0.1, INNER_SHARE)
    temperature: float = option(1.0, POSITIVE)
    tail: DenseTail = "prior"

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def divergence(self, p: Tensor, log_q: Tensor) -> Parts:
        """[B], of the teacher's probabilities [B, C] and the student's log-probabilities [B, C]."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> Parts:
        p = batch.records.dense(self.temperature, self.tail)
        kl = self.divergence(p, F.log_softmax(batch.logits / self.temperature, 1)).mean()
        return batch.plus_ce(kl.times(self.beta * self.temperature**2), self.alpha)


@dataclass(frozen=True)
class SkewKL(_Skewed):
    """alpha CE + beta T^2 KL(p^T, skew p^T + (1 - skew) q^T): Ko et al. 2024 (arXiv 2402.03898).

    The mixture is not linear in q, so an unstored class needs its own p.
    """

    name: ClassVar[str] = "skew-kl"

    def divergence(self, p: Tensor, log_q: Tensor) -> Parts:
        mixture = _log_mixture(self.skew, p, log_q)
        return part("kl", (p_log_p(p) - p * mixture).sum(1))


@dataclass(frozen=True)
class SkewRKL(_Skewed):
    """alpha CE + beta T^2 KL(q^T, (1 - skew) p^T + skew q^T): Ko et al. 2024 (arXiv 2402.03898)."""

    name: ClassVar[str] = "skew-rkl"

    def divergence(self, p: Tensor, log_q: Tensor) -> Parts:
        mixture = _log_mixture(1 - self.skew, p, log_q)
        return part("reverse_kl", (log_q.exp() * (log_q - mixture)).sum(1))


@dataclass(frozen=True)
class BDKD(ByParts):
    """alpha CE + beta T^2 mean_B [f KL(p^T, q^T) + r KL(q^T, p^T)]; online the teacher learns too, from `of_teacher`.

    After Amara et al. 2022 (arXiv 2212.12965), of which we had the abstract and summaries. They say: forward and
    reverse KL are weighted sample by sample, by the gap between the two networks' entropies, and the forward one
    counts more where the student is over-confident. Teacher and student learn together (online), and the reverse KL
    regularises the teacher's own loss.

    The rest is our reading, and every constant is an option. Where H(q^T) < H(p^T), f = heavy and r = light; elsewhere
    it is the other way round. These weights have no gradient. The teacher's loss is teacher_alpha CE + regulariser T^2
    KL(q^T, p^T). Each network takes the other's answer in the same step as given. The teacher starts from new weights
    (start=scratch) or from those that the cache was built with (start=taught). Offline, from a cache, only the student
    learns.
    """

    name: ClassVar[str] = "bdkd"
    alpha: float = option(1.0)
    beta: float = option(1.0)
    temperature: float = option(1.0, POSITIVE)
    heavy: float = option(2.0)
    light: float = option(1.0)
    tail: SpreadTail = "prior"
    teacher_alpha: float = option(1.0)
    regulariser: float = option(1.0)
    start: Literal["scratch", "taught"] = "scratch"
    partner_options: ClassVar[tuple[str, ...]] = ("teacher_alpha", "regulariser", "start")

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    @property
    def starts_taught(self) -> bool:
        return self.start == "taught"

    def of_teacher(self, teacher: Tensor, labels: Tensor, student: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of a teacher that learns, from both networks' logits [B, C]; differentiable in the teacher only."""
        teacher, student = teacher.float(), student.detach().float()
        log_p, log_q = (F.log_softmax(logits / self.temperature, 1) for logits in (teacher, student))
        reverse = part("reverse_kl", (log_q.exp() * (log_q - log_p)).sum(1)).mean()
        batch = Batch(teacher, labels, weights)
        return batch.plus_ce(reverse.times(self.regulariser * self.temperature**2), self.teacher_alpha).total

    def terms(self, batch: Batch) -> Parts:
        soft = batch.records.softened(self.temperature, self.tail)
        log_q = F.log_softmax(batch.logits / self.temperature, 1)
        q = log_q.exp()
        minus_h_q, h_p = (q * log_q).sum(1), soft.entropy()
        forward, reverse = -h_p - soft.cross(log_q), minus_h_q - soft.cross_of(q)
        sure = -minus_h_q.detach() < h_p
        f, r = torch.where(sure, self.heavy, self.light), torch.where(sure, self.light, self.heavy)
        both = (part("kl", f * forward) + part("reverse_kl", r * reverse)).mean()
        return batch.plus_ce(both.times(self.beta * self.temperature**2), self.alpha)


def _log_mixture(share: float, p: Tensor, log_q: Tensor) -> Tensor:
    """log(share p + (1 - share) q), finite where p or q underflow."""
    return torch.logaddexp(p.log() + math.log(share), log_q + math.log1p(-share))
