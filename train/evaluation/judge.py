"""Measures how good students are on one split of the data, any number of times."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.records.encoding import encode
from kdcache.cache.records.records import Records
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.stores import Stored
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.views.render import Renderer
from kdcache.train import group
from kdcache.train.evaluation.metrics import metrics, predict
from kdcache.train.evaluation.parts import Parts, agreements
from kdcache.train.loop.watching import PARTNER


class Judge:
    """Evaluates students on one split, beside the records that the cache holds of the teacher there, if any.

    labels: int64 [N, L] in the student's classes, where there is no cache. parts: of a mixed cache. A call takes a
    student and, as `beside`, a teacher that learnt with it and its input size: then agreement and kl are with that
    teacher, and its own metrics come too, named teacher_*.
    """

    def __init__(
        self,
        cache: Stored | None,
        evaluation: Dataset,
        size: int,
        device: torch.device,
        workers: int | None,
        labels: NDArray[np.int64] | None = None,
        parts: Parts | None = None,
    ) -> None:
        self._data, self._size, self._device, self._workers = evaluation, size, device, workers
        self._renderers: dict[int, Renderer] = {}
        self._records: Records | None = None
        self._parts = parts or {}
        labels = evaluation.labels if labels is None else labels
        if cache is not None:
            if "evaluation" not in cache.identity.record.lacks:
                self._records = cache.read_evaluation()
            labels = cache.evaluation.labels.astype("int64")
        self._labels = torch.from_numpy(labels[:, 0] if labels.shape[1] else labels.reshape(-1))

    def __call__(
        self, model: Classifier, dtype: torch.dtype | None = None, beside: tuple[Classifier, int] | None = None
    ) -> dict[str, float]:
        logits = self._predict(model, self._size, dtype)
        answers = None if beside is None else self._predict(*beside, dtype)
        return group.from_first(lambda: self._metrics(logits, answers))

    def _metrics(self, logits: Tensor, answers: Tensor | None) -> dict[str, float]:
        if answers is None:
            return {**metrics(logits, self._labels, self._records), **agreements(logits, self._parts)}
        theirs = {f"{PARTNER}_{name}": value for name, value in metrics(answers, self._labels).items()}
        return {**metrics(logits, self._labels, encode(answers, None, precision="float32")), **theirs}

    def _predict(self, model: Classifier, size: int, dtype: torch.dtype | None) -> Tensor:
        if size not in self._renderers:
            self._renderers[size] = Renderer(self._data, size, self._device, workers=self._workers)
        return predict(model, self._data, self._renderers[size], dtype)
