"""What color, gray and blur do to pixels on a CPU: the results of `colour` and `pixels`, bit for bit.

Images are uint8 [B, H, W, 3]. `colour` and `pixels` say where constants and roundings come from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.pipeline.views.operations.compiled import compiled, inner

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the parts of color, in the order of `colour`
_SHIFT, _ONE, _SEXTANT = 10, 1024, 1024


@inner
def _gray(red, green, blue):  # type: ignore[no-untyped-def]
    return np.int32(np.uint32(red * 19595 + green * 38470 + blue * 7471 + 2**15) >> np.uint32(16))


@inner
def _cut_off(level):  # type: ignore[no-untyped-def]
    return np.uint8(min(max(level, 0), 255))


@inner
def _blend(values, weight, rest):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        values[i] = _cut_off(np.int32(np.int32(values[i] * weight) + rest) >> _SHIFT)


@inner
def _mean(image):  # type: ignore[no-untyped-def]
    """The mean luminance, to the nearest."""
    values = image.reshape(-1)
    total, area = 0, len(values) // 3
    for i in range(0, len(values), 3):
        total += _gray(values[i], values[i + 1], values[i + 2])
    return (2 * total + area) // (2 * area)


@inner
def _saturate(image, weight):  # type: ignore[no-untyped-def]
    rests = np.empty((image.shape[1], 3), np.int32)
    for y in range(image.shape[0]):  # in two loops, each of which becomes vector instructions
        row, values, rest = image[y], image[y].reshape(-1), rests.reshape(-1)
        for x in range(len(row)):
            level = np.int32(_gray(row[x, 0], row[x, 1], row[x, 2]) * np.int32(_ONE - weight))
            rests[x, 0], rests[x, 1], rests[x, 2] = level, level, level
        for x in range(len(values)):
            values[x] = _cut_off(np.int32(np.int32(values[x] * weight) + rest[x]) >> _SHIFT)


@inner
def _channel(hue, chroma, most, opposite, turned):  # type: ignore[no-untyped-def]
    """Make a channel of pixels from their hues; all is multiplied by the chroma and by 1024."""
    for x in range(len(turned)):
        away = abs(np.int32(hue[x] + np.int32(chroma[x] * opposite)))
        away = min(away, abs(np.int32(away - np.int32(6 * chroma[x]))))
        away = np.int32(away + np.int32(most[x] - np.int32(2 * chroma[x])))
        turned[x] = min(max(away, np.int32(most[x] - chroma[x])), most[x]) >> _SHIFT


@inner
def _turn(image, steps):  # type: ignore[no-untyped-def]
    """Turn the hue by steps of 1 / 6144 of the circle."""
    width = image.shape[1]
    reds, greens, blues = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int32)
    hue, chroma, most = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int32)
    for y in range(image.shape[0]):  # in several loops, which become vector instructions
        row = image[y]
        for x in range(width):
            reds[x], greens[x], blues[x] = row[x, 0], row[x, 1], row[x, 2]
        for x in range(width):
            red, green, blue = reds[x], greens[x], blues[x]
            value = max(max(red, green), blue)
            span = np.int32(value - min(min(red, green), blue))
            turn = np.int32(np.int32(red - green) - np.int32(2 * span))
            turn = np.int32(np.int32(blue - red) + np.int32(2 * span)) if green == value else turn
            turn = np.int32(green - blue) if red == value else turn
            hue[x] = np.int32(np.int32(turn * _SEXTANT) + np.int32(span * steps))
            chroma[x] = np.int32(span * _SEXTANT)
            most[x] = np.int32(np.int32(value * _SEXTANT) + _SEXTANT // 2)
        _channel(hue, chroma, most, np.int32(3), reds)
        _channel(hue, chroma, most, np.int32(1), greens)
        _channel(hue, chroma, most, np.int32(-1), blues)
        for x in range(width):
            row[x, 0], row[x, 1], row[x, 2] = np.uint8(reds[x]), np.uint8(greens[x]), np.uint8(blues[x])


@compiled("void(u1[:,:,:,::1], i8[:,::1], i8[:,::1])")
def jitter(images: NDArray[np.uint8], orders: NDArray[np.int64], factors: NDArray[np.int64]) -> None:
    """Change the parts of color in the order of each image [B, 4], by their factors [B, 4], in place."""
    for b in range(len(images)):
        image, values = images[b], images[b].reshape(-1)
        for k in range(4):
            part = orders[b, k]
            factor = np.int32(factors[b, part])
            if part == HUE:
                if factor != 0:
                    _turn(image, factor)
            elif factor != _ONE:
                if part == BRIGHTNESS:
                    _blend(values, factor, np.int32(0))
                elif part == CONTRAST:
                    _blend(values, factor, np.int32(_mean(image) * (_ONE - factor)))
                else:
                    _saturate(image, factor)


@inner
def _take_colour(image, levels):  # type: ignore[no-untyped-def]
    for y in range(len(image)):
        row = image[y]
        for x in range(len(row)):
            levels[x] = np.uint8(_gray(row[x, 0], row[x, 1], row[x, 2]))
        for x in range(len(row)):
            row[x, 0], row[x, 1], row[x, 2] = levels[x], levels[x], levels[x]


@compiled("void(u1[:,:,:,::1], b1[::1])")
def take_colour(images: NDArray[np.uint8], chosen: NDArray[np.bool_]) -> None:
    """Make the chosen images [B] gray, in place."""
    levels = np.empty(images.shape[2], np.uint8)
    for b in range(len(images)):
        if chosen[b]:
            _take_colour(images[b], levels)


@inner
def _mirrored(place, side):  # type: ignore[no-untyped-def]
    """A place beyond an edge is as far inside of it."""
    return -place if place < 0 else 2 * (side - 1) - place if place >= side else place


@inner
def _weigh(summed, before, after, weight):  # type: ignore[no-untyped-def]
    for i in range(len(summed)):
        summed[i] = np.int32(summed[i] + np.int32(np.int32(before[i]) + np.int32(after[i])) * weight)


@inner
def _smooth(image, target, weights):  # type: ignore[no-untyped-def]
    height, width, _ = image.shape
    reach, length = len(weights) - 1, 3 * width
    padded, summed = np.empty((width + 2 * reach, 3), np.int32), np.empty(length, np.int32)
    line = padded.reshape(-1)
    middle = line[3 * reach : 3 * reach + length]
    for y in range(height):
        row, out = image[y].reshape(-1), target[y].reshape(-1)
        for i in range(length):
            summed[i] = np.int32(row[i] * weights[0])
        for away in range(1, reach + 1):
            above, below = image[_mirrored(y - away, height)], image[_mirrored(y + away, height)]
            _weigh(summed, above.reshape(-1), below.reshape(-1), weights[away])
        for i in range(length):
            middle[i] = np.int32(summed[i] + 2**8) >> 9
        for away in range(1, reach + 1):
            for channel in range(3):
                padded[reach - away, channel] = padded[reach + away, channel]
                padded[reach + width - 1 + away, channel] = padded[reach + width - 1 - away, channel]
        for i in range(length):
            summed[i] = np.int32(middle[i] * weights[0])
        for away in range(1, reach + 1):
            left, right = line[3 * (reach - away) :], line[3 * (reach + away) :]
            _weigh(summed, left[:length], right[:length], weights[away])
        for i in range(length):
            out[i] = np.uint8(np.int32(summed[i] + 2**22) >> 23)


@compiled("void(u1[:,:,:,::1], i4[:,::1], i8[::1])")
def smooth(images: NDArray[np.uint8], kernels: NDArray[np.int32], reaches: NDArray[np.int64]) -> None:
    """Smooth images in place, each by its kernel [B, 1 + r], of which the weights up to its reach [B] are taken.

    A reach of 0 leaves the image as it is. Kernels are as for `pixels.smooth`.
    """
    spare = np.empty(images.shape[1:], np.uint8)
    smoothed = spare.reshape(-1)
    for b in range(len(images)):
        if reaches[b] > 0:
            _smooth(images[b], spare, kernels[b, : reaches[b] + 1])
            values = images[b].reshape(-1)
            for i in range(len(values)):
                values[i] = smoothed[i]
