"""Folders of images by class: which file is in which split, what its label is, and how they are opened."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kdcache.cache.errors import InputError
from kdcache.cache.files import is_folder, is_there
from kdcache.pipeline.data.decode import in_one_line
from kdcache.pipeline.data.imagefiles import FilesDone, is_hidden, left_out, list_images, unreadable_files
from kdcache.pipeline.data.kinds.base import Asked, Kind, TakesPath, paths_at
from kdcache.pipeline.data.kinds.files import FileDataset, Listing, open_listing
from kdcache.pipeline.data.labels import require_text

# Names of the folders of splits, in upper or lower case.
TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev")
TEST = ("test", "testing")
EVALUATION = ("eval", "evaluation")
_SPLITS = (*TRAIN, *VALIDATION, *TEST, *EVALUATION)

HELD_OUT = 10  # where there are no split folders, every tenth image of a class belongs to the eval split
_NAMED = 5  # classes that one message names
_PIECE = 1 << 18  # samples at a time
_PURPOSE = {"train": "learn from", "eval": "evaluate on", "validation": "choose weights by"}


@dataclass(frozen=True)
class Layout:
    """How a kind of folder is laid out, and which folders the user has named.

    evals: what the folder of the eval split may be called, the preferred names first. split_folders: whether there must
    be a folder for each split. train, eval: the folders of the splits, relative to the top, where the user named them.
    """

    evals: tuple[tuple[str, ...], ...]
    split_folders: bool
    train: str | None = None
    eval: str | None = None


@dataclass(frozen=True)
class ClassFolders(Kind):
    """Image files below a folder for each class, and perhaps a folder for each split above these."""

    layout: Layout
    takes_path: TakesPath = "must"
    takes_folders: bool = True

    def open(self, asked: Asked) -> FileDataset:
        def train() -> tuple[Path, Sequence[str]]:
            of_train = self._list(replace(asked, split="train"))
            return of_train.root, of_train.paths

        return open_listing(asked, asked.name, self._list(asked), train)

    def splits(self, asked: Asked) -> tuple[str, ...]:
        """There is a validation split where val and test folders stand beside train, and test is the eval split."""
        third = asked.path is not None and has_validation(asked.path, self._layout(asked))
        return (*super().splits(asked), *(["validation"] if third else ()))

    def unreadable(self, asked: Asked, progress: FilesDone | None = None) -> list[str]:
        """List the files without opening the dataset, since that is refused where a header cannot be read."""
        files = self._list(asked)
        return unreadable_files(files.root, files.paths, progress)

    def _list(self, asked: Asked) -> Listing:
        if asked.path is None:
            raise InputError(f"{asked.name} needs a folder: {asked.name}:PATH")
        return list_split(asked.path, asked.split, self._layout(asked), labelled=not asked.unlabelled)

    def _layout(self, asked: Asked) -> Layout:
        return replace(self.layout, train=asked.folders.get("train"), eval=asked.folders.get("eval"))


def list_split(top: Path, split: str, layout: Layout, *, labelled: bool) -> Listing:
    """List the 'train', 'eval' or 'validation' split below `top`; has_validation says whether there is the last one.

    Where no folder is named like a split, and the layout does not demand such folders, every tenth image of each class
    is held out for the eval split. InputError says what is missing or ambiguous, and which flag decides.
    """
    train, held = _split_folders(top, split, layout)
    third = _third_folder(top, train, held)
    root = {"train": train, "eval": held or train, "validation": third}[split]
    if root is None:
        raise InputError(f"{top}: has no validation split beside a train and a test split")
    names = _class_names(train) if labelled else ()
    if layout.train is None:
        _refuse_splits(top, train)
    paths, others = list_images(root)
    labels = _labels(root, paths, names, train) if labelled else np.zeros(len(paths), dtype=np.int64)
    if labelled and root == train:
        _refuse_empty_classes(train, names, labels)
    whole = train == top and held is None
    if whole:
        chosen = held_out(labels, HELD_OUT) == (split == "eval")
        if not chosen.any():
            raise InputError(f"{top}: has no tenth image in any class to hold out for the eval split")
        paths = paths_at(paths, np.flatnonzero(chosen))
        labels = labels[chosen]
    note = note_of(root, split, len(paths), names, whole) + left_out(others)
    if split == "eval" and held and third is None and (test := _unread_test(top, train, held)):
        note += f"; {test} is not read: with --eval-folder {test} it is reported, and {held.name} chooses the weights"
    return Listing(root, paths, labels[:, None] if labelled else np.empty((len(paths), 0), np.int64), names, note)


def has_validation(top: Path, layout: Layout) -> bool:
    """Whether there are three splits below `top`: to learn from, to choose weights by, and to report."""
    return _third_folder(top, *_split_folders(top, "eval", layout)) is not None


def _third_folder(top: Path, train: Path, held: Path | None) -> Path | None:
    """The folder of the validation split, where another folder is the eval split."""
    if held is None or train == top:
        return None
    found = _only(top, _folders(top), VALIDATION, "--eval-folder")
    return None if found in (train, held) else found


def _unread_test(top: Path, train: Path, held: Path) -> str | None:
    """The name of a test folder that nobody reads, because the validation folder beside it is the eval split."""
    if held.name.casefold() not in VALIDATION:
        return None
    return next((name for name in _folders(top) if name.casefold() in TEST and top / name not in (train, held)), None)


def _split_folders(top: Path, split: str, layout: Layout) -> tuple[Path, Path | None]:
    """The folder of the train split, and the folder of the eval split, or None where there is none."""
    if not is_folder(top):
        raise InputError(f"{top}: {'is not a folder' if is_there(top) else 'no such folder'}")
    there = _folders(top)
    train = _named(top, layout.train, "--train-folder") or _only(top, there, TRAIN, "--train-folder")
    held = _named(top, layout.eval, "--eval-folder")
    if held is None and train != top:
        found = (_only(top, there, kind, "--eval-folder") for kind in layout.evals)
        held = next((folder for folder in found if folder not in (None, train)), None)
    canonical = " or ".join(kind[0] for kind in layout.evals)
    if train is None and (held or layout.split_folders):
        raise InputError(
            f"{top / 'train'}: no such folder, where {top}/CLASS/* of the train split are expected; --train-folder "
            "NAME names another, and --train-folder . says that all folders are classes"
        )
    if train and train != top and held is None and split == "eval":
        name = train.name
        raise InputError(
            f"{top}: has a folder {name} but no {canonical}, as the eval split needs: --eval-folder NAME names "
            f"another; if {name} is a class, give --train-folder ."
        )
    if train and held and (held.is_relative_to(train) or train.is_relative_to(held)):
        raise InputError(f"{held} and {train} lie in each other: the splits must be folders of their own")
    return train or top, held


def _named(top: Path, name: str | None, flag: str) -> Path | None:
    """The folder that the user names for a split."""
    if name is None:
        return None
    folder = Path(os.path.normpath(top / name))
    if not is_folder(folder):
        raise InputError(f"{folder}: no such folder: {flag} is relative to {top}")
    return folder


def _only(top: Path, folders: Sequence[str], names: Sequence[str], flag: str) -> Path | None:
    """The one folder that has one of the names. InputError where several do."""
    found = [folder for folder in folders if folder.casefold() in names]
    if len(found) > 1:
        raise InputError(f"{top}: {' and '.join(found)} may each be the split: {flag} NAME decides")
    return top / found[0] if found else None


def _refuse_splits(top: Path, train: Path) -> None:
    """Raise an InputError for class folders that look like splits, such as seg_train and seg_test."""
    found_words = {folder: words_of(folder) & {*_SPLITS} for folder in _folders(train)}
    splits = [folder for folder, found in found_words.items() if found]
    all_words = set().union(*found_words.values())
    both = all_words & {*TRAIN} and all_words - {*TRAIN}
    if splits and (len(splits) == len(found_words) or (both and 2 * len(splits) >= len(found_words))):
        named = ", ".join(splits[:_NAMED])
        raise InputError(
            f"{train}: {named} look like splits, not classes: --train-folder NAME and --eval-folder NAME name the "
            f"splits; if they are classes, give --train-folder {train.relative_to(top)}"
        )


def words_of(name: str) -> set[str]:
    """The words of a name, without the ending "set": {"train", ""} for trainSet, train_set and train-set1."""
    parts = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())
    return {part.removesuffix("set") for part in parts}


def note_of(place: object, split: str, n: int, names: Sequence[str], whole: bool = False) -> str:
    """A line that tells what was found at a place; whole: whether the splits are parts of what is there."""
    line = f"{place}: {n:,} images to {_PURPOSE[split]}"
    if whole:
        line += f" (every {HELD_OUT}th of a class is held out to evaluate on)" if split == "train" else " (held out)"
    if split == "train" and names:
        more = "" if len(names) <= _NAMED else f", ... {names[-1]}"
        line += f", {len(names):,} classes: {', '.join(names[:_NAMED])}{more}"
    return in_one_line(line)


def held_out(labels: np.ndarray, every: int) -> np.ndarray:
    """Hold out every `every`-th sample of each class: bool [N] for labels int64 [N]."""
    chosen = np.empty(len(labels), np.bool_)
    before = np.zeros(labels.max(initial=0) + 1, np.int64)  # samples of each class in the pieces before
    for start in range(0, len(labels), _PIECE):
        piece = labels[start : start + _PIECE]
        places = before[piece] + places_in_classes(piece, np.arange(len(piece)))
        chosen[start : start + _PIECE] = places % every == every - 1
        before += np.bincount(piece, minlength=len(before))
    return chosen


def places_in_classes(labels: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """How many samples of its class come before each one, int64 [N], if they are ordered by `ranks` [N]."""
    order, counts = np.lexsort((ranks, labels)), np.bincount(labels)
    places = np.empty_like(labels)
    places[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def _folders(top: Path) -> tuple[str, ...]:
    """The names of the folders in `top`, in byte order. Hidden folders are left out."""
    try:
        names = [entry.name for entry in top.iterdir() if entry.is_dir() and not is_hidden(entry.name)]
    except OSError as e:
        raise InputError(f"{top}: cannot be listed: {e.strerror}") from e
    return tuple(sorted(names, key=os.fsencode))


def _class_names(train: Path) -> tuple[str, ...]:
    names = _folders(train)
    if not names:
        raise InputError(
            f"{train}: has no class folders, as in {train}/CLASS/image.jpg; without classes, use --unlabelled"
        )
    require_text(names, str(train))
    return names


def _labels(root: Path, paths: Sequence[str], names: Sequence[str], train: Path) -> np.ndarray:
    """The id of each image's class folder, int64 [N]."""
    ids = {name: i for i, name in enumerate(names)}
    labels = np.fromiter((ids.get(path.partition("/")[0], -1) for path in paths), np.int64, len(paths))
    if (unknown := np.flatnonzero(labels < 0)).size:
        first = paths[unknown[0]]
        if "/" not in first:
            raise InputError(f"{root / first}: lies in no class folder ({root}/CLASS/image.jpg is expected)")
        raise InputError(f"{root / first.partition('/')[0]}: no such class folder in {train}")
    return labels


def _refuse_empty_classes(train: Path, names: Sequence[str], labels: np.ndarray) -> None:
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if empty.size:
        more = f", and {empty.size - 1} more do not" if empty.size > 1 else ""
        raise InputError(f"{train / names[empty[0]]}: holds no images{more}: remove or fill such folders")
