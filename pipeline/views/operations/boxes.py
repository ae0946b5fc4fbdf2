"""Boxes that are drawn as fractions of an image's side, and what is put into them.

A box is top, left, bottom and right in 1/65536 of the height and of the width, so that it lies at the same place in an
image of any size. An empty one has its bottom at its top, or its right at its left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 1 << 16  # of the whole image, in the units of boxes


def edges(boxes: NDArray[Any], height: int, width: int) -> NDArray[np.int64]:
    """The boxes [n, 4] in pixels: each edge goes to the nearest border between pixels, a half up."""
    size = np.array([height, width, height, width])
    pixels: NDArray[np.int64] = (boxes.astype(np.int64) * size + SIDE // 2) // SIDE
    return pixels


def paste(images: Tensor, boxes: NDArray[Any], source: Tensor | None = None) -> None:
    """Change the pixels of images [B, 3, H, W] in their boxes [B, 4] to those of `source`, or to black without one."""
    pixels = edges(boxes, *images.shape[2:])
    if images.device.type == "cpu":
        _paste_by_image(images, pixels, source)
    else:
        _paste_by_mask(images, pixels, source)


def _paste_by_image(images: Tensor, pixels: NDArray[np.int64], source: Tensor | None) -> None:
    """On a CPU: a copy of each box takes a fraction of the time of a mask over all pixels."""
    into, origin = images.numpy(), None if source is None else source.numpy()
    for i in np.flatnonzero((pixels[:, :2] < pixels[:, 2:]).all(1)).tolist():
        top, left, bottom, right = pixels[i].tolist()
        new = 0 if origin is None else origin[i, :, top:bottom, left:right]
        into[i, :, top:bottom, left:right] = new


def _paste_by_mask(images: Tensor, pixels: NDArray[np.int64], source: Tensor | None) -> None:
    """On a GPU: in one step for the whole batch, which does not wait for the device."""
    device = images.device
    first, last = torch.from_numpy(pixels).to(device, non_blocking=True).view(-1, 2, 2, 1).unbind(1)
    rows, columns = (
        (first[:, axis] <= place) & (place < last[:, axis])
        for axis, place in enumerate(torch.arange(size, device=device) for size in images.shape[2:])
    )
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    if source is None:
        images.masked_fill_(inside, 0)
    else:
        images.copy_(torch.where(inside, source, images))
