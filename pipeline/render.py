"""Applying view parameters: uint8 pixels in, uint8 pixels out, the same in both stages.

Uint8 tensors only, never PIL or float, which differ by a level or two: then pixels are bit-equal between build and
train on the same renderer and CPU class, with any number of workers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2 import functional as tv

from kdcache.cache.errors import InputError, KdcacheError
from kdcache.pipeline.datasets import Dataset
from kdcache.pipeline.views import ViewParameters, padding

RENDERER = "torch-uint8-1"


def render(image: Tensor, box: Sequence[int], flip: bool, size: tuple[int, int]) -> Tensor:
    """Cut the box (top, left, height, width) from image uint8 [3, H, W], resize to `size` and flip: [3, *size].

    Antialiased bilinear; pixels outside of the image are black.
    """
    top, left, height, width = (int(b) for b in box)
    y0, y1 = (min(max(y, 0), image.shape[1]) for y in (top, top + height))
    x0, x1 = (min(max(x, 0), image.shape[2]) for x in (left, left + width))
    inside = image[:, y0:y1, x0:x1]
    before = min(-min(left, 0), width), min(-min(top, 0), height)
    beyond = (before[0], width - before[0] - (x1 - x0), before[1], height - before[1] - (y1 - y0))
    if any(beyond):
        inside = F.pad(inside, beyond)
    if (height, width) != size:
        inside = tv.resize(inside, list(size), antialias=True)
    return inside.flip(2) if flip else inside


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std in float32, in the layout of images uint8 [B, 3, H, W]; mean and std [1, 3, 1, 1]."""
    # As whole planes in that layout too: broadcast over channels that lie innermost, it is ten times slower on a CPU.
    plane = torch.empty_like(images[:1], dtype=torch.float32)
    return images.to(torch.float32, copy=True).sub_(plane.copy_(mean)).div_(plane.clone().copy_(std))


class _Pixels:
    """In-memory images on a device, padded once, so that a batch of crops is one flat gather."""

    def __init__(self, images: Tensor, pad: int, device: torch.device) -> None:
        n, height, width, channels = images.shape
        self.size = (height, width)
        self._pad, self._padded_width = pad, width + 2 * pad
        self._area = (height + 2 * pad) * self._padded_width
        padded = torch.zeros((n, height + 2 * pad, self._padded_width, channels), dtype=torch.uint8, device=device)
        padded[:, pad : pad + height, pad : pad + width] = images.to(device)
        self._flat = padded.view(-1, channels)
        self._rows = torch.arange(height, device=device).unsqueeze(1) * self._padded_width
        self._columns = torch.arange(width, device=device)
        self._windows = None
        if device.type == "cpu":  # rows of a crop, one from each pixel on
            shape, strides = (len(self._flat) - width + 1, width * channels), (channels, 1)
            self._windows = np.lib.stride_tricks.as_strided(padded.numpy(), shape, strides, writeable=False)
            self._mirrored = np.arange(width * channels).reshape(width, channels)[::-1].reshape(-1)

    def crops(self, index: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
        """[B, 3, H, W] (channels_last) for samples [B], boxes [B, 4] of the images' own size, flips [B]."""
        first = index * self._area + (boxes[:, 0] + self._pad) * self._padded_width + boxes[:, 1] + self._pad
        if self._windows is not None:  # copied by row, twice as fast as by pixel
            rows = self._windows[first.view(-1, 1).add(self._rows.view(-1)).numpy()]
            chosen = flips.numpy()
            rows[chosen] = rows[chosen].take(self._mirrored, 2)
            return torch.from_numpy(rows).view(len(rows), *self.size, -1).permute(0, 3, 1, 2)
        columns = torch.where(flips.unsqueeze(1), self._columns.flip(0), self._columns)
        at = first.view(-1, 1, 1) + self._rows + columns.unsqueeze(1)
        pixels = self._flat.index_select(0, at.view(-1))
        return pixels.view(*at.shape, -1).permute(0, 3, 1, 2)


@dataclass
class _FileViews(TorchDataset[Tensor | str]):
    """What a worker process does for one sample; an error travels as its text, so that it stays one line."""

    data: Dataset
    parameters: ViewParameters
    first: int
    size: tuple[int, int]

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            box, flip = self.parameters.boxes[index - self.first], self.parameters.flips[index - self.first]
            return render(self.data.decode(index), box.tolist(), bool(flip), self.size)
        except KdcacheError as e:
            return str(e)


class Renderer:
    """Rendered batches of a dataset in views of `policy`, at `size` pixels (None: the images' own), on `device`.

    In-memory images are rendered on the device in batches, files in `workers` processes.
    """

    def __init__(
        self, data: Dataset, size: int | None, device: torch.device, policy: str = "none", workers: int | None = None
    ) -> None:
        self.data, self.device = data, device
        pad = padding(policy, *map(int, data.sizes[0]))
        self.workers = (os.cpu_count() or 1) if workers is None else workers
        self._pixels = None if data.images is None else _Pixels(data.images, pad, device)
        if size is not None:
            self.size = (size, size)
        elif self._pixels is not None:
            self.size = self._pixels.size
        else:
            raise InputError(f"{data.name} holds image files: an input size in pixels is needed")

    def batches(
        self, parameters: ViewParameters, batches: Sequence[NDArray[np.int64]], first: int = 0
    ) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W] for each batch of sample indices; parameters are those of samples first, first+1, ..."""
        views = _FileViews(self.data, parameters, first, self.size)
        if self._pixels is None:
            yield from self._from_files(views, batches)
        elif self.size == self._pixels.size and (parameters.boxes[:, 2:] == self.size).all():
            boxes = torch.from_numpy(parameters.boxes).to(self.device)
            flips = torch.from_numpy(parameters.flips).to(self.device)
            for batch in batches:
                index = torch.from_numpy(batch).to(self.device)
                yield self._pixels.crops(index, boxes[index - first], flips[index - first])
        else:
            for batch in batches:
                yield self._ready(_stack_or_error([views[int(i)] for i in batch]))

    def _from_files(self, views: _FileViews, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        loader: DataLoader[Tensor] = DataLoader(
            views,  # type: ignore[arg-type]
            batch_sampler=[b.tolist() for b in batches],
            num_workers=min(self.workers, len(batches)),
            collate_fn=_stack_or_error,
            worker_init_fn=_one_thread,
            pin_memory=self.device.type == "cuda",
        )
        with _uninterrupted():
            started = iter(loader)
        for batch in started:
            yield self._ready(batch)

    def _ready(self, batch: Tensor | str) -> Tensor:
        if isinstance(batch, str):
            raise InputError(batch)
        return batch.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Have Ctrl-C wait: in the middle of a fork it leaves half-made processes. The workers never see it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _stack_or_error(samples: list[Tensor | str]) -> Tensor | str:
    errors = [s for s in samples if isinstance(s, str)]
    return errors[0] if errors else torch.stack([s for s in samples if isinstance(s, Tensor)])
