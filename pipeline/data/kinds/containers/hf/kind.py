"""Hugging Face data sets: which split, which columns and which classes a dataset `hf:...` has, and its images.

The library `datasets`, of the extra `hf`, finds and fetches the data and gives them as Arrow files, from which
images are read by their offsets. Parquet and other files are copied to Arrow in its own cache once, as for its users.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.imagefiles import FilesDone, unreadable_files
from kdcache.pipeline.data.kinds.base import Asked, Described, Kind, TakesPath
from kdcache.pipeline.data.kinds.containers.hf.arrow import ArrowSource, Rows, index_rows, row_of
from kdcache.pipeline.data.kinds.containers.hf.library import HUB_NAME, load_splits, read_spec
from kdcache.pipeline.data.kinds.containers.items import (
    ItemDataset,
    State,
    file_states,
    item_sizes,
    known_statistics,
    part_of,
    small_pixels,
    unreadable_items,
)
from kdcache.pipeline.data.kinds.files import FileDataset, Listing, below_one_root, open_listing
from kdcache.pipeline.data.kinds.folders import EVALUATION, TEST, TRAIN, VALIDATION, note_of
from kdcache.pipeline.data.labels import LABEL_COLUMNS, classes_of
from kdcache.pipeline.data.memory import recall, remember
from kdcache.pipeline.process.functions import did_you_mean

_EVALS = (VALIDATION, TEST, EVALUATION)  # the first of them that there is is the eval split


class HuggingFace(Kind):
    """`hf:PATH` or `hf:NAME`, and behind it :TRAIN,EVAL for the splits and ?config=...&image=...&label=..."""

    takes_path: TakesPath = "must"

    def is_place(self, text: str) -> bool:
        return read_spec(text).files != ()

    def open(self, asked: Asked) -> Described:
        found = _Found(asked)
        train = found.learnt(found.train)
        whole = found.evaluation is None
        own = train if asked.split == "train" or found.evaluation is None else found.learnt(found.evaluation)
        labels, names = np.empty((len(own.rows), 0), np.int64), tuple[str, ...]()
        if not asked.unlabelled:
            names = _class_names(train)
            labels = _labels(own, names)[:, None]
        places, trained = np.arange(len(own.rows)), np.arange(len(train.rows))
        if whole:
            places, trained = (part_of(labels, split, found.named.text) for split in (asked.split, "train"))
        about: dict[str, Any] = {
            "labels": labels[places],
            "class_names": names,
            "note": note_of(found.named.text, asked.split, len(places), names, whole) + found.note,
        }
        if own.source is None or train.source is None:
            return _of_files(found, (own, places), (train, trained), about)
        sizes, train_sizes = (one.sizes(one.source, asked.home) for one in (own, train) if one.source)
        pixels = small_pixels(own.source, places, sizes[places])
        known = pixels if asked.split == "train" else None
        mean, std = known_statistics(train.source, train_sizes, train.key, trained, known, asked.home)
        return ItemDataset(
            **about,
            name=asked.name,
            split=asked.split,
            sizes=sizes[places],
            mean=mean,
            std=std,
            source=own.source,
            places=places,
            pixels=pixels,
            parts=whole,
        )

    def unreadable(self, asked: Asked, progress: FilesDone | None = None) -> list[str]:
        """Decode the images without opening the dataset, which is refused where one has no header."""
        found = _Found(asked)
        own = found.learnt(found.train if asked.split == "train" or found.evaluation is None else found.evaluation)
        places = np.arange(len(own.rows))
        if found.evaluation is None:
            labels = np.empty((len(places), 0), np.int64)
            if not asked.unlabelled:
                labels = _labels(own, _class_names(own))[:, None]
            places = part_of(labels, asked.split, found.named.text)
        if own.source is None:
            root, paths = found.files(own, places)
            return unreadable_files(root, paths, progress)
        return unreadable_items(own.source, places, progress)


class _Found:
    """The splits of the data set that is asked for, and which of them is which."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.named = read_spec(asked.spec.partition(":")[2])
        self.splits = load_splits(self.named)
        self.train, self.evaluation = self._chosen()

    def _chosen(self) -> tuple[str, str | None]:
        """The splits to train and to evaluate on; None for the latter if a part of the former is held out."""
        there, text = self.splits, self.named.text
        listed = ", ".join(there)
        if self.named.splits:
            for name in self.named.splits:
                if name not in there:
                    raise InputError(f"hf:{text}: has no split {name!r}{did_you_mean(name, there)} (it has {listed})")
            train, evaluation = (*self.named.splits, None)[:2]
            if train == evaluation:
                raise InputError(f"hf:{text}: {train} cannot be both splits; {train} alone holds a tenth out")
            return str(train), evaluation
        if len(there) == 1:
            return next(iter(there)), None
        trains, *evals = ([name for name in there if name.casefold() in kind] for kind in (TRAIN, *_EVALS))
        held = next((names for names in evals if names), [])
        if len(trains) != 1 or len(held) != 1:
            raise InputError(f"hf:{text}: has the splits {listed}: hf:{text}:TRAIN,EVAL says which of them are which")
        return trains[0], held[0]

    @property
    def note(self) -> str:
        """What a note says of splits that are not read, and of files that lie elsewhere."""
        others = [name for name in self.splits if name not in (self.train, self.evaluation)]
        note = "".join(f"; {len(self.splits[name] or ()):,} rows of {name} are not read" for name in others)
        if self.asked.split != "train" or not self.splits[self.train]:
            return note
        first = _arrow_files(self.splits[self.train])[0]
        if not any(first.is_relative_to(file) for file in self.named.files):
            note += f"; the library datasets keeps its Arrow copy in {first.parent} (see HF_DATASETS_CACHE)"
        if self.named.files and HUB_NAME.fullmatch(self.named.text):
            note += "; this is what lies here, not what the hub may have of that name"
        return note

    def learnt(self, split: str) -> _Learnt:
        """The rows of a split, which are indexed once and remembered under their files' names, sizes and times."""
        rows_of, text = self.splits[split], self.named.text
        name = f"{text}, split {split}" if len(self.splits) > 1 else text
        if not rows_of:
            raise InputError(f"{name}: has no rows")
        image = _image_column(text, rows_of.features, self.named.options.get("image"))
        label = None
        if not self.asked.unlabelled:
            label = _label_column(text, rows_of.features, self.named.options.get("label"))
        classes = getattr(rows_of.features[label], "names", None) if label else None
        if any(not isinstance(one, str) for one in classes or ()):
            raise InputError(f"{name}: the classes of {label} have names that are no text")
        files = _arrow_files(rows_of)
        states = file_states(files)
        about = [[(file.name, *state) for file, state in zip(files, states, strict=True)], image, label, classes]
        key = hashlib.sha256(b"kdcache hf 1\n" + json.dumps(about).encode()).hexdigest()
        rows = Rows.from_arrays(recall(self.asked.home, key) or {}, len(files))
        if rows is None or len(rows) != rows_of.num_rows:
            rows = index_rows(name, files, image, label, classes)
            if len(rows) != rows_of.num_rows:
                raise InputError(f"{name}: is a selection of the rows that its files hold: save it with save_to_disk")
            remember(self.asked.home, key, rows.arrays())
        return _Learnt(name, rows, files, states, key, classes is not None)

    def files(self, learnt: _Learnt, places: np.ndarray) -> tuple[Path, Sequence[str]]:
        """The files that the rows at these places name, below one folder."""
        return below_one_root(learnt.name, [self.named.folder / learnt.rows.paths[i] for i in places])


@dataclass(frozen=True, eq=False)
class _Learnt:
    """The rows of one split. key: what they are remembered under. listed: whether the classes are listed in order."""

    name: str
    rows: Rows
    files: tuple[Path, ...]
    states: tuple[State, ...]
    key: str
    listed: bool

    @property
    def source(self) -> ArrowSource | None:
        """The images, unless they are files of their own."""
        if self.rows.paths:
            return None
        file, offsets, lengths = self.rows.images
        return ArrowSource(self.name, self.files, self.states, file, offsets, lengths)

    def sizes(self, source: ArrowSource, home: Path) -> np.ndarray:
        """The sizes of all images, int32 [N, 2], which are read once."""
        key = hashlib.sha256(f"kdcache-sizes 1 {self.key}".encode()).hexdigest()
        sizes = (recall(home, key) or {}).get("sizes", np.empty(0))
        if sizes.shape != (len(source), 2) or sizes.dtype != np.int32:
            sizes = item_sizes(source)
            remember(home, key, {"sizes": sizes})
        return sizes


def _of_files(
    found: _Found, own: tuple[_Learnt, np.ndarray], train: tuple[_Learnt, np.ndarray], about: dict[str, Any]
) -> FileDataset:
    """The dataset of rows that name image files. about: labels, class_names and note."""
    for learnt, _ in (own, train):
        if not learnt.rows.paths:
            raise InputError(f"{learnt.name}: its rows hold images, but those of the other split name files")
    listed = Listing(*found.files(*own), **about)
    apart = found.evaluation is not None
    return open_listing(found.asked, found.asked.name, listed, lambda: found.files(*train), apart=apart)


def _class_names(train: _Learnt) -> tuple[str, ...]:
    _require_labels(train)
    if train.listed:
        return train.rows.texts

    def where(label: str) -> str:
        return row_of(train.name, int(np.flatnonzero(train.rows.labels == train.rows.texts.index(label))[0]))

    return classes_of(train.rows.texts, where)


def _labels(own: _Learnt, names: Sequence[str]) -> np.ndarray:
    """The class of each row, int64 [N]."""
    _require_labels(own)
    ids = {name: i for i, name in enumerate(names)}
    labels: np.ndarray = np.array([ids.get(text, -1) for text in own.rows.texts], np.int64)[own.rows.labels]
    if (unknown := np.flatnonzero(labels < 0)).size:
        first = int(unknown[0])
        text = own.rows.texts[own.rows.labels[first]]
        raise InputError(f"{row_of(own.name, first)}: label {text!r} is no class of the train split")
    return labels


def _require_labels(learnt: _Learnt) -> None:
    if (missing := np.flatnonzero(learnt.rows.labels < 0)).size:
        where = row_of(learnt.name, int(missing[0]))
        raise InputError(f"{where}: has no label ({missing.size:,} rows have none); --unlabelled does without labels")


def _image_column(text: str, features: Mapping[str, Any], given: str | None) -> str:
    """The column of images: that of Image features, else of bytes; or the one that is named, which may hold paths."""
    if given is not None:
        return _given(text, features, given)
    names = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    names = names or [name for name, one in features.items() if getattr(one, "dtype", "") in ("binary", "large_binary")]
    names = names or [name for name, one in features.items() if isinstance(one, dict) and {*one} == {"bytes", "path"}]
    return _only(text, features, names, "images", "image")


def _label_column(text: str, features: Mapping[str, Any], given: str | None) -> str:
    """The column of labels: that of ClassLabel features, else one that is called label, class or target."""
    if given is not None:
        return _given(text, features, given)
    names = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    names = names or [name for name in features if name.casefold() in LABEL_COLUMNS]
    return _only(text, features, names, "labels", "label")


def _only(text: str, features: Mapping[str, Any], names: Sequence[str], what: str, option: str) -> str:
    if len(names) == 1:
        return names[0]
    more = "" if option == "image" else ", and --unlabelled does without"
    if names:
        raise InputError(f"hf:{text}: {' and '.join(names)} may each be the {what}: ?{option}={names[0]} decides{more}")
    has = ", ".join(features)
    raise InputError(f"hf:{text}: has no column of {what}, but {has}: ?{option}=COLUMN names it{more}")


def _given(text: str, features: Mapping[str, Any], name: str) -> str:
    if name not in features:
        near = did_you_mean(name, features)
        raise InputError(f"hf:{text}: has no column {name!r}{near} (it has {', '.join(features)})")
    return name


def _arrow_files(split: Any) -> tuple[Path, ...]:
    return tuple(Path(one["filename"]) for one in split.cache_files)
