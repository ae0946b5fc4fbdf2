"""Applies view parameters to uint8 pixels, in the same way in both stages.

Only uint8 tensors are used, never PIL or floats, which differ by a level or two. So pixels are bit-equal between build
and train on the same renderer and CPU class, with any number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from kdcache.cache.errors import InputError
from kdcache.cache.records.choices import Interpolation
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.rank import cores
from kdcache.pipeline.views.operations.kinds.mix import mixed
from kdcache.pipeline.views.operations.operation import of_rows
from kdcache.pipeline.views.parameters import Parameters, ViewParameters
from kdcache.pipeline.views.policy import Policy, parse_policy
from kdcache.pipeline.views.table import Rows, Table
from kdcache.pipeline.views.workers import Done, Task, Workers

RENDERER = "torch-uint8-1"
_CUTS = 32  # cuts that a worker process makes at once
_DRAWN = 512  # samples whose parameters are drawn at once, at least


def render(
    image: Tensor, box: Sequence[int], flip: bool, size: tuple[int, int], interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Cut the box (top, left, height, width) from image uint8 [3, H, W], resize to `size` and flip: [3, *size].

    Antialiased; pixels outside of the image are black.
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
        # Channels-last, as it was decoded, gives the same values in half the time.
        whole = inside.unsqueeze(0).contiguous(memory_format=torch.channels_last)
        inside = tv.resize(whole, list(size), InterpolationMode(interpolation), antialias=True)[0]
    return inside.flip(2) if flip else inside


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std in float32, in the layout of images uint8 [B, 3, H, W]; mean and std [1, 3, 1, 1]."""
    # mean and std become planes in that layout too: broadcasting over innermost channels is ten times slower on a CPU.
    plane = torch.empty_like(images[:1], dtype=torch.float32)
    return images.to(torch.float32, copy=True).sub_(plane.copy_(mean)).div_(plane.copy_(std))


def order_on(device: torch.device, batches: Sequence[NDArray[np.int64]]) -> Tensor:
    """Copy the samples of all batches to the device at once, which would have to wait for a copy of each batch."""
    return torch.from_numpy(np.concatenate([*batches, np.empty(0, np.int64)])).to(device)


class _Pixels:
    """In-memory images on a device, padded once, so that a batch of crops is one flat gather."""

    def __init__(self, images: Tensor, pad: int, device: torch.device) -> None:
        n, height, width, channels = images.shape
        self.size = (height, width)
        self._pad, self._padded_width = pad, width + 2 * pad
        self._area = (height + 2 * pad) * self._padded_width
        own = padded = images.to(device).contiguous()  # on the CPU and without a margin, this is no copy
        if pad:
            padded = torch.zeros((n, height + 2 * pad, self._padded_width, channels), dtype=torch.uint8, device=device)
            padded[:, pad : pad + height, pad : pad + width] = own
        self._flat = padded.view(-1, channels)
        self._rows = torch.arange(height, device=device).unsqueeze(1) * self._padded_width
        self._columns = torch.arange(width, device=device)
        self._windows = None
        if device.type == "cpu":  # a row of a crop may start at any pixel
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


# What the renderers of a dataset share, by margin and device.
_SHARED: WeakKeyDictionary[Dataset, WeakValueDictionary[tuple[int, torch.device], _Pixels]] = WeakKeyDictionary()


def _pixels(data: Dataset, pad: int, device: torch.device) -> _Pixels:
    """The in-memory images, held once for all renderers with that margin on that device."""
    assert data.pixels is not None
    held = _SHARED.setdefault(data, WeakValueDictionary())
    found = held.get((pad, device))
    if found is None:
        found = held[pad, device] = _Pixels(data.pixels, pad, device)
    return found


Batch = tuple[NDArray[np.int64], Sequence[int]]  # samples, and in which views


class Renderer:
    """Renders batches of a dataset in views of `policy`, at `size` pixels (None: the images' own), on `device`.

    In-memory images are cut on the device in batches, from one padded copy that all renderers of a dataset share.
    Files, and images that are resized from boxes of many sizes, are cut in `workers` processes, which live on from one
    call to the next until `close`. At most two batches of their pixels wait, in each of the views that are cut
    together, or two tasks of 32 cuts for each worker where that is more. The policy's operations on pixels are applied
    on the device, a batch at a time; on a CPU by the workers, where there are any.
    """

    def __init__(
        self,
        data: Dataset,
        size: int | None,
        device: torch.device,
        policy: str | Policy = "none",
        workers: int | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self.data, self.device, self.interpolation = data, device, interpolation
        self.workers = cores() if workers is None else workers
        own = (int(data.sizes[0, 0]), int(data.sizes[0, 1])) if data.in_memory else None
        if size is not None:
            self.size = (size, size)
        elif own is not None:
            self.size = own
        else:
            raise InputError(f"{data.name} holds image files: an input size in pixels is needed")
        self._policy = parse_policy(policy) if isinstance(policy, str) else policy
        margin = self._policy.geometry.margin(*self.size)
        self._pixels = _pixels(data, margin, device) if own == self.size else None
        self._idle: Workers | None = None

    def close(self) -> None:
        """End the worker processes; later calls start new ones."""
        self._idle = None

    def batches(
        self, parameters: Parameters | Table, batches: Sequence[NDArray[np.int64]], first: int = 0
    ) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W] for each batch of sample indices; parameters are those of samples first, first+1, ...

        Where views are mixed, a batch may be of any samples: the partners' images are rendered as well. Who asks for
        a view many times gives its table, which takes time to make.
        """
        table = parameters if isinstance(parameters, Table) else Table(parameters, first)
        batched = [table.batch(samples) for samples in batches]
        partners = self._on_device([at.partners for at in batched])
        for at, theirs, images in zip(batched, partners, self._cut(table, [at.rows for at in batched]), strict=True):
            yield self._mixed(images, table, at, theirs)

    def crops(self, parameters: Sequence[Parameters | Table], batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """uint8 [B * m, 3, H, W] for each batch of B samples, each in m views: sample i in view j is image i * m + j.

        An image file is decoded once for all m. Views that are mixed have to be of one pairing.
        """
        if len(parameters) == 1:
            yield from self.batches(parameters[0], batches)
            return
        tables = [of if isinstance(of, Table) else Table(of, 0) for of in parameters]
        batched = [tables[0].batch(samples) for samples in batches]
        partners = self._on_device([at.partners for at in batched])
        in_all = self._cut_in_all(tables, [at.rows for at in batched])
        for at, theirs, pixels in zip(batched, partners, in_all, strict=True):
            if theirs is not None:
                views = zip(tables, pixels.unbind(1), strict=True)
                mixed = [self._mixed(view.permute(0, 3, 1, 2), table, at, theirs) for table, view in views]
                pixels = _side_by_side(mixed)
            yield pixels.flatten(0, 1).permute(0, 3, 1, 2)

    def views(
        self, parameters: Sequence[Parameters], batches: Sequence[Batch], first: int = 0
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield every batch in each of its views: the places of batch and view, and the pixels as `batches` gives them.

        Files are decoded once for all views of a batch, so batch by batch; in-memory images come view by view. Of
        files, views that are mixed have to be of one pairing.
        """
        if not self.data.in_memory:
            tables = [Table(drawn, first) for drawn in parameters]
            batched = [tables[0].batch(samples) for samples, _ in batches]
            wanted = [(at.rows, places) for at, (_, places) in zip(batched, batches, strict=True)]
            partners = self._on_device([at.partners for at in batched])
            for number, pixels in enumerate(self._by_workers(tables, wanted)):
                for place, view in zip(wanted[number][1], pixels.unbind(1), strict=True):
                    images = view.permute(0, 3, 1, 2)
                    yield number, place, self._mixed(images, tables[place], batched[number], partners[number])
            return
        for place, drawn in enumerate(parameters):
            numbers = [number for number, (_, places) in enumerate(batches) if place in places]
            rendered = self.batches(drawn, [batches[number][0] for number in numbers], first)
            yield from ((number, place, images) for number, images in zip(numbers, rendered, strict=True))

    def _cut(self, table: Table, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """The images of rows of the table before they are mixed, uint8 [m, 3, H, W] for each batch of rows."""
        held = table.held
        if held is not None and self._pixels is not None and (held.boxes[:, 2:] == self.size).all():
            samples, boxes, flips = (
                torch.from_numpy(of).to(self.device) for of in (table.samples, held.boxes, held.flips)
            )
            order = torch.split(order_on(self.device, batches), [len(batch) for batch in batches])
            for rows, index in zip(batches, order, strict=True):
                images = self._pixels.crops(samples[index], boxes[index], flips[index])
                yield self._policy.apply(images, held.drawn, rows)
        elif held is not None and (whole := self.data.pixels) is not None and _whole(held.boxes, self.data):
            for rows in batches:
                pixels = whole[torch.from_numpy(table.samples_of(rows))].permute(0, 3, 1, 2)
                resized = tv.resize(pixels, list(self.size), InterpolationMode(self.interpolation), antialias=True)
                flips = torch.from_numpy(held.flips[rows]).view(-1, 1, 1, 1)
                resized = torch.where(flips, resized.flip(3), resized)
                images = resized.contiguous(memory_format=torch.channels_last)
                if self.device.type == "cuda":  # from pinned memory, so that no step waits for the copy
                    images = images.pin_memory()
                yield self._policy.apply(images.to(self.device, non_blocking=True), held.drawn, rows)
        else:
            cut = self._by_workers([table], [(rows, (0,)) for rows in batches])
            yield from (pixels[:, 0].permute(0, 3, 1, 2) for pixels in cut)

    def _cut_in_all(self, tables: Sequence[Table], batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """The images of rows of n tables before they are mixed, uint8 [m, n, H, W, 3] for each batch of rows."""
        if self._pixels is not None and not self._policy.geometry.resizes:
            return map(_side_by_side, zip(*(self._cut(table, batches) for table in tables), strict=True))
        return self._by_workers(tables, [(rows, range(len(tables))) for rows in batches])

    def _mixed(self, images: Tensor, table: Table, at: Rows, partners: Tensor | None) -> Tensor:
        """Mix what is to be mixed."""
        if partners is None or table.mixing is None:
            return images
        own, theirs = images[: len(partners)], _chosen(images, partners)
        return mixed(own, theirs, of_rows(table.mixing, at.rows[: len(partners)]))

    def _on_device(self, places: Sequence[NDArray[np.int64] | None]) -> list[Tensor | None]:
        """Copy the places of all batches to the device at once; None stays None."""
        there = [of for of in places if of is not None]
        copied = iter(torch.split(order_on(self.device, there), [len(of) for of in there]))
        return [None if of is None else next(copied) for of in places]

    def _by_workers(self, tables: Sequence[Table], batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Batches of rows in their n views before they are mixed, uint8 [m, n, H, W, 3].

        On a CPU the workers change pixels too: threads of this process would wait for cores that the workers have.
        Tasks are made when the workers have room for them, so that those of an epoch are never held together.
        """
        there = self.device.type == "cpu"
        steps = [max(1, _CUTS // len(places)) for _, places in batches]
        counts = [-(-len(rows) // step) for (rows, _), step in zip(batches, steps, strict=True)]
        cuts = [len(rows) * len(places) for rows, places in batches]
        cuts_each = max(
            (min(step * len(to), n) for (_, to), step, n in zip(batches, steps, cuts, strict=True)), default=0
        )
        # The parameters of each batch that is not through, and where its pixels go.
        under_way: deque[tuple[list[ViewParameters], int | None]] = deque()

        def tasks() -> Generator[Task]:
            drawn_ahead = _drawn(tables, batches)
            for (rows, _), step, drawn in zip(batches, steps, drawn_ahead, strict=True):
                samples = tables[0].samples_of(rows)
                at = loader.place(len(rows) * len(drawn))
                under_way.append((drawn, at))
                for first in range(0, len(rows), step):
                    piece = slice(first, first + step)
                    yield _task(samples[piece], [one[piece] for one in drawn], there, at)
                    if at is not None:
                        at += 3 * step * len(drawn) * self.size[0] * self.size[1]

        workers, ahead = min(self.workers, sum(counts)), 2 * max(counts, default=0)
        loader = self._workers_for(tables[0], workers, ahead, (max(cuts, default=0), max(counts, default=0)))
        # No other call may have it before this one is through.
        self._idle = None
        # Tasks hold the workers, as these hold them: the workers of a call that is given up would end seconds late.
        with closing(tasks()) as making:
            done = loader.run(making, cuts_each, 2 * max(counts, default=0))
            for number, (rows, places) in enumerate(batches):
                ready = [_ready(loader.next(done), self.device) for _ in range(counts[number])]
                travelled = [pixels for pixels in ready if pixels is not None]
                drawn, at = under_way.popleft()
                if at is not None:
                    pixels = loader.taken(at, (len(rows), len(places), *self.size, 3))
                else:
                    pixels = travelled[0] if len(travelled) == 1 else torch.cat(travelled)
                if not there and self._policy.operations:
                    everyone, views = np.arange(len(rows)), zip(pixels.unbind(1), drawn, strict=True)
                    pixels = _side_by_side(
                        [self._policy.apply(view.permute(0, 3, 1, 2), of.drawn, everyone) for view, of in views]
                    )
                yield pixels
                del pixels  # so that its memory can be used again when who asked has let go of it
        self._idle = loader

    def _workers_for(self, table: Table, workers: int, ahead: int, batch: tuple[int, int]) -> Workers:
        """The idle workers, if they can do this, or new ones: see Workers."""
        if self._idle is not None and self._idle.serves(workers, ahead, batch[0]):
            return self._idle
        if self.device.type == "cpu":  # what operations import and compile is inherited by the worker processes
            none = np.arange(0)
            self._policy.apply(torch.empty((0, 3, *self.size), dtype=torch.uint8), table.of(none).drawn, none)
        cut = partial(render, size=self.size, interpolation=self.interpolation)
        return Workers(self.data, cut, self._policy.apply, self.size, workers, ahead, self.device.type == "cuda", batch)


def _ready(done: Done, device: torch.device) -> Tensor | None:
    """The pixels on the device; None where they are in the workers' pool."""
    if isinstance(done, str):
        raise InputError(done)
    if done is None:
        return None
    pixels = torch.from_numpy(done) if isinstance(done, np.ndarray) else done
    return pixels.to(device, non_blocking=True)


def _drawn(tables: Sequence[Table], batches: Sequence[Batch]) -> Iterator[list[ViewParameters]]:
    """The parameters of each batch in each of its views. Small batches are drawn several at once, which is faster."""
    first = 0
    while first < len(batches):
        places, last, count = batches[first][1], first, 0
        while last < len(batches) and batches[last][1] == places and count < _DRAWN:
            count += len(batches[last][0])
            last += 1
        together = [rows for rows, _ in batches[first:last]]
        drawn = [tables[place].of(np.concatenate(together)) for place in places]
        stop = 0
        for rows in together:
            part = slice(stop, stop := stop + len(rows))
            yield [of[part] for of in drawn]
        first = last


def _side_by_side(views: Sequence[Tensor]) -> Tensor:
    """The images [m, 3, H, W] of n views, as [m, n, H, W, 3]."""
    pixels = [images.permute(0, 2, 3, 1) for images in views]
    return pixels[0].unsqueeze(1) if len(pixels) == 1 else torch.stack(pixels, 1)


def _whole(boxes: NDArray[np.int32], data: Dataset) -> bool:
    """Whether every box is the whole image, where all images have one size."""
    return bool((boxes == (0, 0, *data.sizes[0])).all())


def _chosen(images: Tensor, places: Tensor) -> Tensor:
    """Some of the images [B, 3, H, W], in the memory format that they have (channels_last)."""
    pixels = images.permute(0, 2, 3, 1)
    if images.device.type == "cpu":  # NumPy needs no other threads, which would wait for cores where workers are busy
        chosen = torch.from_numpy(pixels.numpy()[places.numpy()])
    else:
        chosen = pixels.index_select(0, places)
    return chosen.permute(0, 3, 1, 2)


def _task(samples: NDArray[np.int64], views: Sequence[ViewParameters], with_operations: bool, at: int | None) -> Task:
    boxes, flips = [view.boxes for view in views], [view.flips for view in views]
    drawn = {
        name: {what: np.stack([view.drawn[name][what] for view in views], 1) for what in arrays}
        for name, arrays in (views[0].drawn.items() if with_operations else ())
    }
    cuts = {
        name: {what: of.reshape(-1, *of.shape[2:]) for what, of in arrays.items()} for name, arrays in drawn.items()
    }
    return Task(samples, np.stack(boxes, 1), np.stack(flips, 1), cuts, at)
