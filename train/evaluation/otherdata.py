"""Data that a student was not trained on, and whose classes it knows: for `kdcache eval RUN --data OTHER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.kinds.containers.items import ItemDataset

_SHOWN = 5  # names in one message


def whole_of(spec: str, evaluation: Dataset) -> Dataset:
    """The evaluation split of `spec`; all images where that split is held out of what has no splits of its own."""
    if not evaluation.paths and not (isinstance(evaluation, ItemDataset) and evaluation.parts):
        return evaluation
    joined = evaluation.joined(open_data(spec, "train"))
    return evaluation if joined is None else joined


def labels_of_other(data: Dataset, names: Sequence[str], ids: Sequence[int | None], weights: Path) -> NDArray[np.int64]:
    """int64 [N, 1]: the data's labels as the student counts its classes, which are `ids` for the run's class `names`.

    InputError for classes that the run did not have.
    """
    known = {name: i for name, i in zip(names, ids, strict=True) if i is not None}
    if foreign := [name for name in data.class_names if name not in known]:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        shown = ", ".join(map(repr, foreign[:_SHOWN])) + more
        has = ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
        raise InputError(f"{weights} was not trained on {data.name}'s classes {shown}: its own are {has}")
    labels: NDArray[np.int64] = np.array([known[name] for name in data.class_names], np.int64)[data.labels]
    return labels


def class_ids(data: Dataset, labels: NDArray[np.int64]) -> list[int | None]:
    """What the student answers for each class name, given the cache's labels [N, L] of the data; [] without labels."""
    if not data.labels.shape[1] or labels.shape[1] != 1:
        return []
    ids = dict(zip(data.labels[:, 0].tolist(), labels[:, 0].tolist(), strict=True))
    return [ids.get(c) for c in range(len(data.class_names))]
