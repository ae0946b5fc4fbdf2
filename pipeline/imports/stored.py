"""Stored logits of other projects: what each kind of them offers, and how they become records.

Neither kind holds the labels' own probability, nor the evaluation split. Gaps are T (log p_1 - log p_j), where T is the
temperature of the stored softmax. A probability that underflowed to 0 counts as half the smallest number of its type,
the largest number that is rounded to 0. The tail is log((1 - sum p) / p_1) where 1 - sum p is above what rounding may
have made of it: half a unit in the last place of each p, and 2^-20 for a softmax computed in float32. Below that it
counts as nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import InputError
from kdcache.cache.identity import id_dtype
from kdcache.pipeline.views.parameters import ViewParameters

_SOFTMAX = 2.0**-20  # relative error of a softmax in float32


class Answers(NamedTuple):
    """What is stored for n samples in m views: ids uint32 and p [m, n, K] as stored, and how the views were made.

    made: boxes [m, n, 4] in source pixels and flips [m, n], or seeds [m, n].
    """

    ids: NDArray[np.uint32]
    p: NDArray[Any]
    made: dict[str, NDArray[Any]]

    def digest(self) -> bytes:
        h = hashlib.sha256(np.ascontiguousarray(self.ids, "<u4").data)
        h.update(np.ascontiguousarray(self.p, self.p.dtype.newbyteorder("<")).data)
        for rows in self.made.values():
            h.update(np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).data)
        return h.digest()


class Logits(Protocol):
    """Stored logits of a dataset in V views with K classes a record."""

    policy: Literal["stored", "foreign"]
    views: int
    k: int
    dtype: np.dtype[Any]
    part: int

    def units(self) -> Iterator[range]:
        """The views that are read together, part by part."""
        ...

    def read(self, views: range, rows: range, advance: Callable[[int], object]) -> Answers:
        """Read answers. InputError where the files are not what the format says. advance: gets how many were read."""
        ...

    def where(self, view: int, sample: int) -> str:
        """Where a record lies, for messages."""
        ...


def rounding(p: NDArray[Any]) -> NDArray[np.float64]:
    """How far, float64 [n], the sums of stored probabilities [n, K] may be from the sums that the softmax had."""
    out: NDArray[np.float64] = np.spacing(p).astype(np.float64).sum(1) / 2 + _SOFTMAX
    return out


def encoded(ids: NDArray[np.uint32], stored: NDArray[Any], t: float, classes: int) -> dict[str, NDArray[Any]]:
    """Encode as classes, gaps and tail the records whose ids and probabilities [n, K] at temperature t are stored."""
    smallest = float(np.finfo(stored.dtype).smallest_subnormal) / 2
    order = np.lexsort((ids, -stored))  # by probability, then by id
    ids, ordered = (np.take_along_axis(rows, order, 1) for rows in (ids, stored))
    log = np.log(np.maximum(ordered.astype(np.float64), smallest))
    most = np.finfo(np.float16)
    gaps = np.minimum(t * (log[:, :1] - log[:, 1:]), float(most.max))
    rest = 1 - ordered.astype(np.float64).sum(1)
    told = rest > rounding(ordered)
    tail = np.where(told, np.log(np.where(told, rest, 1.0)) - log[:, 0], -np.inf)[:, None]
    return {
        "classes": ids.astype(id_dtype(classes)),
        "gaps": gaps.astype(np.float16),
        "tail": tail.astype(np.float16),
    }


def parameters_digest(made: dict[str, NDArray[Any]]) -> str:
    """The digest that a commit holds of how its samples' views were made."""
    if "seeds" in made:
        return files.sha256(b"kdcache imported seeds 1\0" + made["seeds"].astype("<i4").tobytes())
    return ViewParameters(made["boxes"], made["flips"].astype(np.bool_)).digest()


def require_all(
    found: NDArray[Any], foreign: list[str], doubled: list[str], names: Callable[[int], str], where: str
) -> None:
    """Raise InputError unless each sample was found once, and nothing else was found."""
    missing = np.flatnonzero(~found)
    for what, count, first in (
        ("samples without a record", len(missing), names(int(missing[0])) if len(missing) else ""),
        ("records of no sample of the dataset", len(foreign), foreign[0] if foreign else ""),
        ("records of samples that have another", len(doubled), doubled[0] if doubled else ""),
    ):
        if count:
            raise InputError(f"{where}: {count:,} {what}, {first} for one: is --data what they were stored for?")


def stem(path: str, last: bool) -> str:
    """With `last`, the file's name up to its last dot; else the path up to the first dot of the name, as FKD has it."""
    folder, slash, name = path.rpartition("/")
    return name.rpartition(".")[0] or name if last else folder + slash + name.split(".")[0]


def by_name(paths: Sequence[str], name: Callable[[str], str], data: str) -> dict[str, int]:
    """List the samples by name. InputError where two samples have the same name, or the images have none."""
    if not paths:
        raise InputError(
            f"{data} has no files, and these records go by file names: give imagenet:PATH or imagefolder:PATH"
        )
    found: dict[str, int] = {}
    for i, path in enumerate(paths):
        if (first := found.setdefault(name(path), i)) != i:
            raise InputError(f"{paths[first]} and {path} have one name for these records: which is meant is not known")
    return found
