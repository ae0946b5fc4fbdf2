"""What the members of TrivialAugment and RandAugment do to pixels on a CPU: the results of `members`, bit for bit.

An image is changed by one member after the other while the processor's cache holds it. Images are uint8 [H, W, 3],
matrices and strengths are as in `members`, which says why the constants are what they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.pipeline.views.operations.compiled import compiled, inner

# Kinds of change, as `auto` numbers them; 0 is none.
MOVED, CURVED, COLOURED, CONTRASTED, SHARPENED, STRETCHED, EQUALIZED = range(1, 8)
_BITS, _ONE = 20, 1 << 20
_CUT = _ONE // 2000


@inner
def _inside(step, start, side, count):  # type: ignore[no-untyped-def]
    """The first of `count` numbers x, and the one after the last, with 0 <= start + step * x < side in 2^-20."""
    most = side << _BITS
    if step == 0:
        return (0, count) if 0 <= start < most else (0, 0)
    if step > 0:
        first, end = -(start // step), (most - 1 - start) // step + 1
    else:
        first, end = (most - start) // step + 1, start // -step + 1
    return max(first, 0), min(end, count)


@inner
def _copy(source, target):  # type: ignore[no-untyped-def]
    for i in range(len(target)):  # ten times as fast as numba's own copy of a slice
        target[i] = source[i]


@inner
def _blacken(target):  # type: ignore[no-untyped-def]
    for i in range(len(target)):
        target[i] = 0


@inner
def _move(image, target, matrix):  # type: ignore[no-untyped-def]
    """Take every pixel from the nearest place of the matrix, or black from beyond the edge."""
    height, width, _ = image.shape
    pixels, across, down = image.reshape(-1), matrix[0, 0], matrix[1, 0]
    for y in range(height):
        row = target[y].reshape(-1)
        column, line = matrix[0, 1] * y + matrix[0, 2], matrix[1, 1] * y + matrix[1, 2]
        first, end = _inside(across, column, width, width)
        top, bottom = _inside(down, line, height, width)
        first = max(first, top)
        end = max(first, min(end, bottom))
        _blacken(row[: 3 * first])
        _blacken(row[3 * end :])
        some = row[3 * first : 3 * end]
        if down == 0 and across == _ONE:  # the pixels of a row stay together
            shift = column >> _BITS
            _copy(image[line >> _BITS].reshape(-1)[3 * (first + shift) :], some)
        else:
            column, line = column + across * first, line + down * first
            for x in range(0, len(some), 3):
                at = np.uintp(3 * ((line >> _BITS) * width + (column >> _BITS)))
                some[x], some[x + 1], some[x + 2] = pixels[at], pixels[at + np.uintp(1)], pixels[at + np.uintp(2)]
                column, line = column + across, line + down


@inner
def _look_up(values, curve):  # type: ignore[no-untyped-def]
    """Replace all values by their entries in the curve [256]."""
    for i in range(len(values)):
        values[i] = curve[values[i]]


@inner
def _look_up_each(values, curves):  # type: ignore[no-untyped-def]
    """Replace the values of each channel by their entries in its curve [3, 256]."""
    red, green, blue = curves
    for i in range(0, len(values), 3):
        values[i], values[i + 1], values[i + 2] = red[values[i]], green[values[i + 1]], blue[values[i + 2]]


@inner
def _gray(red, green, blue):  # type: ignore[no-untyped-def]
    return np.int32(np.uint32(red * 1253677 + green * 2462056 + blue * 478151 + 260) >> np.uint32(22))


@inner
def _cut_off(summed):  # type: ignore[no-untyped-def]
    """A weighted sum in units of 2^-20 without its fraction."""
    level = np.int32(summed + _CUT) >> _BITS
    return np.uint8(min(max(level, 0), 255))  # type: ignore[arg-type]


@inner
def _colour(image, weight):  # type: ignore[no-untyped-def]
    """Weigh the colours against gray."""
    rests = np.empty((image.shape[1], 3), np.int32)
    for y in range(image.shape[0]):  # in two loops, each of which becomes vector instructions
        row, values, rest = image[y], image[y].reshape(-1), rests.reshape(-1)
        for x in range(len(row)):
            level = np.int32(_gray(row[x, 0], row[x, 1], row[x, 2]) * np.int32(_ONE - weight))
            rests[x, 0], rests[x, 1], rests[x, 2] = level, level, level
        for x in range(len(values)):
            values[x] = _cut_off(np.int32(np.int32(values[x] * weight) + rest[x]))


@inner
def _contrast(values, strength, curve):  # type: ignore[no-untyped-def]
    """Make the curve [256] that leads away from the image's mean brightness, or towards it."""
    total, area = 0, len(values) // 3
    for i in range(0, len(values), 3):
        total += _gray(values[i], values[i + 1], values[i + 2])
    for value in range(256):
        level = (value * area * strength + total * (1000 - strength)) // (1000 * area)
        curve[value] = min(max(level, 0), 255)


@inner
def _sharpen(image, target, weight):  # type: ignore[no-untyped-def]
    """Weigh all but the outermost pixels against the rounded mean of their neighbourhood."""
    height, width, _ = image.shape
    _copy(image[0].reshape(-1), target[0].reshape(-1))
    _copy(image[height - 1].reshape(-1), target[height - 1].reshape(-1))
    columns = np.empty(3 * width, np.int32)
    for y in range(1, height - 1):
        above, row, below = image[y - 1].reshape(-1), image[y].reshape(-1), image[y + 1].reshape(-1)
        out = target[y].reshape(-1)
        _copy(row[:3], out[:3])
        _copy(row[-3:], out[-3:])
        for x in range(len(row)):
            columns[x] = np.int32(above[x]) + np.int32(row[x]) + np.int32(below[x])
        left, middle, right, centre, inner = columns[:-6], columns[3:-3], columns[6:], row[3:-3], out[3:-3]
        for x in range(len(inner)):
            total = np.int32(left[x] + middle[x] + right[x] + 4 * centre[x])
            mean = np.int32(total * 80660 + _ONE // 2) >> _BITS
            inner[x] = _cut_off(np.int32(mean * np.int32(_ONE - weight) + centre[x] * weight))


@inner
def _stretch(image, curves):  # type: ignore[no-untyped-def]
    """Make curves [3, 256] that stretch each channel over all values."""
    lows, highs = image[0].copy(), image[0].copy()
    low, high = lows.reshape(-1), highs.reshape(-1)
    for y in range(1, image.shape[0]):
        row = image[y].reshape(-1)
        for x in range(len(row)):
            low[x], high[x] = min(low[x], row[x]), max(high[x], row[x])
    for channel in range(3):
        least, most = np.int64(lows[:, channel].min()), np.int64(highs[:, channel].max())
        span = most - least
        factor = (2**24 - 1) // (span if span > 0 else 1) + 1
        for value in range(256):
            stretched = (value - least if value > least else 0) * 255 * factor >> 24
            curves[channel, value] = value if span == 0 else 255 if stretched > 255 else stretched


@inner
def _equalize(values, curves):  # type: ignore[no-untyped-def]
    """Make curves [3, 256] after which all values of a channel are about as frequent."""
    counts = np.zeros((3, 256), np.int32)
    reds, greens, blues = counts
    for i in range(0, len(values), 3):
        reds[values[i]] += 1
        greens[values[i + 1]] += 1
        blues[values[i + 2]] += 1
    area = len(values) // 3
    for channel in range(3):
        last = 255
        while last > 0 and counts[channel, last] == 0:
            last -= 1
        step = (area - counts[channel, last]) // 255
        below = 0
        for value in range(256):
            curves[channel, value] = min((below + step // 2) // step, 255) if step > 0 else value
            below += counts[channel, value]


@compiled("void(u1[:,:,:,::1], i1[:,::1], i8[:,::1], i8[:,:,::1], u1[:,::1], i8[:,::1])")
def change(
    images: NDArray[np.uint8],
    kinds: NDArray[np.int8],
    places: NDArray[np.int64],
    matrices: NDArray[np.int64],
    curves: NDArray[np.uint8],
    strengths: NDArray[np.int64],
) -> None:
    """Change images uint8 [B, H, W, 3] in place by n changes each, of these kinds [B, n] (see MOVED and the others).

    places [B, n]: which of the matrices [M, 2, 3] moves an image, or which of the curves [C, 256] it is looked up in.
    strengths [B, n]: in thousandths.
    """
    count, height, width, _ = images.shape
    spare, curve, three = np.empty((height, width, 3), np.uint8), np.empty(256, np.uint8), np.empty((3, 256), np.uint8)
    for b in range(count):
        image, other = images[b], spare
        for k in range(kinds.shape[1]):
            kind, values = kinds[b, k], image.reshape(-1)
            weight = np.int32((strengths[b, k] * _ONE + 500) // 1000)
            if kind == MOVED:
                _move(image, other, matrices[places[b, k]])
                image, other = other, image
            elif kind == CURVED:
                _look_up(values, curves[places[b, k]])
            elif kind == COLOURED:
                _colour(image, weight)
            elif kind == CONTRASTED:
                _contrast(values, strengths[b, k], curve)
                _look_up(values, curve)
            elif kind == SHARPENED and min(height, width) > 2:
                _sharpen(image, other, weight)
                image, other = other, image
            elif kind == STRETCHED:
                _stretch(image, three)
                _look_up_each(values, three)
            elif kind == EQUALIZED:
                _equalize(values, three)
                _look_up_each(values, three)
        if image.ctypes.data != images[b].ctypes.data:
            _copy(image.reshape(-1), images[b].reshape(-1))
