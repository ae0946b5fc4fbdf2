"""FFCVLoader: batches of (images, labels, records) from one packed file, by FFCV's loader."""

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
from kdcache.cache.records.records import Records
from kdcache.cache.store.chunks import as_records
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.views.parameters import ViewParameters
from kdcache.pipeline.views.policy import policy_of
from kdcache.pipeline.views.render import normalised, render
from kdcache.train.loaders.order import EpochOrder, Epochs, labels_of, squeezed

if TYPE_CHECKING:
    from kdcache.train.loaders.ffcv_decoders import Epoch

_COMPARED = 64


class FFCVLoader(Epochs):
    """Iterates over (images, labels, records) of an epoch like CachedLoader, from a packed file alone.

    Samples, epochs, order, boxes and records equal those of CachedLoader, and so do the pixels of raw images. Image
    files are resized by FFCV, which is another renderer than the cache's: MismatchError unless allow_renderer (see
    difference). image_size: pixels for the student, for image files only; by default those of the teacher. workers:
    threads that decode. UnservedError without FFCV; InputError for a policy or size that FFCV cannot render.
    """

    def __init__(
        self,
        file: FFCVFile,
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
        self.file = file
        self._views = file.views[:views]
        if views is not None and views > len(self._views):
            raise NotFoundError(f"{file.path} has {len(self._views)} views, not {views}: pack more")
        self._policy = policy_of(file.identity.views, str(file.path))
        self._size = _student_size(file, image_size, allow_renderer)
        file.check_pixels()
        self._order = EpochOrder(len(file) if samples is None else samples, batch_size, rank, world, seed)
        self._device = torch.device(device)
        self._labels = squeezed(torch.from_numpy(file.labels.astype(np.int64)).to(self._device))
        self._prior = None if file.prior is None else file.prior.to(self._device)
        self._mean, self._std = (
            torch.tensor(v, device=self._device).view(1, 3, 1, 1) * 255 for v in (file.mean, file.std)
        )
        try:
            from kdcache.train.loaders.ffcv_decoders import make_loader
        except ImportError as e:
            raise UnservedError(
                f"training from a .beton needs FFCV ({' '.join(str(e).split())}): apt-get install g++ pkg-config "
                "libturbojpeg0-dev libopencv-dev, then pip install ffcv==1.0.2 setuptools; the cache needs neither"
            ) from e
        self._batch = len(np.array_split(np.arange(batch_size), world)[rank])
        self._ffcv = make_loader(file, self._batch, None if file.raw else self._size, workers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdcache-view")
        self._drawn: dict[int, Future[ViewParameters]] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Records]]:
        for images, labels, records in self.steps():
            yield normalised(images, self._mean, self._std), labels, records

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records]]:
        """Yield the same batches with uint8 images, not normalised. CorruptError names a sample that is damaged."""
        chosen = self._order.next_epoch
        (now,), (after,) = self._views_of(chosen), self._views_of(chosen + 1)
        self._drawn = {v: f for v, f in self._drawn.items() if v in (now, after) and not _failed(f)}
        for view in (now, after):
            if view not in self._drawn:
                self._drawn[view] = self._thread.submit(self.file.parameters, view)
        parameters = self._drawn[now].result()
        self._order.begin(chosen)
        batches = self._order.batches(chosen)[start:]
        epoch = self._start(now, parameters, np.concatenate(batches))
        try:
            of_batches = labels_of(self._labels, batches)
            for index, labels, ((pixels, decoded), (rows, whole)) in zip(batches, of_batches, epoch, strict=True):
                self._require_sound(index, decoded, "image")
                self._require_sound(index, whole, f"record of view {now}")
                images = self._own(torch.from_numpy(pixels).permute(0, 3, 1, 2))  # channels_last
                yield self._policy.apply(images, parameters.drawn, index), labels, self._records(rows, index)
        finally:
            epoch.close()

    def difference(self) -> float:
        """How many levels of 255 FFCV's pixels are from those of the cache's renderer, as the first samples' mean."""
        view = self.file.views[0]
        parameters = self.file.parameters(view)
        index = np.arange(min(_COMPARED, self._batch))
        epoch = self._start(view, parameters, index)
        try:
            (pixels, decoded), _ = next(epoch)
            self._require_sound(index, decoded, "image")
            mine = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        finally:
            epoch.close()
        own = [
            render(self.file.image(i), parameters.boxes[i].tolist(), bool(parameters.flips[i]), self._size)
            for i in index.tolist()
        ]
        return float((mine - torch.stack(own)).abs().mean())

    def _start(self, view: int, parameters: ViewParameters, order: NDArray[np.int64]) -> Epoch:
        from kdcache.train.loaders.ffcv_decoders import Epoch

        file = self.file
        file.require_unchanged()
        slot = file.views.index(view)
        storage = (file.content, file.image_bytes, parameters.boxes, parameters.flips, view, slot)
        return Epoch(self._ffcv, order, storage)

    def _require_sound(self, index: NDArray[np.int64], sound: NDArray[np.uint8], what: str) -> None:
        if not sound.all():
            raise self.file.corrupt(f"the {what} of sample {index[sound.argmin()]} is damaged")

    def _own(self, read: Tensor) -> Tensor:
        """A copy on the device, since FFCV fills its buffers again and again."""
        if self._device.type != "cuda":
            return read.clone().to(self._device)
        # Through pinned memory of torch's, which is not used again before the copy is done: no waiting here.
        pinned = torch.empty_like(read, pin_memory=True).copy_(read)
        return pinned.to(self._device, non_blocking=True)

    def _records(self, rows: NDArray[np.uint8], index: NDArray[np.int64]) -> Records:
        file = self.file
        records = as_records(file.identity.record, file.layout.split(rows), file.labels[index], None)
        return replace(records._map(self._own), prior=self._prior)


def _failed(drawn: Future[ViewParameters]) -> bool:
    return drawn.done() and drawn.exception() is not None


def _student_size(file: FFCVFile, image_size: int | None, allow_renderer: bool) -> tuple[int, int]:
    """Height and width of the student's images. MismatchError or InputError where FFCV cannot give them as asked."""
    policy = file.identity.views.policy
    geometry = policy_of(file.identity.views, str(file.path)).geometry
    height, width = file.sizes[0].tolist()
    if not file.raw:
        if geometry.margin(height, width):
            raise InputError(
                f"{file.path} has views of {policy}, which reach beyond the image's edge, and FFCV's resizing does "
                "not: train from the cache itself, or from one with rrc"
            )
        if not allow_renderer:
            raise MismatchError(
                f"{file.path} holds image files, which FFCV renders by {file.renderer} and the cache was built with "
                f"{file.identity.views.renderer}: give --allow-renderer to train all the same, which says how far "
                "apart they are, or train from the cache itself"
            )
        side = image_size or file.identity.teacher.input_size
        return side, side
    if geometry.resizes or (image_size is not None and (image_size, image_size) != (height, width)):
        raise InputError(
            f"{file.path} holds raw pixels of {height}x{width}, which are cut and never resized: train from the "
            f"cache itself for {policy} at {image_size or f'{height}x{width}'} pixels"
        )
    return height, width
