"""Arrow files of a Hugging Face data set: where each row's image lies in them, so that it is read by its offset.

The files are mapped into memory only while they are indexed. What they say of themselves is checked: offsets that lie
outside of a file are refused. pyarrow belongs to the extra `hf`, so it is imported where it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache.errors import InputError, first_sentence
from kdcache.pipeline.data.decode import MAX_BYTES
from kdcache.pipeline.data.imagefiles import Paths
from kdcache.pipeline.data.kinds.containers.items import State, read_part, size_by_parts

_NOT = -1  # the code of a label that a row does not have
_AGAIN = "save it again with save_to_disk"


@dataclass(frozen=True, eq=False)
class ArrowSource:
    """The images of one split, whose bytes lie in Arrow files. states: those of the files when they were indexed.

    file: int32 [N]. offsets, lengths: int64 [N]. name: what messages call the split.
    """

    name: str
    files: tuple[Path, ...]
    states: tuple[State, ...]
    file: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    few = 256

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrowSource) and (self.files, self.states) == (other.files, other.states)

    def __hash__(self) -> int:
        return hash((self.files, self.states))

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, place: int) -> str:
        return row_of(self.name, place)

    def read(self, place: int) -> tuple[bytes, None]:
        return self._bytes(place, int(self.lengths[place])), None

    def size(self, place: int) -> tuple[int, int]:
        return size_by_parts(lambda most: self._bytes(place, most), int(self.lengths[place]), self.where(place))

    def _bytes(self, place: int, length: int) -> bytes:
        number = int(self.file[place])
        return read_part(self.files[number], self.states[number], int(self.offsets[place]), length, self.where(place))


@dataclass(frozen=True, eq=False)
class Rows:
    """What the rows of one split hold.

    images: file, offset and length of each row's image, int64 [3, N], or [3, 0] if the images are files of their own,
    which `paths` names. labels: the place of each row's label in `texts`, -1 without one, int64 [N]; all -1 if labels
    were not read.
    """

    images: np.ndarray
    paths: Paths
    labels: np.ndarray
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` makes rows of."""
        return {
            "images": self.images,
            "paths": self.paths.as_array(),
            "labels": self.labels,
            "texts": np.frombuffer(json.dumps(self.texts).encode(), np.uint8),
        }

    @classmethod
    def from_arrays(cls, stored: Mapping[str, np.ndarray], files: int) -> Rows | None:
        """The rows that `arrays` gave; None unless the arrays fit each other and so many files."""
        try:
            images, labels = stored["images"], stored["labels"]
            paths, texts = Paths.from_array(stored["paths"]), tuple(json.loads(stored["texts"].tobytes()))
        except (KeyError, ValueError):
            return None
        n = len(labels)
        fits = n > 0 and labels.max() < len(texts) if texts else n > 0
        fits &= images.dtype == labels.dtype == np.int64 and images.shape == (3, 0 if paths else n)
        if not fits or len(paths) not in (0, n) or (images.size and images[0].max() >= files):
            return None
        return cls(images, paths, labels, texts)


def row_of(name: str, row: int) -> str:
    """What messages call a row."""
    return f"{name}: row {row}"


def index_rows(name: str, files: Sequence[Path], image: str, label: str | None, classes: Sequence[str] | None) -> Rows:
    """Find the image and the label of every row in Arrow stream files, in order.

    label: the column of labels, None to read none. classes: the names of the classes, where labels are their places.
    InputError, which calls the split `name`, for what cannot be taken.
    """
    import pyarrow as pa

    images: list[np.ndarray] = []
    paths: list[Paths] = []
    labels: list[Any] = []
    n = 0
    for number, file in enumerate(files):
        try:
            for batch, start, end in _batches(file):
                found = _Column(name, n, _column(file, batch, image), start, end)
                if (places := found.places()) is None:
                    paths.append(Paths.of(found.paths()))
                else:
                    images.append(np.stack([np.full(len(batch), number), *places]))
                if bool(paths) and bool(images):
                    raise InputError(f"{row_of(name, n)}: some rows hold images, and others paths of images")
                if label is not None:
                    labels.append(_column(file, batch, label))
                    if labels[-1].type != labels[0].type:
                        types = f"{labels[0].type} in other files, and {labels[-1].type} in this one"
                        raise InputError(f"{file}: the column {label} is {types}: {_AGAIN}")
                n += len(batch)
        except (OSError, pa.ArrowException) as e:
            raise InputError(f"{file}: cannot be read as Arrow: {first_sentence(e)}") from e
    if not n:
        raise InputError(f"{name}: has no rows")
    codes, texts = np.full(n, _NOT, np.int64), tuple[str, ...]()
    if label is not None:
        codes, texts = _labels(name, label, pa.chunked_array(labels), classes)
    joined = Paths.of(chain.from_iterable(paths))
    return Rows(np.concatenate(images, 1) if images else np.empty((3, 0), np.int64), joined, codes, texts)


def _column(file: Path, batch: Any, name: str) -> Any:
    """A column of a record batch. InputError where the file, damaged, lacks it or holds it twice."""
    if batch.schema.get_field_index(name) < 0:
        held = ", ".join(batch.schema.names) or "none"
        raise InputError(f"{file}: does not have one column {name!r} (its columns: {held}): {_AGAIN}")
    return batch.column(name)


def _batches(file: Path) -> Iterator[tuple[Any, int, int]]:
    """The record batches of a file that is mapped into memory, with the addresses of its first byte and its end."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        whole = mapped.read_buffer()
        with pa.ipc.open_stream(pa.BufferReader(whole)) as batches:
            for batch in batches:
                if len(batch):
                    yield batch, whole.address, whole.address + whole.size


@dataclass(frozen=True)
class _Column:
    """The images of one record batch. first: its first row. start, end: addresses of its file's bytes."""

    name: str
    first: int
    column: Any
    start: int
    end: int

    def places(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Offset and length of each image in the file, int64 [n]; None where rows name files. InputError for others."""
        import pyarrow as pa

        bytes_ = self._field("bytes")
        if bytes_ is None or pa.types.is_null(bytes_.type):
            return None
        there = self._valid(bytes_)
        if not there.any():
            return None
        self._require(there, "has no image")
        wide = pa.types.is_large_binary(bytes_.type)
        if not wide and not pa.types.is_binary(bytes_.type):
            raise InputError(f"{self.name}: its images are {bytes_.type}, not bytes")
        _, ends, content = bytes_.buffers()
        bounds = np.frombuffer(ends, np.int64 if wide else np.int32)[bytes_.offset :][: len(bytes_) + 1].astype(
            np.int64
        )
        lengths = np.diff(bounds)
        begin = content.address if content is not None and content.size else self.start
        inside = len(bounds) == len(bytes_) + 1 and self.start <= begin and begin + int(bounds[-1]) <= self.end
        if not inside or bounds[0] < 0 or (lengths < 0).any():
            raise InputError(f"{self.name}: its Arrow files are compressed or damaged: {_AGAIN}")
        self._require(lengths > 0, "its image is empty")
        self._require(lengths <= MAX_BYTES, "its image is larger than 1 GiB")
        return begin - self.start + bounds[:-1], lengths

    def paths(self) -> list[str]:
        """The paths of images that are files of their own. InputError for rows that have none."""
        path = self._field("path")
        if path is None:
            raise InputError(f"{row_of(self.name, self.first)}: has no image")
        self._require(self._valid(path), "has neither an image nor a path")
        found: list[str] = path.to_pylist()
        self._require(np.array([bool(text) and "\0" not in text for text in found]), "its path is no path of a file")
        self._require(np.array(["://" not in text for text in found]), "its image is no file on this disk")
        return found

    def _field(self, field: str) -> Any:
        """The bytes or the paths, in a column of both or of one of them."""
        import pyarrow as pa

        kind = self.column.type
        if pa.types.is_struct(kind):
            return self.column.field(field) if kind.get_field_index(field) >= 0 else None
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return self.column if text == (field == "path") else None

    def _valid(self, array: Any) -> np.ndarray:
        there: np.ndarray = np.array(array.is_valid().to_numpy(zero_copy_only=False))
        there &= self.column.is_valid().to_numpy(zero_copy_only=False)
        return there

    def _require(self, holds: np.ndarray, problem: str) -> None:
        if not holds.all():
            first = self.first + int(np.flatnonzero(~holds)[0])
            raise InputError(f"{row_of(self.name, first)}: {problem} ({int((~holds).sum()):,} rows here)")


def _labels(name: str, label: str, column: Any, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The codes int64 [N] of the labels, -1 without one, and what they stand for. InputError for other labels."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_integer(kind):
        ids = pc.fill_null(column.cast(pa.int64()), _NOT).to_numpy()
        least = 0 if classes is None else _NOT  # a class of -1 stands for no label
        wrong = np.flatnonzero((ids < least) | (ids >= (len(classes) if classes is not None else np.inf)))
        wrong = wrong[pc.is_valid(column).to_numpy()[wrong]]
        if wrong.size:
            first = int(wrong[0])
            what = "ids begin at 0" if classes is None else f"there are {len(classes):,}"
            raise InputError(f"{row_of(name, first)}: label {ids[first]} is no class: {what}")
        if classes is not None:
            return ids, tuple(classes)
        known, codes = np.unique(ids, return_inverse=True)
        skipped = int(known[0] == _NOT)
        return codes.reshape(-1).astype(np.int64) - skipped, tuple(map(str, known[skipped:].tolist()))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        coded = column.combine_chunks().dictionary_encode()
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        texts = tuple(coded.dictionary.to_pylist())
        codes = pc.fill_null(coded.indices.cast(pa.int64()), _NOT).to_numpy()
        if "" in texts or any("\0" in text for text in texts):
            first = int(
                np.flatnonzero(np.isin(codes, [i for i, text in enumerate(texts) if not text or "\0" in text]))[0]
            )
            raise InputError(f"{row_of(name, first)}: label '' is no class name")
        return codes, texts
    raise InputError(f"{name}: column {label} holds {kind}, but labels are whole numbers or class names")
