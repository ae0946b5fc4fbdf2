"""What a command does when nothing more is said, by kind of dataset; docs/defaults.md shows the same table."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.pipeline.datasets import Dataset

DATA = "digits"
DENSE_UP_TO = 200  # classes; above, the top DEFAULT_K are stored
DEFAULT_K = 20


@dataclass(frozen=True)
class Defaults:
    """augment and views of a cache; student, epochs, weight decay, batch size and peak learning rate at that batch
    of training; build_batch of the build."""

    augment: str
    views: int
    student: str
    epochs: int
    train_batch: int
    lr: float
    decay: float
    build_batch: int

    def rate(self, batch: int) -> float:
        """The peak learning rate at another batch size: in proportion."""
        return self.lr * batch / self.train_batch


_DIGITS = Defaults("crop", 8, "resnet8", 20, 64, 0.05, 5e-4, 256)
_SMALL = Defaults("crop,flip", 16, "resnet20", 60, 128, 0.1, 5e-4, 256)
_FILES = Defaults("rrc,flip", 16, "resnet18", 100, 256, 0.1, 1e-4, 128)


def defaults_for(data: Dataset) -> Defaults:
    """The row of the table for a dataset."""
    if data.name == "digits":
        return _DIGITS
    return _SMALL if data.images is not None else _FILES


def stored_classes(classes: int) -> int | None:
    """K where --topk is not given: None (dense) for few classes."""
    return None if classes <= DENSE_UP_TO else DEFAULT_K
