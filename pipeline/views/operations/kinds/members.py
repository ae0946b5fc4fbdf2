"""What the members of TrivialAugment and RandAugment do to pixels: moving them, changing their tones, sharpening.

Pixels are uint8 [b, H, W, 3]. Results are those of torchvision.transforms.v2.functional on uint8 tensors, computed
exactly and cut off where torchvision cuts off float32, which falls one level short where the exact value is whole.

Matrices int64 [b, 2, 3] say where pixels come from, in units of 2^-20 pixels: row 0 times (column, row, 1) is the
column, row 1 times it is the row, both with the half pixel added already, so that a shift by 20 bits rounds them.
Strengths int64 [b], on the host, are whole thousandths: 1000 leaves an image as it is.

Coefficients are rounded once, from exact fractions or from sines that lie far from a tie; whatever follows is integer
arithmetic.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.pipeline.views.operations.pixels import on_device

LEVELS = 30  # levels go from 0, or from minus this, to this
BITS = 20
ONE = 1 << BITS

Levels = NDArray[np.int64]  # [n]
Matrices = NDArray[np.int64]  # [n, 2, 3]
Strengths = NDArray[np.int64]  # [n]


def _unmoved(count: int) -> Matrices:
    """Matrices of images that stay as they are."""
    matrices = np.zeros((count, 2, 3), np.int64)
    matrices[:, 0, 0] = matrices[:, 1, 1] = ONE
    matrices[:, :, 2] = ONE // 2
    return matrices


def sheared(level: Levels, axis: int, thousandths: int) -> Matrices:
    """Shear along an axis (0: the columns) from the corner: by this many thousandths a pixel and level.

    For sides of up to 500 pixels the nearest pixels are those of the exact fractions, ties going up.
    """
    slope = (level * thousandths * ONE + 500) // 1000
    matrices = _unmoved(len(level))
    matrices[:, axis, 1 - axis] = slope
    # Half a pixel of slope to the centre of the first pixel, and half of the distance to the nearest place that is no
    # tie, which is more than what rounding has done to the slope.
    matrices[:, axis, 2] += (slope >> 1) + ONE // 4000
    return matrices


def shifted(level: Levels, axis: int, side: int, step: Fraction) -> Matrices:
    """Shift along an axis (0: the columns) by whole pixels: step * level * side, without its fraction."""
    pixels = np.abs(level) * step.numerator * side // step.denominator
    matrices = _unmoved(len(level))
    matrices[:, axis, 2] -= np.sign(level) * pixels * ONE
    return matrices


def turned(level: Levels, height: int, width: int, degrees: Fraction) -> Matrices:
    """Turn counter-clockwise about the centre by this many degrees a level."""
    cosine, sine = (waves[level + LEVELS] for waves in sines(degrees))
    across, down = width - 1, height - 1
    matrices = _unmoved(len(level))
    matrices[:, 0, 0], matrices[:, 0, 1] = cosine, -sine
    matrices[:, 1, 0], matrices[:, 1, 1] = sine, cosine
    matrices[:, 0, 2] += (across * ONE - cosine * across + sine * down) >> 1
    matrices[:, 1, 2] += (down * ONE - sine * across - cosine * down) >> 1
    return matrices


@lru_cache
def sines(degrees: Fraction) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cosine and sine of every level's angle, in units of 2^-20.

    Not one lies within 0.001 units of a tie, so that every machine's sine, right to 14 digits, gives the same.
    """
    angles = [math.radians(float(level * degrees)) for level in range(-LEVELS, LEVELS + 1)]
    cosine, sine = ([round(wave(angle) * ONE) for angle in angles] for wave in (math.cos, math.sin))
    return np.array(cosine, np.int64), np.array(sine, np.int64)


def moved(pixels: Tensor, matrices: Matrices) -> Tensor:
    """Take every pixel from its place: the nearest pixel there, or black beyond the edge."""
    count, height, width, channels = pixels.shape
    # Positions of up to 1,024 pixels on either side fit into 32 bits.
    kind = torch.int32 if max(height, width) <= 500 else torch.int64
    m = on_device(matrices, pixels.device, kind).view(count, 2, 3, 1, 1)
    columns = torch.arange(width, dtype=kind, device=pixels.device)
    rows = torch.arange(height, dtype=kind, device=pixels.device).view(-1, 1)
    x, y = (
        (m[:, i, 0] * columns + (m[:, i, 1] * rows + m[:, i, 2])).bitwise_right_shift_(BITS).clamp_(-1, side)
        for i, side in enumerate((width, height))
    )
    # A black frame of one pixel takes all that lies beyond the edge.
    framed = pixels.new_zeros((count, height + 2, width + 2, channels))
    framed[:, 1:-1, 1:-1] = pixels
    first = torch.arange(count, device=pixels.device).view(-1, 1, 1) * ((height + 2) * (width + 2)) + (width + 3)
    index = y.mul_(width + 2).add_(x).to(torch.int64).add_(first)
    return framed.view(-1, channels).index_select(0, index.view(-1)).view(pixels.shape)


def looked_up(pixels: Tensor, curves: Tensor) -> Tensor:
    """Replace each value by its entry in the image's curves uint8 [b, 1 or 3, 256]: one for all channels or each."""
    return curves.view(-1).index_select(0, _places(pixels, curves.shape[1])).view(pixels.shape)


def _places(pixels: Tensor, curves: int) -> Tensor:
    """Where each value is in b * curves curves, int32 [b * H * W * 3]."""
    count, _, width, channels = pixels.shape
    first = torch.arange(0, 256 * count * curves, 256, dtype=torch.int32, device=pixels.device)
    # Adding whole rows is ten times faster on a CPU than adding three numbers again and again.
    rows = first.view(count, 1, 1, curves).expand(count, 1, width, channels).reshape(count, 1, -1)
    return pixels.flatten(2).to(torch.int32).add_(rows).view(-1)


def gray(pixels: Tensor) -> Tensor:
    """The brightness int32 [b, H, W]: 0.2989 red + 0.587 green + 0.114 blue without its fraction, exactly."""
    red, green, blue = pixels.to(torch.int32).unbind(-1)
    # In units of 2^-22; 260 is more than what rounding has done to the factors, and less than 1/10,000 with it.
    level = (red * 1253677).add_(green, alpha=2462056).add_(blue, alpha=478151)
    return level.add_(260).bitwise_right_shift_(22)


def coloured(pixels: Tensor, strengths: Strengths) -> Tensor:
    """Away from gray, or towards it."""
    weight = _weights(strengths, pixels)
    rest = gray(pixels).mul_(ONE - weight)
    weighted = pixels.flatten(2).to(torch.int32).mul_(weight).view(pixels.shape)
    for channel in weighted.unbind(-1):  # adding to all three at once takes half as long again on a CPU
        channel.add_(rest)
    return _cut_off(weighted)


def sharpened(pixels: Tensor, strengths: Strengths) -> Tensor:
    """Away from the rounded mean of the neighbourhood, or towards it; the outermost pixels stay as they are."""
    count, height, width, channels = pixels.shape
    if min(height, width) <= 2:
        return pixels
    wide = pixels.flatten(2).to(torch.int32)
    centre = wide[:, 1:-1, channels:-channels]
    columns = (wide[:, :-2] + wide[:, 1:-1]).add_(wide[:, 2:])
    total = (columns[..., : -2 * channels] + columns[..., channels:-channels]).add_(columns[..., 2 * channels :])
    mean = total.add_(centre, alpha=4).mul_(80660).add_(ONE // 2).bitwise_right_shift_(BITS)  # total / 13, rounded
    weight = _weights(strengths, pixels)
    inner = _cut_off(mean.mul_(ONE - weight).add_(centre * weight))
    pixels[:, 1:-1, 1:-1] = inner.view(count, height - 2, width - 2, channels)
    return pixels


def _weights(strengths: Strengths, pixels: Tensor) -> Tensor:
    """The strengths in units of 2^-20, int32 [b, 1, 1] on the device."""
    return on_device((strengths * ONE + 500) // 1000, pixels.device).view(-1, 1, 1)


def _cut_off(summed: Tensor) -> Tensor:
    """uint8 of a weighted sum int32 in units of 2^-20, without its fraction; the sum is overwritten."""
    # Half a thousandth more makes whole again what rounding the weight has left below.
    return summed.add_(ONE // 2000).bitwise_right_shift_(BITS).clamp_(0, 255).byte()


def contrasted(pixels: Tensor, strengths: Strengths) -> Tensor:
    """Curves uint8 [b, 1, 256]: away from the image's mean brightness, or towards it."""
    area = pixels.shape[1] * pixels.shape[2]
    total = gray(pixels).flatten(1).sum(1, dtype=torch.int64).view(-1, 1)
    strength = on_device(strengths, pixels.device, torch.int64).view(-1, 1)
    values = torch.arange(256, device=pixels.device) * area * strength + total * (1000 - strength)
    return values.div_(1000 * area, rounding_mode="floor").clamp_(0, 255).byte().unsqueeze(1)


def stretched(pixels: Tensor) -> Tensor:
    """Curves uint8 [b, 3, 256] that stretch each channel over all values; a channel of one value stays as it is."""
    count, height, width, channels = pixels.shape
    rows = pixels.view(count, height, -1)  # reducing these first is five times faster on a CPU
    least = rows.amin(1).view(count, width, channels).amin(1).to(torch.int64).unsqueeze(-1)
    most = rows.amax(1).view(count, width, channels).amax(1).to(torch.int64).unsqueeze(-1)
    values = torch.arange(256, device=pixels.device)
    span = most - least
    factor = torch.div(2**24 - 1, span.clamp(min=1), rounding_mode="floor") + 1  # enough for 255 * 255 / span
    curves = (values - least).clamp_(min=0).mul_(255 * factor).bitwise_right_shift_(24).clamp_(max=255)
    return torch.where(span > 0, curves, values).byte()


def equalized(pixels: Tensor) -> Tensor:
    """Curves uint8 [b, 3, 256] that make all values of a channel about as frequent, by the rule of PIL."""
    count, height, width, channels = pixels.shape
    places = _places(pixels, channels).view(-1)
    histogram = torch.zeros(count * channels * 256, dtype=torch.int32, device=pixels.device)
    histogram.index_add_(0, places, histogram.new_ones(1).expand(len(places)))
    below = histogram.view(count, channels, 256).cumsum(2, dtype=torch.int32)
    # The number of pixels that have not the largest value, in 255 steps.
    step = (below * (below < height * width)).amax(2, keepdim=True).div_(255, rounding_mode="floor")
    curves = torch.zeros_like(below)
    curves[..., 1:] = below[..., :-1]
    curves.add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    return torch.where(step > 0, curves, torch.arange(256, dtype=torch.int32, device=pixels.device)).byte()
