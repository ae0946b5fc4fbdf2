"""Commands that end at any step, each as if it were a process of its own; all of them run in this one process.

A step is an operation that leaves a trace: a file that is opened to be written, a link, a rename, a removal, a sync, a
request to a bucket. Python's audit events tell of all of them, whoever calls. From the step at which a command is
killed on, no step of it is done any more, so that no `finally` tidies up. What is simulated besides:

- A machine that loses power loses the contents of the files that were not synced, and the names that were given since
  their folder was synced, the last ones first.
- On a full disk nothing grows any more: what is written is cut off in its middle.
- A command that is overtaken stands still while another one runs from its beginning to its end. Whoever has to wait
  for others waits for a minute at a time, in which nobody else gives a sign of life.
- When time passes, all files get older.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# The audit events that are steps, and those of them that need room on the disk.
STEPS = frozenset(
    {
        "open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime",
        "os.chmod",
    }
)  # fmt: skip
GROWING = frozenset({"open", "os.mkdir", "os.link", "os.symlink"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MINUTE = 61.0  # seconds: after so many without a sign of life a builder counts as dead
_MOST_WAITS = 12
_waited = 0.0  # seconds, by all processes


def monotonic() -> float:
    """What time.monotonic gives to commands that wait."""
    return time.monotonic() + _waited


def since(sign: float) -> float:
    """A file's time as it was before files got older because commands wait."""
    return round(sign + _waited, 3)


running: list[Process] = []  # those that run, the one whose turn it is at the end
_numbers = itertools.count(1)


class Killed(BaseException):
    """The process has ended."""


@dataclass(frozen=True)
class Fate:
    """What happens to a command at a step, counted from 1.

    kind: "lives", "killed", "power" (the machine loses it), "full" (the disk is, from then on), "interrupted" (Ctrl-C),
    "lost", "busy" and "away" (of a bucket's server: its answer to one request is, it refuses some, it is from then on)
    or "overtaken".
    then: the command that overtakes it. only: the kind of steps that count, such as "put"; all, if empty.
    """

    kind: str = "lives"
    step: int = 0
    then: Callable[[], object] | None = None
    only: str = ""


LIVES = Fate()


class Process:
    """One command on the machine `who`, whose files lie below `root`. boot: which of the machine's lives it is."""

    def __init__(self, root: Path, who: str, boot: int, fate: Fate, age: Callable[[float], object]) -> None:
        self.root, self.who, self.machine, self.fate = str(root), who, f"{who}, boot {boot}", fate
        self.number, self.passed, self.dead, self.full = next(_numbers), 0, False, False
        self.trouble, self.refused = "", 0  # what is wrong with the bucket's server, and how often it refused
        self.leases: list = []  # this command as a builder of caches
        self._age, self._waits = age, 0
        self._opened: list[str] = []
        self._written: set[int] = set()  # inodes
        self._moves: list[tuple[str, str, str]] = []  # that were not synced: event, source and destination

    def step(self, event: str, path: str, to: str = "") -> None:
        """Called before each step."""
        if self.dead:
            raise Killed
        self._note_opened()
        if self.fate.only in ("", event):
            self.passed += 1
            if self.passed == self.fate.step:
                self._meet(event)
        if self.full and event in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if event == "open":
            self._opened.append(path)
        elif event in ("os.link", "os.rename"):
            self._moves.append((event, path, to))

    def _meet(self, event: str) -> None:
        if self.fate.kind in ("killed", "power"):
            self.die()
        if self.fate.kind == "interrupted":
            raise KeyboardInterrupt
        if self.fate.kind == "full":
            self.full = True
        if self.fate.kind in ("lost", "busy", "away"):
            self.trouble = self.fate.kind
        if self.fate.kind == "overtaken" and self.fate.then is not None:
            self.fate.then()

    def die(self) -> None:
        """End the process here."""
        self.dead = True
        raise Killed

    def sync(self, fd: int) -> None:
        """What os.fsync does."""
        path, about = str(Path(f"/proc/self/fd/{fd}").readlink()), os.fstat(fd)
        if not path.startswith(self.root):
            return
        is_file = stat.S_ISREG(about.st_mode)
        try:
            self.step("fsync", path)
        except Killed:
            if is_file:
                os.ftruncate(fd, about.st_size // 2)
            raise
        if is_file and self.full:
            os.ftruncate(fd, about.st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # which, as a real one of a write, names no file
        if is_file:
            self._written.discard(about.st_ino)
        else:
            self._moves = [move for move in self._moves if str(Path(move[2]).parent) != path]

    def _note_opened(self) -> None:
        """Remember the files that were opened since the last step: only now they are there."""
        for path in self._opened:
            try:
                about = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISREG(about.st_mode):
                self._written.add(about.st_ino)
        self._opened.clear()

    def lose_power(self) -> None:
        """Undo what the process has not synced, after its end."""
        self._note_opened()
        for event, source, to in reversed(self._moves):
            try:
                if event == "os.link":
                    Path(to).unlink()
                elif not Path(source).exists():
                    Path(to).rename(source)
            except OSError:
                break  # what came later is on the disk, and so is this
        for path in Path(self.root).rglob("*"):
            about = path.lstat()
            if stat.S_ISREG(about.st_mode) and about.st_ino in self._written:
                os.truncate(path, 0)

    def wait(self) -> None:
        """What time.sleep does where a command waits for others."""
        global _waited
        self._waits += 1
        _waited += MINUTE
        assert self._waits < _MOST_WAITS, f"{self.who} waits for somebody who will never come"
        self._age(MINUTE)
        for lease in self.leases:
            give_sign_of_life(lease)


class _Once:
    """Stands for the event that ends a builder's signs of life, after one of them."""

    def __init__(self, event: threading.Event) -> None:
        self._event, self._over = event, False

    def wait(self, _: float) -> bool:
        over, self._over = self._over or self._event.is_set(), True
        return over

    def is_set(self) -> bool:
        return self._event.is_set()


def give_sign_of_life(lease) -> None:
    """What a builder's own thread does every few seconds."""
    event = lease._stop
    lease._stop = _Once(event)
    try:
        lease._beat()
    finally:
        lease._stop = event


def _audit(event: str, args: tuple) -> None:
    if not running or event not in STEPS or threading.current_thread() is not threading.main_thread():
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING):
        return
    process = running[-1]
    # An operation that is given a folder's descriptor, as in shutil.rmtree, has a name for a path.
    if event in ("os.remove", "os.rmdir") and args[-1] != -1:
        return process.step(event, f"{process.root}/{args[0]}")
    if not isinstance(args[0], str | os.PathLike):
        return
    path, to = os.fspath(args[0]), os.fspath(args[1]) if event in ("os.link", "os.rename") else ""
    if path.startswith(process.root) or to.startswith(process.root):
        process.step(event, path, to)


_hooked = False


def hook() -> None:
    """Have Python tell of every step, from now on: an audit hook cannot be removed."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True


@contextmanager
def unwatched():
    """Nothing inside is a step of anybody."""
    kept = running[:]
    running.clear()
    try:
        yield
    finally:
        running[:] = kept


def sync(fd: int) -> None:
    """In the place of os.fsync, which takes most of the time of writing small files."""
    if running and threading.current_thread() is threading.main_thread():
        running[-1].sync(fd)


class Serial:
    """In the place of a ThreadPoolExecutor: each job is done at once, so that the steps of a command have one order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def shutdown(self, *args: object, **kwargs: object) -> None:
        pass

    def map(self, function, *items):
        return iter([function(*one) for one in zip(*items, strict=False)])

    def submit(self, function, *args):
        from concurrent.futures import Future

        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future
