"""Which box of an image a view shows, and whether it is mirrored.

A policy has one rule for boxes and at most one for flips. Both draw from one stream, the words of a sample being
shared between them: word 0 is the flip's, words 1 and 2 place the box, and the others are for its size.

In all rules, words is uint64 [n, rule.words], and height and width are int64 [n].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.records.choices import SequenceName
from kdcache.pipeline.views.draws import Samples, chance, fraction, words
from kdcache.pipeline.views.operations.operation import Stage, argument

_PIECE = 4096  # samples at a time, so that the words and what is made of them stay in the processor's cache
_SIZES, _TRIES = 4, 10  # the first word of a box's size; tries, of two words each
# The aspect of torchvision's RandomResizedCrop: 3/4-4/3, log-uniform. It is one of 4,096 values rounded to 2^-20,
# because exp differs between machines in the last bit and a box must not.
_ASPECTS = np.array(
    [round(math.exp((2 * (i + 0.5) / 4096 - 1) * math.log(4 / 3)) * 2**20) / 2**20 for i in range(4096)]
)

Integers = NDArray[np.int64]


class Geometry(Protocol):
    """A rule for boxes."""

    @property
    def words(self) -> int:
        """How many random words a sample takes in each view, the flip's included."""

    @property
    def resizes(self) -> bool:
        """Whether boxes are of other sizes than their images, so that they have to be resized."""

    def margin(self, height: int, width: int) -> int:
        """How many pixels beyond the edge of an image a box may reach."""

    def boxes(self, words: NDArray[np.uint64], height: Integers, width: Integers) -> Integers:
        """The boxes [n, 4]: top, left, height and width in source pixels. Row i depends on row i alone."""


@dataclass(frozen=True)
class Whole:
    """The whole image."""

    words: ClassVar[int] = 1
    resizes: ClassVar[bool] = False

    def margin(self, height: int, width: int) -> int:
        return 0

    def boxes(self, words: NDArray[np.uint64], height: Integers, width: Integers) -> Integers:
        return np.stack([np.zeros_like(height), np.zeros_like(height), height, width], 1)


@dataclass(frozen=True)
class Crop:
    """A box of the image's own size, moved by up to an eighth of the shorter side."""

    name: ClassVar[str] = "crop"
    stage: ClassVar[Stage] = "geometry"
    stream: ClassVar[int] = 0
    words: ClassVar[int] = 3
    resizes: ClassVar[bool] = False

    def margin(self, height: int, width: int) -> int:
        return max(1, min(height, width) // 8)

    def boxes(self, words: NDArray[np.uint64], height: Integers, width: Integers) -> Integers:
        pad = np.maximum(1, np.minimum(height, width) // 8)
        top, left = (_multiple(words[:, i], 2 * pad + 1) - pad for i in (1, 2))
        return np.stack([top, left, height, width], 1)


@dataclass(frozen=True)
class ResizedCrop:
    """The first of ten random boxes that fits; else the largest central box of an allowed aspect.

    least, most: a box's area as a part of the image's, uniform between the two. With the defaults, this is
    torchvision's RandomResizedCrop.
    """

    least: float = argument(0.08, 0, 1)
    most: float = argument(1.0, 0, 1)

    name: ClassVar[str] = "rrc"
    stage: ClassVar[Stage] = "geometry"
    stream: ClassVar[int] = 0
    words: ClassVar[int] = _SIZES + 2 * _TRIES
    resizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1:
            raise InputError(
                f"rrc({self.least:g},{self.most:g}) has no areas to draw from: the first number must be above 0 and "
                "at most the second, and the second at most 1"
            )

    def margin(self, height: int, width: int) -> int:
        return 0

    def boxes(self, words: NDArray[np.uint64], height: Integers, width: Integers) -> Integers:
        # Integer forms of min(H, W * 4/3) and min(W, H * 4/3), for what no try fits.
        box_height, box_width = np.minimum(height, width * 4 // 3), np.minimum(width, height * 4 // 3)
        missing = np.arange(len(words))
        for place in range(_SIZES, self.words, 2):
            tried = self._try(words[missing, place], words[missing, place + 1], height[missing] * width[missing])
            fits = (tried > 0).all(0) & (tried[0] <= height[missing]) & (tried[1] <= width[missing])
            box_height[missing[fits]], box_width[missing[fits]] = tried[:, fits]
            missing = missing[~fits]
            if not len(missing):
                break
        room = height - box_height, width - box_width
        top, left = (_multiple(words[:, 1 + i], room[i] + 1) for i in (0, 1))
        top[missing], left[missing] = (room[i][missing] // 2 for i in (0, 1))
        return np.stack([top, left, np.maximum(box_height, 1), np.maximum(box_width, 1)], 1)

    def _try(self, area: NDArray[np.uint64], aspect: NDArray[np.uint64], whole: Integers) -> Integers:
        """Heights and widths [2, n] of boxes from their two words and the areas of the images, fitting or not."""
        # Only +, *, / and sqrt are used, which IEEE 754 rounds alike everywhere.
        areas = whole * (self.least + (self.most - self.least) * fraction(area))
        aspects = _ASPECTS[(aspect >> np.uint64(52)).astype(np.int64)]
        sides: Integers = np.rint(np.sqrt(np.stack([areas / aspects, areas * aspects]))).astype(np.int64)
        return sides


@dataclass(frozen=True)
class Flip:
    """Mirror left to right with probability p. In the spread sequence, p = 0.5 mirrors exactly every second view."""

    p: float = argument(0.5, 0, 1)

    name: ClassVar[str] = "flip"
    stage: ClassVar[Stage] = "geometry"
    stream: ClassVar[int] = 0
    words: ClassVar[int] = 1

    @property
    def steps(self) -> Mapping[int, int]:
        """The steps of the spread sequence that are not the usual ones: half a turn makes word 0 alternate."""
        return {0: 2**63} if self.p == 0.5 else {}

    def flips(self, words: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which samples are mirrored, bool [n]."""
        return chance(words[:, 0], self.p)


def geometry(
    rule: Geometry,
    flip: Flip | None,
    seed: int,
    stream: int,
    view: int,
    samples: Samples,
    sizes: NDArray[np.int32],
    sequence: SequenceName = "random",
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Draw the boxes int32 [n, 4] and flips bool [n] of n samples, which may be a range or any samples in any order.

    stream: the second word of the key, that of the rules or one of teaching. sizes [n, 2]: height and width of each
    sample's image. Beside the result, memory does not depend on n.
    """
    n = len(samples)
    boxes, flips = np.empty((n, 4), np.int32), np.zeros(n, np.bool_)
    for start in range(0, n, _PIECE):
        piece = slice(start, start + _PIECE)
        steps = flip.steps if flip else {}
        drawn = words(seed, stream, view, samples[piece], rule.words, sequence, steps)
        boxes[piece] = rule.boxes(drawn, sizes[piece, 0].astype(np.int64), sizes[piece, 1].astype(np.int64))
        if flip:
            flips[piece] = flip.flips(drawn)
    return boxes, flips


def _multiple(words: NDArray[np.uint64], bound: Integers) -> Integers:
    """Make each word a number from 0 to its bound - 1."""
    return np.floor(fraction(words) * bound).astype(np.int64)
