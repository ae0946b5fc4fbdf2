"""Integer arithmetic on uint8 images [n, 3, H, W], which the operations share.

All of it is equal to the bit on every device and in either memory format. No function waits for the device: which
images are changed, and by what, is known on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ONE = 1024  # a weight of 1: images are blended in steps of 1/1024
SMOOTHED = 2**16  # a kernel's weights sum to this
_GRAY = (19595, 38470, 7471)  # 0.299, 0.587 and 0.114 of 2^16, as Pillow has them
# Values that are worked on at once: on a CPU what its cache holds, on a GPU what leaves memory for the network.
_CPU_PIECE, _GPU_PIECE = 2**19, 2**25


def on_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Copy a small array to the device without waiting for it."""
    return torch.from_numpy(np.array(array)).to(dtype).to(device, non_blocking=True)


def on_rows(images: Tensor, rows: NDArray[np.int64], change: Callable[[Tensor, NDArray[np.int64]], Tensor]) -> Tensor:
    """Replace images[rows] in place by change(images[rows], rows), in pieces; rows holds no image twice.

    change gets a copy of its own, and returns uint8 in the same shape and memory format. The result is `images` unless
    these have gaps in memory.
    """
    images = dense(images)
    if not len(rows):
        return images
    values = flat(images)
    most = _CPU_PIECE if images.device.type == "cpu" else _GPU_PIECE
    each = max(1, most // values.shape[1])
    for start in range(0, len(rows), each):
        some = rows[start : start + each]
        place = on_device(some, images.device, torch.int64)
        changed = flat(change(_as_images(values.index_select(0, place), images), some))
        if images.device.type == "cpu":  # NumPy copies whole rows, thirty times as fast as torch does by element
            values.numpy()[some] = changed.numpy()
        else:
            values[place] = changed
    return images


def in_loops(images: Tensor) -> bool:
    """Whether compiled loops change these images, in place of torch's operations."""
    return images.device.type == "cpu"


def by_loop(images: Tensor, loop: Callable[..., None], *drawn: NDArray[Any]) -> Tensor:
    """Change images [B, 3, H, W] on a CPU by a compiled loop over pixels [B, H, W, 3] that works in place.

    The images may be overwritten. The result has their memory format.
    """
    layout = torch.channels_last if images.stride(1) == 1 else torch.contiguous_format
    pixels = images.permute(0, 2, 3, 1).contiguous()
    loop(pixels.numpy(), *drawn)
    return pixels.permute(0, 3, 1, 2).contiguous(memory_format=layout)


def dense(images: Tensor) -> Tensor:
    """The images without gaps in memory; a copy only if they have any."""
    last = images.stride(1) == 1
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def flat(images: Tensor) -> Tensor:
    """Dense images as [n, 3 * H * W], in the order of memory and without a copy."""
    return (images.permute(0, 2, 3, 1) if images.stride(1) == 1 else images).flatten(1)


def _as_images(values: Tensor, images: Tensor) -> Tensor:
    """Values [n, 3 * H * W] in the memory format of these images: the inverse of `flat`."""
    _, channels, height, width = images.shape
    if images.stride(1) == 1:
        return values.view(-1, height, width, channels).permute(0, 3, 1, 2)
    return values.view(-1, channels, height, width)


def gray(images: Tensor) -> Tensor:
    """The luminance int32 [n, 1, H, W], from 0 to 255: ITU-R 601-2, rounded as in Pillow's convert("L")."""
    red, green, blue = (channel.to(torch.int32) for channel in images.unbind(1))
    level = red.mul_(_GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])
    return level.add_(2**15).bitwise_right_shift_(16).unsqueeze(1)


def blend(images: Tensor, others: Tensor | int, weights: NDArray[Any]) -> Tensor:
    """images * weight + others * (1 - weight), rounded down and kept within 0 to 255, as Pillow and torchvision do.

    images: uint8 [n, 3, H, W], dense. others: from 0 to 255, int32 [n, 1, H, W] for all channels, or integers
    [n, 1, 1, 1] for all pixels, or one number. weights: integers [n] in steps of 1 / ONE, from 0 to 16 * ONE; above
    ONE they lead away from the others.
    """
    weight = on_device(weights, images.device).unsqueeze(1)
    rest = (ONE - weight) * (others if isinstance(others, int) else others.flatten(1).to(torch.int32))
    if rest.shape[1] == 1:
        return _as_images(_blend(flat(images), rest, weight), images)
    result = torch.empty_like(images)
    for channel, blended in zip(images.unbind(1), result.unbind(1), strict=True):
        blended.copy_(_blend(channel.flatten(1), rest, weight).view(blended.shape))
    return result


def _blend(values: Tensor, rest: Tensor, weight: Tensor) -> Tensor:
    summed = values.to(torch.int32).mul_(weight).add_(rest)
    return summed.bitwise_right_shift_(ONE.bit_length() - 1).clamp_(0, 255).to(torch.uint8)


def smooth(images: Tensor, kernels: NDArray[Any]) -> Tensor:
    """Convolve dense images with a symmetric kernel each, along both sides; the edges are reflected.

    kernels: integers [n, 1 + r], the weights of a pixel and of those 1 to r pixels away, that are at least 0 and sum
    (all but the first counted twice) to SMOOTHED. r is less than both sides. Each value is rounded to 1/128 between
    the two passes, and then to the nearest.
    """
    n, channels, height, width = images.shape
    reach = kernels.shape[1] - 1
    # Lines of memory [m, height, length]: a pixel's neighbours are `step` values and one line away.
    if images.stride(1) == 1:
        planes, step = images.permute(0, 2, 3, 1), channels
    else:
        planes, step = images.reshape(n * channels, height, width, 1), 1
        kernels = np.repeat(kernels, channels, 0)
    weights = on_device(kernels, images.device).view(len(kernels), -1, 1, 1).unbind(1)
    down = _pass(_padded(planes, 1, reach).flatten(2), weights, 1, 1)
    down.add_(2**8).bitwise_right_shift_(9)  # 15 bits, so that the second pass fits 31
    across = _pass(_padded(down.view(planes.shape), 2, reach).flatten(2), weights, 2, step)
    return _as_images(across.add_(2**22).bitwise_right_shift_(23).to(torch.uint8).view(n, -1), images)


def _padded(values: Tensor, dim: int, reach: int) -> Tensor:
    """A copy in int32 with `reach` more values at both ends of a dimension, mirrored at the first and the last one."""
    size = values.shape[dim]
    shape = list(values.shape)
    shape[dim] += 2 * reach
    padded = torch.empty(shape, dtype=torch.int32, device=values.device)
    padded.narrow(dim, reach, size).copy_(values)
    for away in range(1, reach + 1):
        padded.select(dim, reach - away).copy_(values.select(dim, away))
        padded.select(dim, reach + size - 1 + away).copy_(values.select(dim, size - 1 - away))
    return padded


def _pass(lines: Tensor, weights: tuple[Tensor, ...], dim: int, step: int) -> Tensor:
    """The weighted sum along a dimension that is padded by the reach at both ends."""
    reach = len(weights) - 1
    size = lines.shape[dim] - 2 * reach * step
    summed = lines.narrow(dim, reach * step, size) * weights[0]
    pair = torch.empty_like(summed)
    for away, weight in enumerate(weights[1:], 1):
        before, after = (lines.narrow(dim, (reach + d) * step, size) for d in (-away, away))
        summed.addcmul_(torch.add(before, after, out=pair), weight)
    return summed
