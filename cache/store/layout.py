"""What a cache holds, and under which names: arrays, their chunks, and the commits that make chunks visible.

All of it follows from the identity. Nothing here is taken from a file in the cache, so that a foreign shape or dtype
cannot reach the decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from kdcache.cache.identity import FORMAT, NO_TAIL, STEP, Identity, RecordIdentity, SplitName, Strict, id_dtype

# Blosc makes data longer by no more than its header and a few bytes for each block.
_OVERHEAD = 4096
_SHARD = re.compile(r"v([0-9]{5,9})-p([0-9]{4,9})")


@dataclass(frozen=True)
class ArraySpec:
    """An array [N, ...] in chunks of `rows` rows; `attributes` are for people who open it with zarr alone."""

    name: str
    shape: tuple[int, ...]
    rows: int
    dtype: str
    dims: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()

    @property
    def fill(self) -> float | int:
        """The value that shows a hole: NaN, or the largest id."""
        return float("nan") if np.dtype(self.dtype).kind == "f" else int(np.iinfo(self.dtype).max)

    @property
    def level(self) -> int:
        """Blosc's level, as bench/codec.py found it.

        Records of few bytes get the best level, since they are soon compressed. Dense ones get a faster level.
        """
        return 9 if np.dtype(self.dtype).kind == "u" else 5

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The shape of every chunk; the last one is filled up with the fill value."""
        return (min(self.rows, self.shape[0]), *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk before compression."""
        return math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    @property
    def max_file_bytes(self) -> int:
        """The most bytes that a chunk's file can have."""
        return self.chunk_bytes + self.chunk_bytes // 128 + _OVERHEAD

    def chunk_file(self, part: int) -> str:
        """The file of a part's chunk, from the folder that the array lies in."""
        return "/".join([self.name, "c", str(part), *["0"] * (len(self.shape) - 1)])

    def interval(self, part: int) -> slice:
        """The rows of a part."""
        return slice(part * self.rows, min((part + 1) * self.rows, self.shape[0]))


class Chunk(NamedTuple):
    """One part of one array. folder: where the array lies, from the split's folder; "" is that folder itself."""

    folder: str
    spec: ArraySpec
    part: int

    @property
    def base(self) -> str:
        """The folder as the beginning of a file's name."""
        return f"{self.folder}/" if self.folder else ""

    @property
    def file(self) -> str:
        """The file's name, from the split's folder: the name that a commit gives it."""
        return self.base + self.spec.chunk_file(self.part)

    @property
    def rows(self) -> slice:
        """The rows of the array that lie in it."""
        return self.spec.interval(self.part)


class StoredFile(Strict):
    """A committed chunk: its file's size in bytes and sha256, and the sha256 of the rows in it.

    rows: the digest of the part's rows alone, as raw little-endian bytes in C order, which is the same in every kind
    of store.
    """

    size: int
    sha256: str
    rows: str


class Commit(Strict):
    """Makes the files of one shard (or of labels, sizes or prior) part of the cache.

    parameters: digest of the view parameters of the shard's samples. writer: who built it, for people.
    """

    format: Literal[1, 2] = FORMAT
    key: str
    name: str
    parameters: str | None
    files: dict[str, StoredFile]
    writer: dict[str, str]

    def content(self) -> tuple[str | None, dict[str, str]]:
        """The parameters and the digests of rows that it names, whatever the bytes that hold the rows."""
        return self.parameters, {file: stored.rows for file, stored in self.files.items()}


def shard_name(view: int, part: int) -> str:
    """The name of a shard's commit."""
    return f"v{view:05d}-p{part:04d}"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """View and part of a shard by its commit's name; None where the name is not that of a shard."""
    m = _SHARD.fullmatch(name)
    return (int(m[1]), int(m[2])) if m and name == shard_name(int(m[1]), int(m[2])) else None


class SplitLayout:
    """The arrays of one split of a cache, and the chunks that each of its commits names.

    prefix: the split's folder, as the beginning of a file's name. part: samples a part; parts: how many there are.
    """

    def __init__(self, identity: Identity, split: SplitName) -> None:
        data, record = identity.split(split), identity.record_of(split)
        self.split, self.record = split, record
        self.prefix = "" if split == "train" else "eval/"
        self.samples, self.part = data.samples, identity.part
        self.parts = -(-self.samples // self.part)
        ids = id_dtype(record.classes)
        self.labels = ArraySpec("labels", (self.samples, identity.sample_labels), self.part, ids, ("sample", "label"))
        size = ("sample", "height_and_width")
        self.sizes = ArraySpec("sizes", (self.samples, 2), self.part, "int32", size) if data.files else None
        self.records = record_arrays(record, self.samples, self.part)
        self.view_arrays = _view_arrays(identity.views.policy, self.samples, self.part) if split == "train" else []
        prior, dims = (record.tails, record.classes), ("temperature", "class")
        self.prior = ArraySpec("prior", prior, record.tails, "float32", dims)
        self.tail_sums = ArraySpec("tail_sums", (self.parts, *prior), 1, "float64", ("part", *dims))

    @property
    def has_prior(self) -> bool:
        """Whether this split holds the class prior: that of training does, unless its records are dense."""
        return self.split == "train" and not self.record.dense

    def carries_tail_sums(self, view: int) -> bool:
        """Whether the commits of a view also name the part's share of the prior."""
        return view == 0 and self.has_prior

    @property
    def view_bytes(self) -> int:
        """What the records of a view take once they are decompressed."""
        return self.parts * sum(spec.chunk_bytes for spec in self.records)

    def commit_file(self, name: str) -> str:
        """The file of a commit, from the cache's folder."""
        return f"{self.prefix}commits/{name}.json"

    def shards(self, views: Iterable[int]) -> Iterator[str]:
        """The names of all shards of these views."""
        return (shard_name(view, part) for view in views for part in range(self.parts))

    def chunks(self, name: str) -> list[Chunk]:
        """The chunks that the commit of that name has to name."""
        if name == "labels":
            return self._in_parts(self.labels) if self.labels.shape[1] else []
        if name == "sizes":
            return self._in_parts(self.sizes) if self.sizes else []
        if name == "prior":
            return [Chunk("", self.prior, 0)] if self.has_prior else []
        if (shard := parse_shard_name(name)) is None:
            raise ValueError(f"no commit is called {name!r}")
        view, part = shard
        found = [Chunk(f"views/v{view:05d}", spec, part) for spec in (*self.records, *self.view_arrays)]
        return [*found, Chunk("", self.tail_sums, part)] if self.carries_tail_sums(view) else found

    def _in_parts(self, spec: ArraySpec) -> list[Chunk]:
        return [Chunk("", spec, part) for part in range(self.parts)]


def record_arrays(record: RecordIdentity, samples: int, part: int) -> list[ArraySpec]:
    """The arrays of one view's records. An array without elements (K = 1 gaps, L = 0 labels) is left out."""
    ids = id_dtype(record.classes)
    names: list[tuple[str, int, str, str]] = []
    if record.k is not None:
        names.append(("classes", record.k, ids, "rank"))
        names.append(("gaps", record.k - 1, record.precision, "rank_from_2"))
    else:
        names.append(("gaps", record.classes, record.precision, "class"))
    names.append(("target_gap", record.target_gaps, "float16", "label"))
    if record.k is not None:
        coded = record.precision == "uint8"
        names.append(("tail", len(record.temperatures), "uint8" if coded else "float16", "temperature"))
        if record.tail_std:
            names.append(("tail_std", 2, "float16", "std_and_tail"))
    return [
        ArraySpec(name, (samples, width), part, dtype, ("sample", dim), _notes(name, record))
        for name, width, dtype, dim in names
        if width
    ]


def _view_arrays(policy: str, samples: int, part: int) -> list[ArraySpec]:
    """The arrays that say how an imported view was made; a view that is drawn has none."""
    if policy == "stored":
        return [
            ArraySpec("boxes", (samples, 4), part, "int32", ("sample", "top_left_height_width")),
            ArraySpec("flips", (samples,), part, "uint8", ("sample",)),
        ]
    return [ArraySpec("seeds", (samples,), part, "int32", ("sample",))] if policy == "foreign" else []


def _notes(name: str, record: RecordIdentity) -> tuple[tuple[str, Any], ...]:
    """How to read an array's numbers, for people who open it with zarr alone."""
    coded = record.k is not None and record.precision == "uint8"
    if name == "gaps":
        return (("nats", f"{STEP} * cumulative sum along the row" if coded else "as stored"),)
    if name == "tail":
        most = f"log({record.classes} - {record.k}) - last gap / temperature - {STEP} * code; {NO_TAIL}: no tail"
        return ("temperatures", record.temperatures), ("nats", most if coded else "as stored")
    return ()
