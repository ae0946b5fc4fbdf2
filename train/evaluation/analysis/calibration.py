"""Calibration: how far a student's probabilities can be believed, before and after temperature scaling.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599) divides all logits by one number, which minimises the NLL of
images that the student has not learnt from. Here these are evaluation images, for want of others. So that no image is
judged by a number that was fitted to it, each half of the images is judged by the temperature of the other half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.train.evaluation.metrics import metrics, reliability

SMALLEST, LARGEST = 0.02, 50.0  # temperatures
_ROWS = 4096  # that are taken to float64 at once


@dataclass(frozen=True)
class Bin:
    """The images whose most probable class has a probability in one fifteenth of 0..1.

    confidence: the mean of that probability. accuracy: how many of the classes are those asked about, in 0..1. Both
    are 0 for an empty bin.
    """

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """nll in nats, brier in 0..2 and ece in 0..1 as `metrics` defines them; bins: the 15 of `reliability`."""

    nll: float
    brier: float
    ece: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Scaling:
    """Calibration before and after temperature scaling.

    temperature: the one that fits all images, which is the one to use on others. of_halves: those of the two halves,
    by which `after` is measured: each half of the images is scaled by the temperature of the other.
    """

    temperature: float
    of_halves: tuple[float, float]
    before: Calibration
    after: Calibration


def calibration(logits: Tensor, labels: Tensor) -> Calibration:
    """Measure the calibration of logits [N, C] for labels [N]."""
    found = metrics(logits, labels)
    return Calibration(found["nll"], found["brier"], found["ece"], bins_of(logits, labels))


def bins_of(logits: Tensor, classes: Tensor) -> tuple[Bin, ...]:
    """The 15 bins of `reliability` for logits [N, C], with `classes` [N] in the place of labels."""
    return tuple(Bin(int(n), sure, right) for n, sure, right in reliability(logits, classes).tolist())


def scaling(logits: Tensor, labels: Tensor) -> Scaling | None:
    """Measure calibration before and after temperature scaling. logits [N, C], labels [N]; None for one image alone."""
    if len(labels) < 2:
        return None
    first = torch.from_numpy(halves(labels.numpy()))
    one, other = (fitted_temperature(logits[half], labels[half]) for half in (first, ~first))
    by_other = torch.where(first, torch.tensor(other), torch.tensor(one)).to(logits.dtype)
    return Scaling(
        temperature=fitted_temperature(logits, labels),
        of_halves=(one, other),
        before=calibration(logits, labels),
        after=calibration(logits / by_other.unsqueeze(1), labels),
    )


def halves(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [N]: every second image of each class is in the first half. The same for every student."""
    first = np.empty(len(labels), np.bool_)
    first[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 2 == 0
    return first


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in 0.02..50 by which the NLL of logits [N, C] / temperature is least for labels [N].

    The NLL is convex in 1 / temperature, so its slope has one zero, or none: then it is one of the two ends.
    """
    from scipy.optimize import brentq  # slow to import, and not every evaluation fits a temperature

    low, high = math.log(SMALLEST), math.log(LARGEST)

    def slope(log: float) -> float:
        return _slope(logits, labels, math.exp(-log))

    if slope(low) <= 0:  # the NLL falls all the way to small temperatures: every image is classified well
        return SMALLEST
    if slope(high) >= 0:
        return LARGEST
    return math.exp(float(brentq(slope, low, high, xtol=1e-7)))


def _slope(logits: Tensor, labels: Tensor, scale: float) -> float:
    """The derivative of the mean NLL of scale * logits by scale: the mean of E[z] - z_y."""
    total = 0.0
    for at in range(0, len(labels), _ROWS):
        z = logits[at : at + _ROWS].double()
        p = (z * scale).softmax(1)
        total += float(((p * z).sum(1) - z.gather(1, labels[at : at + _ROWS].unsqueeze(1)).squeeze(1)).sum())
    return total / len(labels)


def described(found: Scaling) -> Sequence[str]:
    """The lines that tell people of it."""
    before, after = found.before, found.after
    return [
        f"temperature   {found.temperature:.3f}: scaled by that of the other half of the images, nll {before.nll:.4f} "
        f"-> {after.nll:.4f}, ece {before.ece:.4f} -> {after.ece:.4f}"
    ]
