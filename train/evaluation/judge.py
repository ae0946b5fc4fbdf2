"""Measures how good students are on one split of the data, any number of times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.errors import InputError, KdcacheError, NotFoundError
from kdcache.cache.records.encoding import encode
from kdcache.cache.records.records import Records
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.stores import Stored
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.views.render import Renderer
from kdcache.train import group
from kdcache.train.evaluation.metrics import metrics, predict
from kdcache.train.evaluation.parts import Parts, agreements
from kdcache.train.loaders.cached import renderer_for, require_data, stored_view
from kdcache.train.loop.watching import PARTNER

TRAIN_IMAGES = 2000


@dataclass(frozen=True, eq=False)
class Answers:
    """What a student answers for N images, beside what is known of them.

    logits float32 [N, C]; labels int64 [N] in the student's classes, or empty without labels. teacher: what the teacher
    answers for the same images, if that is known. of_partner float32 [N, C]: the logits of a teacher that learnt beside
    the student, where there is one; `teacher` then holds these. parts: what those of a mixed cache answer.
    """

    logits: Tensor
    labels: Tensor
    teacher: Records | None
    of_partner: Tensor | None = None
    parts: Parts = field(default_factory=dict)

    @cached_property
    def ranked(self) -> Tensor:
        """int64 [N, 5] the student's most probable classes, the most probable first; [N, C] where C is less."""
        return self.logits.topk(min(5, self.logits.shape[1]), dim=1).indices

    def figures(self) -> dict[str, float]:
        """Compute the student's `metrics`, and those of a teacher that learnt beside it, named teacher_*."""
        found = {**metrics(self.logits, self.labels, self.teacher), **agreements(self.logits, self.parts)}
        if self.of_partner is None:
            return found
        return {**found, **{f"{PARTNER}_{k}": v for k, v in metrics(self.of_partner, self.labels).items()}}


def beside_partner(logits: Tensor, labels: Tensor, of_partner: Tensor) -> Answers:
    """A student's answers beside those of the teacher that learnt with it."""
    return Answers(logits, labels, encode(of_partner, None, precision="float32"), of_partner)


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
        self,
        model: Classifier,
        dtype: torch.dtype | None = None,
        beside: tuple[Classifier, int] | None = None,
        more: Callable[[Answers], dict[str, float]] = lambda answers: {},
    ) -> dict[str, float]:
        """The figures on all ranks. more: what else the first rank makes of the answers."""
        logits = self._predict(model, self._size, dtype)
        of_partner = None if beside is None else self._predict(*beside, dtype)

        def figures() -> dict[str, float]:
            answers = self._answers(logits, of_partner)
            return {**answers.figures(), **more(answers)}

        return group.from_first(figures)

    def answers(self, model: Classifier, beside: tuple[Classifier, int] | None = None) -> Answers:
        """Ask the student, and the teacher that learnt with it if there is one, in one process."""
        of_partner = None if beside is None else self._predict(*beside, None)
        return self._answers(self._predict(model, self._size, None), of_partner)

    def _answers(self, logits: Tensor, of_partner: Tensor | None) -> Answers:
        if of_partner is None:
            return Answers(logits, self._labels, self._records, parts=self._parts)
        return beside_partner(logits, self._labels, of_partner)

    def _predict(self, model: Classifier, size: int, dtype: torch.dtype | None) -> Tensor:
        if size not in self._renderers:
            self._renderers[size] = Renderer(self._data, size, self._device, workers=self._workers)
        return predict(model, self._data, self._renderers[size], dtype)


def training_answers(
    store: Stored,
    data: str | Dataset,
    count: int,
    model: Classifier,
    size: int,
    device: torch.device,
    workers: int | None,
    beside: tuple[Classifier, int] | None = None,
) -> Answers:
    """Ask a student for `count` training images, spread evenly, in the first complete view of the cache.

    data: the images, or a spec of them. The labels are empty where the view's images are mixed. beside: as for a Judge.
    All ranks call it together, and the first one gets all answers. InputError for a packed file with images, and for
    views that cannot be drawn here; MismatchError for other images.
    """
    if not isinstance(store, Cache):
        raise InputError(f"{store.where} is a packed file with images: give the cache itself with --cache")
    if store.identity.views.policy == "foreign":
        raise InputError(f"{store.where} was imported with views that only the transforms of its project can make")
    if not store.views:
        raise NotFoundError(f"{store.where} has no complete view")
    has = store.identity.record
    images = open_data(data, "train", unlabelled=has.labels == 0) if isinstance(data, str) else data
    require_data(store, images)
    view = stored_view(store, images, store.views[0])
    samples = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.int64))
    records = store.read(store.views[0], samples=samples)
    labels = torch.empty(0, dtype=torch.int64)
    if has.labels and not store.identity.views.mixed:
        labels = torch.from_numpy(store.train.labels[samples, 0].astype("int64"))

    def ask(network: Classifier, side: int) -> Tensor:
        renderer = renderer_for(store, images, side, device, workers)
        return predict(network, images, renderer, view=view, samples=samples)

    logits = ask(model, size)
    return Answers(logits, labels, records) if beside is None else beside_partner(logits, labels, ask(*beside))


def on_training_images(
    store: Stored,
    data: str | Dataset,
    count: int | None,
    say: Callable[[str], None],
    *how: Any,
) -> Answers | None:
    """The student's answers for `count` images of a training view; None where there are none to be had.

    What is asked for raises an error where it cannot be had; what is not asked for is left out, and `say` says so.
    count: None for 2,000 where they can be had. how: the model, its input size, device, worker processes and the
    teacher that learnt beside it.
    """
    if count == 0 or (count is None and "://" in store.where):  # a whole view would come over the network
        return None
    try:
        return training_answers(store, data, count or TRAIN_IMAGES, *how)
    except KdcacheError as e:
        if count is not None:
            raise
        say(f"note: not compared with the teacher on training images: {e}")
        return None
