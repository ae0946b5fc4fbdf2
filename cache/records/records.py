"""What is stored for one (view, sample), as tensors: it is gathered, and read back as the teacher's distribution.

Shapes: B batch, C classes, K stored classes, T stored temperatures, L labels a record. Logits are in nats.
Everything is relative to the largest logit z_1, so that every normaliser is a sum of positive terms and no probability
is found by subtraction.

Precision uint8 is for top-k records, in steps of 1/8 nat, as chosen by bench/codec.py. A gap is stored as its distance
to the gap before (gaps are rounded, not distances, so errors do not add up); a distance above 255 steps counts as 255.
How they are rounded stands in rounding.py; it makes no difference to how they are read.
A tail is stored as its distance to the largest possible tail, where all classes left out are as probable as the K-th.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from kdcache.cache.errors import InputError, UnservedError
from kdcache.cache.identity import NO_TAIL, STEP

Tail = Literal["prior", "uniform", "bucket", "renorm", "drop"]
TAILS = get_args(Tail)  # here, since torch 2.6 cannot compile a call of get_args

# Logit standardisation, as published: softmax((z - mean) / (1e-7 + std) / 2).
STD_TAU, STD_FLOOR = 2.0, 1e-7


@dataclass(frozen=True, eq=False)
class Records:
    """Records of B (view, sample) pairs; indexing with a tensor of B' positions gathers records, a slice shares them.

    classes [B, K] ids by decreasing logit (None: dense, all C classes in order); gaps [B, K-1] z_1 - z_(j), j = 2..K,
    or dense [B, C]; target_gap [B, L] z_1 - z_y ([B, 0] where an import lacks it); tail [B, T] log of the unstored
    classes' summed exp((z_c - z_1)/t), labels left out if they have a gap; tail_std [B, 2] the unbiased std of the C
    logits and the tail at t = 2 std, or None; labels [B, L]; prior [T, C] how the tail is spread (with tail_std a row
    more, for that), or None. label_weights float32 [B, L]: the labels' shares of a mixed image, or None for images of
    one label and where nothing has drawn the shares yet. gaps and tail of type uint8 are codes: `decoded_gaps` and
    `decoded_tail` give the values.
    """

    classes: Tensor | None
    gaps: Tensor
    target_gap: Tensor
    tail: Tensor
    labels: Tensor
    num_classes: int
    temperatures: tuple[float, ...]
    tail_std: Tensor | None = None
    prior: Tensor | None = None
    label_weights: Tensor | None = None

    def __len__(self) -> int:
        return self.gaps.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the records; the prior is no part of them."""
        fields = (self.classes, self.gaps, self.target_gap, self.tail, self.tail_std, self.labels)
        return sum(t.nbytes for t in fields if t is not None)

    def __getitem__(self, index: Tensor | slice) -> Records:
        return self._map(lambda t: t[index] if isinstance(index, slice) else t.index_select(0, index))

    def to(self, device: torch.device | str) -> Records:
        """The same records on a device. The host waits for copies to itself alone, which it could read too early."""
        ahead = torch.device(device).type != "cpu"
        moved = self._map(lambda t: t.to(device, non_blocking=ahead))
        return replace(moved, prior=None if self.prior is None else self.prior.to(device, non_blocking=ahead))

    def pin_memory(self) -> Records:
        """A copy in pinned memory. A DataLoader with pin_memory=True calls this."""
        pinned = self._map(Tensor.pin_memory)
        return replace(pinned, prior=None if self.prior is None else self.prior.pin_memory())

    def weighed_labels(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each column of labels int64 [B] with its weights [B]; where there are no weights, the first one alone."""
        if self.label_weights is None:
            yield self.labels[:, 0].long(), None
        else:
            yield from zip(self.labels.long().unbind(1), self.label_weights.unbind(1), strict=True)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Records:
        return replace(
            self,
            classes=None if self.classes is None else f(self.classes),
            gaps=f(self.gaps),
            target_gap=f(self.target_gap),
            tail=f(self.tail),
            tail_std=None if self.tail_std is None else f(self.tail_std),
            labels=f(self.labels),
            label_weights=None if self.label_weights is None else f(self.label_weights),
        )

    def decoded_gaps(self) -> Tensor:
        """The gaps in nats, float32."""
        if self.gaps.dtype != torch.uint8:
            return self.gaps.float()
        return self.gaps.cumsum(1, dtype=torch.float32) * STEP

    def decoded_tail(self, at: int) -> Tensor:
        """[B] the tail at the temperature in that place, float32; -inf where nothing remains."""
        code = self.tail[:, at]
        if code.dtype != torch.uint8:
            return code.float()
        last = self.gaps.sum(1, dtype=torch.float32) * STEP / self.temperatures[at]
        value = self._most - last - STEP * code.float()
        return value.masked_fill(code == NO_TAIL, -torch.inf)

    @property
    def _most(self) -> float:
        """The tail relative to the K-th class if all classes left out were as probable as that."""
        assert self.classes is not None
        return math.log(self.num_classes - self.classes.shape[1])

    def softened(self, temperature: float, tail: Tail = "prior") -> Softened:
        """The teacher's softmax(z / temperature); UnservedError where it is not stored."""
        return Softened(self, temperature, tail)

    def standardised(self, tau: float = STD_TAU, tail: Tail = "prior") -> Softened:
        """The teacher's softmax((z - mean) / (1e-7 + std) / tau); UnservedError where it is not stored.

        std is the unbiased one of the row's C logits: a temperature of its own for each record.
        """
        if self.classes is None:
            return Softened(self, (self.decoded_gaps().std(1, keepdim=True) + STD_FLOOR) * tau, tail)
        if self.tail_std is None or tau != STD_TAU:
            raise UnservedError(
                f"logits standardised to tau {tau:g} are not stored: build with --tail-std (which serves tau "
                f"{STD_TAU:g}), or dense records with --topk {self.num_classes}"
            )
        return Softened(self, (self.tail_std[:, :1].float() + STD_FLOOR) * tau, tail)

    def logits(self) -> Tensor:
        """[B, C] the teacher's logits, the largest of each row at 0; UnservedError from top-k records."""
        if self.classes is not None:
            raise UnservedError(
                f"these records hold the top {self.classes.shape[1]} of {self.num_classes} classes, and all are "
                f"needed: build with --topk {self.num_classes}"
            )
        return -self.decoded_gaps()

    def predictions(self) -> Tensor:
        """[B] the teacher's most probable class."""
        return self.gaps.argmin(1) if self.classes is None else self.classes[:, 0].long()

    def dense(self, temperature: float, tail: Tail = "prior", prior: Tensor | None = None) -> Tensor:
        """Probabilities [B, C], for tests and plots. `prior` [T, C] replaces the records' own.

        With `drop` a row sums to less than one. `bucket` has no dense form: InputError.
        """
        source = self if prior is None else replace(self, prior=prior)
        return Softened(source, temperature, tail).dense()


class Softened:
    """softmax(z / T) of the teacher for B records, as stored classes, labels and a modelled tail.

    temperature: a stored one, or [B, 1] 2 std (Records.standardised). Stored classes that are labels take the label's
    own gap, which is never quantised.
    The tail's mass is exact; how it is spread over the classes that were not stored is the `tail` model:
    prior (as the class prior; evenly where records have none), uniform, bucket (one class of its own),
    renorm (as if it were not there), drop (mass that no class receives).
    """

    def __init__(self, records: Records, temperature: float | Tensor, tail: Tail = "prior") -> None:
        if tail not in TAILS:
            raise InputError(f"unknown tail model {tail!r}: take one of {', '.join(TAILS)}")
        self._model, self._classes = tail, records.num_classes
        self._spreads = tail in ("prior", "uniform")
        # A label without a gap is a class like others: among those stored, or in the tail.
        self._labels = labels = records.labels[:, : records.target_gap.shape[1]].long()
        self._lacks_gap = labels.shape != records.labels.shape
        # Logarithms of probabilities from here on. log_softmax is one kernel where logsumexp is ten, and a GPU that
        # trains a small student waits for launches.
        if records.classes is None:
            # Dense: every class is stored, in order.
            self._ids = None
            self._log = torch.log_softmax(records.decoded_gaps() / -temperature, 1)
            self._label_log = self._log.gather(1, labels)
        else:
            label_log = records.target_gap.float() / -temperature
            if isinstance(temperature, Tensor):
                assert records.tail_std is not None
                at, tail_log = len(records.temperatures), records.tail_std[:, 1].float()
            else:
                at = _position(temperature, records.temperatures)
                tail_log = records.decoded_tail(at)
            head = records.classes.long()
            gaps = records.decoded_gaps()
            log = torch.cat([gaps.new_zeros(len(gaps), 1), gaps / -temperature], 1)
            if records.gaps.dtype == torch.uint8:
                for j in range(labels.shape[1]):
                    log = torch.where(head == labels[:, j : j + 1], label_log[:, j : j + 1], log)
            # A label among the stored classes, or named twice, must not count twice.
            outside = (labels.unsqueeze(2) != head.unsqueeze(1)).all(2)
            for j in range(1, labels.shape[1]):
                outside[:, j] &= (labels[:, :j] != labels[:, j : j + 1]).all(1)
            extra = label_log.masked_fill(~outside, -torch.inf)
            self._ids = torch.cat([head, labels], 1)
            self._counted = torch.cat([torch.ones_like(head, dtype=torch.bool), outside], 1)
            tail_log = torch.full_like(tail_log, -torch.inf) if tail == "renorm" else tail_log
            whole = torch.log_softmax(torch.cat([log, extra, tail_log.unsqueeze(1)], 1), 1)
            self._log, self._tail_log = whole[:, :-1], whole[:, -1]
            self._label_log = label_log + whole[:, :1]  # the most probable class was at 0
            self._prior = records.prior[at].float() if tail == "prior" and records.prior is not None else None

    @property
    def head_mass(self) -> Tensor:
        """[B] probability of the stored classes and labels together."""
        return self._log.exp().sum(1)

    def target(self) -> Tensor:
        """[B, L] probability of each label: exact also where the label is not among the stored classes."""
        return self.log_target().exp()

    def log_target(self) -> Tensor:
        """[B, L] logarithm of target(), finite also where that underflows."""
        self._require_gap()
        return self._label_log

    def rest(self, which: Tensor | None = None) -> Tensor:
        """[B] probability of all classes but the label: 1 - target(), as a sum of positive terms."""
        return self._with_tail(self._others(which)).exp().sum(1)

    def ranked(self) -> tuple[Tensor, Tensor, Tensor]:
        """[B, K] ids and probabilities of the stored classes, the most probable first; [B] that of all others."""
        p = self._log.exp()
        if self._ids is None:
            ordered = torch.sort(p, dim=1, descending=True, stable=True)
            return ordered.indices, ordered.values, torch.zeros_like(p[:, 0])
        k = self._ids.shape[1] - self._labels.shape[1]
        below = p[:, k:].sum(1) + self._tail_log.exp()
        return self._ids[:, :k], p[:, :k], below

    def cross(self, logq: Tensor) -> Tensor:
        """[B] sum over c of p_c logq_c for logq [B, C]; differentiable in logq only."""
        return self._cross(logq, self._log)

    def cross_others(self, logq: Tensor, which: Tensor | None = None) -> Tensor:
        """[B] `cross` over the classes other than the label, with p renormalised over those.

        which [B]: the label's column in each row; the first unless told.
        """
        return self._cross(logq, self._others(which))

    def cross_of(self, q: Tensor) -> Tensor:
        """[B] sum over c of q_c log p_c for q [B, C]; differentiable in q only. InputError for a tail without density.

        It is linear in q, so the dense teacher is not needed: with a tail spread as w,
        log p_c = log tail + log w_c - log W.
        """
        q, log = q.float(), self._log
        if self._ids is None:
            return (q * log).sum(1)
        if not self._spreads:
            raise InputError(f"the {self._model} tail has no density over the unstored classes: take prior or uniform")
        stored = (q.gather(1, self._ids) * torch.where(self._counted, log, 0.0)).sum(1)
        unstored = q.scatter(1, self._ids, 0.0)
        tail_log = torch.where(torch.isinf(self._tail_log), 0.0, self._tail_log)  # no class is left there
        if self._prior is None:
            return stored + unstored.sum(1) * (tail_log - self._rest_count().log())
        with torch.autocast(q.device.type, enabled=False):
            return stored + unstored @ self._prior.log() + unstored.sum(1) * (tail_log - self._rest_weight().log())

    def entropy(self) -> Tensor:
        """[B] -sum p log p, the tail as modelled."""
        return self._entropy(self._log)

    def entropy_others(self, which: Tensor | None = None) -> Tensor:
        """[B] entropy over the classes other than the label; for `which` see cross_others."""
        return self._entropy(self._others(which))

    def dense(self) -> Tensor:
        """[B, C] probabilities."""
        p, tail = self._normalised(self._log)
        if self._ids is None:
            return p
        if self._model == "bucket":
            raise InputError("the bucket tail is one class of its own and has no dense form")
        out = p.new_zeros(len(p), self._classes)
        if self._spreads:
            spread = out + (1.0 if self._prior is None else self._prior)
            spread.scatter_(1, self._ids, 0.0)
            out = spread * (tail / spread.sum(1).clamp(min=1e-30)).unsqueeze(1)
        return out.scatter_add_(1, self._ids, p)

    def _require_gap(self) -> None:
        if self._lacks_gap:
            raise UnservedError("these imported records lack the teacher's gap to the label: take a loss without it")

    def _others(self, which: Tensor | None) -> Tensor:
        self._require_gap()
        y = self._labels[:, :1] if which is None else self._labels.gather(1, which.unsqueeze(1))
        if self._ids is None:
            return self._log.scatter(1, y, -torch.inf)
        return self._log.masked_fill(self._ids == y, -torch.inf)

    def _with_tail(self, log: Tensor) -> Tensor:
        return log if self._ids is None else torch.cat([log, self._tail_log.unsqueeze(1)], 1)

    def _normalised(self, log: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K+L] and [B]: probabilities of the stored classes and of the tail; all 0 where `log` leaves nothing."""
        # Logarithms are needed: next to a label with p_y -> 1 all other masses can be below float32's smallest number.
        masses = self._with_tail(log)
        p = torch.softmax(masses, 1)
        if self._ids is None and self._classes > 1:
            return p, p.new_zeros(())
        p = p.masked_fill(torch.isneginf(masses).all(1, keepdim=True), 0.0)
        return (p, p.new_zeros(())) if self._ids is None else (p[:, :-1], p[:, -1])

    def _cross(self, logq: Tensor, log: Tensor) -> Tensor:
        logq = logq.float()
        p, tail = self._normalised(log)
        if self._ids is None:
            return (p * logq).sum(1)
        at_ids = logq.gather(1, self._ids)
        total = (p * at_ids).sum(1)
        if self._model == "bucket":
            left_out = logq.scatter(1, self._ids, -torch.inf)
            return total + tail * torch.where(tail > 0, torch.logsumexp(left_out, 1), 0.0)
        return total + tail * self._rest_mean(logq, at_ids) if self._spreads else total

    def _entropy(self, log: Tensor) -> Tensor:
        p, tail = self._normalised(log)
        out: Tensor = -torch.special.xlogy(p, p).sum(1)
        if self._ids is None or self._model in ("renorm", "drop"):
            return out
        out = out - torch.special.xlogy(tail, tail)
        if not self._spreads:
            return out
        if self._prior is None:
            return out + tail * self._rest_count().log()
        log_prior = self._prior.log().expand(len(p), -1)
        within = self._rest_weight().log() - self._rest_mean(log_prior, log_prior.gather(1, self._ids))
        return out + tail * within

    def _rest_count(self) -> Tensor:
        return (self._classes - self._counted.sum(1)).clamp(min=1).float()

    def _rest_weight(self) -> Tensor:
        # In float64, because this is 1 minus almost 1; the prior's floor keeps it positive.
        assert self._prior is not None and self._ids is not None
        prior = self._prior.double()
        return (prior.sum() - (prior[self._ids] * self._counted).sum(1)).clamp(min=1e-12).float()

    def _rest_mean(self, x: Tensor, at_ids: Tensor) -> Tensor:
        """[B] mean of x [B, C] over the classes not stored, weighted as the tail is spread."""
        if self._prior is None:
            return (x.sum(1) - (at_ids * self._counted).sum(1)) / self._rest_count()
        assert self._ids is not None
        weights = self._prior[self._ids] * self._counted
        with torch.autocast(x.device.type, enabled=False):
            return (x @ self._prior - (at_ids * weights).sum(1)) / self._rest_weight()


def _position(temperature: float, stored: tuple[float, ...]) -> int:
    if temperature not in stored:
        have = ",".join(f"{t:g}" for t in stored)
        raise UnservedError(
            f"temperature {temperature:g} is not stored (stored: {have}); "
            f"build with --temperatures {have},{temperature:g}, or dense records"
        )
    return stored.index(temperature)
