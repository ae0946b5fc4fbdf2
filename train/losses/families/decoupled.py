"""Losses that take the divergence from the teacher apart into terms with weights of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.cache.errors import InputError, UnservedError
from kdcache.cache.records.records import Records, Tail
from kdcache.train import group
from kdcache.train.losses.base import (
    POSITIVE,
    POSITIVE_SHARE,
    Batch,
    ByParts,
    Needs,
    Parts,
    decoupled,
    option,
    p_log_p,
    part,
    require_single,
    set_ramp,
    whole,
)


@dataclass
class DKD(ByParts):
    """CE + w T^2 [alpha KL((p_y, 1 - p_y)^T, (q_y, 1 - q_y)^T) + beta KL(p~^T, q~^T)], w = min(epoch / warmup, 1).

    Zhao et al. 2022 (arXiv 2203.08679). The first term is exact from top-k records. The authors tune beta by pair
    of networks (2 for resnet56 -> resnet20).
    """

    name: ClassVar[str] = "dkd"
    alpha: float = option(1.0)
    beta: float = option(0.5, cifar=8.0)
    temperature: float = option(1.0, POSITIVE, cifar=4.0)
    warmup: int = option(1, POSITIVE, cifar=20)
    tail: Tail = "prior"
    _ramp: Tensor = field(default_factory=whole, init=False, repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(target_gap=True, temperatures=(self.temperature,), mixed=False)

    def set_epoch(self, epoch: int) -> None:
        set_ramp(self._ramp, epoch, self.warmup)

    def terms(self, batch: Batch) -> Parts:
        require_single(self.name, batch.labels)
        soft = batch.records.softened(self.temperature, self.tail)
        both = decoupled(soft, batch.logits / self.temperature, batch.labels, self.alpha, self.beta)
        return part("ce", batch.ce()) + both.mean().times(self._ramp * self.temperature**2)


@dataclass
class IKL(ByParts):
    """CE + w [alpha H(p^T, q^T) + beta / 4 sum_jk v_j v_k ((t_j - t_k) - (s_j - s_k))^2], w = min(epoch / warmup, 1).

    Improved KL, Cui et al. 2023 (arXiv 2305.13948). With pairs=teacher, v is the sample's softmax(t / temperature2);
    with pairs=prior, v is the mean of that over the training samples of class y (view 0). As sum v = 1, the pair sum is
    twice the variance of t - s under v, which takes O(C) work, not O(C^2). There is no T^2, as in the authors' code.
    """

    name: ClassVar[str] = "ikl"
    alpha: float = option(1.0)
    beta: float = option(0.5, cifar=4.0)
    temperature: float = option(1.0, POSITIVE, cifar=4.0)
    temperature2: float = option(1.0, POSITIVE, cifar=100.0)
    pairs: Literal["teacher", "prior"] = option("prior", cifar="teacher")
    warmup: int = option(1, POSITIVE, cifar=20)
    _ramp: Tensor = field(default_factory=whole, init=False, repr=False, compare=False)
    _prior: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(dense=True, first_view=self.pairs == "prior")

    def set_epoch(self, epoch: int) -> None:
        set_ramp(self._ramp, epoch, self.warmup)

    def prepare(self, records: Records | Iterable[Records]) -> None:
        """Take the class prior [C, C], a row for each label, from the records of view 0, whole or in parts.

        Records of mixed images count for each label by its weight. With several ranks all of them must call this, each
        with all records or each with its share.
        """
        if self.pairs != "prior":
            return
        sums: Tensor | None = None
        for some in _slices(records, 8192) if isinstance(records, Records) else records:
            v = torch.softmax(some.logits().double() / self.temperature2, 1)
            if sums is None:
                sums = v.new_zeros(v.shape[1], v.shape[1])
            for y, share in some.weighed_labels():
                sums.index_add_(0, y, v if share is None else v * share.double().unsqueeze(1))
        if sums is None:
            raise InputError("ikl:pairs=prior has no records to take its class prior from")
        sums = group.total(sums)
        total = sums.sum(1, keepdim=True)
        self._prior = torch.where(total > 0, sums / total.clamp(min=1), 1 / len(sums)).float()

    def terms(self, batch: Batch) -> Parts:
        logits, t = batch.logits, batch.records.logits()
        cross = -batch.records.softened(self.temperature).cross(F.log_softmax(logits / self.temperature, 1))
        v = self._pair_weights(t, batch)
        gap = t - logits
        gap = gap - (v * gap).sum(1, keepdim=True)
        variance = (v * gap**2).sum(1)
        ce = batch.label_ce(F.log_softmax(logits, 1))
        apart = part("soft", self.alpha * cross) + part("pairs", self.beta / 2 * variance)
        return part("ce", ce) + apart.times(self._ramp)

    def _pair_weights(self, t: Tensor, batch: Batch) -> Tensor:
        """[B, C] v of each sample."""
        if self.pairs == "teacher":
            return torch.softmax(t / self.temperature2, 1)
        if self._prior is None:
            raise UnservedError("ikl:pairs=prior needs prepare(records of view 0) first, or take pairs=teacher")
        self._prior = self._prior.to(t.device)
        y, share = batch.columns()
        return (share.unsqueeze(2) * self._prior[y]).sum(1)


@dataclass(frozen=True)
class GKD(ByParts):
    """alpha CE + T^2 [primary KL of p^T, q^T within the group G + binary KL of (p_G, 1 - p_G)^T, (q_G, 1 - q_G)^T].

    Grouped KD, Zhao et al. 2023 (arXiv 2304.04462, for faces; the abstract names the parts, the weights are ours). G
    is the smallest group of the teacher's most probable classes that holds `mass` of p^T. Only the sum of what is
    outside G counts, so no tail is modelled. The loss is exact if G lies within the k stored classes; otherwise G is
    those k classes.
    """

    name: ClassVar[str] = "gkd"
    alpha: float = option(1.0)
    primary: float = option(1.0)
    binary: float = option(1.0)
    mass: float = option(0.9, POSITIVE_SHARE)
    temperature: float = option(1.0, POSITIVE)

    @property
    def needs(self) -> Needs:
        return Needs(labels=self.alpha != 0, temperatures=(self.temperature,))

    def terms(self, batch: Batch) -> Parts:
        scaled = batch.logits / self.temperature
        ids, p, below = batch.records.softened(self.temperature).ranked()
        inside = (p.cumsum(1) - p) < self.mass
        p_in, p_out = (p * inside).sum(1), (p * ~inside).sum(1) + below

        s = scaled.gather(1, ids)
        lse_in = torch.logsumexp(s.masked_fill(~inside, -torch.inf), 1)
        lse_out = torch.logsumexp(scaled.scatter(1, ids, s.masked_fill(inside, -torch.inf)), 1)
        # If G holds all classes there is nothing outside: that has probability 0 on both sides.
        lse_out = torch.where(torch.isinf(lse_out), lse_in.detach(), lse_out)
        whole_lse = torch.logsumexp(scaled, 1)

        p_within = p * inside / p_in.unsqueeze(1)
        within = p_log_p(p_within) - p_within * (s - lse_in.unsqueeze(1))
        between = p_log_p(p_in) + p_log_p(p_out)
        between = between - p_in * (lse_in - whole_lse) - p_out * (lse_out - whole_lse)
        both = part("primary", self.primary * within.sum(1)) + part("binary", self.binary * between)
        return batch.plus_ce(both.mean().times(self.temperature**2), self.alpha)


def _slices(records: Records, rows: int) -> Iterator[Records]:
    return (records[start : start + rows] for start in range(0, len(records), rows))
