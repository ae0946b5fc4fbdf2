"""View parameters: a pure function of (policy, seed, view, sample, image size).

The table of policies says how each is drawn; render.py applies the parameters. There is no other image
randomness in either stage. A new policy is a rule in operations/geometry.py and a line in `POLICIES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import CorruptError, InputError
from kdcache.pipeline.views.operations.geometry import Crop, Flip, Geometry, ResizedCrop, Whole, geometry

# Streams are the second word of Philox's key: whatever the seeds, two streams never give the same draw. The views of
# caches have stream 0, and the orders of training (train/loaders/order.py) have stream 1.
_VIEWS = 0
TEACHING = 2**32  # far from the streams that a later kind of view may need


@dataclass(frozen=True)
class Policy:
    """How views are drawn: the rule for their boxes, and whether every second view is mirrored."""

    geometry: Geometry
    flips: bool = False


POLICIES = {
    "none": Policy(Whole()),
    "flip": Policy(Whole(), flips=True),
    "crop": Policy(Crop()),
    "crop,flip": Policy(Crop(), flips=True),
    "rrc": Policy(ResizedCrop()),
    "rrc,flip": Policy(ResizedCrop(), flips=True),
}


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """How a view of each of n samples is made.

    boxes int32 [n, 4]: top, left, height and width in source pixels; outside of the image is black.
    flips bool [n]: whether it is mirrored left to right, after the crop.
    """

    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.flips)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> ViewParameters:
        return ViewParameters(self.boxes[index], self.flips[index])

    def digest(self) -> str:
        """The sha256 of the parameters, in hexadecimal. Each commit holds it, and a reader compares it."""
        h = hashlib.sha256(b"kdcache view parameters 1\0")
        h.update(np.ascontiguousarray(self.boxes, "<i4").tobytes())
        h.update(np.ascontiguousarray(self.flips, "u1").tobytes())
        return h.hexdigest()


def check_policy(policy: str) -> str:
    """The policy's canonical name. InputError for an unknown policy."""
    name = ",".join(p.strip() for p in policy.split(","))
    if name not in POLICIES:
        raise InputError(f"unknown view policy {policy!r}: take one of {'; '.join(POLICIES)}")
    return name


def padding(policy: str, height: int, width: int) -> int:
    """How many pixels beyond the edge of an image of this size a box may reach; 0 for the policies of imports."""
    known = POLICIES.get(policy)
    return known.geometry.margin(height, width) if known else 0


def resizes(policy: str) -> bool:
    """Whether views are cut in other sizes than their images have."""
    known = POLICIES.get(policy)
    return known is not None and known.geometry.resizes


def draw(
    policy: str, seed: int, view: int, samples: range, sizes: NDArray[np.int32], stream: int = _VIEWS
) -> ViewParameters:
    """Draw the parameters of a view for contiguous samples. sizes int32 [n, 2]: height and width of their images.

    stream: the stream of caches, or TEACHING, so that no cached view is one that the teacher was trained on.
    """
    rule = POLICIES[check_policy(policy)]
    flip = Flip() if rule.flips else None
    return ViewParameters(*geometry(rule.geometry, flip, seed, stream, view, samples, sizes))


def imported_view(stored: Mapping[str, NDArray[Any]], sizes: NDArray[np.int32], where: str) -> ViewParameters:
    """Read the parameters of an imported view from its arrays. CorruptError for boxes that leave the images."""
    boxes, flips = stored["boxes"], stored["flips"]
    corner, extent = boxes[:, :2].astype(np.int64), boxes[:, 2:].astype(np.int64)
    if (corner < 0).any() or (extent < 1).any() or (corner + extent > sizes).any() or (flips > 1).any():
        raise CorruptError(f"{where} holds boxes or flips that cannot be: import it again")
    return ViewParameters(boxes, flips.astype(np.bool_))


def evaluation_view(sizes: NDArray[np.int32], whole: bool) -> ViewParameters:
    """The unaugmented view: the whole image, or for files the central square of 224/256 of the shorter side."""
    height, width = _height_and_width(sizes)
    if whole:
        boxes = np.stack([np.zeros_like(height), np.zeros_like(height), height, width], 1)
    else:
        side = np.maximum(1, np.minimum(height, width) * 7 // 8)
        boxes = np.stack([(height - side) // 2, (width - side) // 2, side, side], 1)
    return ViewParameters(boxes.astype(np.int32), np.zeros(len(sizes), np.bool_))


def _height_and_width(sizes: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
