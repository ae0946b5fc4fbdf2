"""Goes through the samples of a dataset in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from kdcache.cache.errors import InputError, UnreadableError
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.process.rank import cores
from kdcache.pipeline.process.reading import Reading, as_it_is, deaths_first, lost_workers
from kdcache.pipeline.process.screen import begin_worker

T = TypeVar("T")


def in_workers(
    work: Callable[[int], T],
    places: Sequence[int],
    where: Callable[[int], str],
    *,
    title: str = "read samples",
    unit: str = "samples",
    chunk: int = 64,
    few: int = 0,
) -> Generator[T, None, None]:
    """Yield work(place) for each place, in order, computed by worker processes; each gets `chunk` places at once.

    Up to `few` places need no workers, and this process does the work. Errors have to be part of what `work` returns.
    UnreadableError where a worker is killed, which names what it was reading by `where(place)`. Who stops before the
    end closes the generator, so that the workers end.
    """
    if len(places) <= few:
        yield from map(work, places)
        return
    tasks = [places[i : i + chunk] for i in range(0, len(places), chunk)]
    workers = min(cores(), len(tasks))
    reading = Reading(workers)
    loader: DataLoader[list[T]] = DataLoader(
        _Tasks(work, tasks, reading),
        batch_size=None,
        sampler=range(len(tasks)),
        num_workers=workers,
        collate_fn=as_it_is,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # draws seeds that nobody needs, and leaves the run's own generator alone
    )
    reason = None
    try:
        with deaths_first(), Progress(title, len(places), unit) as progress:
            for done in loader:
                yield from done
                progress.advance(len(done))
    except RuntimeError as e:
        if (reason := _killed(str(e), reading, where)) is None:
            raise
    except OSError as e:
        raise InputError(f"worker processes cannot be started ({e.strerror or e}): is memory short?") from e
    if reason:  # raised only now, since torch's error would keep the other workers
        raise UnreadableError(reason)


def _killed(error: str, reading: Reading, where: Callable[[int], str]) -> str | None:
    """What torch's error means where a worker is gone, and what that one was reading; None for other errors."""
    if (lost := lost_workers(error)) is None:
        return None
    places = reading.places(lost[0])
    what = f"{where(places[0])}: the worker process that read it" if places else "a worker process"
    return f"{what} was killed or ended: often memory is short, or its own code crashes"


@dataclass
class _Tasks(TorchDataset[list[T]], Generic[T]):
    """The places that are worked on, in tasks of several each."""

    work: Callable[[int], T]
    tasks: Sequence[Sequence[int]]
    reading: Reading

    def __getitem__(self, number: int) -> list[T]:
        worker = get_worker_info()
        assert worker is not None
        done = []
        for place in self.tasks[number]:
            self.reading.note(worker.id, place)
            done.append(self.work(place))
        self.reading.note(worker.id, -1)
        return done


def _begin(worker: int) -> None:
    torch.set_num_threads(1)
    begin_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group, and the parent ends its workers
