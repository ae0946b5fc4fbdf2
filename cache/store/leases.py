"""Leases, by which several builders of one cache, on one machine or many, divide its shards among themselves.

Every builder gives signs of life, several in the time that it states. Whoever gives none for that time is taken for
dead, and so is a builder whose process ran on this machine and has ended. A lease is something that only one builder
can make: NAME.0 for a free shard, and NAME.1 to take NAME.0 over from the dead.

A builder that was stopped and wakes up may find its work leased to another. That costs double work and no more:
whoever holds which lease, it is decided elsewhere what becomes part of the cache (publish.py, registry/bucket.py).

There are two kinds, for a folder (here) and for a bucket (registry/leases.py). In a folder each builder has one small
file, leases/TOKEN.json, which it touches every few seconds. A lease is a hard link to that file, named after the shard.
Only one builder can make that link, over NFS too, and one touch of the file renews all leases of its builder. Time is
taken from the file system's own clock: other builders compare with a file of theirs that they have just touched. Since
that clock may be set back, they also note by their own how long they have seen no new sign of life.

filelock's SoftFileLease comes close, but takes a lease over by exchanging two names, which NFS refuses.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from pydantic import Field

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, MismatchError, NotFoundError, UnreadableError
from kdcache.cache.identity import Strict, canonical, parse

EXPIRES = 60.0  # seconds without a sign of life
MOST_BYTES = 4096  # of what describes a builder
_BEATS = 4  # signs of life in that time
_LEAVING = 10.0  # seconds that a sign of life under way may still take when the builder ends


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


# The owner of a lease that cannot be read, as a crash or a bad disk leaves one. Nobody lives who has it, so that it is
# taken over; at worst a shard is computed twice.
NOBODY = Owner(token="", host="", process=1, machine=None, started=None, since="", seconds=0.0)


def owner_in(read: Callable[[], Owner]) -> Owner | None:
    """The owner that a lease or a sign of life names: None where it is gone, NOBODY where it is none.

    read: reads it. UnreadableError where its bytes are not to be had now, whatever they are.
    """
    try:
        return read()
    except NotFoundError:
        return None
    except (CorruptError, MismatchError):
        return NOBODY


class Leases(ABC):
    """This process as one of the builders of a cache. After a `with` it holds no lease any more.

    token: the builder's name. say: is called with a line when a lease is lost.
    """

    def __init__(self, token: str, say: Callable[[str], None]) -> None:
        self._say = say
        self._owner = Owner(
            token=token,
            host=socket.gethostname(),
            process=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()),
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=EXPIRES,
        )
        self._held: dict[str, str] = {}  # the lease of each name
        self._seen: dict[str, tuple[float, float]] = {}  # of each builder its last sign of life, and since when
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        self._touch()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(_LEAVING)
        for name in list(self._held):
            self.release(name)
        self._leave()

    def take(self, name: str) -> bool:
        """Lease `name`, unless a live builder has it."""
        leases, last, number = self._leases(name), None, 0
        if leases:
            last, number = self._owner_of(leases[-1]), _number(leases[-1]) + 1
            if last is None:  # given back just now
                return False
            if self._living(leases[-1]):
                return last == self._owner
        lease = f"{name}.{number}"
        if not self._make(lease):  # another was quicker, or has just taken this one for dead
            return False
        if leases and self._owner_of(leases[-1]) != last:
            # Its owner woke up and gave it back, and another builder may have begun again at 0.
            self._remove(lease)
            return False
        for old in leases:
            self._remove(old)
        self._held[name] = lease
        return True

    def release(self, name: str) -> None:
        """Give a lease back; a lost one is left alone."""
        lease = self._held.pop(name, None)
        if lease and self._is_mine(lease):
            self._remove(lease)

    def lost(self, name: str) -> bool:
        """Whether this builder does not hold `name`, or no longer does."""
        return name not in self._held

    def holder(self, name: str) -> Owner | None:
        """The live builder that has `name`."""
        leases = self._leases(name)
        return self._living(leases[-1]) if leases else None

    def others(self) -> list[Owner]:
        """The other live builders."""
        found = (self._living(name) for name in self._names() if name.endswith(".json"))
        return [owner for owner in found if owner and owner != self._owner]

    @abstractmethod
    def clear(self) -> None:
        """Remove what dead builders left behind, and nothing of a live one."""

    def _unchanged(self, owner: Owner, sign: float, at: float) -> float:
        """For how many seconds a builder's last sign of life is known to have been the last.

        sign: its time, by the clock of the place. at: when it was read, by a clock of this machine that nobody sets.
        """
        known, since = self._seen.get(owner.token, (None, at))
        if sign != known:
            self._seen[owner.token] = sign, at
            return 0.0
        return at - since

    def _leases(self, name: str) -> list[str]:
        """The leases of a name: the last one counts, and earlier ones were taken over."""
        found = (lease.rpartition(".") for lease in self._names())
        return [f"{name}.{n}" for n in sorted(int(n) for of, _, n in found if of == name and n.isdecimal())]

    def _beat(self) -> None:
        failing = False
        while not self._stop.wait(self._owner.seconds / _BEATS):
            try:
                lost = self._renew()
                failing = False
            except (OSError, UnreadableError) as e:
                if not failing:
                    reason = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) else str(e).partition(": check")[0]
                    self._say(f"{reason}: other builds may take this one for dead, and do its work")
                failing = True
                continue
            for name in lost:
                if self._held.pop(name, None):
                    self._say(
                        f"lost the lease of {name} ({self._owner.seconds:g} s without a sign of life): "
                        "another build may compute it too, and the first to finish counts"
                    )

    # What the kinds differ in. A lease is named NAME.NUMBER, a builder's sign of life TOKEN.json.

    @abstractmethod
    def _touch(self) -> object:
        """Give a sign of life."""

    @abstractmethod
    def _renew(self) -> list[str]:
        """Give a sign of life; the names whose leases are lost. OSError or UnreadableError where that fails."""

    @abstractmethod
    def _leave(self) -> None:
        """Remove this builder's sign of life."""

    @abstractmethod
    def _names(self) -> list[str]:
        """The names of all leases and signs of life."""

    @abstractmethod
    def _owner_of(self, name: str) -> Owner | None:
        """The builder that a lease or a sign of life belongs to; None where it is gone, NOBODY where it is none."""

    @abstractmethod
    def _living(self, name: str) -> Owner | None:
        """The same builder, if it lives."""

    @abstractmethod
    def _make(self, lease: str) -> bool:
        """Make a lease of this builder's; whether it was this call that made it."""

    @abstractmethod
    def _is_mine(self, lease: str) -> bool:
        """Whether a lease is there and this builder's."""

    @abstractmethod
    def _remove(self, lease: str) -> None:
        """Remove a lease, if it is there."""


class FolderLeases(Leases):
    """This process as one of the builders of the cache in a folder. token: names its folder in scratch/ too."""

    def __init__(self, path: Path, token: str, say: Callable[[str], None]) -> None:
        super().__init__(token, say)
        self._folder, self._scratch = path / "leases", path / "scratch"
        self._file = self._folder / f"{token}.json"

    def clear(self) -> None:
        keep = (self._scratch / "decided", self._scratch / self._owner.token)
        for folder in (self._folder, self._scratch):
            for path in map(folder.joinpath, files.names(folder)):
                if path in keep or self._in_use(path):
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
        return self._living(f"{path.name}.json" if path.parent == self._scratch else path.name) is not None

    def _touch(self) -> float:
        """Returns the time by the file system's clock, in seconds."""
        while True:
            try:
                os.utime(self._file)
                return self._file.stat().st_mtime
            except FileNotFoundError:  # the first time, or another builder took this one for dead
                files.publish(self._file, canonical(self._owner), self._folder)

    def _renew(self) -> list[str]:
        lost = [name for name, lease in list(self._held.items()) if not self._is_mine(lease)]
        with suppress(FileNotFoundError):  # the next `take` makes it again
            os.utime(self._file)
        return lost

    def _leave(self) -> None:
        shutil.rmtree(self._scratch / self._owner.token, ignore_errors=True)
        self._file.unlink(missing_ok=True)

    def _names(self) -> list[str]:
        return files.names(self._folder)

    def _owner_of(self, name: str) -> Owner | None:
        return _in_file(self._folder / name)

    def _living(self, name: str) -> Owner | None:
        owner = self._owner_of(name)
        if owner is None or owner == NOBODY:
            return None
        at = time.monotonic()
        try:
            # After it was opened, because that makes an NFS client ask the server.
            touched = (self._folder / name).stat().st_mtime
        except FileNotFoundError:
            return None
        silent = max(self._touch() - touched, self._unchanged(owner, touched, at))
        return None if ended(owner) or silent > owner.seconds else owner

    def _make(self, lease: str) -> bool:
        self._touch()
        try:
            os.link(self._file, self._folder / lease)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def _is_mine(self, lease: str) -> bool:
        try:
            return (self._folder / lease).samefile(self._file)
        except FileNotFoundError:
            return False

    def _remove(self, lease: str) -> None:
        files.discard(self._folder / lease)


def _in_file(path: Path) -> Owner | None:
    return owner_in(lambda: parse(Owner, files.read_bounded(path, MOST_BYTES), str(path), "remove it"))


def unreadable(folder: Path) -> list[Path]:
    """What lies in a folder of leases, and is neither a lease nor a sign of life."""
    found = (folder / name for name in files.names(folder) if not name.endswith(".tmp"))
    return [path for path in found if _in_file(path) == NOBODY]


def _number(lease: str) -> int:
    return int(lease.rpartition(".")[2])


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


def ended(owner: Owner) -> bool:
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
