"""Losses that ask for correlation with the teacher instead of equality, and logits standardised to a common scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcache.cache.records.records import Tail
from kdcache.train import group
from kdcache.train.losses.base import (
    POSITIVE,
    SHARE,
    Batch,
    ByParts,
    Needs,
    Parts,
    decoupled,
    option,
    part,
    require_single,
    set_ramp,
    whole,
)

_LEAST_SPREAD = 1e-30


@dataclass(frozen=True)
class DIST(ByParts):
    """alpha CE + beta T^2 [(1 - mean_B Pearson of rows of p^T, q^T) + (1 - mean_C Pearson of columns)].

    Huang et al. 2022 (arXiv 2205.10536). Their names are the inter-class relation for the rows and the intra-class one
    for the columns. As in the authors' code, `eps` is added to the product of the two norms that a correlation is
    divided by, which takes most of the weight from classes that are improbable throughout a batch; eps=0 is Pearson's
    own. A row or column without variance (a batch of 1) has correlation 0.
    """

    name: ClassVar[str] = "dist"
    alpha: float = option(1.0)
    beta: float = option(2.0)
    temperature: float = option(1.0, POSITIVE, cifar=4.0)
    eps: float = option(1e-8, before=0.0)

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, dense=True)

    def terms(self, batch: Batch) -> Parts:
        p = torch.softmax(batch.records.logits() / self.temperature, 1)
        q = torch.softmax(batch.logits / self.temperature, 1)
        inter = part("inter", 1 - _pearson(p, q, 1, self.eps).mean())
        intra = part("intra", 1 - _pearson(p, q, 0, self.eps).mean())
        return batch.plus_ce((inter + intra).times(self.beta * self.temperature**2), self.alpha)


@dataclass(frozen=True)
class CMKD(ByParts):
    """alpha CE + beta mean_B [(1 - d) (1 - Pearson(p^T, q^T)) + d (1 - Spearman(t, s))].

    After Niu et al. 2024 (arXiv 2410.06561). The paper says, by its abstract: there is a Pearson and a Spearman loss
    between the outputs of teacher and student, and their weights follow each sample's difficulty.

    The rest is our reading, and every constant is an option. Logits are standardised first. The difficulty is the
    teacher's entropy at T = 1 over log C, and d = low + (high - low) * difficulty: where the teacher is unsure, the
    order of the classes counts more than the values. Ranks are sums over classes of sigmoid((x_j - x_k) / softness),
    which can be differentiated. That is O(B C^2) work, done in slices of the batch so that memory stays small. eps is
    as in dist.
    """

    name: ClassVar[str] = "cmkd"
    alpha: float = option(1.0)
    beta: float = option(2.0)
    temperature: float = option(1.0, POSITIVE)
    softness: float = option(0.1, POSITIVE)
    low: float = option(0.0, SHARE)
    high: float = option(1.0, SHARE)
    standardise: bool = True
    eps: float = option(1e-8, before=0.0)

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, dense=True)

    def terms(self, batch: Batch) -> Parts:
        logits, t = batch.logits, batch.records.logits()
        difficulty = batch.records.softened(1.0).entropy() / math.log(t.shape[1])
        d = self.low + (self.high - self.low) * difficulty
        x, z = (_standardised(logits), _standardised(t)) if self.standardise else (logits, t)
        p, q = (torch.softmax(v / self.temperature, 1) for v in (z, x))
        spearman = _pearson(self._ranks(z), self._ranks(x), 1, self.eps)
        values = part("pearson", (1 - d) * (1 - _pearson(p, q, 1, self.eps)))
        apart = (values + part("spearman", d * (1 - spearman))).mean()
        return batch.plus_ce(apart.times(self.beta), self.alpha)

    def _ranks(self, x: Tensor) -> Tensor:
        """[B, C] for each class, a smooth count of the classes with smaller logits."""

        def ranks(rows: Tensor) -> Tensor:
            return torch.sigmoid_(rows.unsqueeze(2) - rows.unsqueeze(1)).sum(2)

        slices = torch.split(x / self.softness, max(1, 2**21 // x.shape[1] ** 2))
        return torch.cat([checkpoint(ranks, rows, use_reentrant=False, preserve_rng_state=False) for rows in slices])


@dataclass
class LogitStd(ByParts):
    """alpha CE + weight tau^2 KL of softmax(t' / tau), softmax(s' / tau); t', s' = (x - mean) / (1e-7 + std) by row.

    Logit standardisation, Sun et al. 2024 (arXiv 2403.01427); std is the unbiased one. With base=dkd, DKD's two terms
    take the place of KL, with its warm-up w and with `target` and `others` as their weights (DKD's alpha and beta). The
    presets are DKD's own, and both terms are multiplied by `weight`, as in the authors' code. A row of equal logits has
    no shape: it counts as zeros and gets no gradient.
    """

    name: ClassVar[str] = "logit-std"
    base: Literal["kd", "dkd"] = "kd"
    alpha: float = option(1.0, cifar=0.1)
    weight: float = option(9.0)
    tau: float = option(2.0, POSITIVE)
    target: float = option(1.0)
    others: float = option(0.5)
    warmup: int = option(1, POSITIVE)
    tail: Tail = "prior"
    _ramp: Tensor = field(default_factory=whole, init=False, repr=False, compare=False)

    @classmethod
    def cifar_preset(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        if given.get("base") == "dkd":
            return {"alpha": 1.0, "others": 8.0, "warmup": 20}
        return super().cifar_preset(given)

    @property
    def needs(self) -> Needs:
        dkd = self.base == "dkd"
        return Needs(labels=self.alpha != 0 or dkd, target_gap=dkd, standardised=self.tau, mixed=not dkd)

    def set_epoch(self, epoch: int) -> None:
        set_ramp(self._ramp, epoch, self.warmup)

    def terms(self, batch: Batch) -> Parts:
        soft = batch.records.standardised(self.tau, self.tail)
        scaled = _standardised(batch.logits) / self.tau
        if self.base == "dkd":
            require_single(f"{self.name}:base=dkd", batch.labels)
            inner = decoupled(soft, scaled, batch.labels, self.target, self.others).times(self._ramp)
        else:
            inner = part("kd", -soft.entropy() - soft.cross(F.log_softmax(scaled, 1)))
        return batch.plus_ce(inner.mean().times(self.weight * self.tau**2), self.alpha)


def _standardised(x: Tensor) -> Tensor:
    """(x - mean) / (1e-7 + unbiased std) by row; 0 without gradient for a row of equal values."""
    centred = x - x.mean(1, keepdim=True)
    safe = torch.where(_varies(x, centred, 1)[0], centred, 0.0)
    squares = (safe**2).sum(1, keepdim=True) / (x.shape[1] - 1)
    return safe / (1e-7 + torch.where(squares > 0, squares, 1.0).sqrt())


def _pearson(x: Tensor, y: Tensor, dim: int, eps: float) -> Tensor:
    """The correlation of x and y along dim (0: over all ranks' rows), with eps added to the product of their norms.

    It is 0 without gradient where one of them is constant.
    """
    scaled: list[Tensor] = []
    norms: list[Tensor] = []
    floor: Tensor | float = eps
    for v in (x, y):
        centred = v - (group.mean(v) if dim == 0 else v.mean(dim, keepdim=True))
        varies, spread = _varies(v, centred, dim)
        # The values are scaled first, because the square of a small probability would underflow.
        spread = torch.where(varies, spread, 1.0)
        scaled.append(torch.where(varies, centred, 0.0) / spread)
        squares = _sum(scaled[-1] ** 2, dim, keepdim=True)
        norms.append(torch.where(squares > 0, squares, 1.0).sqrt())
        floor = floor / spread
    return _sum(scaled[0] * scaled[1] / (norms[0] * norms[1] + floor), dim)


def _varies(x: Tensor, centred: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Whether the values along dim differ by more than float32's rounding, and their largest distance from the mean.

    A tiny distance counts as none, since gradients divided by it would be infinite.
    """
    extremes = torch.stack([v.detach().abs().amax(dim, keepdim=True) for v in (centred, x)])
    spread, size = group.largest(extremes) if dim == 0 else extremes
    return (spread > 1e-6 * size) & (spread > _LEAST_SPREAD), spread


def _sum(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    out = x.sum(dim, keepdim=keepdim)
    return group.total(out) if dim == 0 else out
