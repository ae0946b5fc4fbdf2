"""Batches of (images, labels, records): where the cache meets the pixels.

The epoch's records are one slab on the device, gathered by index; the next epoch's slab is read ahead in a thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.encoding import encode
from kdcache.cache.errors import InputError, KdcacheError, MismatchError, NotFoundError
from kdcache.cache.records import Records
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.build.source import describe_data
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.ffcv.beton import Beton
from kdcache.pipeline.views.policy import TEACHING, ViewParameters, draw, imported_view
from kdcache.pipeline.views.render import RENDERER, Renderer, normalised, order_on

_GATHERED = 1 << 22  # bytes: far fewer calls than by batch, and still in the processor's caches


class LiveTeacher(Protocol):
    """What answers in every step: a Teacher, or one that learns beside the student (cotrain.py)."""

    @property
    def device(self) -> torch.device: ...

    @property
    def input_size(self) -> int: ...

    def logits(self, images: Tensor) -> Tensor: ...


def epoch_batches(
    samples: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[NDArray[np.int64]]:
    """This rank's part of each batch of an epoch: a permutation that depends on (seed, epoch) alone.

    The samples left over by whole batches wait for another epoch's permutation.
    """
    words = np.random.Philox(key=np.array([seed, 1], np.uint64), counter=np.array([0, epoch, 0, 0], np.uint64))
    # Samples by the upper bits of their words, which have the samples in the lower ones: ten times as fast as argsort.
    low = np.uint64((1 << samples.bit_length()) - 1)
    order = (np.sort(words.random_raw(samples) & ~low | np.arange(samples, dtype=np.uint64)) & low).astype(np.int64)
    count = samples // batch_size
    return [np.array_split(b, world)[rank] for b in np.split(order[: count * batch_size], count)]


def gathered(records: Records, batches: Sequence[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Records]]:
    """Labels and records of each batch, given the records of all samples: many batches' are gathered at once."""
    a_batch = max((len(b) for b in batches), default=1) * records.nbytes // len(records)
    at_once = max(1, _GATHERED // a_batch)
    order = order_on(records.gaps.device, batches)
    for start in range(0, len(batches), at_once):
        sizes = [len(b) for b in batches[start : start + at_once]]
        answers, order = records[order[: sum(sizes)]], order[sum(sizes) :]
        labels, stop = _squeezed(answers.labels.long()), 0
        for size in sizes:
            rows = slice(stop, stop := stop + size)
            yield labels[rows], answers[rows]


def require_data(cache: Cache | Beton, data: Dataset) -> None:
    """MismatchError, field by field, unless `data` is the split that the cache was built from."""
    has = cache.identity.data if data.split == "train" else cache.identity.evaluation
    given = describe_data(data, has.full_contents)
    if found := has.differences(given, theirs="the data"):
        raise MismatchError(f"{cache.where} was built from other data than {data.name}: {'; '.join(found)}")
    if isinstance(cache, Cache):  # a .beton has the train split's images itself
        (cache.train if data.split == "train" else cache.evaluation).require_sizes(data.sizes)


def stored_view(cache: Cache, data: Dataset, view: int) -> ViewParameters:
    """The view's parameters, drawn again or as imported, compared with the digests of its commits."""
    views, store = cache.identity.views, cache.train
    if views.imported:
        drawn = imported_view(store.view_arrays(view), data.sizes, f"view {view} of {cache.where}")
    elif views.renderer != RENDERER:
        raise MismatchError(f"{cache.where} was rendered by {views.renderer}, this kdcache renders by {RENDERER}")
    else:
        drawn = draw(views.policy, views.seed, view, range(len(data)), data.sizes)
    for part in range(store.parts):
        rows = store.rows(part)
        if drawn[rows.start : rows.stop].digest() != store.commit(shard_name(view, part)).parameters:
            raise MismatchError(
                f"view {view}, part {part} of {cache.where} was built with other view parameters than this "
                "kdcache draws: its records do not belong to these pixels"
            )
    return drawn


class EpochOrder:
    """Which samples stand in which batch of which epoch, and which epoch comes next: a loader's `sampler`.

    epoch: the one that was begun last, or that set_epoch has chosen since. Each beginning takes the next epoch, unless
    set_epoch has chosen one. samples: how many there are, or the chosen ones' places, int64 in ascending order.
    """

    def __init__(self, samples: int | NDArray[np.int64], batch_size: int, rank: int, world: int, seed: int) -> None:
        self._chosen = None if isinstance(samples, int) else samples
        self._samples = samples if isinstance(samples, int) else len(samples)
        if not 1 <= batch_size <= self._samples:
            raise InputError(f"a batch of {batch_size} does not fit the data's {self._samples} samples")
        if batch_size < world:
            raise InputError(f"a batch of {batch_size} cannot be split over {world} ranks")
        self._batch_size, self._seed = batch_size, seed
        self._rank, self._world = rank, world
        self._epoch, self._begun = 0, False

    @property
    def epoch(self) -> int:
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that begins next, counted from 0."""
        self._epoch, self._begun = epoch, False

    @property
    def next_epoch(self) -> int:
        return self._epoch + self._begun

    def begin(self, epoch: int) -> None:
        """Note that the first batch of this epoch is ready: only then has it been taken."""
        self._epoch, self._begun = epoch, True

    def __len__(self) -> int:
        return self._samples // self._batch_size

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """This rank's part of each batch."""
        found = epoch_batches(self._samples, self._batch_size, self._seed, epoch, self._rank, self._world)
        return self._places(found)

    def in_order(self) -> list[NDArray[np.int64]]:
        """This rank's share of the batches that hold all samples once, in ascending order; the last may be short."""
        all_of_them = np.split(np.arange(self._samples), range(self._batch_size, self._samples, self._batch_size))
        return self._places(all_of_them[self._rank :: self._world])

    def _places(self, batches: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        return batches if self._chosen is None else [self._chosen[batch] for batch in batches]


class _Epochs:
    """What the loaders have in common: an order of epochs, each of which takes a view."""

    _order: EpochOrder
    _views: Sequence[int] | None  # in turn; None: view e in epoch e

    @property
    def sampler(self) -> EpochOrder:
        """For frameworks that choose the epoch by `loader.sampler.set_epoch(e)`."""
        return self._order

    @property
    def epoch(self) -> int:
        """The epoch that was begun last, or that set_epoch has chosen since; counted from 0."""
        return self._order.epoch

    @property
    def view(self) -> int:
        """The view that `epoch` takes."""
        return self._view_of(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that begins next, counted from 0: its view and its order."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._order)

    def _view_of(self, epoch: int) -> int:
        return epoch if self._views is None else self._views[epoch % len(self._views)]


class CachedLoader(_Epochs):
    """Iterates over (images, labels, records) of an epoch, in an order that depends on (seed, epoch) alone.

    images: float32 [B, 3, S, S], normalised by the dataset's mean and std, in the view that the records belong
    to; labels: int64 [B] in the teacher's classes ([B, L] unless L = 1); records: Records of B. batch_size is that of
    all `world` ranks together; samples that fill no batch are left out of the epoch.

    Epoch e takes complete view e mod V. The first iterator reads epoch 0 and each later one the epoch after the last
    that was begun, from its first batch on; set_epoch(e), also as sampler.set_epoch(e), chooses another. `epoch` and
    `view` say what is read.

    data: a Dataset, or its name as in --data. image_size: pixels for the student, by default those of the images
    (in memory) or of the teacher (files). views: use only the first so many. samples: train on these alone, places in
    ascending order. Raises MismatchError when the data are not the cache's, NotFoundError when no view is complete.
    """

    def __init__(
        self,
        cache: Cache,
        data: Dataset | str,
        batch_size: int = 256,
        rank: int = 0,
        world: int = 1,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        image_size: int | None = None,
        views: int | None = None,
        workers: int | None = None,
        samples: NDArray[np.int64] | None = None,
    ) -> None:
        unlabelled = cache.identity.record.labels == 0
        self.cache = cache
        self.data = open_data(data, "train", unlabelled=unlabelled) if isinstance(data, str) else data
        require_data(cache, self.data)
        if cache.identity.views.policy == "foreign":
            raise InputError(
                f"{cache.where} was imported with views that only the transforms of its project can make: in a loop of "
                "your own, cache.read(view) has the records, cache.train.view_arrays(view) the seeds (docs/stores.md)"
            )
        self._views = cache.views[:views]
        if not self._views:
            raise NotFoundError(f"{cache.where} has no complete view: run kdcache build again to finish it")
        if views is not None and views > len(self._views):
            raise NotFoundError(f"{cache.where} has {len(self._views)} complete views, not {views}: build more")
        self._order = EpochOrder(len(self.data) if samples is None else samples, batch_size, rank, world, seed)
        self._device = torch.device(device)
        self._renderer = _renderer(cache, self.data, image_size, self._device, workers)
        self._mean, self._std = (
            torch.tensor(v, device=self._device).view(1, 3, 1, 1) * 255 for v in (self.data.mean, self.data.std)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdcache-slab")
        self._slabs: dict[int, Future[tuple[Records, ViewParameters]]] = {}
        self._in_use = Counter[int]()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Records]]:
        for images, labels, records in self.steps():
            yield normalised(images, self._mean, self._std), labels, records

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records]]:
        """The same with the images as rendered: uint8. start: leave out so many batches, unrendered."""
        epoch = self._order.next_epoch
        now, after = self._view_of(epoch), self._view_of(epoch + 1)
        spare = self._drop_others(now, after)
        for view in (now, after):
            if view not in self._slabs:
                self._slabs[view] = self._thread.submit(self._read, view, spare)
                spare = None
        records, parameters = self._slabs[now].result()
        self._order.begin(epoch)
        batches = self._order.batches(epoch)[start:]
        rendered = self._renderer.batches(parameters, batches)
        self._in_use[now] += 1
        try:
            for images, (labels, answers) in zip(rendered, gathered(records, batches), strict=True):
                yield images, labels, answers
        finally:
            self._in_use[now] -= 1

    def _drop_others(self, *wanted: int) -> Records | None:
        """Forget other views' slabs and those that could not be read; one of them that can be written over, or None."""
        spare = None
        for view, slab in list(self._slabs.items()):
            sound = slab.done() and slab.exception() is None
            if view not in wanted or (slab.done() and not sound):
                del self._slabs[view]
                # Not while an earlier iterator, which may go on, takes batches from it.
                if sound and self._device.type == "cpu" and not self._in_use[view]:
                    spare = slab.result()[0]
        return spare

    def _read(self, view: int, spare: Records | None) -> tuple[Records, ViewParameters]:
        return self.cache.read(view, spare).to(self._device), stored_view(self.cache, self.data, view)


class OnlineLoader(_Epochs):
    """The baseline: the same views in the same order, answered by the live teacher in every step.

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
    ) -> None:
        if not fresh_views and not cache.views:
            raise NotFoundError(f"{cache.where} has no complete view; --fresh-views needs none")
        self._cache, self._data, self._teacher = cache, data, teacher
        self._views = None if fresh_views else cache.views[:views]
        self._order = EpochOrder(len(data) if samples is None else samples, batch_size, rank, world, seed)
        self._student_images = _renderer(cache, data, image_size, teacher.device, workers)
        self._teacher_images = Renderer(
            data, teacher.input_size, teacher.device, cache.identity.views.policy, workers,
            cache.identity.teacher.interpolation,
        )  # fmt: skip
        self._labels = _labels(cache, teacher.device)

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records]]:
        """(images uint8 [B, 3, S, S], labels, dense float32 records of the live teacher)."""
        epoch, views = self._order.next_epoch, self._cache.identity.views
        parameters = draw(views.policy, views.seed, self._view_of(epoch), range(len(self._data)), self._data.sizes)
        self._order.begin(epoch)
        batches = self._order.batches(epoch)[start:]
        finite = torch.ones((), dtype=torch.bool, device=self._teacher.device)
        of_batches = labels_of(self._labels, batches)
        for labels, (images, seen) in zip(of_batches, self._images(parameters, batches), strict=True):
            y = labels if labels.numel() else None
            answers = self._teacher.logits(seen)
            finite &= torch.isfinite(answers).all()  # looked at in the end, so that no step waits for the device
            yield images, labels, encode(answers, y, precision="float32", check=False)
        if not finite:
            raise KdcacheError("the teacher's logits are not finite: lower --lr where it learns, or check its weights")

    def answers(self, view: int) -> Iterator[Records]:
        """The live teacher's records of all training samples in this view, batch by batch; a rank gives its share."""
        views, mine = self._cache.identity.views, self._order.in_order()
        parameters = draw(views.policy, views.seed, view, range(len(self._data)), self._data.sizes)
        labels = labels_of(self._labels, mine)
        for y, seen in zip(labels, self._teacher_images.batches(parameters, mine), strict=True):
            yield encode(self._teacher.logits(seen), y if y.numel() else None, precision="float32")

    def _images(
        self, parameters: ViewParameters, batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the student and what the teacher sees: one rendering where both want the same."""
        student, teacher = self._student_images, self._teacher_images
        mine = student.batches(parameters, batches)
        if (student.size, student.interpolation) == (teacher.size, teacher.interpolation):
            return ((images, images) for images in mine)
        return zip(mine, teacher.batches(parameters, batches), strict=True)


class PlainLoader(_Epochs):
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
        self._order = EpochOrder(len(data), batch_size, rank, world, seed)
        self._renderer = Renderer(data, size, device, policy, workers)
        self._labels = torch.from_numpy(data.labels[:, 0]).to(device)

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, None]]:
        epoch, everything = self._order.next_epoch, range(len(self._data))
        parameters = draw(self._policy, self._seed, epoch, everything, self._data.sizes, TEACHING)
        self._order.begin(epoch)
        batches = self._order.batches(epoch)[start:]
        rendered = self._renderer.batches(parameters, batches)
        for images, labels in zip(rendered, labels_of(self._labels, batches), strict=True):
            yield images, labels, None


def _renderer(
    cache: Cache, data: Dataset, image_size: int | None, device: torch.device, workers: int | None
) -> Renderer:
    size = image_size or (None if data.in_memory else cache.identity.teacher.input_size)
    return Renderer(data, size, device, cache.identity.views.policy, workers)


def labels_of(labels: Tensor, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
    """Each batch's, on the device of those of all samples."""
    order = order_on(labels.device, batches)
    return (labels[index] for index in torch.split(order, [len(batch) for batch in batches]))


def _labels(cache: Cache, device: torch.device) -> Tensor:
    return _squeezed(torch.from_numpy(cache.train.labels.astype(np.int64)).to(device))


def _squeezed(labels: Tensor) -> Tensor:
    """[B] from [B, 1]; other [B, L] as they are."""
    return labels[:, 0] if labels.shape[1] == 1 else labels
