"""Batches of (images, labels, records) from one packed .beton file, by FFCV's loader."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.errors import InputError, MismatchError, NotFoundError, UnservedError
from kdcache.cache.records import Records
from kdcache.cache.store.chunks import as_records
from kdcache.pipeline.ffcv.beton import Beton
from kdcache.pipeline.views.policy import ViewParameters, padding, resizes
from kdcache.pipeline.views.render import normalised, render
from kdcache.train.loaders.cached import EpochOrder, _Epochs, labels_of

if TYPE_CHECKING:
    from kdcache.train.loaders.ffcv_decoders import Epoch

_COMPARED = 64


class BetonLoader(_Epochs):
    """Iterates over (images, labels, records) of an epoch like CachedLoader, from a packed file alone.

    The same samples in the same epochs and order, cut by the same boxes, with the same records; raw images also pixel
    by pixel.
    Image files are resized by FFCV, which is another renderer than the cache's: MismatchError unless allow_renderer
    (see difference). image_size: pixels for the student, of image files only; by default the teacher's. workers:
    threads that decode. UnservedError without FFCV; InputError for a policy or size that FFCV cannot render.
    """

    def __init__(
        self,
        beton: Beton,
        batch_size: int = 256,
        rank: int = 0,
        world: int = 1,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        image_size: int | None = None,
        views: int | None = None,
        workers: int | None = None,
        allow_renderer: bool = False,
        samples: NDArray[np.int64] | None = None,
    ) -> None:
        self.beton = beton
        self._views = beton.views[:views]
        if views is not None and views > len(self._views):
            raise NotFoundError(f"{beton.path} has {len(self._views)} views, not {views}: pack more")
        self._size = _student_size(beton, image_size, allow_renderer)
        beton.check_pixels()
        self._order = EpochOrder(len(beton) if samples is None else samples, batch_size, rank, world, seed)
        self._device = torch.device(device)
        self._labels = torch.from_numpy(beton.labels.astype(np.int64)).to(self._device)
        if self._labels.shape[1] == 1:
            self._labels = self._labels[:, 0]
        self._prior = None if beton.prior is None else beton.prior.to(self._device)
        self._mean, self._std = (
            torch.tensor(v, device=self._device).view(1, 3, 1, 1) * 255 for v in (beton.mean, beton.std)
        )
        try:
            from kdcache.train.loaders.ffcv_decoders import make_loader
        except ImportError as e:
            raise UnservedError(
                f"training from a .beton needs FFCV ({' '.join(str(e).split())}): apt-get install g++ pkg-config "
                "libturbojpeg0-dev libopencv-dev, then pip install ffcv==1.0.2 setuptools; the cache needs neither"
            ) from e
        self._batch = len(np.array_split(np.arange(batch_size), world)[rank])
        self._ffcv = make_loader(beton, self._batch, None if beton.raw else self._size, workers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdcache-view")
        self._drawn: dict[int, Future[ViewParameters]] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Records]]:
        for images, labels, records in self.steps():
            yield normalised(images, self._mean, self._std), labels, records

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records]]:
        """The same with the images as rendered: uint8. CorruptError names a sample whose bytes are damaged."""
        chosen = self._order.next_epoch
        now, after = self._view_of(chosen), self._view_of(chosen + 1)
        self._drawn = {v: f for v, f in self._drawn.items() if v in (now, after) and not _failed(f)}
        for view in (now, after):
            if view not in self._drawn:
                self._drawn[view] = self._thread.submit(self.beton.parameters, view)
        parameters = self._drawn[now].result()
        self._order.begin(chosen)
        batches = self._order.batches(chosen)[start:]
        epoch = self._start(now, parameters, np.concatenate(batches))
        try:
            of_batches = labels_of(self._labels, batches)
            for index, labels, ((pixels, decoded), (rows, whole)) in zip(batches, of_batches, epoch, strict=True):
                self._require_sound(index, decoded, "image")
                self._require_sound(index, whole, f"record of view {now}")
                images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # channels_last
                yield self._own(images), labels, self._records(rows, index)
        finally:
            epoch.close()

    def difference(self) -> float:
        """How far FFCV's pixels are from the cache's own renderer's: mean absolute levels (of 255), first samples."""
        view = self.beton.views[0]
        parameters = self.beton.parameters(view)
        index = np.arange(min(_COMPARED, self._batch))
        epoch = self._start(view, parameters, index)
        try:
            (pixels, decoded), _ = next(epoch)
            self._require_sound(index, decoded, "image")
            mine = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        finally:
            epoch.close()
        own = [
            render(self.beton.image(i), parameters.boxes[i].tolist(), bool(parameters.flips[i]), self._size)
            for i in index.tolist()
        ]
        return float((mine - torch.stack(own)).abs().mean())

    def _start(self, view: int, parameters: ViewParameters, order: NDArray[np.int64]) -> Epoch:
        from kdcache.train.loaders.ffcv_decoders import Epoch

        self.beton.require_unchanged()
        beton = self.beton
        slot = beton.views.index(view)
        storage = (beton.content, beton.image_bytes, parameters.boxes, parameters.flips, view, slot)
        return Epoch(self._ffcv, order, storage)

    def _require_sound(self, index: NDArray[np.int64], sound: NDArray[np.uint8], what: str) -> None:
        if not sound.all():
            raise self.beton.corrupt(f"the {what} of sample {index[sound.argmin()]} is damaged")

    def _own(self, read: Tensor) -> Tensor:
        """On the device: a copy, since FFCV fills its buffers again and again."""
        if self._device.type != "cuda":
            return read.clone().to(self._device)
        # Through pinned memory of torch's, which is not used again before the copy is done: no waiting here.
        pinned = torch.empty_like(read, pin_memory=True).copy_(read)
        return pinned.to(self._device, non_blocking=True)

    def _records(self, rows: NDArray[np.uint8], index: NDArray[np.int64]) -> Records:
        beton = self.beton
        records = as_records(beton.identity.record, beton.layout.split(rows), beton.labels[index], None)
        return replace(records._map(self._own), prior=self._prior)


def _failed(drawn: Future[ViewParameters]) -> bool:
    return drawn.done() and drawn.exception() is not None


def _student_size(beton: Beton, image_size: int | None, allow_renderer: bool) -> tuple[int, int]:
    """(H, W) of the images that the student gets; an error where FFCV cannot give them as asked."""
    policy = beton.identity.views.policy
    height, width = beton.sizes[0].tolist()
    if not beton.raw:
        if padding(policy, height, width):
            raise InputError(
                f"{beton.path} has views of {policy}, which reach beyond the image's edge, and FFCV's resizing does "
                "not: train from the cache itself, or from one with rrc"
            )
        if not allow_renderer:
            raise MismatchError(
                f"{beton.path} holds image files, which FFCV renders by {beton.renderer} and the cache was built with "
                f"{beton.identity.views.renderer}: give --allow-renderer to train all the same, which says how far "
                "apart they are, or train from the cache itself"
            )
        side = image_size or beton.identity.teacher.input_size
        return side, side
    if resizes(policy) or (image_size is not None and (image_size, image_size) != (height, width)):
        raise InputError(
            f"{beton.path} holds raw pixels of {height}x{width}, which are cut and never resized: train from the "
            f"cache itself for {policy} at {image_size or f'{height}x{width}'} pixels"
        )
    return height, width
