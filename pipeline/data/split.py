"""One split of a dataset beside the labels and the store of its records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.data.dataset import Dataset


@dataclass(frozen=True, eq=False)
class Split:
    """The images, their labels in the teacher's classes (int64 [N, L]; L is 0 when unlabelled), and their store."""

    data: Dataset
    labels: NDArray[np.int64]
    store: SplitStore

    @property
    def name(self) -> str:
        """'train' or 'eval', as the store counts the splits: a validation split is evaluated like the eval split."""
        return self.store.split
