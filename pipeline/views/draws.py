"""Draws random numbers for each sample, and has the rules that make boxes of them.

The numbers are raw Philox 4x64 words mapped by our own formula, since NumPy keeps the raw stream stable between
versions but not its distributions. The key is (seed, stream) and the counter is (the sample's first block, view), so
any range of samples is drawn without the others.

In all rules, u [n, 4 * blocks] holds each sample's numbers in [0, 1), where number 0 is left for the flip. height
and width are int64 [n].
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

WORDS = 4  # in one Philox block
_TRIES = 10
# torchvision's RandomResizedCrop: area 8-100%, aspect 3/4-4/3 log-uniform. The aspect is one of 4,096 values rounded
# to 2^-20, because exp differs between machines in the last bit and a box must not.
_AREA = (0.08, 1.0)
_ASPECTS = np.array(
    [round(math.exp((2 * (i + 0.5) / 4096 - 1) * math.log(4 / 3)) * 2**20) / 2**20 for i in range(4096)]
)


def below(words: NDArray[np.uint64], bound: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Make each word a number from 0 to bound - 1, all as probable; bound, one or one a word, is at most 2^31."""
    return ((words >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)


def chance(words: NDArray[np.uint64], p: float) -> NDArray[np.bool_]:
    """Whether each word says yes, which it does with probability p from 0 to 1 (in steps of 2^-53)."""
    return (words >> np.uint64(11)) < np.uint64(round(p * 2**53))


def uniforms(seed: int, stream: int, view: int, samples: range, blocks: int) -> NDArray[np.float64]:
    """Draw the numbers [n, 4 * blocks]: multiples of 2^-53 in [0, 1)."""
    counter = np.array([samples.start * blocks, view, 0, 0], np.uint64)
    philox = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)
    raw = philox.random_raw(len(samples) * blocks * WORDS).reshape(len(samples), blocks * WORDS)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Geometry(Protocol):
    """A rule for boxes."""

    @property
    def blocks(self) -> int:
        """How many Philox blocks a sample takes."""

    @property
    def resizes(self) -> bool:
        """Whether boxes are of other sizes than their images, so that they have to be resized."""

    def margin(self, height: int, width: int) -> int:
        """How many pixels beyond the edge of an image a box may reach."""

    def boxes(self, u: NDArray[np.float64], height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
        """The boxes [n, 4]: top, left, height and width in source pixels."""


class Whole:
    """The whole image."""

    blocks, resizes = 1, False

    def margin(self, height: int, width: int) -> int:
        return 0

    def boxes(self, u: NDArray[np.float64], height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack([np.zeros_like(height), np.zeros_like(height), height, width], 1)


class Crop:
    """A box of the image's own size, moved by up to an eighth of the shorter side."""

    blocks, resizes = 1, False

    def margin(self, height: int, width: int) -> int:
        return max(1, min(height, width) // 8)

    def boxes(self, u: NDArray[np.float64], height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
        pad = np.maximum(1, np.minimum(height, width) // 8)
        top, left = (np.floor(u[:, i] * (2 * pad + 1)).astype(np.int64) - pad for i in (1, 2))
        return np.stack([top, left, height, width], 1)


class ResizedCrop:
    """The first of ten random boxes that fits; else the largest central box of an allowed aspect."""

    blocks, resizes = 1 + 2 * _TRIES // WORDS, True

    def margin(self, height: int, width: int) -> int:
        return 0

    def boxes(self, u: NDArray[np.float64], height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
        # Only +, *, / and sqrt are used, which IEEE 754 rounds alike everywhere.
        low, high = _AREA
        area = (height * width)[:, None] * (low + (high - low) * u[:, WORDS::2])
        aspect = _ASPECTS[np.floor(u[:, WORDS + 1 :: 2] * len(_ASPECTS)).astype(np.int64)]
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
        chosen = np.arange(len(u)), fits.argmax(1)
        found = fits.any(1)
        # Integer forms of min(W, H * 4/3) and min(H, W * 4/3).
        box_h = np.where(found, h[chosen], np.minimum(height, width * 4 // 3))
        box_w = np.where(found, w[chosen], np.minimum(width, height * 4 // 3))
        top = np.where(found, np.floor(u[:, 1] * (height - box_h + 1)).astype(np.int64), (height - box_h) // 2)
        left = np.where(found, np.floor(u[:, 2] * (width - box_w + 1)).astype(np.int64), (width - box_w) // 2)
        return np.stack([top, left, np.maximum(box_h, 1), np.maximum(box_w, 1)], 1)
