"""CachedDataset: a cache's records beside their pixels, sample by sample, for DataLoaders that are not ours.

A view is read in the process that made the dataset, into memory that the worker processes share with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as MapDataset

from kdcache.cache.errors import InputError
from kdcache.cache.identity import SplitName
from kdcache.cache.records.records import Records
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.views.parameters import Mixing, ViewParameters, evaluation_view
from kdcache.pipeline.views.policy import policy_of
from kdcache.pipeline.views.render import Renderer, normalised
from kdcache.pipeline.views.table import Table
from kdcache.pipeline.views.workers import SHARED_MEMORY, shared_memory_free
from kdcache.train.loaders.cached import complete_views, opened, shares_of, stored_view
from kdcache.train.loaders.order import squeezed

Sample = tuple[Tensor, Tensor, Records]  # an image with its label and record, or a batch of them
Transform = Callable[[Tensor], Tensor]

_MIX = "mix"  # no operation of a policy has this name
_PAUSE = 0.001  # seconds between two looks at a view that is being written


class _Fetched(Sequence[Sample]):
    """The samples of a batch, as a DataLoader hands them to collate: held as the batch that collate gives."""

    def __init__(self, batch: Sample) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch[0])

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        images, labels, records = self.batch
        return images[at], labels[at], records[at : at + 1]


class _SharedView:
    """The records and the parameters of one view, in memory that worker processes share, forked or spawned.

    Another view takes the place of the first by `put`. `version` is odd while that writes, and another number after
    each time. state: int64 [2], the version and the epoch.
    """

    def __init__(self, records: Records, drawn: ViewParameters) -> None:
        arrays = {key: torch.from_numpy(np.array(rows)) for key, rows in _arrays(drawn).items()}
        needed = sum(t.nbytes for t in [*_tensors(records).values(), *arrays.values()])
        if needed > (free := shared_memory_free()):
            raise InputError(
                f"a view takes {needed / 1e6:.0f} MB of shared memory and {SHARED_MEMORY} has {free / 1e6:.0f} MB "
                "left: give the container more (docker run --shm-size), or take CachedLoader, which needs none"
            )
        shared: dict[str, Any] = {name: _shared(t) for name, t in _tensors(records).items()}
        self.records = replace(records, **shared)
        self._arrays = {key: _shared(t) for key, t in arrays.items()}
        self.state = _shared(torch.zeros(2, dtype=torch.int64))

    @property
    def version(self) -> int:
        return int(self.state[0])

    def put(self, records: Records, drawn: ViewParameters) -> None:
        self.state[0] += 1
        for name, theirs in _tensors(records).items():
            _tensors(self.records)[name].copy_(theirs)
        for key, rows in _arrays(drawn).items():
            self._arrays[key].numpy()[...] = rows
        self.state[0] += 1

    def table(self) -> Table:
        """The parameters as a renderer takes them. They share the memory, so the table serves for one version."""
        of: dict[str, dict[str, NDArray[Any]]] = {}
        for (operation, what), rows in self._arrays.items():
            of.setdefault(operation, {})[what] = rows.numpy()
        own, mix = of.pop(""), of.pop(_MIX, None)
        mixing = None if mix is None else Mixing(mix.pop("partners"), mix, None)
        return Table(ViewParameters(own["boxes"], own["flips"], of, mixing), 0)


def _shared(tensor: Tensor) -> Tensor:
    """The same tensor, whose memory is shared from now on."""
    return tensor.share_memory_()  # type: ignore[no-untyped-call, no-any-return]


def _tensors(records: Records) -> dict[str, Tensor]:
    """The tensors of some records by the names of their fields."""
    return {f.name: t for f in fields(records) if isinstance(t := getattr(records, f.name), Tensor)}


def _arrays(drawn: ViewParameters) -> dict[tuple[str, str], NDArray[Any]]:
    """The arrays of a view's parameters by operation and name; boxes and flips belong to no operation."""
    found: dict[tuple[str, str], NDArray[Any]] = {("", "boxes"): drawn.boxes, ("", "flips"): drawn.flips}
    by_operation: dict[str, Mapping[str, NDArray[Any]]] = dict(drawn.drawn)
    if drawn.mixing is not None:
        by_operation[_MIX] = {"partners": drawn.mixing.partners, **drawn.mixing.drawn}
    for operation, arrays in by_operation.items():
        found |= {(operation, what): rows for what, rows in arrays.items()}
    return found


class CachedDataset(MapDataset[Sample]):
    """A map-style dataset: index -> (image, label, record), for any DataLoader, sampler and number of workers.

        DataLoader(dataset, 128, shuffle=True, num_workers=4, collate_fn=dataset.collate)

    gives what CachedLoader does, bit for bit, for the same samples in the same view: images float32 [B, 3, S, S],
    normalised by the dataset's mean and std; labels int64 [B]; Records of B. Where views are mixed, labels are [B, 2],
    records.label_weights has their shares, and a sample's partner need not be in the batch. dataset[i] is one of them:
    an image [3, S, S], a label [], and Records of one.

    Epoch e takes complete view e mod V. It never goes on by itself: call set_epoch(e) before each epoch, and not while
    a DataLoader is giving batches, which would be of either view. Worker processes see it, those that persist too.

    cache, data, image_size, views: as for CachedLoader. split: "eval" gives the unaugmented evaluation images beside
    the teacher's answers, in every epoch. transform: makes something else than normalised images of a batch's pixels
    uint8 [B, 3, S, S] (torch.nn.Identity() leaves them as they are); what is drawn at random there, the teacher has not
    seen. epoch: the first one, so that a run that goes on reads no view in vain. Raises MismatchError when the data are
    not the cache's, NotFoundError when no view is complete.
    """

    def __init__(
        self,
        cache: Cache,
        data: Dataset | str,
        *,
        split: SplitName = "train",
        image_size: int | None = None,
        views: int | None = None,
        transform: Transform | None = None,
        epoch: int = 0,
    ) -> None:
        self.data = opened(cache, data, split)
        self._views = complete_views(cache, views) if split == "train" else (0,)
        self._cache: Cache | None = cache  # None in a copy for another process, which never reads
        self._policy = policy_of(cache.identity.views, cache.where) if split == "train" else "none"
        self._size = image_size or (None if self.data.in_memory else cache.identity.teacher.input_size)
        self._renderer: Renderer | None = None
        self._transform = transform
        self._scale = tuple(torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (self.data.mean, self.data.std))
        self._view = self._view_of(epoch)
        self._shared = _SharedView(*self._read(cache, self._view))
        self._table: tuple[int, Table] | None = None  # with its version
        self._shared.state[1] = epoch

    @property
    def epoch(self) -> int:
        """The epoch that set_epoch has chosen last."""
        return int(self._shared.state[1])

    @property
    def view(self) -> int:
        """The view that `epoch` takes."""
        return self._view_of(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, and read its view. Call it in the process that made the dataset."""
        if self._cache is None:
            raise InputError("this copy of the dataset reads no views: call set_epoch in the process that made it")
        view = self._view_of(epoch)
        if view != self._view:
            self._shared.put(*self._read(self._cache, view))
            self._view = view
        self._shared.state[1] = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        return _Fetched(self._fetch([index]))[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Sample]:
        """The samples of a batch at once, which is how a DataLoader asks for them."""
        return _Fetched(self._fetch(indices))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Sample:
        """(images, labels, Records) of a batch: a DataLoader's collate_fn. It takes samples of several datasets too."""
        if isinstance(samples, _Fetched):
            return samples.batch
        images, labels, records = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(labels), _together(records)

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned worker gets: the data and the shared view, and nothing that reads a cache."""
        return {**self.__dict__, "_cache": None, "_renderer": None, "_table": None}

    def _view_of(self, epoch: int) -> int:
        if epoch < 0:
            raise InputError(f"there is no epoch {epoch}: they are counted from 0")
        return self._views[epoch % len(self._views)]

    def _read(self, cache: Cache, view: int) -> tuple[Records, ViewParameters]:
        if self.data.split != "train":
            return cache.read_evaluation(), evaluation_view(self.data.sizes, whole=self.data.in_memory)
        drawn, records = stored_view(cache, self.data, view)[:], cache.read(view)
        shares = shares_of(drawn, records.labels.shape[1], self._drawing.size)
        return replace(records, label_weights=shares), drawn

    @property
    def _drawing(self) -> Renderer:
        if self._renderer is None:
            self._renderer = Renderer(self.data, self._size, torch.device("cpu"), self._policy, workers=0)
        return self._renderer

    def _fetch(self, indices: Sequence[int]) -> Sample:
        samples = np.asarray(indices, np.int64)
        if len(wrong := samples[(samples < -len(self)) | (samples >= len(self))]):
            raise IndexError(f"there is no sample {wrong[0]} in {self.data.name}: it has {len(self)}")
        samples = np.where(samples < 0, samples + len(self), samples)
        while True:  # again if another view has been written meanwhile, so that a batch is of one view
            version = self._shared.version
            if version % 2 == 0:
                batch = self._batch(samples, version)
                if self._shared.version == version:
                    return batch
            time.sleep(_PAUSE)

    def _batch(self, samples: NDArray[np.int64], version: int) -> Sample:
        if self._table is None or self._table[0] != version:
            self._table = version, self._shared.table()
        (pixels,) = self._drawing.batches(self._table[1], [samples])
        images = normalised(pixels, *self._scale) if self._transform is None else self._transform(pixels)
        if len(images) != len(samples):
            raise InputError(f"transform made {len(images)} images of a batch of {len(samples)}: it takes [B, 3, S, S]")
        records = self._shared.records[torch.from_numpy(samples)]
        return images, squeezed(records.labels.long()), records


def _together(records: Sequence[Records]) -> Records:
    """Records of several samples as one. InputError where they are of caches that store other things."""
    first = records[0]
    for other in records:
        same = (other.num_classes, other.temperatures) == (first.num_classes, first.temperatures)
        shapes = ({n: t.shape[1:] for n, t in _tensors(r).items() if n != "prior"} for r in (first, other))
        priors = first.prior is other.prior or (
            first.prior is not None and other.prior is not None and torch.equal(first.prior, other.prior)
        )
        if not (same and priors and next(shapes) == next(shapes)):
            raise InputError("these samples are of several caches, whose records do not fit together: batch each alone")
    every = [_tensors(r) for r in records]
    joined: dict[str, Any] = {name: torch.cat([of[name] for of in every]) for name in every[0] if name != "prior"}
    return replace(first, **joined)
