"""What every loss is, and the terms that several of them share.

Notation: y is the label; T the temperature; p and q are the teacher's and the student's softmax at T (at 1 where no T
is written); t and s are their logits; p~ and q~ are p and q over the classes other than y; CE = -log q_y;
H(a, b) = -sum a log b; sg means that no gradient passes.
Shapes: B batch, C classes, L labels a sample, F features. Every loss is called as

    loss(student_logits [B, C], labels [B], records)                    scalar, the mean over the batch
    loss(student_logits [B, C], labels [B, L], records, weights [B, L]) for mixed images (mixup, cutmix)

where the weights are by default those that CachedLoader has put into the records, in float32, and is differentiable in
the student only. `loss.parts(...)` takes the same arguments and names the terms of that scalar. For mixed labels every
term that is a cross-entropy to the labels is the weighted sum; other terms with a label say what they take.

What a loss needs of a cache and of the student it declares in `needs`. What it wants beyond the records of a batch is a
protocol that it fulfils: Learnt, Featured, Surveying, Paced, Partnered.

Under several ranks (group.py) a loss is the mean over the rank's own rows, and what it takes of the batch as a whole it
takes of all ranks' rows, so all ranks have to call it. Weighted by the ranks' shares of the batch (group.weight), the
gradients that DDP averages are then those of one process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.cache.errors import InputError, UnservedError
from kdcache.cache.records.records import Records, Softened

T = TypeVar("T")

DenseTail = Literal["prior", "uniform", "renorm", "drop"]  # the tails with a probability for every class
SpreadTail = Literal["prior", "uniform"]  # the tails with a positive probability for every class


@dataclass(frozen=True)
class Needs:
    """What a loss reads.

    labels: the samples' labels. target_gap: the teacher's own answer for the labels, which imported caches lack.
    temperatures: the teacher, softened to these. dense: the teacher's logits of all classes. standardised: the
    teacher's logits, standardised to this tau. features: the student's features one stage before the last (see
    Featured). first_view: all training records of view 0, once (see Surveying). mixed: whether the loss has a meaning
    for two labels.
    """

    labels: bool = True
    target_gap: bool = False
    temperatures: tuple[float, ...] = ()
    dense: bool = False
    standardised: float | None = None
    features: bool = False
    first_view: bool = False
    mixed: bool = True


@dataclass(frozen=True)
class Parts:
    """A sum that remembers its terms by name, with which a formula can go on calculating.

    total: the sum, [B] for each sample or [] for the batch. named: the terms, shaped like the total and without
    gradient; each has its weight, so that they add up to the total but for rounding.
    """

    total: Tensor
    named: Mapping[str, Tensor]

    def __add__(self, other: Parts) -> Parts:
        """The sum of both; terms of the same name are added."""
        named = dict(self.named)
        for name, value in other.named.items():
            named[name] = named[name] + value if name in named else value
        return Parts(self.total + other.total, named)

    def times(self, factor: float | Tensor) -> Parts:
        return Parts(factor * self.total, {name: factor * value for name, value in self.named.items()})

    def mean(self) -> Parts:
        """The mean over the batch; of a sum that is [] already, the sum itself."""
        if self.total.dim() == 0:
            return self
        return Parts(self.total.mean(), {name: value.mean() for name, value in self.named.items()})


def part(name: str, value: Tensor) -> Parts:
    """A sum of a single term."""
    return Parts(value, {name: value.detach()})


@dataclass(frozen=True)
class Batch:
    """What a loss is computed from.

    logits: the student's, float32 [B, C]. labels: [B], or [B, L] with weights [B, L]. features: the student's, [B, F],
    for losses that need them.
    """

    logits: Tensor
    labels: Tensor
    weights: Tensor | None = None
    features: Tensor | None = None
    answers: Records | None = None

    @property
    def records(self) -> Records:
        """The teacher's records of the batch. UnservedError where the caller gave none."""
        if self.answers is None:
            raise UnservedError("this loss learns from a teacher: give the batch's records too")
        return self.answers

    def label_ce(self, log_q: Tensor) -> Tensor:
        """[B] -log q_y, or the weighted sum of it over the labels."""
        return label_ce(log_q, self.labels, self.weights)

    def columns(self) -> tuple[Tensor, Tensor]:
        """Labels and their weights, both [B, L]; a single label has weight 1."""
        if self.labels.dim() == 2:
            return self.labels, given_weights(self.labels, self.weights)
        return self.labels.unsqueeze(1), torch.ones_like(self.labels, dtype=torch.float32).unsqueeze(1)

    def ce(self, label_smoothing: float = 0.0) -> Tensor:
        """CE with smoothed labels: [] for single labels, [B] for mixed ones."""
        if self.labels.dim() == 1:
            return F.cross_entropy(self.logits, self.labels, label_smoothing=label_smoothing)
        log_q = F.log_softmax(self.logits, 1)
        ce = (1 - label_smoothing) * self.label_ce(log_q)
        return ce - label_smoothing * log_q.mean(1)

    def plus_ce(self, parts: Parts, alpha: float) -> Parts:
        """parts + alpha CE, all []; with alpha = 0 the labels are not looked at, and may be missing."""
        return parts + part("ce", self.ce()).mean().times(alpha) if alpha else parts


class Loss(Protocol):
    """What the trainer calls."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def parts(
        self, logits: Tensor, labels: Tensor, records: Records | None = None, weights: Tensor | None = None
    ) -> Parts:
        """The named terms of the loss, all []; their total is what is minimised."""

    def __call__(
        self, logits: Tensor, labels: Tensor, records: Records | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """The total of the parts."""


@runtime_checkable
class Learnt(Protocol):
    """A loss with parameters of its own, which are trained beside the student's."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@runtime_checkable
class Featured(Learnt, Protocol):
    """A loss that needs the student's features: a head of its own learns from them.

    Before the optimiser is made, the head is made under the run's seed, since it draws from torch's generator. The
    features of each batch are an argument of `parts` and of the call; gradients pass through them. The head belongs to
    training alone: it is not part of the student's weights. FeatureLoss does all this for a trainer.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def make_head(self, channels: int, classes: int, device: torch.device | str = "cpu") -> None: ...

    def terms(self, batch: Batch) -> Parts: ...


@runtime_checkable
class Surveying(Protocol):
    """A loss that looks at all training records of view 0, once and before the first epoch, if it needs.first_view."""

    def prepare(self, records: Records | Iterable[Records]) -> None: ...


@runtime_checkable
class Paced(Protocol):
    """A loss that goes by the epoch: it is told each one, counted from 1, before it begins.

    Until it is told of one, its warm-up counts as over, so that other loops need not know of it.
    """

    def set_epoch(self, epoch: int) -> None: ...


@runtime_checkable
class Partnered(Protocol):
    """A loss by which a live teacher learns too, beside the student.

    partner_options: the names of the options that are about that teacher alone. starts_taught: whether it starts from
    the weights of the cache's teacher, not from new ones (option start=taught).
    """

    partner_options: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str: ...

    @property
    def starts_taught(self) -> bool: ...

    def of_teacher(self, teacher: Tensor, labels: Tensor, student: Tensor, weights: Tensor | None = None) -> Tensor: ...


class ByParts(ABC):
    """The head that all losses share: a loss of the table gives its `terms`, and is called and taken apart by them."""

    name: ClassVar[str]

    @abstractmethod
    def terms(self, batch: Batch) -> Parts:
        """The named terms, either all [B] or all []; their total is what is minimised."""

    def parts(
        self,
        logits: Tensor,
        labels: Tensor,
        records: Records | None = None,
        weights: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Parts:
        """The named terms of the loss, all []; for the arguments see above. UnservedError where one is missing.

        weights: by default those that the records have.
        """
        if weights is None and records is not None:
            weights = records.label_weights
        return self.terms(Batch(logits.float(), labels, weights, features, records)).mean()

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        records: Records | None = None,
        weights: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The total of the parts."""
        return self.parts(logits, labels, records, weights, features).total

    @classmethod
    def cifar_preset(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that were published for CIFAR-100 where they differ; `given` are those that the user chose."""
        return _noted(cls, _CIFAR)

    @classmethod
    def options_before(cls) -> dict[str, Any]:
        """The options that were added later, at the values that held before they existed."""
        return _noted(cls, _BEFORE)


# Options of a loss are the fields of its dataclass; their defaults are the settings published for ImageNet.


@dataclass(frozen=True)
class Bounds:
    """The range of a number: finite, and from 0 to `most`, without 0 if `positive`, and without `most` if `below`."""

    positive: bool = False
    most: float = math.inf
    below: bool = False

    def require(self, where: str, number: float, text: str) -> None:
        """InputError with `where` and the number as the user wrote it, unless it lies within."""
        if not 0 <= number < math.inf:
            raise InputError(f"{where}={text} must be finite and not negative")
        if self.positive and number == 0:
            raise InputError(f"{where}={text} must be positive")
        if number > self.most or (self.below and number == self.most):
            both = ", without both" if self.below else ""
            raise InputError(f"{where}={text} must lie between 0 and {self.most:g}{both}")


ANY, POSITIVE = Bounds(), Bounds(positive=True)
SHARE, POSITIVE_SHARE, INNER_SHARE = Bounds(most=1.0), Bounds(True, 1.0), Bounds(True, 1.0, below=True)
_BOUNDS, _CIFAR, _BEFORE = "bounds", "cifar", "before"


def option(default: T, bounds: Bounds = ANY, *, cifar: T | None = None, before: T | None = None) -> T:
    """A field of a loss's dataclass: its default and its range.

    cifar: what was published for CIFAR-100, if that differs. before: what held before there was the option, in runs
    that were begun then.
    """
    more = {name: value for name, value in ((_CIFAR, cifar), (_BEFORE, before)) if value is not None}
    made: T = field(default=default, metadata={_BOUNDS: bounds, **more})
    return made


def _noted(cls: type[Any], note: str) -> dict[str, Any]:
    """What the options say under this name; an option that does not say it is left out."""
    return {f.name: f.metadata[note] for f in fields(cls) if note in f.metadata}


def bounds_of(of: Field[Any]) -> Bounds:
    """The range of an option."""
    found: Bounds = of.metadata.get(_BOUNDS, ANY)
    return found


# A warm-up: w = min(epoch / warmup, 1).


def whole() -> Tensor:
    """w = 1, the warm-up being over."""
    # On the CPU whatever the device: such a scalar goes along with a kernel's arguments, and no copy is waited for.
    return torch.ones((), dtype=torch.float32, device="cpu")


def set_ramp(ramp: Tensor, epoch: int, warmup: int) -> None:
    """Set w in place: a compiled loop would be compiled again in every epoch for a number, or another tensor."""
    ramp.fill_(min(epoch / warmup, 1.0))


# Terms that several losses share.


def given_weights(labels: Tensor, weights: Tensor | None) -> Tensor:
    """The weights of mixed labels in float32. InputError where they are missing."""
    if weights is None:
        raise InputError(f"mixed labels {list(labels.shape)} need weights of the same shape")
    return weights.float()


def label_ce(log_q: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """[B] -log q_y, or the weighted sum of it over the labels."""
    if labels.dim() == 1:
        return F.nll_loss(log_q, labels, reduction="none")
    log_q_y: Tensor = (given_weights(labels, weights) * log_q.gather(1, labels)).sum(1)
    return -log_q_y


def p_log_p(p: Tensor) -> Tensor:
    """p log p, which is 0 where p is 0."""
    out: Tensor = torch.special.xlogy(p, p)
    return out


def decoupled(soft: Softened, scaled: Tensor, y: Tensor, alpha: float, beta: float) -> Parts:
    """[B] DKD's terms: alpha KL((p_y, 1 - p_y), (q_y, 1 - q_y)) and beta KL(p~, q~), for student logits over T."""
    at = y.unsqueeze(1)
    lse = torch.logsumexp(scaled, 1, keepdim=True)
    lse_others = torch.logsumexp(scaled.scatter(1, at, -torch.inf), 1, keepdim=True)
    log_q_y, log_q_rest = (scaled.gather(1, at) - lse).squeeze(1), (lse_others - lse).squeeze(1)
    p_y, p_rest = soft.target()[:, 0], soft.rest()
    binary = p_log_p(p_y) + p_log_p(p_rest) - p_y * log_q_y - p_rest * log_q_rest
    others = -soft.entropy_others() - soft.cross_others(scaled - lse_others)
    return part("target", alpha * binary) + part("nontarget", beta * others)


def require_single(name: str, labels: Tensor) -> None:
    """UnservedError for mixed labels."""
    if labels.dim() != 1:
        raise UnservedError(f"{name} has no meaning for mixed labels: take another loss, or views without mixing")
