"""What a build has computed and not yet committed is spooled to local disk, by a thread beside the teacher."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from kdcache.cache.care import DAY, HOUR, Leaving, extent
from kdcache.cache.errors import BusyError
from kdcache.cache.files import names, replace_file, sha256
from kdcache.cache.home import home, list_caches
from kdcache.cache.store.cache import Cache

SPOOL_SECONDS = 20.0
# Work that waits to be written is as much at risk as what the spool has not synced. So no more jobs than this wait, and
# none waits longer than this.
WAITING_JOBS, WAITING_SECONDS = 256, 10.0


class Writer:
    """A thread that does jobs one after the other, so that writing overlaps the teacher. Use it with `with`.

    A job's error is raised by a later call, and the jobs after it are not done. A block that is left early ends when
    the jobs that wait are done.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._waiting: deque[tuple[float, Future[None]]] = deque()
        self._failed = False

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown()

    def do(self, job: Callable[[], None]) -> None:
        """Have a job done; waits first while too many jobs wait, or one has waited too long."""
        while self._waiting and (
            self._waiting[0][1].done()
            or len(self._waiting) >= WAITING_JOBS
            or time.monotonic() - self._waiting[0][0] > WAITING_SECONDS
        ):
            self._next()
        self._waiting.append((time.monotonic(), self._thread.submit(self._run, job)))

    def finish(self) -> None:
        """Wait until every job is done."""
        while self._waiting:
            self._next()

    def _next(self) -> None:
        self._waiting.popleft()[1].result()

    def _run(self, job: Callable[[], None]) -> None:
        if not self._failed:
            try:
                job()
            except BaseException:
                self._failed = True
                raise


class Spool:
    """Encoded batches of one shard under way, synced to local disk now and then until the shard is committed.

    Where there are several builders of one shard (one was stopped and woke up), each has a folder of its own. A builder
    that is killed leaves its lock, and with it its folder, to the next one. Close the spool after use.

    total: rows of the shard. rows: how many of them are synced. sums: the sum of the tail sums so far.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self._total = total
        for slot in itertools.count():
            self._folder = folder.with_name(f"{folder.name}-{slot}")
            with suppress(Timeout):
                self._lock = _locked(self._folder)
                break
        # All rows in one piece from the first batch on: many small arrays, made between the large ones of each batch,
        # would keep the memory of these from being used again.
        self._arrays: dict[str, NDArray[Any]] = {}
        self._filled = 0
        self._synced_at = time.monotonic()
        self.sums: NDArray[np.float64] | None = None
        self.rows = 0
        self._load()

    def close(self) -> None:
        """Leave the shard to others; a second call does nothing."""
        self._lock.release()

    def add(self, block: dict[str, NDArray[Any]], sums: NDArray[np.float64] | None) -> None:
        """Append a batch's arrays by name, and its tail sums [T, C]."""
        self._put(block)
        # Summed batch by batch, so that the sum has the same bits wherever the spool was cut.
        if sums is not None:
            self.sums = sums if self.sums is None else self.sums + sums
        if time.monotonic() - self._synced_at > SPOOL_SECONDS:
            self._sync()

    def keep(self) -> None:
        """Sync what is not yet synced, and leave the shard to others."""
        if self._filled > self.rows:
            self._sync()
        self.close()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All rows by array name."""
        return {name: rows[: self._filled] for name, rows in self._arrays.items()}

    def remove(self) -> None:
        """Remove what is spooled."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _put(self, block: dict[str, NDArray[Any]]) -> None:
        stop = self._filled + len(block["gaps"])
        for name, rows in block.items():
            if name not in self._arrays:
                self._arrays[name] = np.empty((self._total, *rows.shape[1:]), rows.dtype)
            self._arrays[name][self._filled : stop] = rows
        self._filled = stop

    def _sync(self) -> None:
        stop = self._filled
        block = {name: rows[self.rows : stop] for name, rows in self._arrays.items()}
        content = io.BytesIO()
        extra = {} if self.sums is None else {"_sums": self.sums}
        np.savez(content, allow_pickle=False, **block, **extra)
        data = content.getvalue()
        replace_file(self._folder / f"{self.rows:012d}-{stop:012d}.block", sha256(data).encode() + data)
        self.rows, self._synced_at = stop, time.monotonic()

    def _load(self) -> None:
        for path in sorted(self._folder.glob(f"{'[0-9]' * 12}-{'[0-9]' * 12}.block")):
            start, stop = map(int, path.stem.split("-"))
            content = path.read_bytes() if path.is_file() else b""
            digest, data = content[:64], content[64:]
            # A block that is damaged, or lies beyond a damaged one: its rows are computed again.
            if start != self.rows or stop > self._total or sha256(data).encode() != digest:
                continue
            with np.load(io.BytesIO(data), allow_pickle=False) as f:
                block = {name: f[name] for name in f.files}
            self.sums = block.pop("_sums", self.sums)
            self._put(block)
            self.rows = stop


def _locked(folder: Path) -> FileLock:
    """Make the folder and lock it; Timeout where another builder holds the lock."""
    while True:
        with suppress(FileNotFoundError):  # another builder has just cleared the folder away
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock", timeout=0, thread_local=False)  # the writer's thread gives it back
            lock.acquire()
            return lock


def spool_folder(path: Path, key: str) -> Path:
    """The folder for builds of this cache in this place; a build of the same key elsewhere has another one."""
    return home() / "spool" / f"{key[:16]}-{sha256(os.fsencode(path.resolve()))[:16]}"


def clear(spool: Path, cache: Cache) -> None:
    """Remove what builds have left in the spool for shards that are committed, unless one is at work on them."""
    for name in names(spool):
        if _committed(name, cache):
            with suppress(BusyError):
                _remove(spool / name)
    with suppress(OSError):  # missing, or not empty
        spool.rmdir()


def leavings(days: float) -> Iterator[Leaving]:
    """What may go from the spool; nothing is changed.

    That is what belongs to shards that are committed, and what belongs to no cache that is known here and has lain
    untouched for so many days: --out may have been anywhere.
    """
    known = {spool_folder(cache.path, cache.key).name: cache for cache in list_caches()[0] if not cache.packed}
    for folder in names(home() / "spool"):
        top, cache = home() / "spool" / folder, known.get(folder)
        for name in names(top):
            size, newest = extent(top / name)
            age = time.time() - newest
            if cache is not None and _committed(name, cache) and age > HOUR:
                yield Leaving(str(top / name), size, "of a shard that is committed", partial(_remove, top / name))
            elif cache is None and age > max(days * DAY, HOUR):
                why = f"of a build that stopped {age / DAY:.0f} days ago, of a cache that is not in {home()}"
                yield Leaving(str(top / name), size, why, partial(_remove, top / name))


def _committed(name: str, cache: Cache) -> bool:
    store = cache.evaluation if name.startswith("eval-") else cache.train
    return store.has(name.removeprefix("eval-").rpartition("-b")[0])


def _remove(folder: Path) -> None:
    """Remove one shard's folder; BusyError while a builder is at work on it."""
    try:
        with suppress(FileNotFoundError), FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # there are others
            folder.parent.rmdir()
    except Timeout:
        raise BusyError(f"{folder} is in use by a build") from None
