"""Distillation losses from records, beside the papers' formulas.

Notation: y label; T temperature; p, q the teacher's and the student's softmax at T (without T: at 1); p~, q~ the
same over the classes other than y; CE = -log q_y; H(a, b) = -sum a log b. Every loss is called as
loss(student_logits [B, C], labels [B], records) and gives a scalar, the mean over the batch, in float32 and
differentiable in the student only. What a loss needs of a cache it declares in `needs`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.cache.errors import InputError, UnservedError
from kdcache.cache.identity import RecordIdentity
from kdcache.cache.records import Records, Tail


@dataclass(frozen=True)
class Needs:
    """What a loss reads: labels, and the teacher at these temperatures (none: no teacher)."""

    labels: bool = True
    temperatures: tuple[float, ...] = ()


class Loss(Protocol):
    """What the trainer calls."""

    name: ClassVar[str]

    @property
    def needs(self) -> Needs: ...

    def __call__(self, logits: Tensor, labels: Tensor, records: Records | None) -> Tensor: ...


@dataclass(frozen=True)
class CE:
    """CE, with optional label smoothing: plain training, no teacher."""

    name: ClassVar[str] = "ce"
    label_smoothing: float = 0.0

    @property
    def needs(self) -> Needs:
        return Needs()

    def __call__(self, logits: Tensor, labels: Tensor, records: Records | None = None) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


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

    def __call__(self, logits: Tensor, labels: Tensor, records: Records) -> Tensor:
        logits = logits.float()
        teacher = records.softened(self.temperature, self.tail)
        log_q = F.log_softmax(logits / self.temperature, 1)
        kl = (-teacher.entropy() - teacher.cross(log_q)).mean()
        loss = self.beta * self.temperature**2 * kl
        return loss + self.alpha * F.cross_entropy(logits, labels) if self.alpha else loss


@dataclass(frozen=True)
class NKD:
    """CE - p_y log q_y + gamma T^2 H(p~^T, q~^T): Yang et al. 2023 (arXiv 2303.13005, eq. 7; also 2208.10139).

    p_y and q_y are at temperature 1. The authors' module leaves CE to its caller; this is the whole loss.
    """

    name: ClassVar[str] = "nkd"
    gamma: float = 1.5
    temperature: float = 1.0
    tail: Tail = "prior"

    @property
    def needs(self) -> Needs:
        return Needs(temperatures=tuple(sorted({1.0, self.temperature})))

    def __call__(self, logits: Tensor, labels: Tensor, records: Records) -> Tensor:
        logits = logits.float()
        soft = records.softened(self.temperature, self.tail)
        p_y = (soft if self.temperature == 1 else records.softened(1.0, self.tail)).target()[:, 0]
        target = -(1 + p_y) * F.log_softmax(logits, 1).gather(1, labels.unsqueeze(1)).squeeze(1)
        # log q~ over the other classes; the label's own entry is never read, and finite so that 0 x it is 0.
        scaled = logits / self.temperature
        others = scaled.scatter(1, labels.unsqueeze(1), -torch.inf)
        log_q = scaled - torch.logsumexp(others, 1, keepdim=True)
        return (target - self.gamma * self.temperature**2 * soft.cross_others(log_q)).mean()


LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in (CE, KD, NKD)}

# Up to 64 pixels the papers' CIFAR settings; above, the classes' own defaults, which are those for ImageNet.
SMALL_IMAGES = 64
_SMALL_PRESETS: dict[str, dict[str, float]] = {
    "kd": {"alpha": 0.1, "beta": 0.9, "temperature": 4.0},
    "nkd": {"gamma": 3.5, "temperature": 3.0},
}


def make_loss(spec: str, image_size: int) -> Loss:
    """The loss of `NAME[:key=value,...]`, with the preset for images of this many pixels.

    InputError for a name, a key or a value that does not exist.
    """
    name, _, text = spec.partition(":")
    if name not in LOSSES:
        raise InputError(f"unknown loss {name!r}: take one of {', '.join(LOSSES)}")
    cls = LOSSES[name]
    known = {f.name: f for f in fields(cls)}
    options: dict[str, Any] = dict(_SMALL_PRESETS.get(name, {})) if image_size <= SMALL_IMAGES else {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise InputError(f"loss {name} has no option {key!r}: it has {', '.join(known)}")
        try:
            options[key] = value if key == "tail" else float(value)
        except ValueError:
            raise InputError(f"loss {name}: {key}={value!r} is no number") from None
    if options.get("temperature", 1.0) <= 0:
        raise InputError(f"loss {name}: the temperature must be positive")
    if (tail := options.get("tail", "prior")) not in get_args(Tail):
        raise InputError(f"loss {name}: unknown tail model {tail!r}: take one of {', '.join(get_args(Tail))}")
    loss: Loss = cls(**options)
    return loss


def require_served(loss: Loss, record: RecordIdentity) -> None:
    """UnservedError, with the build flags that help, unless a cache of such records serves the loss."""
    if loss.needs.labels and not record.labels:
        raise UnservedError(f"{loss.name} needs labels; this cache was built with --unlabelled")
    lacking = [t for t in loss.needs.temperatures if t not in record.temperatures]
    if lacking and not record.dense:
        stored = ",".join(f"{t:g}" for t in record.temperatures)
        wanted = ",".join(f"{t:g}" for t in sorted({*record.temperatures, *lacking}))
        raise UnservedError(
            f"{loss.name} needs the teacher at temperature {', '.join(f'{t:g}' for t in lacking)}; this cache holds "
            f"{stored}: build one with --temperatures {wanted}, or train with temperature={stored.split(',')[0]}"
        )
