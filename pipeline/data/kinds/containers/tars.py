"""WebDataset tars: which tars are which split, and their samples, read by offset."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.decode import in_one_line
from kdcache.pipeline.data.imagefiles import FilesDone, Paths
from kdcache.pipeline.data.kinds.base import Asked, Kind, TakesPath, paths_at
from kdcache.pipeline.data.kinds.containers.items import (
    ItemDataset,
    file_states,
    item_sizes,
    known_statistics,
    part_of,
    read_part,
    size_by_parts,
    small_pixels,
    unreadable_items,
)
from kdcache.pipeline.data.kinds.containers.passes import in_workers
from kdcache.pipeline.data.kinds.containers.tarindex import TarIndex, index_tar
from kdcache.pipeline.data.kinds.containers.tarnames import BETWEEN, spelled, tars_of
from kdcache.pipeline.data.kinds.folders import note_of
from kdcache.pipeline.data.labels import classes_of
from kdcache.pipeline.data.memory import recall, remember

_FEW = 8  # tars that this process indexes itself
_NAMES = ("classnames.txt", "classes.txt")  # a class a line, in the folder of the first tar


class Tars(Kind):
    """`wds:TRAIN::EVAL`, or `wds:PATTERN` for tars whose names tell their split, or of which a part is held out."""

    takes_path: TakesPath = "must"
    between: str = BETWEEN

    def open(self, asked: Asked) -> ItemDataset:
        train, evaluation, unread = tars_of(asked)
        learnt = _learnt(train, asked.home)
        own = learnt if asked.split == "train" or evaluation is None else _learnt(evaluation, asked.home)
        labels, names = np.empty((len(own.source), 0), np.int64), tuple[str, ...]()
        if not asked.unlabelled:
            ids = _ids(learnt)
            labels = _labels(own, ids)[:, None]
            names = _class_names(train[0].parent, tuple(ids))
        places = trained = np.arange(len(own.source))
        if whole := evaluation is None:
            places, trained = (part_of(labels, split, train[0]) for split in (asked.split, "train"))
        elif own is not learnt:
            trained = np.arange(len(learnt.source))
        pixels = small_pixels(own.source, places, own.sizes[places])
        mean, std = known_statistics(
            learnt.source, learnt.sizes, learnt.key, trained, pixels if asked.split == "train" else None, asked.home
        )
        return ItemDataset(
            name=asked.name,
            split=asked.split,
            labels=labels[places],
            class_names=names,
            sizes=own.sizes[places],
            mean=mean,
            std=std,
            note=note_of(spelled(asked), asked.split, len(places), names, whole) + own.left_out + unread,
            source=own.source,
            places=places,
            paths=paths_at(own.source.names, places) if whole else own.source.names,
            pixels=pixels,
            parts=whole,
        )

    def unreadable(self, asked: Asked, progress: FilesDone | None = None) -> list[str]:
        """Decode the images without opening the dataset, which is refused where one has no header."""
        train, evaluation, _ = tars_of(asked)
        own = _indexed(train if asked.split == "train" or evaluation is None else evaluation)
        places = np.arange(len(own.source))
        if evaluation is None:
            labels = np.empty((len(places), 0), np.int64)
            if not asked.unlabelled:
                labels = _labels(own, _ids(own))[:, None]
            places = part_of(labels, asked.split, train[0])
        return unreadable_items(own.source, places, progress)


@dataclass(frozen=True, eq=False)
class TarSource:
    """The images of some tars. states: each tar's size in bytes and time of change in ns when it was indexed.

    tar, offsets, lengths: int64 [N]. names: of the images' members.
    """

    tars: tuple[Path, ...]
    states: tuple[tuple[int, int], ...]
    tar: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    names: Paths
    few = 256

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TarSource) and (self.tars, self.states) == (other.tars, other.states)

    def __hash__(self) -> int:
        return hash((self.tars, self.states))

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, place: int) -> str:
        return in_one_line(f"{self.tars[self.tar[place]]}: {self.names[place]}")

    def read(self, place: int) -> tuple[bytes, None]:
        return self._bytes(place, int(self.lengths[place])), None

    def size(self, place: int) -> tuple[int, int]:
        return size_by_parts(lambda most: self._bytes(place, most), int(self.lengths[place]), self.where(place))

    def _bytes(self, place: int, length: int) -> bytes:
        """The first bytes of an image. InputError where its tar is not what it was when it was indexed."""
        number = int(self.tar[place])
        return read_part(self.tars[number], self.states[number], int(self.offsets[place]), length, self.where(place))


@dataclass(frozen=True, eq=False)
class _Index:
    """The samples of some tars. labels: the place of each one's label in `texts`, -1 without, int64 [N]."""

    source: TarSource
    labels: np.ndarray
    texts: tuple[str, ...]
    without_image: int

    @property
    def left_out(self) -> str:
        n = self.without_image
        return f"; {n:,} samples without an image are left out" if n else ""


@dataclass(frozen=True, eq=False)
class _Learnt(_Index):
    """Also the sizes int32 [N, 2]. key: what all this is remembered under."""

    sizes: np.ndarray
    key: str


def _learnt(tars: tuple[Path, ...], home: Path) -> _Learnt:
    """All that is to be known of some tars, which is remembered under their names, sizes and times of change."""
    states = file_states(tars)
    listing = "".join(f"{path.name}\0{size} {changed}\n" for path, (size, changed) in zip(tars, states, strict=True))
    key = hashlib.sha256(b"kdcache tars 1\n" + os.fsencode(listing)).hexdigest()
    if (stored := recall(home, key)) is not None and (known := _from_arrays(tars, states, stored, key)):
        return known
    index = _indexed(tars)
    found = _Learnt(index.source, index.labels, index.texts, index.without_image, item_sizes(index.source), key)
    remember(home, key, _arrays(found))
    return found


@dataclass(frozen=True)
class _IndexOne:
    tars: tuple[Path, ...]

    def __call__(self, number: int) -> TarIndex | str:
        try:
            return index_tar(self.tars[number])
        except InputError as e:
            return str(e)


def _indexed(tars: tuple[Path, ...]) -> _Index:
    """Read the headers of all tars, in worker processes."""
    states = file_states(tars)
    known: dict[str | None, int] = {}  # labels, in the order in which they come first
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, Paths]] = []  # offsets, lengths, labels and names of each tar
    number = text = None
    without_image = 0
    work, numbers = _IndexOne(tars), range(len(tars))
    with closing(
        in_workers(work, numbers, lambda i: str(tars[i]), title="index tars", unit="tars", chunk=1, few=_FEW)
    ) as results:
        for index in results:
            if isinstance(index, str):
                raise InputError(index)
            codes = [known.setdefault(label, len(known)) for label in index.labels]
            arrays = (np.array(of, np.int64) for of in (index.offsets, index.lengths, codes))
            parts.append((*arrays, Paths.of(index.names)))  # type: ignore[arg-type]  # three of them
            number, text = number or index.numbers, text or index.texts
            without_image += index.without_image
    if number and text:
        raise InputError(f"{text}: its label is text, and that of {number} is a number: write all in one way")
    counts = [len(part[3]) for part in parts]
    if not sum(counts):
        raise InputError(f"{tars[0]}{' and the others' if len(tars) > 1 else ''}: holds no sample with an image")
    texts = sorted(label for label in known if label is not None)
    ids = {text: i for i, text in enumerate(texts)} | {None: -1}
    source = TarSource(
        tars,
        states,
        np.repeat(np.arange(len(tars)), counts),
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
        Paths.of(chain.from_iterable(part[3] for part in parts)),
    )
    labels = np.array([ids[label] for label in known], np.int64)[np.concatenate([part[2] for part in parts])]
    return _Index(source, labels, tuple(texts), without_image)


_EACH = ("tar", "offsets", "lengths")


def _arrays(learnt: _Learnt) -> dict[str, np.ndarray]:
    return {
        **{name: getattr(learnt.source, name) for name in _EACH},
        "names": learnt.source.names.as_array(),
        "labels": learnt.labels,
        "texts": np.frombuffer(json.dumps(learnt.texts).encode(), np.uint8),
        "without_image": np.array(learnt.without_image),
        "sizes": learnt.sizes,
    }


def _from_arrays(
    tars: tuple[Path, ...], states: tuple[tuple[int, int], ...], stored: dict[str, np.ndarray], key: str
) -> _Learnt | None:
    """What _arrays has made arrays of; None unless they fit each other."""
    try:
        each = [stored[name] for name in (*_EACH, "labels")]
        names = Paths.from_array(stored["names"])
        texts, sizes = tuple(json.loads(stored["texts"].tobytes())), stored["sizes"]
        without = int(stored["without_image"])
    except (KeyError, ValueError):
        return None
    n = len(names)
    fits = all(array.shape == (n,) and array.dtype == np.int64 for array in each)
    if not fits or sizes.shape != (n, 2) or sizes.dtype != np.int32 or each[0].max() >= len(tars):
        return None
    tar, offsets, lengths, labels = each
    return _Learnt(TarSource(tars, states, tar, offsets, lengths, names), labels, texts, without, sizes, key)


def _ids(learnt: _Index) -> dict[str, int]:
    """The id of each label of the train split."""
    _require_all(learnt)

    def where(text: str) -> str:
        return learnt.source.where(int(np.flatnonzero(learnt.labels == learnt.texts.index(text))[0]))

    return {name: i for i, name in enumerate(classes_of(learnt.texts, where))}


def _require_all(index: _Index) -> None:
    if (missing := np.flatnonzero(index.labels < 0)).size:
        where = index.source.where(int(missing[0]))
        raise InputError(
            f"{where}: has no label ({missing.size:,} samples have none): a .cls or a .json member with a label must "
            "stand beside the image under the same name; --unlabelled does without"
        )


def _labels(own: _Index, ids: dict[str, int]) -> np.ndarray:
    _require_all(own)
    labels: np.ndarray = np.array([ids.get(text, -1) for text in own.texts], np.int64)[own.labels]
    if (unknown := np.flatnonzero(labels < 0)).size:
        first = int(unknown[0])
        text = own.texts[own.labels[first]]
        raise InputError(f"{own.source.where(first)}: label {text!r} is no class of the train split")
    return labels


def _class_names(folder: Path, ids: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the classes: those in a file beside the tars where labels are ids, else the labels themselves."""
    file = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if file is None or ids != tuple(map(str, range(len(ids)))):
        return ids
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be read: {e}") from e
    if len(names) < len(ids):
        raise InputError(f"{file}: names {len(names):,} classes, but labels go up to {len(ids) - 1:,}")
    return names
