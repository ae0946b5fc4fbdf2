"""Applying view parameters: uint8 pixels in, uint8 pixels out, the same in both stages.

Uint8 tensors only, never PIL or float, which differ by a level or two: then pixels are bit-equal between build and
train on the same renderer and CPU class, with any number of workers.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from kdcache.cache.choices import Interpolation
from kdcache.cache.errors import EXPLANATIONS, InputError, KdcacheError, UnreadableError
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.rank import cores, this_rank
from kdcache.pipeline.views.policy import ViewParameters, padding

RENDERER = "torch-uint8-1"
SHARED_MEMORY = "/dev/shm"
_CUTS = 32  # that a worker process makes at once


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
        # In the layout that it was decoded in: the same values in half the time.
        whole = inside.unsqueeze(0).contiguous(memory_format=torch.channels_last)
        inside = tv.resize(whole, list(size), InterpolationMode(interpolation), antialias=True)[0]
    return inside.flip(2) if flip else inside


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std in float32, in the layout of images uint8 [B, 3, H, W]; mean and std [1, 3, 1, 1]."""
    # As whole planes in that layout too: broadcast over channels that lie innermost, it is ten times slower on a CPU.
    plane = torch.empty_like(images[:1], dtype=torch.float32)
    return images.to(torch.float32, copy=True).sub_(plane.copy_(mean)).div_(plane.copy_(std))


def order_on(device: torch.device, batches: Sequence[NDArray[np.int64]]) -> Tensor:
    """All batches' samples, on the device at once: a copy by batch would have it wait each time."""
    return torch.from_numpy(np.concatenate([*batches, np.empty(0, np.int64)])).to(device)


class _Pixels:
    """In-memory images on a device, padded once, so that a batch of crops is one flat gather."""

    def __init__(self, images: Tensor, pad: int, device: torch.device) -> None:
        n, height, width, channels = images.shape
        self.size = (height, width)
        self._pad, self._padded_width = pad, width + 2 * pad
        self._area = (height + 2 * pad) * self._padded_width
        own = padded = images.to(device).contiguous()  # without a margin on the CPU: these very pixels
        if pad:
            padded = torch.zeros((n, height + 2 * pad, self._padded_width, channels), dtype=torch.uint8, device=device)
            padded[:, pad : pad + height, pad : pad + width] = own
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


# By dataset, then by margin and device: what its renderers hold together.
_SHARED: WeakKeyDictionary[Dataset, WeakValueDictionary[tuple[int, torch.device], _Pixels]] = WeakKeyDictionary()


def _pixels(data: Dataset, pad: int, device: torch.device) -> _Pixels:
    """Its in-memory images, once for all renderers with that margin on that device."""
    assert data.pixels is not None
    held = _SHARED.setdefault(data, WeakValueDictionary())
    found = held.get((pad, device))
    if found is None:
        found = held[pad, device] = _Pixels(data.pixels, pad, device)
    return found


@dataclass
class _Task:
    """Samples [b] and their boxes [b, n, 4] and flips [b, n] in n views.

    shared: whether the pixels come back in shared memory, or else through a pipe.
    """

    samples: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    shared: bool = True


_Done = Tensor | NDArray[np.uint8] | str  # what came of a task: pixels, shared or not, or an error


@dataclass
class _Cuts(TorchDataset[_Done]):
    """What a worker process does: uint8 [b, n, *size, 3] of a task, each image decoded once for all of its views.

    An error travels as its text, so that it stays one line. at: for each worker its process id and the sample that it
    has under way or -1, which tells of a worker that was killed what it was reading.
    """

    data: Dataset
    size: tuple[int, int]
    interpolation: Interpolation
    at: ctypes.Array[ctypes.c_int64]

    def __getitem__(self, task: _Task) -> _Done:
        if (worker := get_worker_info()) is None:
            return self._cut(task, lambda _: None)

        def note(sample: int) -> None:
            self.at[2 * worker.id + 1] = sample

        self.at[2 * worker.id] = os.getpid()
        try:
            return self._cut(task, note)
        finally:
            note(-1)

    def _cut(self, task: _Task, note: Callable[[int], None]) -> _Done:
        cuts: list[Tensor] = []
        views = task.boxes.shape[1]
        for i, sample in enumerate(task.samples.tolist()):
            if i and sample == task.samples[i - 1]:  # a short batch is filled up with its last sample
                cuts += cuts[-views:]
                continue
            note(sample)
            try:
                image = self.data.decode(sample)
            except KdcacheError as e:
                return str(e)
            drawn = zip(task.boxes[i].tolist(), task.flips[i].tolist(), strict=True)
            rendered = (render(image, box, flip, self.size, self.interpolation) for box, flip in drawn)
            cuts += [one.permute(1, 2, 0) for one in rendered]
        shape = (len(task.samples), views, *self.size, 3)
        if task.shared:
            with suppress(RuntimeError):  # others have taken the shared memory meanwhile
                stacked: Tensor = default_collate(cuts)  # in a worker straight into memory that is shared
                return stacked.view(shape)
        return torch.stack(cuts).view(shape).numpy()


Batch = tuple[NDArray[np.int64], Sequence[int]]  # samples, and in which views


class Renderer:
    """Rendered batches of a dataset in views of `policy`, at `size` pixels (None: the images' own), on `device`.

    In-memory images are cut on the device in batches, from one padded copy that all renderers of a dataset share.
    Files, and what has to be resized by boxes of many sizes, are cut in `workers` processes, which live on from one
    call to the next until `close`; of their pixels no more wait than two batches in each of the views that are cut
    together, or two tasks of 32 cuts a worker where that is more.
    """

    def __init__(
        self,
        data: Dataset,
        size: int | None,
        device: torch.device,
        policy: str = "none",
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
        self._pixels = _pixels(data, padding(policy, *self.size), device) if own == self.size else None
        self._idle: _Loader | None = None

    def close(self) -> None:
        """End the worker processes; later calls start new ones."""
        self._idle = None

    def batches(
        self, parameters: ViewParameters, batches: Sequence[NDArray[np.int64]], first: int = 0
    ) -> Iterator[Tensor]:
        """uint8 [B, 3, H, W] for each batch of sample indices; parameters are those of samples first, first+1, ..."""
        if self._pixels is not None and (parameters.boxes[:, 2:] == self.size).all():
            boxes = torch.from_numpy(parameters.boxes).to(self.device)
            flips = torch.from_numpy(parameters.flips).to(self.device)
            for index in torch.split(order_on(self.device, batches), [len(batch) for batch in batches]):
                yield self._pixels.crops(index, boxes[index - first], flips[index - first])
        elif (images := self.data.pixels) is not None and _whole(parameters.boxes, self.data):
            for batch in batches:
                pixels = images[torch.from_numpy(batch)].permute(0, 3, 1, 2)
                resized = tv.resize(pixels, list(self.size), InterpolationMode(self.interpolation), antialias=True)
                flips = torch.from_numpy(parameters.flips[batch - first]).view(-1, 1, 1, 1)
                resized = torch.where(flips, resized.flip(3), resized)
                yield resized.contiguous(memory_format=torch.channels_last).to(self.device)
        else:
            yield from (images for *_, images in self._by_workers([parameters], [(b, (0,)) for b in batches], first))

    def views(
        self, parameters: Sequence[ViewParameters], batches: Sequence[Batch], first: int = 0
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Every batch in each of its views: the places of both, and the pixels as `batches` gives them.

        Files are decoded once for all views of a batch, so batch by batch; in-memory images come view by view.
        """
        if not self.data.in_memory:
            yield from self._by_workers(parameters, batches, first)
            return
        for place, drawn in enumerate(parameters):
            wanted = [number for number, (_, places) in enumerate(batches) if place in places]
            rendered = self.batches(drawn, [batches[number][0] for number in wanted], first)
            yield from ((number, place, images) for number, images in zip(wanted, rendered, strict=True))

    def _by_workers(
        self, parameters: Sequence[ViewParameters], batches: Sequence[Batch], first: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        tasks: list[_Task] = []
        counts = []
        for samples, places in batches:
            step = max(1, _CUTS // len(places))
            chosen = [parameters[place] for place in places]
            new = [_task(samples[i : i + step], chosen, first) for i in range(0, len(samples), step)]
            tasks += new
            counts.append(len(new))
        workers, ahead = min(self.workers, len(tasks)), 2 * max(counts, default=0)
        if (loader := self._idle) is None or not loader.serves(workers, ahead):
            at = RawArray(ctypes.c_int64, [-1] * (2 * workers))
            cutter = _Cuts(self.data, self.size, self.interpolation, at)
            loader = _Loader(cutter, workers, ahead, self.device.type == "cuda")
        # Not for another call before this one is through.
        self._idle = None
        done = loader.run(tasks, 2 * max(counts, default=0))
        for number, (_, places) in enumerate(batches):
            cuts = [self._ready(loader.next(done)) for _ in range(counts[number])]
            pixels = cuts[0] if len(cuts) == 1 else torch.cat(cuts)
            for j, place in enumerate(places):
                yield number, place, pixels[:, j].permute(0, 3, 1, 2)
        self._idle = loader

    def _ready(self, pixels: _Done) -> Tensor:
        if isinstance(pixels, str):
            raise InputError(pixels)
        if isinstance(pixels, np.ndarray):
            pixels = torch.from_numpy(pixels)
        return pixels.to(self.device, non_blocking=True)


class _Loader:
    """Worker processes that wait for tasks between the runs; with 0 of them this process does the work."""

    def __init__(self, cuts: _Cuts, workers: int, ahead: int, pin: bool) -> None:
        self._workers, self._tasks, self._cuts = workers, list[_Task](), cuts
        self._cut_bytes = 3 * cuts.size[0] * cuts.size[1]
        self._each = max(2, -(-ahead // workers)) if workers else None  # tasks that a worker has or has done
        self._loader: DataLoader[_Done] = DataLoader(
            self._cuts,
            batch_size=None,
            sampler=self._tasks,
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=self._each,
            persistent_workers=workers > 0,
            worker_init_fn=_begin_worker,
            pin_memory=pin,
            generator=torch.Generator(),  # the workers' seeds, of which they have no use: not from the run's own
        )
        _LOADERS.add(self)

    def serves(self, workers: int, ahead: int) -> bool:
        """Whether it has that many workers, and lets so many tasks be ahead."""
        return self._workers >= workers and (self._each is None or self._each * self._workers >= ahead)

    def run(self, tasks: list[_Task], held: int) -> Iterator[_Done]:
        """What comes of the tasks, in their order. held: of how many the pixels are in use at once."""
        if self._each is not None:
            cuts = max((task.flips.size for task in tasks), default=0)
            most = (self._each * self._workers + held) * cuts * self._cut_bytes
            # Half of it is left to others: other loaders of this process, and processes that start in this moment.
            shared = 2 * most * this_rank().local_world <= shared_memory_free()
            for task in tasks:
                task.shared = shared
        self._tasks[:] = tasks
        with _uninterrupted():
            try:
                return iter(self._loader)
            except OSError as e:
                raise InputError(
                    f"worker processes cannot be started ({e.strerror or e}): is {SHARED_MEMORY} full, or memory "
                    "short? --workers 0 does without them"
                ) from e

    def next(self, done: Iterator[_Done]) -> _Done:
        try:
            return next(done)
        except RuntimeError as e:
            if (reason := worker_error(e)) is None:
                raise
            raise UnreadableError(reason) from e

    def reading(self, pid: int) -> str | None:
        """The file, or which image, that the worker process with this id has under way, if any."""
        for process, sample in zip(self._cuts.at[::2], self._cuts.at[1::2], strict=True):
            if process == pid and sample >= 0:
                return self._cuts.data.where(sample)
        return None


_LOADERS: WeakSet[_Loader] = WeakSet()


def worker_error(error: Exception) -> str | None:
    """A line on a worker process that was killed, with the file that it was reading; None for other errors.

    torch reports it wherever the main process is at that moment, so not always to who waits for pixels.
    """
    found = re.match(
        r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.*?)\.( |$))?", str(error)
    )
    if found is None:
        return None
    pids = [int(pid) for pid in found[1].split(",")]
    files = [file for loader in _LOADERS for pid in pids if (file := loader.reading(pid))]
    what = f"{files[0]}: the worker process that read it was killed" if files else "a worker process was killed"
    how = f" ({found[2]})" if found[2] else ""
    return f"{what}{how}: often memory is short, or {SHARED_MEMORY} too small; lower --workers"


EXPLANATIONS.append(worker_error)


def shared_memory_free() -> int:
    """Bytes that may still be shared between processes; a container often has 64 MB in all."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # there is none on macOS, which has other means
        return sys.maxsize
    return found.f_bavail * found.f_frsize


def _as_it_is(done: Any) -> Any:
    """In place of torch's own collation, which would put every array into shared memory."""
    return done


def _whole(boxes: NDArray[np.int32], data: Dataset) -> bool:
    """Whether every box is the whole image, all of which are of one size."""
    return bool((boxes == (0, 0, *data.sizes[0])).all())


def _task(samples: NDArray[np.int64], views: Sequence[ViewParameters], first: int) -> _Task:
    drawn = [view[samples - first] for view in views]
    return _Task(samples, np.stack([d.boxes for d in drawn], 1), np.stack([d.flips for d in drawn], 1))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM wait: in the middle of a fork they leave half-made processes. The workers have neither.

    What ends a whole process group or job would else kill them before this process has ended its step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    else:  # macOS, which does not tell whose signal it is
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _obey_parent(parent: int) -> None:
    """End by a SIGTERM of the parent's, and of nobody else's: that is how multiprocessing ends its workers."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
