"""One split of a dataset: what identities say of it, and its images together with the store of their records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import MismatchError
from kdcache.cache.identity import DataIdentity, Identity
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


def describe_data(data: Dataset, full: bool) -> DataIdentity:
    """Describe a split for a cache's identity. full: whether its fingerprint covers the contents of all files."""
    return DataIdentity(
        name=data.name,
        split="train" if data.split == "train" else "eval",
        samples=len(data),
        fingerprint=data.fingerprint(full),
        full_contents=full,
        files=not data.in_memory,
    )


def require_described(data: Dataset, identity: Identity, where: str) -> None:
    """MismatchError, field by field, unless the cache of this identity, at `where`, was built from this split."""
    has = identity.data if data.split == "train" else identity.evaluation
    if found := has.differences(describe_data(data, has.full_contents), theirs="the data"):
        raise MismatchError(f"{where} was built from other data than {data.name}: {'; '.join(found)}")
