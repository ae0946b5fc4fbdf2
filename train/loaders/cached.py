"""CachedLoader: batches of (images, labels, records), in which a cache's records meet their pixels.

The records of an epoch are one slab on the device (slabs.py), gathered by index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.errors import InputError, MismatchError, NotFoundError
from kdcache.cache.identity import SplitName
from kdcache.cache.records.records import Records
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.cache.store.split import THREADS
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.split import require_described
from kdcache.pipeline.process.device import numbered
from kdcache.pipeline.process.rank import cores
from kdcache.pipeline.stores import Stored
from kdcache.pipeline.views.operations.kinds.mix import label_weights
from kdcache.pipeline.views.parameters import Parameters, imported_view, view_of_all
from kdcache.pipeline.views.policy import policy_of
from kdcache.pipeline.views.render import RENDERER, Renderer, normalised
from kdcache.train.loaders.order import EpochOrder, Epochs
from kdcache.train.loaders.slabs import Held, Slabs, Wanted

_LARGE = 1 << 29  # bytes of a view's records, which take a core more than a second


def require_data(cache: Stored, data: Dataset) -> None:
    """MismatchError, field by field, unless `data` is the split that the cache was built from.

    Its views must be such as this kdcache can draw again: see `policy_of`.
    """
    policy_of(cache.identity.views, cache.where)
    require_described(data, cache.identity, cache.where)
    (cache.train if data.split == "train" else cache.evaluation).require_sizes(data.sizes)


def opened(cache: Cache, data: Dataset | str, split: SplitName = "train") -> Dataset:
    """The split of the data, which is opened where `data` is a name. MismatchError unless the cache was built from it.

    InputError for another split, and for a cache whose views cannot be drawn here.
    """
    unlabelled = cache.identity.record.labels == 0
    found = open_data(data, split, unlabelled=unlabelled) if isinstance(data, str) else data
    if found.split != split:
        raise InputError(f"the {found.split} split of {found.name} was given, and the {split} split is asked for")
    require_data(cache, found)
    if cache.identity.views.policy == "foreign":
        raise InputError(
            f"{cache.where} was imported with views that only the transforms of its project can make: in a loop of "
            "your own, cache.read(view) has the records, cache.train.view_arrays(view) the seeds (docs/stores.md)"
        )
    return found


def complete_views(cache: Cache, views: int | None) -> tuple[int, ...]:
    """The complete views of a cache, or the first so many of them. NotFoundError where there are not so many."""
    found = cache.views[:views]
    if not found:
        raise NotFoundError(f"{cache.where} has no complete view: run kdcache build again to finish it")
    if views is not None and views > len(found):
        raise NotFoundError(f"{cache.where} has {len(found)} complete views, not {views}: build more")
    return found


def stored_view(cache: Cache, data: Dataset, view: int) -> Parameters:
    """The view's parameters, drawn again or as imported, compared with the digests of its commits."""
    drawn = drawn_view(cache, data, view)
    require_as_built(cache, view, drawn)
    return drawn


def drawn_view(cache: Cache, data: Dataset, view: int) -> Parameters:
    """The view's parameters, drawn again or as imported, before anything has been compared with them.

    Those of image files are not kept, but drawn again for each batch, unless views are mixed.
    """
    views = cache.identity.views
    if views.imported:
        return imported_view(cache.train.view_arrays(view), data.sizes, f"view {view} of {cache.where}")
    if views.renderer != RENDERER:
        raise MismatchError(f"{cache.where} was rendered by {views.renderer}, this kdcache renders by {RENDERER}")
    return view_of_all(views, view, data.sizes, data.in_memory)


def require_as_built(cache: Cache, view: int, drawn: Parameters, threads: int = 1) -> None:
    """MismatchError unless the digests in the view's commits are those of these parameters."""
    store = cache.train

    def same(part: int) -> bool:
        rows = store.rows(part)
        return drawn[rows.start : rows.stop].digest() == store.commit(shard_name(view, part)).parameters

    with ThreadPoolExecutor(threads, thread_name_prefix="kdcache-views") as pool:
        for part, as_built in enumerate(pool.map(same, range(store.parts))):
            if not as_built:
                raise MismatchError(
                    f"view {view}, part {part} of {cache.where} was built with other view parameters than this "
                    "kdcache draws: its records do not belong to these pixels"
                )


def shares_of(drawn: Parameters, labels: int, size: tuple[int, int]) -> Tensor | None:
    """The shares [N, 2] that labels have in mixed images of that height and width.

    labels: how many a record has. None where images are not mixed, or have no labels.
    """
    if drawn.mixing is None or labels != 2:
        return None
    return torch.from_numpy(label_weights(drawn.mixing.drawn, *size))


def partners_of(drawn: Parameters) -> NDArray[np.int64] | None:
    """The partner of each sample, where the view is mixed."""
    return None if drawn.mixing is None else drawn.mixing.partners


class CachedLoader(Epochs):
    """Iterates over (images, labels, records) of an epoch, in an order that depends on (seed, epoch) alone.

    images: float32 [B, 3, S, S], normalised by the dataset's mean and std, in the view that the records belong to;
    labels: int64 [B] in the teacher's classes ([B, L] unless L = 1); records: Records of B. Where views are mixed,
    labels are [B, 2], records.label_weights [B, 2] has their shares, and a batch holds both images of every pair, so
    that batch_size has to be even for each rank. batch_size is that of all `world` ranks together; samples that fill no
    batch are left out of the epoch.

    Epoch e takes complete view e mod V, unless crops_per_decode says otherwise. The first iterator reads epoch 0 and
    each later one the epoch after the last that was begun, from its first batch on; set_epoch(e), also as
    sampler.set_epoch(e), chooses another. `epoch` and `view` say what is read.

    data: a Dataset, or its name as in --data. image_size: pixels for the student, by default those of the images
    (in memory) or of the teacher (files). views: use only the first so many. samples: train on these alone, places in
    ascending order. Raises MismatchError when the data are not the cache's, NotFoundError when no view is complete.

    crops_per_decode: a batch holds B / m images, each in m views one after the other, so that a file is decoded once
    for m crops. m epochs are a round, in which every image is taken once in each of m views: after it, every image has
    been seen in the same views as after m epochs without. InputError where B is no multiple of m.
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
        crops_per_decode: int = 1,
    ) -> None:
        self.cache, self.data = cache, opened(cache, data)
        self._views = complete_views(cache, views)
        mixed, chosen = cache.identity.views.mixed, len(self.data) if samples is None else samples
        self._order = EpochOrder(chosen, batch_size, rank, world, seed, mixed, crops_per_decode)
        self._require_crops(cache.where, mixed)
        self._device = numbered(device)
        self._renderer = renderer_for(cache, self.data, image_size, self._device, workers)
        self._mean, self._std = (
            torch.tensor(v, device=self._device).view(1, 3, 1, 1) * 255 for v in (self.data.mean, self.data.std)
        )
        self._reader = _Reader(cache, self.data, self._order, self._views_of, world, self._renderer.size, self._device)
        large = cache.train.layout.view_bytes >= _LARGE
        self._slabs = Slabs(self._reader, reuse=self._device.type == "cpu", large=large)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Records]]:
        for images, labels, records in self.steps():
            yield normalised(images, self._mean, self._std), labels, records

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records]]:
        """Yield the same batches with uint8 images, not normalised. start: skip so many batches without rendering."""
        epoch, begun = self._order.next_epoch, False
        wanted, after = self._reader.wanted(epoch), self._reader.after(epoch)
        with self._slabs.taken(wanted, after, lambda drawn: self._reader.batches(epoch, drawn)[start:]) as taken:
            # Pixels first: the records of a first epoch are still being read.
            rendered = self._renderer.crops([slab.parameters for slab in taken.slabs], taken.batches)
            for images, (labels, records) in zip(rendered, taken.gathered(), strict=True):
                if not begun:
                    self._order.begin(epoch)
                    begun = True
                yield images, labels, records
            if not begun:
                self._order.begin(epoch)


class _Reader:
    """Reads the slabs of a CachedLoader: whole views, or on one of several ranks what an epoch uses there."""

    def __init__(
        self, cache: Cache, data: Dataset, order: EpochOrder, views_of: Callable[[int], list[int]], world: int,
        size: tuple[int, int], device: torch.device,
    ) -> None:  # fmt: skip
        self._cache, self._data, self._order, self._views_of = cache, data, order, views_of
        self._whole, self._size, self._device = world == 1, size, device
        self._known: dict[int, list[NDArray[np.int64]]] = {}
        self._lock = Lock()

    def wanted(self, epoch: int) -> list[Wanted]:
        """The slabs that an epoch takes its batches from."""
        first = None if self._whole else epoch - epoch % self._order.crops
        return [Wanted(view, first) for view in self._views_of(epoch)]

    def after(self, epoch: int) -> list[Wanted]:
        """What of the next round is read meanwhile: a view more in each epoch, so that in the last one it is whole."""
        crops = self._order.crops
        return self.wanted(epoch + crops)[: epoch % crops + 1]

    def batches(self, epoch: int, drawn: Callable[[], Parameters]) -> list[NDArray[np.int64]]:
        """This rank's batches of an epoch. drawn: gives the parameters of the epoch's view."""

        def ordered() -> list[NDArray[np.int64]]:
            return self._order.batches(epoch, partners_of(drawn()) if self._cache.identity.views.mixed else None)

        if self._whole:
            return ordered()
        with self._lock:  # the thread that reads a rank's records ahead asks for batches, too
            if epoch not in self._known:
                # Copies, since the order of all ranks' samples would stay in memory with any part of it.
                own = [batch.copy() for batch in ordered()]
                crops = self._order.crops
                near = {e: of for e, of in self._known.items() if abs(e // crops - epoch // crops) <= 1}
                self._known = near | {epoch: own}
            return self._known[epoch]

    def draw(self, view: int) -> Parameters:
        return drawn_view(self._cache, self._data, view)

    def compare(self, view: int, drawn: Parameters, hurry: bool) -> None:
        require_as_built(self._cache, view, drawn, _threads(hurry))

    def read(
        self, wanted: Wanted, drawn: Callable[[], Parameters], spare: Records | None, hurry: bool,
        samples: NDArray[np.int64] | None = None,
    ) -> Held:  # fmt: skip
        if samples is None and wanted.epoch is not None:
            epochs = range(wanted.epoch, wanted.epoch + self._order.crops)
            samples = np.sort(np.concatenate([batch for epoch in epochs for batch in self.batches(epoch, drawn)]))
        if samples is None:
            records = self._cache.read(wanted.view, spare)
        else:
            spare = spare if spare is not None and len(spare) == len(samples) else None
            records = self._cache.read(wanted.view, spare, samples, _threads(hurry))
        if self._cache.identity.views.mixed:
            shares = shares_of(drawn(), records.labels.shape[1], self._size)
            shares = shares if shares is None or samples is None else shares[torch.from_numpy(samples)]
            records = replace(records, label_weights=shares)
        records = records.to(self._device)
        if self._device.type == "cuda":  # it is there then for every stream, not only for this thread's
            torch.cuda.current_stream(self._device).synchronize()
        return Held(records, samples)


def _threads(hurry: bool) -> int:
    """Threads that read: one where nobody waits, which leaves the cores to the training and takes least memory."""
    return min(THREADS, cores()) if hurry else 1


def renderer_for(
    cache: Cache, data: Dataset, image_size: int | None, device: torch.device, workers: int | None
) -> Renderer:
    """The renderer of the cache's views for a student, at image_size or by default as CachedLoader says."""
    size = image_size or (None if data.in_memory else cache.identity.teacher.input_size)
    return Renderer(data, size, device, policy_of(cache.identity.views, cache.where), workers)
