"""View parameters: a pure function of (policy, seed, view, sample, image size).

Uniforms are raw Philox 4x64 words mapped by our own formula: NumPy keeps the raw stream stable, not its
distributions. The key is (seed, stream) and the counter (sample's first block, view), so any range of samples is
drawn without the others. Drawing (here) and applying (render.py) are apart, and no other image randomness exists in
either stage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import CorruptError, InputError

POLICIES = ("none", "flip", "crop", "crop,flip", "rrc", "rrc,flip")
# Streams, the second word of the key: whatever the seeds, two streams never give the same draw. Caches have stream 0,
# the orders of training (loader.py) stream 1.
_VIEWS = 0
TEACHING = 2**32  # far from those that a later kind of view may need
_WORDS = 4  # of one Philox block
_RRC_TRIES = 10
# RandomResizedCrop as torchvision has it: area 8-100%, aspect 3/4-4/3 log-uniform. The aspect is one of 4,096
# values rounded to 2^-20, because exp differs between machines in the last bit and a box must not.
_RRC_AREA = (0.08, 1.0)
_RRC_ASPECTS = np.array(
    [round(math.exp((2 * (i + 0.5) / 4096 - 1) * math.log(4 / 3)) * 2**20) / 2**20 for i in range(4096)]
)


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """boxes int32 [n, 4]: top, left, height, width in source pixels (outside of the image is black);
    flips bool [n]: mirrored left to right, after the crop."""

    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.flips)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> ViewParameters:
        return ViewParameters(self.boxes[index], self.flips[index])

    def digest(self) -> str:
        """sha256 of the parameters, which a commit holds and a reader compares."""
        h = hashlib.sha256(b"kdcache view parameters 1\0")
        h.update(np.ascontiguousarray(self.boxes, "<i4").tobytes())
        h.update(np.ascontiguousarray(self.flips, "u1").tobytes())
        return h.hexdigest()


def check_policy(policy: str) -> str:
    """The policy's canonical name; InputError for an unknown one."""
    name = ",".join(p.strip() for p in policy.split(","))
    if name not in POLICIES:
        raise InputError(f"unknown view policy {policy!r}: take one of {'; '.join(POLICIES)}")
    return name


def padding(policy: str, height: int, width: int) -> int:
    """How many pixels beyond the image's edge a `crop` box may reach: an eighth of the shorter side."""
    return max(1, min(height, width) // 8) if "crop" in policy.split(",") else 0


def draw(
    policy: str, seed: int, view: int, samples: range, sizes: NDArray[np.int32], stream: int = _VIEWS
) -> ViewParameters:
    """Parameters of a view for samples (contiguous); sizes int32 [n, 2] are their images' H and W.

    stream: that of caches, or TEACHING, so that no cached view is one that the teacher was trained on.
    """
    pieces = check_policy(policy).split(",")
    blocks = 1 if "rrc" not in pieces else 1 + 2 * _RRC_TRIES // _WORDS
    u = _uniforms(seed, stream, view, samples, blocks)
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    flips = u[:, 0] < 0.5 if "flip" in pieces else np.zeros(len(samples), np.bool_)
    if "rrc" in pieces:
        boxes = _random_resized_crop(u, height, width)
    elif "crop" in pieces:
        pad = np.maximum(1, np.minimum(height, width) // 8)
        top, left = (np.floor(u[:, i] * (2 * pad + 1)).astype(np.int64) - pad for i in (1, 2))
        boxes = np.stack([top, left, height, width], 1)
    else:
        boxes = np.stack([np.zeros_like(height), np.zeros_like(height), height, width], 1)
    return ViewParameters(boxes.astype(np.int32), flips)


def imported_view(stored: Mapping[str, NDArray[Any]], sizes: NDArray[np.int32], where: str) -> ViewParameters:
    """Parameters from the arrays of an imported view; CorruptError for boxes that leave images of these sizes."""
    boxes, flips = stored["boxes"], stored["flips"]
    corner, extent = boxes[:, :2].astype(np.int64), boxes[:, 2:].astype(np.int64)
    if (corner < 0).any() or (extent < 1).any() or (corner + extent > sizes).any() or (flips > 1).any():
        raise CorruptError(f"{where} holds boxes or flips that cannot be: import it again")
    return ViewParameters(boxes, flips.astype(np.bool_))


def evaluation_view(sizes: NDArray[np.int32], whole: bool) -> ViewParameters:
    """The unaugmented view: the whole image, or for files the central square of 224/256 of the shorter side."""
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    if whole:
        boxes = np.stack([np.zeros_like(height), np.zeros_like(height), height, width], 1)
    else:
        side = np.maximum(1, np.minimum(height, width) * 7 // 8)
        boxes = np.stack([(height - side) // 2, (width - side) // 2, side, side], 1)
    return ViewParameters(boxes.astype(np.int32), np.zeros(len(sizes), np.bool_))


def _uniforms(seed: int, stream: int, view: int, samples: range, blocks: int) -> NDArray[np.float64]:
    """[n, 4 * blocks] numbers in [0, 1), multiples of 2^-53."""
    counter = np.array([samples.start * blocks, view, 0, 0], np.uint64)
    philox = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter)
    raw = philox.random_raw(len(samples) * blocks * _WORDS).reshape(len(samples), blocks * _WORDS)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _random_resized_crop(
    u: NDArray[np.float64], height: NDArray[np.int64], width: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The first of ten random boxes that fits; else the largest central box of an allowed aspect."""
    # Only +, *, / and sqrt, which IEEE 754 rounds alike everywhere.
    low, high = _RRC_AREA
    area = (height * width)[:, None] * (low + (high - low) * u[:, _WORDS::2])
    aspect = _RRC_ASPECTS[np.floor(u[:, _WORDS + 1 :: 2] * len(_RRC_ASPECTS)).astype(np.int64)]
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
