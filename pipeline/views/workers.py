"""Worker processes that decode images, cut views from them and change these by operations.

They get tasks, each of a few samples in several views, and give back pixels, through shared memory where there is
enough of it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from kdcache.cache.errors import EXPLANATIONS, InputError, KdcacheError, UnreadableError
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.process.reading import Reading, as_it_is, deaths_first, lost_workers
from kdcache.pipeline.process.screen import begin_worker
from kdcache.pipeline.views.operations.operation import Drawn
from kdcache.pipeline.views.pool import Pool, can_share

SHARED_MEMORY = "/dev/shm"
_HELD = 3  # batches that are not under way: the one that is put together, the one before it, and the one in use
Cut = Callable[[Tensor, Sequence[int], bool], Tensor]  # an image, a box and whether to flip it; uint8 [3, *size]
# Images uint8 [b, 3, *size], what operations drew for them, and the rows there: changed images.
Change = Callable[[Tensor, Mapping[str, Drawn], NDArray[np.int64]], Tensor]


@dataclass
class Task:
    """Samples [b], and their boxes [b, n, 4] and flips [b, n] in n views.

    drawn: what operations drew for the b * n cuts; empty where nothing is to be changed here.
    at: where in the pool the pixels go; None where it has no room.
    shared: whether pixels that are not in the pool come back in shared memory, or else through a pipe.
    """

    samples: NDArray[np.int64]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    at: int | None = None
    shared: bool = True


# What came of a task: pixels, shared or not, None if they are in the pool, or an error.
Done = Tensor | NDArray[np.uint8] | None | str


@dataclass
class _Cutter(TorchDataset[Done]):
    """Does the work of one process: a task in, uint8 [b, n, *size, 3] out; each image is decoded once for all views.

    An error travels as its text, so that it stays one line.
    """

    data: Dataset
    cut: Cut
    change: Change
    size: tuple[int, int]
    reading: Reading
    pool: Pool | None

    def __getitem__(self, task: Task) -> Done:
        worker = get_worker_info()
        if worker is None or worker.dataset is not self:  # none, or one of a loader that is not ours
            return self._all(task, lambda _: None)

        def note(sample: int) -> None:
            self.reading.note(worker.id, sample)

        try:
            return self._all(task, note)
        finally:
            note(-1)

    def _all(self, task: Task, note: Callable[[int], None]) -> Done:
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
            cuts += [self.cut(image, box, flip).permute(1, 2, 0) for box, flip in drawn]
        shape = (len(task.samples), views, *self.size, 3)
        if task.at is not None:
            assert self.pool is not None
            there = torch.from_numpy(self.pool.array(task.at, (len(cuts), *self.size, 3)))
            self._changed(torch.stack(cuts, out=there), task)
            return None
        if task.shared:
            with suppress(RuntimeError):  # others have taken the shared memory meanwhile
                stacked: Tensor = default_collate(cuts)  # a worker stacks straight into shared memory
                return self._changed(stacked, task).view(shape)
        return self._changed(torch.stack(cuts), task).view(shape).numpy()

    def _changed(self, cuts: Tensor, task: Task) -> Tensor:
        """The cuts [b * n, *size, 3] after the operations, in the same memory."""
        if task.drawn:
            changed = self.change(cuts.permute(0, 3, 1, 2), task.drawn, np.arange(len(cuts))).permute(0, 2, 3, 1)
            if changed.data_ptr() != cuts.data_ptr():
                cuts.copy_(changed)
        return cuts


class _Tasks:
    """The tasks of whatever run is under way: a DataLoader asks for them anew in each."""

    def __init__(self) -> None:
        self.of_this_run: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.of_this_run


class Workers:
    """Processes that cut views of `size` from a dataset's images and wait for tasks between the runs.

    With 0 workers this process does the work. ahead: how many tasks may be under way or done and not taken. pin:
    whether the pixels come in pinned memory. batch: how many cuts a batch has, and how many tasks, at most.
    """

    def __init__(
        self, data: Dataset, cut: Cut, change: Change, size: tuple[int, int], workers: int, ahead: int, pin: bool,
        batch: tuple[int, int],
    ) -> None:  # fmt: skip
        self._workers, self._tasks = workers, _Tasks()
        self._cut_bytes = 3 * size[0] * size[1]
        self._each = max(2, -(-ahead // workers)) if workers else None  # tasks that a worker has under way or done
        self._pool: Pool | None = None
        if self._each is not None and can_share() and not pin:  # whose pixels are copied to pinned memory anyway
            cuts, tasks = batch
            with suppress(OSError):  # where there is no memory for it, the pixels travel
                self._pool = Pool(-(-self._each * workers // tasks) + _HELD, cuts * self._cut_bytes)
        self._cutter = _Cutter(data, cut, change, size, Reading(workers), self._pool)
        self._loader: DataLoader[Done] = DataLoader(
            self._cutter,
            batch_size=None,
            sampler=self._tasks,
            num_workers=workers,
            collate_fn=as_it_is,
            prefetch_factor=self._each,
            persistent_workers=workers > 0,
            worker_init_fn=_begin_worker,
            pin_memory=pin,
            generator=torch.Generator(),  # draws seeds that nobody uses, and leaves the run's own generator alone
        )
        _STARTED.add(self)

    def serves(self, workers: int, ahead: int, cuts: int) -> bool:
        """Whether there are that many workers, so many tasks may be ahead, and a batch may have so many cuts."""
        enough = self._each is None or self._each * self._workers >= ahead
        room = self._pool is None or cuts * self._cut_bytes <= self._pool.size
        return self._workers >= workers and enough and room

    def place(self, cuts: int) -> int | None:
        """Where the pixels of a batch of so many cuts are to go; None if they have to travel."""
        return self._pool.take(cuts * self._cut_bytes) if self._pool is not None else None

    def taken(self, at: int, shape: tuple[int, ...]) -> Tensor:
        """The pixels uint8 of this shape that went there, all of whose tasks are done."""
        assert self._pool is not None
        return self._pool.tensor(at, shape)

    def run(self, tasks: Iterator[Task], cuts: int, held: int) -> Iterator[Done]:
        """The results of the tasks, in their order. A task is taken from `tasks` when there is room for it.

        cuts: the most that a task has. held: how many results are in use at once.
        """
        if self._each is not None:
            most = (self._each * self._workers + held) * cuts * self._cut_bytes
            # Half of it is left to others: other workers of this process, and processes that start in this moment.
            shared = 2 * most * this_rank().local_world <= shared_memory_free()
            tasks = (replace(task, shared=shared) for task in tasks)
        self._tasks.of_this_run = tasks
        with _uninterrupted():
            try:
                return iter(self._loader)
            except OSError as e:
                raise InputError(
                    f"worker processes cannot be started ({e.strerror or e}): is {SHARED_MEMORY} full, or memory "
                    "short? --workers 0 does without them"
                ) from e

    def next(self, done: Iterator[Done]) -> Done:
        try:
            with deaths_first():
                return next(done)
        except RuntimeError as e:
            if (reason := worker_error(e)) is None:
                raise
            raise UnreadableError(reason) from e

    def reading(self, pids: Sequence[int]) -> list[str]:
        """The files or images that the worker processes with these ids are working on."""
        return [self._cutter.data.where(sample) for sample in self._cutter.reading.places(pids)]


_STARTED: WeakSet[Workers] = WeakSet()


def worker_error(error: Exception) -> str | None:
    """One line that tells of a worker process that was killed and what it was reading; None for other errors.

    torch raises it wherever the main process is at that moment, so not always where pixels are waited for.
    """
    if (lost := lost_workers(str(error))) is None:
        return None
    pids, signalled = lost
    files = [file for started in _STARTED for file in started.reading(pids)]
    what = f"{files[0]}: the worker process that read it was killed" if files else "a worker process was killed"
    how = f" ({signalled})" if signalled else ""
    return f"{what}{how}: often memory is short, or {SHARED_MEMORY} too small; lower --workers"


EXPLANATIONS.append(worker_error)


def shared_memory_free() -> int:
    """Bytes that may still be shared between processes; a container often has 64 MB in all."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # there is none on macOS, which has other means
        return sys.maxsize
    return found.f_bavail * found.f_frsize


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait, which would leave half-made processes in the middle of a fork.

    Workers never get them. Otherwise a signal to a whole process group or job would kill the workers before this
    process has ended its step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    begin_worker()
    sys.excepthook = _unless_left
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    else:  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the error of a thread that hands over pixels, unless the parent has left meanwhile, as after Ctrl-C."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _obey_parent(parent: int) -> None:
    """End when the parent sends SIGTERM, as multiprocessing ends its workers, and not when anybody else does."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
