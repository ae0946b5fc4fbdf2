"""Mixed images: two samples blended (mixup), or a box of the one pasted into the other (cutmix).

mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018. cutmix: Yun et al., "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features", 2019. Both of a pair are mixed by the same weight and
box, as in torchvision's and timm's batches: the one image is w x + (1 - w) y, the other one w y + (1 - w) x. Who is
mixed with whom is in cache/records/pairs.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.errors import InputError
from kdcache.pipeline.views.draws import below
from kdcache.pipeline.views.operations.beta import THRESHOLDS
from kdcache.pipeline.views.operations.boxes import SIDE, edges, paste
from kdcache.pipeline.views.operations.operation import Drawn, Stage, argument
from kdcache.pipeline.views.operations.pixels import dense, flat, on_device

_CPU_PIECE = 2**18  # values that are blended at once on a CPU, whose cache holds them
_AT_ONCE = 1 << 16  # images whose labels are weighed at once
WHOLE = 256  # the weight of an image that is not blended
# The side of a box whose area is the part of the image that a weight leaves: sqrt(1 - weight / 256), in 1/65536.
_SIDES = np.array([isqrt((WHOLE - weight) << 24) for weight in range(WHOLE + 1)])


class Mix(Protocol):
    """A way to mix two images. `name`, `stage` and `stream` as for an `Operation` on single images."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    stream: ClassVar[int]

    @property
    def words(self) -> int:
        """How many random words a pair takes in each view."""

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        """How n pairs are mixed, from random words uint64 [n, self.words]; row i depends on row i of the words alone.

        weight uint16 [n]: of a sample's own image in the blend, in 1/256; its partner's has the rest. box int32
        [n, 4]: top, left, bottom and right of what is pasted from the partner, in 1/65536 of the side.
        """


@dataclass(frozen=True)
class Mixup:
    """A blend of two images, whose weight is drawn from Beta(alpha, alpha)."""

    alpha: float = argument(0.8, 0.1, 4)

    name: ClassVar[str] = "mixup"
    stage: ClassVar[Stage] = "mix"
    stream: ClassVar[int] = 10
    words: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _thresholds(self.alpha)

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        weight = beta_weights(words[:, 0], self.alpha).astype(np.uint16)
        return {"weight": weight, "box": np.zeros((len(words), 4), np.int32)}


@dataclass(frozen=True)
class Cutmix:
    """A box of the partner's image pasted in.

    Its area is 1 less a draw of Beta(alpha, alpha), its middle is anywhere, and what lies beyond the edge is cut off.
    """

    alpha: float = argument(1.0, 0.1, 4)

    name: ClassVar[str] = "cutmix"
    stage: ClassVar[Stage] = "mix"
    stream: ClassVar[int] = 11
    words: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _thresholds(self.alpha)

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        half = _SIDES[beta_weights(words[:, 0], self.alpha)] // 2
        middle = below(words[:, 1:], SIDE)
        first, last = np.maximum(middle - half[:, None], 0), np.minimum(middle + half[:, None], SIDE)
        box = np.concatenate([first, last], 1).astype(np.int32)
        return {"weight": np.full(len(words), WHOLE, np.uint16), "box": box}


def beta_weights(words: NDArray[np.uint64], alpha: float) -> NDArray[np.int64]:
    """Draws [n] of Beta(alpha, alpha), rounded to 1/256, from random words [n]: from 0 to 256."""
    return np.searchsorted(_thresholds(alpha), words >> np.uint64(32), side="right").astype(np.int64)


def mixed(images: Tensor, partners: Tensor, drawn: Drawn) -> Tensor:
    """Mix images with those of their partners, both uint8 [B, 3, H, W], as drawn for B pairs (see `Mix.draw`).

    The images stay as they are. The result has their memory format.
    """
    images = dense(images)
    layout = torch.channels_last if images.stride(1) == 1 else torch.contiguous_format
    result, partners = torch.empty_like(images), partners.contiguous(memory_format=layout)
    rows = np.flatnonzero(drawn["weight"] < WHOLE)  # known on the host, so that a GPU need not be waited for
    if images.device.type == "cpu":
        # By NumPy: threads of torch wait for each other, for long where others are at work on the same cores.
        flat(result).numpy()[:] = flat(images).numpy()
        _blend_rows(flat(result).numpy(), flat(partners).numpy(), drawn["weight"], rows)
    else:
        result.copy_(images)
        if len(rows):
            _blend(flat(result), flat(partners), drawn["weight"])
    paste(result, drawn["box"], partners)
    return result


def label_weights(drawn: Drawn, height: int, width: int) -> NDArray[np.float32]:
    """The parts [n, 2] that an image and its partner's have in images mixed at this size; both together are 1.

    The partner's box counts by its true area in pixels.
    """
    whole = height * width * WHOLE
    parts = np.empty((len(drawn["weight"]), 2), np.float32)
    for start in range(0, len(parts), _AT_ONCE):
        piece = slice(start, start + _AT_ONCE)
        top, left, bottom, right = edges(drawn["box"][piece], height, width).T
        own = (height * width - (bottom - top) * (right - left)) * drawn["weight"][piece].astype(np.int64)
        parts[piece, 0], parts[piece, 1] = own / whole, (whole - own) / whole
    return parts


def _blend(values: Tensor, other: Tensor, weights: NDArray[np.uint16]) -> None:
    """Make values [n, pixels] (values * w + other * (256 - w) + 128) >> 8.

    Sums reach 65,408, so that int16 holds them modulo 2^16; the shift leaves the right eight bits in the lower byte.
    """
    weight = on_device(weights.astype(np.int16), values.device, torch.int16).unsqueeze(1)
    summed = (values * weight).add_(other * (WHOLE - weight))
    values.copy_(summed.add_(WHOLE // 2).bitwise_right_shift_(8))


def _blend_rows(
    values: NDArray[np.uint8], other: NDArray[np.uint8], weights: NDArray[np.uint16], rows: NDArray[np.int64]
) -> None:
    """The same on a CPU, for some rows."""
    each = max(1, _CPU_PIECE // values.shape[1])
    first, second = np.empty((2, each, values.shape[1]), np.uint16)
    for start in range(0, len(rows), each):
        some = rows[start : start + each]
        a, b, weight = first[: len(some)], second[: len(some)], weights[some, None]
        a[:], b[:] = values[some], other[some]
        a *= weight
        b *= np.uint16(WHOLE) - weight
        a += b
        a += np.uint16(WHOLE // 2)
        a >>= np.uint16(8)
        values[some] = a


@lru_cache
def _thresholds(alpha: float) -> NDArray[np.uint64]:
    """For k = 0..255 the probability that a draw is at most k, in 2^-32. InputError for an alpha that has no table."""
    if alpha not in THRESHOLDS:
        known = ", ".join(f"{a:g}" for a in THRESHOLDS)
        raise InputError(f"mixup and cutmix have no table of Beta({alpha:g}, {alpha:g}): take an alpha of {known}")
    lower = np.array(THRESHOLDS[alpha].split(), np.uint64)
    return np.concatenate([lower, np.uint64(2**32) - lower[::-1]])  # the distribution is symmetric
