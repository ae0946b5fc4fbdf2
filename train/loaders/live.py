"""Loaders without a cache's records: a live teacher answers in every step, or nothing but labels is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.errors import KdcacheError, NotFoundError
from kdcache.cache.records.encoding import encode
from kdcache.cache.records.records import Records
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.answers import labels_in
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.views.parameters import TEACHING, Parameters, draw, view_of_all
from kdcache.pipeline.views.policy import parse_policy, policy_of
from kdcache.pipeline.views.render import Renderer
from kdcache.pipeline.views.table import Table
from kdcache.train.loaders.cached import partners_of, renderer_for, shares_of
from kdcache.train.loaders.order import EpochOrder, Epochs, in_turns, labels_of, squeezed


class LiveTeacher(Protocol):
    """A network that answers in every step: a Teacher, or one that learns beside the student (loop/cotrain.py)."""

    @property
    def device(self) -> torch.device: ...

    @property
    def input_size(self) -> int: ...

    def logits(self, images: Tensor) -> Tensor: ...


class OnlineLoader(Epochs):
    """The baseline: the views of a cache in the order of CachedLoader, answered by the live teacher in every step.

    fresh_views: epoch e takes view e, a new one every epoch, instead of view e mod V. Epochs go on as in CachedLoader.
    """

    def __init__(
        self,
        cache: Cache,
        data: Dataset,
        teacher: LiveTeacher,
        batch_size: int,
        *,
        fresh_views: bool = False,
        seed: int = 0,
        image_size: int | None = None,
        views: int | None = None,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        samples: NDArray[np.int64] | None = None,
        crops_per_decode: int = 1,
    ) -> None:
        if not fresh_views and not cache.views:
            raise NotFoundError(f"{cache.where} has no complete view; --fresh-views needs none")
        self._cache, self._data, self._teacher = cache, data, teacher
        self._views = None if fresh_views else cache.views[:views]
        mixed, chosen = cache.identity.views.mixed, len(data) if samples is None else samples
        self._order = EpochOrder(chosen, batch_size, rank, world, seed, mixed, crops_per_decode)
        self._require_crops(cache.where, mixed)
        self._drawn: dict[int, Parameters] = {}  # of the views of a round
        self._student_images = renderer_for(cache, data, image_size, teacher.device, workers)
        self._teacher_images = Renderer(
            data, teacher.input_size, teacher.device, policy_of(cache.identity.views, cache.where), workers,
            cache.identity.teacher.interpolation,
        )  # fmt: skip

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records]]:
        """(images uint8 [B, 3, S, S], labels, dense float32 records of the live teacher)."""
        epoch = self._order.next_epoch
        parameters = self._parameters(self._views_of(epoch))
        self._order.begin(epoch)
        batches = self._order.batches(epoch, partners_of(parameters[0]))[start:]
        finite = torch.ones((), dtype=torch.bool, device=self._teacher.device)
        of_batches = self._labels(parameters, batches)
        for (labels, shares), (images, seen) in zip(of_batches, self._images(parameters, batches), strict=True):
            y = labels if labels.numel() else None
            answers = self._teacher.logits(seen)
            finite &= torch.isfinite(answers).all()  # looked at in the end, so that no step waits for the device
            records = encode(answers, y, precision="float32", check=False)
            yield images, labels, replace(records, label_weights=shares)
        if not finite:
            raise KdcacheError("the teacher's logits are not finite: lower --lr where it learns, or check its weights")

    def answers(self, view: int) -> Iterator[Records]:
        """The live teacher's records of all training samples in this view, batch by batch. A rank gives its share."""
        mine = self._order.in_order()
        parameters = self._drawn_view(view)
        of_batches = self._labels([parameters], mine)
        for (y, shares), seen in zip(of_batches, self._teacher_images.batches(parameters, mine), strict=True):
            records = encode(self._teacher.logits(seen), y if y.numel() else None, precision="float32")
            yield replace(records, label_weights=shares)

    def _drawn_view(self, view: int) -> Parameters:
        return view_of_all(self._cache.identity.views, view, self._data.sizes, self._data.in_memory)

    def _parameters(self, views: Sequence[int]) -> list[Parameters]:
        """The parameters of these views, which are kept for the other epochs of their round."""
        kept = self._drawn
        self._drawn = {v: kept.get(v) or self._drawn_view(v) for v in views}
        return list(self._drawn.values())

    def _labels(
        self, parameters: Sequence[Parameters], batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The labels of each batch in some views, and where these are mixed their shares in the student's images."""
        labels = self._cache.train.labels.astype(np.int64)
        return _with_shares(labels, parameters, batches, self._student_images.size, self._teacher.device)

    def _images(
        self, parameters: Sequence[Parameters], batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the student sees and what the teacher sees, rendered once where both want the same."""
        student, teacher = self._student_images, self._teacher_images
        tables = [Table(drawn, 0) for drawn in parameters]
        mine = student.crops(tables, batches)
        if (student.size, student.interpolation) == (teacher.size, teacher.interpolation):
            return ((images, images) for images in mine)
        return zip(mine, teacher.crops(tables, batches), strict=True)


class PlainLoader(Epochs):
    """Images and labels alone, for teaching a teacher: epoch e takes view e of a draw that no cache is built from.

    Epochs go on as in CachedLoader.
    """

    def __init__(
        self,
        data: Dataset,
        policy: str,
        batch_size: int,
        size: int,
        *,
        seed: int,
        device: torch.device,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._data, self._policy, self._seed = data, policy, seed
        self._views = None
        self._order = EpochOrder(len(data), batch_size, rank, world, seed, parse_policy(policy).mixed)
        self._renderer = Renderer(data, size, device, policy, workers)

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records | None]]:
        """(images uint8 [B, 3, S, S], labels, None). start: leave out so many batches.

        Where views are mixed, records that hold no answers take the place of None: label_weights stands in them.
        """
        epoch, everything = self._order.next_epoch, range(len(self._data))
        parameters = draw(self._policy, self._seed, epoch, everything, self._data.sizes, stream=TEACHING)
        self._order.begin(epoch)
        batches = self._order.batches(epoch, partners_of(parameters))[start:]
        size, device = self._renderer.size, self._renderer.device
        of_batches = _with_shares(self._data.labels, [parameters], batches, size, device)
        rendered = self._renderer.batches(parameters, batches)
        for images, (y, shares) in zip(rendered, of_batches, strict=True):
            yield images, y, None if shares is None else _unanswered(y, shares, len(self._data.class_names))


def _with_shares(
    labels: NDArray[np.int64],
    parameters: Sequence[Parameters],
    batches: Sequence[NDArray[np.int64]],
    size: tuple[int, int],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The labels of each batch, and where the views are mixed their shares in images of that size.

    labels: int64 [N, L], those of the samples. Of several views, those of a sample follow each other; they are of one
    pairing, where they are mixed.
    """
    views, of_records = len(parameters), labels_in(labels, parameters[0], range(len(labels)))
    found = labels_of(squeezed(torch.from_numpy(of_records).to(device)), batches)
    shares = [shares_of(drawn, of_records.shape[1], size) for drawn in parameters]
    drawn = [labels_of(of.to(device), batches) for of in shares if of is not None]
    if not drawn:
        return ((in_turns([y] * views), None) for y in found)
    return ((in_turns([y] * views), in_turns(of)) for y, *of in zip(found, *drawn, strict=True))


def _unanswered(labels: Tensor, shares: Tensor, classes: int) -> Records:
    """Records of a batch that no teacher has answered for."""
    nothing = shares.new_empty((len(labels), 0))
    return Records(None, nothing, nothing, nothing, labels, classes, (), label_weights=shares)
