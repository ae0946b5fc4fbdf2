"""Folders of images by class: which file is in which split, and what its label is."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcache.cache.errors import InputError
from kdcache.pipeline.imagefiles import list_images

_HELD_OUT = 10  # where there are no split folders, every so manyth image of a class is the eval split's


@dataclass(frozen=True, eq=False)
class Listing:
    """The files of one split, in byte order of their paths."""

    root: Path
    paths: tuple[str, ...]  # relative to root
    labels: np.ndarray  # int64 [N, 1], or [N, 0] when unlabelled
    class_names: tuple[str, ...]


def list_split(
    top: Path,
    split: str,
    *,
    labelled: bool,
    evals: Sequence[str],
    split_folders: bool,
) -> Listing:
    """The 'train' or 'eval' split of the images below `top`.

    The splits are top/train and the first of top/`evals` that exists. Without any of them, and unless
    `split_folders` demands them, every tenth image of each class is held out. InputError says what is
    missing.
    """
    if not top.is_dir():
        raise InputError(f"{top}: {'is not a folder' if top.exists() else 'no such folder'}")
    given = [top / name for name in evals if (top / name).is_dir()]
    train = top / "train"
    whole = not split_folders and not given and not train.is_dir()
    if whole:
        train = top
    elif not train.is_dir():
        raise InputError(f"{train}: no such folder, where {top}/CLASS/* of the train split are expected")
    elif split == "eval" and not given:
        raise InputError(f"{top}: has a folder train but no {' or '.join(evals)}, as the eval split needs")
    root = train if whole or split == "train" else given[0]

    names = _class_names(train) if labelled else ()
    paths = list_images(root)
    labels = _labels(root, paths, names, train) if labelled else np.zeros(len(paths), dtype=np.int64)
    if labelled and root == train:
        _refuse_empty_classes(train, names, labels)
    if whole:
        chosen = held_out(labels, _HELD_OUT) == (split == "eval")
        if not chosen.any():
            raise InputError(f"{top}: has no tenth image in any class to hold out for the eval split")
        paths = tuple(paths[i] for i in np.flatnonzero(chosen))
        labels = labels[chosen]
    return Listing(root, paths, labels[:, None] if labelled else np.empty((len(paths), 0), np.int64), names)


def held_out(labels: np.ndarray, every: int) -> np.ndarray:
    """bool [N]: whether a sample is its class's number every-1, 2*every-1 and so on. labels is int64 [N]."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    place = np.empty_like(labels)
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen: np.ndarray = place % every == every - 1
    return chosen


def _class_names(train: Path) -> tuple[str, ...]:
    try:
        names = [entry.name for entry in train.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as e:
        raise InputError(f"{train}: cannot be listed: {e.strerror}") from e
    if not names:
        raise InputError(
            f"{train}: has no class folders, as in {train}/CLASS/image.jpg; without classes, use --unlabelled"
        )
    return tuple(sorted(names, key=os.fsencode))


def _labels(root: Path, paths: Sequence[str], names: Sequence[str], train: Path) -> np.ndarray:
    """int64 [N]"""
    ids = {name: i for i, name in enumerate(names)}
    labels = np.array([ids.get(path.partition("/")[0], -1) for path in paths], dtype=np.int64)
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
