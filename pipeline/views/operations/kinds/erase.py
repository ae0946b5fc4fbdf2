"""Random erasing: a box of the image becomes black (Zhong et al., "Random Erasing Data Augmentation", 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.pipeline.views.draws import below, chance
from kdcache.pipeline.views.operations.boxes import SIDE, paste
from kdcache.pipeline.views.operations.operation import Drawn, Stage, argument
from kdcache.pipeline.views.operations.pixels import dense

# As torchvision's RandomErasing: area 2-33%, height to width 0.3-3.3 log-uniform. The ratio is one of 4,096 values
# rounded to 2^-20, because exp differs between machines in the last bit and a box must not.
_AREA, _RATIO = (0.02, 0.33), (0.3, 3.3)
_RATIOS = np.array(
    [
        round(math.exp(math.log(_RATIO[0]) + (i + 0.5) / 4096 * math.log(_RATIO[1] / _RATIO[0])) * 2**20) / 2**20
        for i in range(4096)
    ]
)
_TRIES = 4  # torchvision has ten; a box fits in all but 0.35% of the tries, so in all but 1 of 6 billion draws of four


@dataclass(frozen=True)
class Erase:
    """With probability p, a box becomes black: torchvision's RandomErasing with its areas and ratios, and value 0.

    Lengths are fractions of the side, so that a box has its ratio in square images, which views usually are.
    """

    p: float = argument(0.25, 0, 1)

    name: ClassVar[str] = "erase"
    stage: ClassVar[Stage] = "erase"
    stream: ClassVar[int] = 9
    words: ClassVar[int] = 3 + 2 * _TRIES

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        """box int32 [n, 4]: top, left, bottom and right in 1/65536 of the side; zeros where nothing is erased."""
        box = np.zeros((len(words), 4), np.int32)
        pending = np.flatnonzero(chance(words[:, 0], self.p))
        for number in range(_TRIES):
            area, ratio = words[pending, 3 + 2 * number], words[pending, 4 + 2 * number]
            sides = _sides(area, ratio)
            fits = (sides < SIDE).all(1)
            found, sides = pending[fits], sides[fits]
            first = below(words[found, 1:3], SIDE - sides + 1)
            box[found] = np.concatenate([first, first + sides], 1)
            pending = pending[~fits]
        return {"box": box}

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        images = dense(images)
        paste(images, drawn["box"])
        return images


def _sides(area: NDArray[np.uint64], ratio: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Height and width [n, 2] of boxes in 1/65536 of the side. Only +, *, / and sqrt, which IEEE 754 rounds alike."""
    low, high = _AREA
    areas = low + (high - low) * ((area >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    ratios = _RATIOS[below(ratio, len(_RATIOS))]
    sides: NDArray[np.int64] = np.rint(np.sqrt(np.stack([areas * ratios, areas / ratios], 1)) * SIDE).astype(np.int64)
    return sides
