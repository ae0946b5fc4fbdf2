"""Leases, by which several builders of one cache, on one machine or many, divide its shards among themselves.

Each builder has one small file, leases/TOKEN.json, which it touches every few seconds. To lease a shard, it makes a
hard link to that file, named after the shard. Only one builder can make that link, over NFS too, and one touch of the
file renews all leases of its builder. A builder is taken for dead when it has not touched its file for the time that
the file states, or when its process ran on this machine and has ended. That time is taken from the file system's own
clock: other builders compare with a file of theirs that they have just touched. A dead builder's lease NAME.0 is taken
over by making NAME.1, which again only one builder can.

A builder that was stopped and wakes up may find its work leased to another. That costs double work and no more:
publish.py decides what becomes part of the cache, whoever holds which lease.

filelock's SoftFileLease comes close, but takes a lease over by exchanging two names, which NFS refuses.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from pydantic import Field

from kdcache.cache import files
from kdcache.cache.errors import NotFoundError
from kdcache.cache.identity import Strict, canonical, parse

EXPIRES = 60.0  # seconds without a sign of life
_BEATS = 4  # signs of life in that time
_MAX_BYTES = 4096


class Owner(Strict):
    """A builder. machine: this boot of its machine, None if unknown; started: when its process did, in system ticks."""

    token: str
    host: str
    process: int = Field(ge=1, lt=2**31)
    machine: str | None
    started: int | None
    since: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.host} (process {self.process}, since {self.since})"


class Leases:
    """This process as one of the builders of the cache at `path`. After a `with` it holds no lease any more.

    token: the builder's name, also that of its folder in scratch/. say: is called with a line when a lease is lost.
    """

    def __init__(self, path: Path, token: str, say: Callable[[str], None]) -> None:
        self._folder, self._scratch, self._say = path / "leases", path / "scratch", say
        self._file = self._folder / f"{token}.json"
        self._owner = Owner(
            token=token,
            host=socket.gethostname(),
            process=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()),
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=EXPIRES,
        )
        self._held: dict[str, Path] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        self._touch()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        shutil.rmtree(self._scratch / self._owner.token, ignore_errors=True)
        self._file.unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Lease `name`, unless a live builder has it."""
        links, last, number = self._links(name), None, 0
        if links:
            last, number = self._owner_of(links[-1]), int(links[-1].suffix[1:]) + 1
            if last is None:  # given back just now
                return False
            if self._living(links[-1]):
                return last == self._owner
        self._touch()
        link = self._folder / f"{name}.{number}"
        try:
            os.link(self._file, link)
        except (FileExistsError, FileNotFoundError):  # another was quicker, or has just taken this one for dead
            return False
        if links and self._owner_of(links[-1]) != last:
            # Its owner woke up and gave it back, and another builder may have begun again at 0.
            link.unlink(missing_ok=True)
            return False
        for old in links:
            old.unlink(missing_ok=True)
        self._held[name] = link
        return True

    def release(self, name: str) -> None:
        """Give a lease back; a lost one is left alone."""
        link = self._held.pop(name, None)
        if link and self._is_mine(link):
            link.unlink(missing_ok=True)

    def lost(self, name: str) -> bool:
        """Whether this builder does not hold `name`, or no longer does."""
        return name not in self._held

    def holder(self, name: str) -> Owner | None:
        """The live builder that has `name`."""
        links = self._links(name)
        return self._living(links[-1]) if links else None

    def others(self) -> list[Owner]:
        """The other live builders."""
        found = (self._living(self._folder / name) for name in files.names(self._folder) if name.endswith(".json"))
        return [owner for owner in found if owner and owner != self._owner]

    def clear(self) -> None:
        """Remove what dead builders left behind, and nothing of a live one."""
        for folder in (self._folder, self._scratch):
            for path in map(folder.joinpath, files.names(folder)):
                if path.name in ("decided", self._owner.token) or self._in_use(path):
                    continue
                if path.is_dir() and not path.is_symlink():
                    files.remove_folder(path, self._scratch / self._owner.token)
                else:
                    path.unlink(missing_ok=True)

    def _in_use(self, path: Path) -> bool:
        if path.suffix == ".tmp":  # its builder may just be starting, so that only its age counts
            try:
                return self._touch() - path.stat().st_mtime <= EXPIRES
            except FileNotFoundError:
                return False
        owner = self._folder / f"{path.name}.json" if path.parent == self._scratch else path
        return self._living(owner) is not None

    def _is_mine(self, link: Path) -> bool:
        try:
            return link.samefile(self._file)
        except FileNotFoundError:
            return False

    def _links(self, name: str) -> list[Path]:
        numbers = [n for lease, _, n in (file.rpartition(".") for file in files.names(self._folder)) if lease == name]
        return [self._folder / f"{name}.{n}" for n in sorted(map(int, filter(str.isdecimal, numbers)))]

    def _owner_of(self, path: Path) -> Owner | None:
        try:
            return parse(Owner, files.read_bounded(path, _MAX_BYTES), str(path), "remove it")
        except NotFoundError:
            return None

    def _living(self, path: Path) -> Owner | None:
        """The builder that a file or link belongs to, if it lives."""
        owner = self._owner_of(path)
        try:
            touched = path.stat().st_mtime  # after it was opened, because that makes an NFS client ask the server
        except FileNotFoundError:
            return None
        return None if owner is None or _ended(owner) or self._touch() - touched > owner.seconds else owner

    def _touch(self) -> float:
        """Show that this builder lives. Returns the time by the file system's clock, in seconds."""
        while True:
            try:
                os.utime(self._file)
                return self._file.stat().st_mtime
            except FileNotFoundError:  # the first time, or another builder took this one for dead
                files.publish(self._file, canonical(self._owner), self._folder)

    def _beat(self) -> None:
        failing = False
        while not self._stop.wait(self._owner.seconds / _BEATS):
            try:
                lost = [name for name, link in list(self._held.items()) if not self._is_mine(link)]
                os.utime(self._file)
                failing = False
            except FileNotFoundError:
                pass  # the next `take` makes it again
            except OSError as e:
                if not failing:
                    self._say(f"{e.filename}: {e.strerror}: other builds may take this one for dead, and do its work")
                failing = True
                continue
            for name in lost:
                if self._held.pop(name, None):
                    self._say(
                        f"lost the lease of {name} ({self._owner.seconds:g} s without a sign of life): "
                        "another build may compute it too, and the first to finish counts"
                    )


@cache
def _machine() -> str | None:
    """This boot of this machine and the namespace of its process numbers; None where Linux does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(process: int) -> int | None:
    """When a process started, in ticks since boot; -1 if it has ended and waits for its parent; None if unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


def _ended(owner: Owner) -> bool:
    """Whether a builder's process is known to have ended, which only its own machine can tell."""
    if owner.machine is None or owner.machine != _machine():
        return False
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it is somebody else's process, and alive
    now = _started(owner.process)
    return now is not None and now != owner.started
