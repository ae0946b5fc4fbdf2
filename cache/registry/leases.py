"""Leases in a bucket, by which builders on many machines divide the shards of one cache with nothing else in common.

    leases/KEY/TOKEN.json   a builder of that cache; it is written again every few seconds
    leases/KEY/NAME.0       the lease of a shard: it holds who has it, and only one builder can create it

They do what leases in a folder do (store/leases.py). What differs:

- There are no links. So a lease holds its builder's token, and a builder's sign of life is the time of TOKEN.json.
- Time is the server's: that of others' signs of life is compared with that of one's own, from the same list. As one's
  own is some seconds old, the dead are noticed a little later. A server tells whole seconds, so one is allowed.
- Nothing is removed on a condition. A builder that is stopped between a look and the removal that follows from it may
  remove another's lease when it wakes up. Then a shard is computed twice, and the first commit counts.
- A list may be some seconds old, so that not every question is a request. Whatever a builder goes by it looks up
  again: after it has created a lease, it takes the shard only if a new list shows no later one.

They lie outside of caches/, so that what is there can be create-only for everybody (docs/sharing.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from kdcache.cache.errors import UnreadableError
from kdcache.cache.identity import canonical, parse
from kdcache.cache.registry.objects import Objects, read_checked
from kdcache.cache.store.leases import MOST_BYTES, NOBODY, Leases, Owner, ended, owner_in

LEASES = "leases"
PAUSE = 5.0  # seconds between two lists
_GRAIN = 1.0  # seconds, to which servers tell times


class ObjectLeases(Leases):
    """This process as one of the builders of the cache of that key in a bucket.

    Where a lease cannot be given back, because the bucket cannot be reached or credentials lack the right to remove,
    it expires.
    """

    def __init__(self, objects: Objects, key: str, token: str, say: Callable[[str], None]) -> None:
        super().__init__(token, say)
        self._objects, self._folder = objects, f"{LEASES}/{key}"
        self._me, self._content = f"{token}.json", canonical(self._owner)
        self._times: dict[str, float] = {}
        self._owners: dict[tuple[str, float], Owner] = {}
        self._asked = self._listed = self._shown = float("-inf")
        self._away = False  # whether the bucket did not let something be removed
        self._lock = threading.RLock()  # the thread that gives signs of life looks too

    def take(self, name: str) -> bool:
        with self._lock:
            return super().take(name)

    def release(self, name: str) -> None:
        with self._lock:
            super().release(name)

    def holder(self, name: str) -> Owner | None:
        with self._lock:
            return super().holder(name)

    def others(self) -> list[Owner]:
        with self._lock:
            return super().others()

    def clear(self) -> None:
        with self._lock:
            self._look(0)
            self._drop([name for name in self._times if name != self._me and self._living(name) is None])

    def _touch(self) -> None:
        self._objects.replace(f"{self._folder}/{self._me}", self._content)
        self._shown = time.monotonic()

    def _renew(self) -> list[str]:
        self._touch()
        with self._lock:
            self._look(0)
            held = list(self._held.items())
            return [n for n, lease in held if self._leases(n)[-1:] != [lease] or self._owner_of(lease) != self._owner]

    def _leave(self) -> None:
        with self._lock:
            mine = [name for name in self._times if name != self._me and self._known(name) == self._owner]
            self._drop([*mine, self._me])

    def _names(self) -> list[str]:
        self._look(PAUSE)
        return list(self._times)

    def _look(self, pause: float) -> None:
        """List what there is, unless that was done less than so many seconds ago."""
        if time.monotonic() - self._listed >= pause:
            self._asked = time.monotonic()
            self._times = self._objects.times(self._folder)
            self._listed = time.monotonic()
            there = {self._version(name) for name in self._times}
            self._owners = {version: owner for version, owner in self._owners.items() if version in there}

    def _version(self, name: str) -> tuple[str, float]:
        # A token is never another builder's, and its file always says the same.
        return (name, 0.0 if name.endswith(".json") else self._times[name])

    def _known(self, name: str) -> Owner | None:
        return self._owners.get(self._version(name)) if name in self._times else None

    def _owner_of(self, name: str) -> Owner | None:
        if name in self._times and self._known(name) is None and (owner := self._read(name)):
            self._owners[self._version(name)] = owner
        return self._known(name)

    def _read(self, name: str) -> Owner | None:
        path = f"{self._folder}/{name}"
        where = f"{self._objects.url}/{path}"
        read = partial(read_checked, self._objects, path, MOST_BYTES, lambda got: parse(Owner, got, where, "remove it"))
        return owner_in(read)

    def _living(self, name: str) -> Owner | None:
        owner, now = self._owner_of(name), self._times.get(self._me)
        if owner == NOBODY:
            return None
        if owner is None or owner == self._owner or now is None:  # without a time nobody is taken for dead
            return owner
        shown = self._times.get(f"{owner.token}.json")
        if shown is None or ended(owner):
            return None
        silent = max(now - shown, self._unchanged(owner, shown, self._asked))
        return None if silent > owner.seconds + _GRAIN else owner

    def _make(self, lease: str) -> bool:
        if time.monotonic() - self._shown > self._owner.seconds / 2:  # stopped until now
            self._touch()
        made = self._objects.create(f"{self._folder}/{lease}", self._content)
        self._look(0)
        self._owners = {version: owner for version, owner in self._owners.items() if version[0].endswith(".json")}
        if made and self._leases(lease.rpartition(".")[0])[-1:] != [lease]:
            self._remove(lease)
            return False
        return made

    def _is_mine(self, lease: str) -> bool:
        if self._away and self._stop.is_set():
            return False
        try:
            return self._read(lease) == self._owner
        except UnreadableError:
            self._away = True
            return False

    def _remove(self, lease: str) -> None:
        self._drop([lease])

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self._times.pop(name, None)
        if self._away and self._stop.is_set():
            return
        try:
            self._objects.remove([f"{self._folder}/{name}" for name in names])
        except UnreadableError:
            self._away = True
