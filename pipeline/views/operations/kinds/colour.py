"""The operations on colours that a policy names with their arguments: color, gray, solarize, blur and three.

What is drawn has the distributions of torchvision's transforms, and applying gives the bits of Pillow's operations
(brightness, contrast, saturation, gray, solarize) or of the exact formula, rounded (hue).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.pipeline.views.draws import below, chance
from kdcache.pipeline.views.operations.operation import Drawn, Stage, argument
from kdcache.pipeline.views.operations.pixels import (
    ONE,
    SMOOTHED,
    blend,
    by_loop,
    gray,
    in_loops,
    on_device,
    on_rows,
    smooth,
)

_SEXTANT = 1024  # steps of hue in a sixth of the circle
_CIRCLE = 6 * _SEXTANT
_PARTS = ("brightness", "contrast", "saturation", "hue")
_ORDERS = np.array(list(itertools.permutations(range(len(_PARTS)))))
_SIGMAS = 255  # steps between the weakest blur and the strongest
# Standard deviations in pixels of an image of 224: SimCLR's (arXiv 2002.05709), which DeiT III has too.
_WEAKEST, _STRONGEST, _SIDE = Decimal("0.1"), Decimal(2), 224


@dataclass(frozen=True)
class Color:
    """Change brightness, contrast, saturation and hue in a random order: torchvision's ColorJitter.

    The factors of the first three are uniform from max(0, 1 - argument) to 1 + argument, and the turn of the hue from
    -argument to argument of the circle. The defaults are those of DeiT III (arXiv 2204.07118).
    """

    name: ClassVar[str] = "color"
    stage: ClassVar[Stage] = "colour"
    stream: ClassVar[int] = 2
    words: ClassVar[int] = 4

    brightness: float = argument(0.3, 0, 10)
    contrast: float = argument(0.3, 0, 10)
    saturation: float = argument(0.3, 0, 10)
    hue: float = argument(0.0, 0, 0.5)

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        """brightness, contrast, saturation [n]: factors in steps of 1 / 1024. hue [n]: in steps of 1 / 6144 of the
        circle. order [n]: which of the 24 orders, in which permutations of the four are listed.
        """
        drawn: dict[str, NDArray[Any]] = {}
        for i, name in enumerate(_PARTS):
            middle, unit = (0, _CIRCLE) if name == "hue" else (ONE, ONE)
            away = round(getattr(self, name) * unit)
            least = -away if name == "hue" else max(0, middle - away)
            drawn[name] = (below(words[:, i], middle + away - least + 1) + least).astype(np.int16)
        low = words[:, 0] << np.uint64(32)  # the half of the word that the brightness has left
        drawn["order"] = below(low, len(_ORDERS)).astype(np.uint8)
        return drawn

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        order = _ORDERS[drawn["order"]]
        if in_loops(images):
            from kdcache.pipeline.views.operations.kinds import colourloops  # imports numba, which takes its time

            factors = np.stack([drawn[name].astype(np.int64) for name in _PARTS], 1)
            return by_loop(images, colourloops.jitter, order, factors)
        for place, (part, name) in itertools.product(range(len(_PARTS)), enumerate(_PARTS)):
            neutral = 0 if name == "hue" else ONE
            rows = np.flatnonzero((order[:, place] == part) & (drawn[name] != neutral))
            images = on_rows(images, rows, partial(_adjust, name, drawn[name]))
        return images


@dataclass(frozen=True)
class Gray:
    """Take away the colours with probability p: torchvision's RandomGrayscale. The default is SimCLR's."""

    name: ClassVar[str] = "gray"
    stage: ClassVar[Stage] = "colour"
    stream: ClassVar[int] = 3
    words: ClassVar[int] = 1

    p: float = argument(0.2, 0, 1)

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        """gray [n]: 1 where the colours go."""
        return {"gray": chance(words[:, 0], self.p).astype(np.uint8)}

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        if in_loops(images):
            from kdcache.pipeline.views.operations.kinds import colourloops

            return by_loop(images, colourloops.take_colour, drawn["gray"] > 0)
        return on_rows(images, np.flatnonzero(drawn["gray"]), lambda some, _: _without_colour(some))


@dataclass(frozen=True)
class Solarize:
    """Invert the values from 128 on, with probability p: torchvision's RandomSolarize. The default is BYOL's."""

    name: ClassVar[str] = "solarize"
    stage: ClassVar[Stage] = "colour"
    stream: ClassVar[int] = 4
    words: ClassVar[int] = 1

    p: float = argument(0.2, 0, 1)

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        """solarize [n]: 1 where values are inverted."""
        return {"solarize": chance(words[:, 0], self.p).astype(np.uint8)}

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        # The lesser of a value and its inverse is the inverse from 128 on.
        return on_rows(images, np.flatnonzero(drawn["solarize"]), lambda some, _: torch.minimum(some, ~some))


@dataclass(frozen=True)
class Blur:
    """Smooth with a Gaussian, with probability p. The default is SimCLR's.

    The standard deviation is uniform from 0.1 to 2 pixels of an image with a shorter side of 224, and as large a
    fraction of the shorter side of any other: an image of 32 pixels hardly changes.
    """

    name: ClassVar[str] = "blur"
    stage: ClassVar[Stage] = "colour"
    stream: ClassVar[int] = 5
    words: ClassVar[int] = 2

    p: float = argument(0.5, 0, 1)

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        """sigma [n]: 0 where nothing is blurred, or which of the 255 standard deviations, from 1."""
        return {"sigma": (_sigmas(words[:, 1]) * chance(words[:, 0], self.p)).astype(np.uint8)}

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        side = min(images.shape[2:])
        kernels = {int(sigma): kernel(int(sigma), side) for sigma in np.unique(drawn["sigma"]) if sigma}
        if in_loops(images):
            return _smoothed(images, drawn["sigma"], kernels)
        # Kernels of the same reach are applied together; those that reach no other pixel change nothing.
        for reach in sorted({len(weights) - 1 for weights in kernels.values()} - {0}):
            table = np.zeros((_SIGMAS + 1, reach + 1), np.int32)
            for sigma, weights in kernels.items():
                if len(weights) == reach + 1:
                    table[sigma] = weights
            of_rows = table[drawn["sigma"]]
            rows = np.flatnonzero(of_rows[:, 0])
            images = on_rows(images, rows, partial(_smooth, of_rows))
        return images


@dataclass(frozen=True)
class Three:
    """Do one of gray, solarize and blur, each as often: DeiT III's ThreeAugment (arXiv 2204.07118)."""

    name: ClassVar[str] = "three"
    stage: ClassVar[Stage] = "colour"
    stream: ClassVar[int] = 6
    words: ClassVar[int] = 2

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        """gray, solarize and sigma [n], as the three draw them; one of them is not 0."""
        which = below(words[:, 0], 3)
        drawn = {"gray": which == 0, "solarize": which == 1, "sigma": _sigmas(words[:, 1]) * (which == 2)}
        return {name: array.astype(np.uint8) for name, array in drawn.items()}

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        for operation in (Gray(), Solarize(), Blur()):
            images = operation.apply(images, drawn)
        return images


def _adjust(part: str, of_all: NDArray[np.int16], images: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Apply one of the four parts of `Color` to some rows of a batch that has these factors."""
    factors = of_all[rows]
    if part == "brightness":
        return blend(images, 0, factors)
    if part == "hue":
        return _turn(images, factors)
    levels = gray(images)
    if part == "contrast":
        levels = _mean(levels)
    return blend(images, levels, factors)


def _smoothed(images: Tensor, sigmas: NDArray[np.uint8], kernels: Mapping[int, Sequence[int]]) -> Tensor:
    """Images on a CPU, smoothed by the kernels of their sigmas [B]; 0 has none."""
    from kdcache.pipeline.views.operations.kinds import colourloops

    reaches = np.zeros(_SIGMAS + 1, np.int64)
    for sigma, weights in kernels.items():
        reaches[sigma] = len(weights) - 1
    table = np.zeros((_SIGMAS + 1, reaches.max() + 1), np.int32)
    for sigma, weights in kernels.items():
        table[sigma, : len(weights)] = weights
    return by_loop(images, colourloops.smooth, table[sigmas], reaches[sigmas])


def _smooth(of_all: NDArray[np.int32], images: Tensor, rows: NDArray[np.int64]) -> Tensor:
    return smooth(images, of_all[rows])


def _mean(levels: Tensor) -> Tensor:
    """The mean of each image, to the nearest: [n, 1, H, W] to [n, 1, 1, 1]."""
    values = levels.flatten(1)
    count = values.shape[1]
    twice = values.sum(1, dtype=torch.int64).mul_(2).add_(count)
    return twice.div(2 * count, rounding_mode="floor").view(-1, 1, 1, 1)


def _turn(images: Tensor, steps: NDArray[np.int16]) -> Tensor:
    """Turn the hue by `steps` [n] of 1 / 6144 of the circle. Value and saturation of HSV stay, as in colorsys.

    All is multiplied by the chroma, the difference of a pixel's largest and smallest value, so that nothing has to be
    divided: the result is the exact one, rounded to the nearest.
    """
    red, green, blue = (channel.to(torch.int32).flatten(1) for channel in images.unbind(1))
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # The hue in sextants, from -3 to 3: red is 0, green 2 and blue -2. First as if blue had the largest value.
    hue = (red - green).sub_(chroma, alpha=2)
    if_green, if_red = (blue - red).add_(chroma, alpha=2).sub_(hue), green - blue
    hue.addcmul_(if_green, green.eq_(value))
    hue.addcmul_(if_red.sub_(hue), red.eq_(value)).mul_(_SEXTANT)
    hue.addcmul_(chroma, on_device(steps, images.device).unsqueeze(1))  # now from -6 to 6
    chroma.mul_(_SEXTANT)
    most = value.mul_(_SEXTANT).add_(_SEXTANT // 2)
    least, rise, circle = most - chroma, most.sub(chroma, alpha=2), 6 * chroma
    result = torch.empty_like(images)
    for channel, opposite in zip(result.unbind(1), (3, 1, -1), strict=True):
        # A channel has its least value up to a sextant away from the hue opposite to it, and its largest from two on.
        away = hue.add(chroma, alpha=opposite).abs_()
        away = torch.minimum(away, (away - circle).abs_()).add_(rise)
        turned = torch.minimum(torch.maximum(away, least), most).bitwise_right_shift_(_SEXTANT.bit_length() - 1)
        channel.copy_(turned.to(torch.uint8).view(channel.shape))
    return result


def _without_colour(images: Tensor) -> Tensor:
    levels = gray(images)[:, 0].to(torch.uint8)
    result = torch.empty_like(images)
    for channel in result.unbind(1):
        channel.copy_(levels)
    return result


def _sigmas(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    return below(words, _SIGMAS) + 1


def deviation(sigma: int, side: int) -> Decimal:
    """The standard deviation in pixels that a drawn sigma from 1 to 255 stands for, if `side` is the shorter side."""
    return (_WEAKEST + (_STRONGEST - _WEAKEST) * (2 * sigma - 1) / (2 * _SIGMAS)) * side / _SIDE


@lru_cache(2**14)
def kernel(sigma: int, side: int) -> tuple[int, ...]:
    """The weights of a Gaussian for a pixel and those next to it on one side, up to three standard deviations away.

    They are in steps of 1 / SMOOTHED. Decimals are used since their exp is the same on every machine.
    """
    with localcontext(Context(prec=30, rounding=ROUND_HALF_EVEN)):
        wide = deviation(sigma, side)
        reach = int((3 * wide).to_integral_value(ROUND_CEILING))
        heights = [(-(Decimal(away) ** 2) / (2 * wide**2)).exp() for away in range(reach + 1)]
        total = heights[0] + 2 * sum(heights[1:])
        others = [int((height * SMOOTHED / total).to_integral_value()) for height in heights[1:]]
    while others and not others[-1]:
        others.pop()
    return (SMOOTHED - 2 * sum(others), *others)
