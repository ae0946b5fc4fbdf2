"""NKD and its two forms without a teacher: Yang et al. 2022 and 2023."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.cache.errors import UnservedError
from kdcache.cache.records.records import Tail
from kdcache.train import group
from kdcache.train.losses.base import POSITIVE, Batch, ByParts, Needs, Parts, given_weights, label_ce, option, part


@dataclass(frozen=True)
class NKD(ByParts):
    """CE - p_y log q_y + gamma T^2 H(p~^T, q~^T): Yang et al. 2023 (arXiv 2303.13005, eq. 7; first in 2208.10139).

    p_y and q_y are at temperature 1. The authors' module leaves CE to its caller; this is the whole loss. With mixed
    labels y is the heavier label, as in the authors' code; with mixed=both, both terms count for each label, times its
    weight.
    """

    name: ClassVar[str] = "nkd"
    gamma: float = option(1.5, cifar=3.5)
    temperature: float = option(1.0, POSITIVE, cifar=3.0)
    tail: Tail = "prior"
    mixed: Literal["heavier", "both"] = "heavier"

    @property
    def needs(self) -> Needs:
        return Needs(target_gap=True, temperatures=tuple(sorted({1.0, self.temperature})))

    def terms(self, batch: Batch) -> Parts:
        soft = batch.records.softened(self.temperature, self.tail)
        p = (soft if self.temperature == 1 else batch.records.softened(1.0, self.tail)).target()
        log_q = F.log_softmax(batch.logits, 1)
        ce = batch.label_ce(log_q)
        loss = part("ce", ce)
        scaled = batch.logits / self.temperature
        for y, which, weight in self._targets(batch):
            p_y = p.gather(1, which.unsqueeze(1)).squeeze(1) if which is not None else p[:, 0]
            ce_y = ce if which is None else label_ce(log_q, y, None)
            others = soft.cross_others(_log_others(scaled, y), which)
            both = part("target", p_y * ce_y) + part("nontarget", -self.gamma * self.temperature**2 * others)
            loss = loss + (both if weight is None else both.times(weight))
        return loss

    def _targets(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Each label [B] that counts as y, its column in the records (None: the first), and its weight (None: 1)."""
        labels = batch.labels
        if labels.dim() == 1:
            yield labels, None, None
            return
        weights = given_weights(labels, batch.weights)
        if self.mixed == "heavier":
            which = weights.argmax(1)
            yield labels.gather(1, which.unsqueeze(1)).squeeze(1), which, None
            return
        for column in range(labels.shape[1]):
            yield labels[:, column], torch.full_like(labels[:, 0], column), weights[:, column]


@dataclass(frozen=True)
class TFNKD(ByParts):
    """CE - sg[q_y + V - mean_B q_y] log q_y, V = 1: teacher-free NKD, Yang et al. 2022 (arXiv 2208.10139).

    The student's own q_y, shifted to have the mean V, stands for the teacher's. With mixed labels V is each label's
    weight, and the means are over the batch's heavier and over its lighter labels. Two labels of one class are one.
    """

    name: ClassVar[str] = "tf-nkd"

    @property
    def needs(self) -> Needs:
        return Needs()

    def terms(self, batch: Batch) -> Parts:
        log_q = F.log_softmax(batch.logits, 1)
        return part("ce", batch.label_ce(log_q)) + part("target", _own_target(batch, log_q, power=1))


@dataclass
class USKD(ByParts):
    """CE - alpha sg[q_y^2 + V - mean_B q_y^2] log q_y + beta H(zeta~, q~) + mu H(y_ls, w).

    Universal self-distillation without a teacher, Yang et al. 2023 (arXiv 2303.13005). w [B, C] is the softmax of a
    linear head on the student's features one stage before the last; y_ls = 0.9 one-hot + 0.1 / C. zeta is Zipf's
    1 / rank over all classes, and zeta~ leaves y out and is renormalised; neither has a gradient. With rank=code
    classes are ranked by w_i / (1 - w_y) + log q_i / (1 - log q_y), with 1e-6 added to both divisors, as in the
    authors' code; with rank=paper q takes the place of log q, as in the paper's text. With mixed labels V is as in
    tf-nkd, y_ls is the weighted sum, and every label of positive weight is left out of zeta~ and q~.

    Features [B, F] are the mean over H and W of the output [B, F, H, W] of the stage before the last (kdcache's
    networks: `stages[-2]`; torchvision's resnets: `layer3`), not detached. Featured says how a trainer gives them.
    """

    name: ClassVar[str] = "uskd"
    alpha: float = option(1.0, cifar=0.1)
    beta: float = option(0.1)
    mu: float = option(0.005, cifar=0.1)
    rank: Literal["code", "paper"] = "code"
    head: nn.Linear | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(features=True)

    def make_head(self, channels: int, classes: int, device: torch.device | str = "cpu") -> None:
        """Make the linear head that gives w, newly initialised."""
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

    def terms(self, batch: Batch) -> Parts:
        if batch.features is None:
            raise UnservedError("uskd needs the student's features [B, F] one stage before the last")
        head, logits = self._head(), batch.logits
        with torch.autocast(logits.device.type, enabled=False):
            log_w = F.log_softmax(F.linear(batch.features.float(), head.weight, head.bias), 1)
        log_q = F.log_softmax(logits, 1)
        share = torch.zeros_like(log_q).scatter_add_(1, *batch.columns())  # the weight of each class in the labels
        named = share > 0
        zeta = self._zipf(log_w.detach().exp(), log_q.detach(), named)
        # If all classes are named there are no others, and any finite q~ will do, since zeta is 0.
        others = logits.masked_fill(named & ~named.all(1, keepdim=True), -torch.inf)
        log_others = logits - torch.logsumexp(others, 1, keepdim=True)
        weak = 0.9 * share + 0.1 / logits.shape[1]
        target = self.alpha * _own_target(batch, log_q, power=2)
        return (
            part("ce", batch.label_ce(log_q))
            + part("target", target)
            + part("nontarget", -self.beta * (zeta * log_others).sum(1))
            + part("weak", -self.mu * (weak * log_w).sum(1))
        )

    def _zipf(self, w: Tensor, log_q: Tensor, named: Tensor) -> Tensor:
        """[B, C] zeta~: 1 / rank of each class, 0 for the named ones, summing to 1."""
        q = log_q if self.rank == "code" else log_q.exp()

        def scored(x: Tensor) -> Tensor:
            return x / (1 - (x * named).sum(1, keepdim=True) + 1e-6)

        order = torch.sort(scored(w) + scored(q), dim=1, descending=True, stable=True).indices
        places = torch.arange(1, w.shape[1] + 1, device=w.device, dtype=w.dtype).expand_as(w)
        zeta = (1 / torch.zeros_like(w).scatter_(1, order, places)).masked_fill(named, 0.0)
        return zeta / zeta.sum(1, keepdim=True).clamp(min=1e-30)


def _own_target(batch: Batch, log_q: Tensor, power: int) -> Tensor:
    """[B] -sg[q_y^power + V - mean_B q_y^power] log q_y, summed over the labels of positive weight V."""
    y, v = batch.columns()
    if batch.labels.dim() == 2:
        # Two labels of one class are one label, which has the weight of both.
        same = y.unsqueeze(2) == y.unsqueeze(1)
        v = torch.where(same.tril(-1).any(2), 0.0, (v.unsqueeze(1) * same).sum(2))
        # The heavier label first, so that a mean is over like labels.
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
