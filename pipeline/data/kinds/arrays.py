"""Images that are arrays in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcache.pipeline.data.imagefiles import mean_std
from kdcache.pipeline.data.kinds.base import Asked, Described, Kind, TakesPath

Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # images uint8 [N, H, W, 3], labels int64 [N], class names


@dataclass(frozen=True, eq=False)
class ArrayDataset(Described):
    """A dataset whose images are one tensor, so that all of them have one size."""

    pixels: torch.Tensor  # uint8 [N, H, W, 3]
    paths = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_pixels(self.pixels)

    def decode(self, index: int) -> torch.Tensor:
        return self.pixels[index].permute(2, 0, 1).contiguous()

    def _fingerprint(self, full: bool) -> str:
        digest = self._begun("arrays", full, pixels=self.pixels.shape)
        digest.update(self.pixels.contiguous().numpy().data)
        return digest.hexdigest()

    def _contents(self, places: np.ndarray) -> dict[str, Any]:
        return {"pixels": self.pixels[torch.from_numpy(places)]}


def from_arrays(name: str, split: str, load: Callable[[bool], Arrays]) -> ArrayDataset:
    """Make a split of the arrays that load(train) gives. Class names, mean and std are those of the train split."""
    images, labels, names = load(split == "train")
    train_images = images
    if split != "train":
        train_images, _, names = load(True)
    mean, std = mean_std(train_images)
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    sizes = np.tile(np.array(images.shape[1:3], dtype=np.int32), (len(images), 1))
    return ArrayDataset(name, split, labels[:, None], names, sizes, mean, std, pixels)


@dataclass(frozen=True)
class InMemory(Kind):
    """Datasets that a function loads whole; load(asked, train) gives the arrays of one split."""

    load: Callable[[Asked, bool], Arrays]
    takes_path: TakesPath = "may"

    def open(self, asked: Asked) -> ArrayDataset:
        return from_arrays(asked.name, asked.split, lambda train: self.load(asked, train))
