"""Compares runs that differ in more than their seed: means with intervals, and differences seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ENOUGH = 3  # values: the interval of two is nine times as wide as their distance, which tells nothing


@dataclass(frozen=True)
class Estimate:
    """The mean of n values, their standard deviation and the 95% t-interval of the mean.

    deviation is None for one value, low and high for fewer than three.
    """

    mean: float
    n: int
    deviation: float | None
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of one value or more, taken to be drawn from one normal distribution (Student 1908)."""
    n, mean = len(values), statistics.fmean(values)
    deviation = statistics.stdev(values) if n > 1 else None
    if deviation is None or n < ENOUGH:
        return Estimate(mean, n, deviation, None, None)
    from scipy.stats import t as student_t  # slow to import

    half = float(student_t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, n, deviation, mean - half, mean + half)


@dataclass(frozen=True)
class Difference:
    """How much more one group of runs has of a figure than another, over the seeds that both have.

    estimate: of the differences seed by seed, which are `values`. A group's seeds share what the seed draws, such as
    the order of images, and so their differences vary less than the runs do.
    """

    values: tuple[float, ...]
    estimate: Estimate


def difference(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Compare the figures of two groups, by seed; None where they have no seed in common."""
    values = tuple(mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys()))
    return Difference(values, estimate(values)) if values else None
