"""How good a student is class by class, and which classes it takes for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MATRIX_UP_TO = 200  # classes
_LARGEST = 100  # confusions that are kept
_SHOWN = 5


@dataclass(frozen=True)
class PerClass:
    """A column for each figure, with one row for each class of the student, in their order.

    images: how many have that label. correct: how many of them are classified as it. predicted: how many of all images
    are. accuracy: correct of images, in 0..1; None for a class without images.
    """

    names: tuple[str, ...]
    images: tuple[int, ...]
    correct: tuple[int, ...]
    predicted: tuple[int, ...]
    accuracy: tuple[float | None, ...]


@dataclass(frozen=True)
class Confusion:
    """So many images of class `label` are classified as class `prediction`, which is another one."""

    label: int
    prediction: int
    images: int


@dataclass(frozen=True)
class Confusions:
    """matrix: images by label (row) and prediction (column), or None for more than 200 classes.

    largest: the most frequent confusions, at most 100, the largest first. others: how many images all others have.
    """

    matrix: tuple[tuple[int, ...], ...] | None
    largest: tuple[Confusion, ...]
    others: int


def names_of_classes(classes: int, names: Sequence[str], ids: Sequence[int | None]) -> tuple[str, ...]:
    """Name each of a student's classes, given the data's class `names` and their ids; else its number is its name."""
    found = [str(c) for c in range(classes)]
    for name, c in zip(names, ids, strict=False):
        if c is not None:
            found[c] = name
    return tuple(found)


def per_class(predictions: NDArray[np.int64], labels: NDArray[np.int64], names: Sequence[str]) -> PerClass:
    """Count images by class. predictions and labels [N], each below len(names)."""
    images, predicted, correct = (
        np.bincount(of, minlength=len(names)).tolist() for of in (labels, predictions, labels[labels == predictions])
    )
    accuracy = [
        right / all_of_them if all_of_them else None for right, all_of_them in zip(correct, images, strict=True)
    ]
    return PerClass(tuple(names), tuple(images), tuple(correct), tuple(predicted), tuple(accuracy))


def confusions(predictions: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> Confusions:
    """Count images by label and prediction, [N] each and below `classes`."""
    pairs, counts = np.unique(labels * classes + predictions, return_counts=True)
    rows, columns = np.divmod(pairs, classes)
    matrix = None
    if classes <= MATRIX_UP_TO:
        whole = np.zeros((classes, classes), np.int64)
        whole[rows, columns] = counts
        matrix = tuple(map(tuple, whole.tolist()))
    wrong = rows != columns
    rows, columns, counts = rows[wrong], columns[wrong], counts[wrong]
    order = np.lexsort((columns, rows, -counts))[:_LARGEST]
    largest = [Confusion(*of) for of in zip(*(a[order].tolist() for a in (rows, columns, counts)), strict=True)]
    return Confusions(matrix, tuple(largest), int(counts.sum() - counts[order].sum()))


def described(found: PerClass, mixed_up: Confusions) -> list[str]:
    """The lines that tell people of the worst classes and the largest confusions; none where all is right."""
    known = [(accuracy, c) for c, accuracy in enumerate(found.accuracy) if accuracy is not None and accuracy < 1]
    worst = [f"{found.names[c]} {100 * accuracy:.1f}% of {found.images[c]:,}" for accuracy, c in sorted(known)[:_SHOWN]]
    wrong = [
        f"{found.names[one.label]} as {found.names[one.prediction]} {one.images:,}" for one in mixed_up.largest[:_SHOWN]
    ]
    lines = (("worst classes", worst), ("confused", wrong))
    return [f"{title:13} {', '.join(shown)}" for title, shown in lines if shown]
