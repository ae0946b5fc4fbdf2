"""The evaluation at the end of a run, whose answers are analysed for the loggers that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train.evaluation.analysis.analysis import Analysis, analyse, figures_of
from kdcache.train.evaluation.analysis.classes import Confusions, PerClass
from kdcache.train.evaluation.judge import Answers
from kdcache.train.loop.logs.services import Findings, Picture

_SIDE = 480  # pixels of a matrix at least, unless its cells would be broken
_DARK = np.array([8, 48, 107])  # what a class is classified as always
_SHOWN = 5
_COLUMNS = ("class", "images", "correct", "predicted", "accuracy")


class AnalysedEnd:
    """Evaluates a student as `evaluate` does, and keeps what `kdcache eval` would tell of it beside that.

    evaluate: is given a student, and what makes more figures of its answers. training: a student's answers for
    training images, or None; all ranks call both together. names: of the student's C classes.
    """

    def __init__(
        self,
        evaluate: Callable[[Classifier, Callable[[Answers], dict[str, float]]], dict[str, float]],
        training: Callable[[Classifier], Answers | None],
        names: Sequence[str],
    ) -> None:
        self._evaluate, self._training, self._names = evaluate, training, names
        self._analysis: Analysis | None = None

    def evaluate(self, model: Classifier) -> dict[str, float]:
        training = self._training(model)

        def analysed(answers: Answers) -> dict[str, float]:
            self._analysis = analyse(answers, self._names, training)
            return figures_of(self._analysis)

        return self._evaluate(model, analysed)

    def findings(self) -> Findings | None:
        found = self._analysis
        if found is None or found.per_class is None or found.confusions is None:
            return None
        matrix = confusion_picture(found.confusions, found.per_class.names)
        return Findings(_COLUMNS, _rows(found.per_class), () if matrix is None else (matrix,))


def _rows(found: PerClass) -> tuple[tuple[str | int | float | None, ...], ...]:
    """A row for each class, the least accurate first, and last those without images."""
    rows = zip(found.names, found.images, found.correct, found.predicted, found.accuracy, strict=True)
    return tuple(sorted(rows, key=lambda row: 2.0 if row[-1] is None else row[-1]))


def confusion_picture(found: Confusions, names: Sequence[str]) -> Picture | None:
    """The confusion matrix as a square for each label (row) and prediction (column); None for more than 200 classes.

    A square is the darker the more of the label's images have that prediction: white for none, dark blue for all.
    """
    if found.matrix is None:
        return None
    counts: NDArray[np.float64] = np.array(found.matrix, np.float64)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    pixels = (255 - shares[..., None] * (255 - _DARK)).round().astype(np.uint8)
    cell = -(-_SIDE // len(names))
    largest = [f"{names[one.label]} as {names[one.prediction]} {one.images:,}" for one in found.largest[:_SHOWN]]
    caption = (
        f"rows: labels, columns: predictions, in the order of classes; most confused: {', '.join(largest) or 'none'}"
    )
    return Picture("confusion", pixels.repeat(cell, 0).repeat(cell, 1), caption)
