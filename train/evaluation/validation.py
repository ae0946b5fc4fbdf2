"""The part of the training images that is held out, to choose weights by.

The evaluation split is what is reported, and what chooses must not be what is reported.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.data.kinds.folders import places_in_classes

_STREAM = 3  # of the key (0, stream): views have 0, orders 1


def held_out_part(data: Dataset, fraction: float) -> NDArray[np.bool_]:
    """bool [N]: the same samples for every run on these data, round(fraction n) of each class's n.

    They are those whose drawn numbers are the smallest of their class. InputError without labels, and where no
    sample, or no other one, is left.
    """
    if not data.labels.shape[1]:
        raise InputError("--validation chooses weights by top-1, which needs labels: leave it out")
    labels = data.labels[:, 0]
    drawn = np.random.Philox(key=np.array([0, _STREAM], np.uint64)).random_raw(len(data))
    most = np.floor(fraction * np.bincount(labels) + 0.5)
    chosen: NDArray[np.bool_] = places_in_classes(labels, drawn) < most[labels]
    if not chosen.any() or chosen.all():
        kept = "none" if not chosen.any() else "all"
        raise InputError(f"--validation {fraction:g} holds out {kept} of {data.name}'s {len(data):,} training images")
    return chosen
