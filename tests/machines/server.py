"""A bucket in memory, each request to which is a step of the process that makes it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import obstore
import pytest
from obstore import exceptions as oe
from obstore.store import MemoryStore

from kdcache.cache.registry.kinds import network
from kdcache.tests.machines.processes import running

URL = "s3://shared/team"
_REFUSALS = 3  # of a server that is busy


class Server:
    """Stands for the module `obstore` in kdcache's network code: its functions, on objects that are kept here.

    version: changes whenever an object does.
    """

    def __init__(self) -> None:
        self.store, self.version = MemoryStore(), 0
        self._jumps: list[tuple[float, float]] = []  # when time passed, and how much of it

    def __getattr__(self, name: str) -> Any:
        return getattr(obstore, name)

    def pass_time(self, seconds: float) -> None:
        self._jumps.append((time.time(), seconds))

    # What kdcache asks for

    def get(self, _, path: str, **options: Any):
        return self._asked("get", path, lambda: obstore.get(self.store, path, **options))

    def head(self, _, path: str):
        return self._asked("head", path, lambda: self._aged(obstore.head(self.store, path)))

    def put(self, _, path: str, data, **options: Any):
        def do():
            self.version += 1
            return obstore.put(self.store, path, data, **options)

        return self._asked("put", path, do)

    def delete(self, _, paths):
        def do():
            self.version += 1
            there = {meta["path"] for meta in self.all()}
            return obstore.delete(self.store, [p for p in ([paths] if isinstance(paths, str) else paths) if p in there])

        return self._asked("delete", str(paths), do)

    def list(self, _, prefix: str | None = None, **options: Any):
        pages = self._asked("list", prefix or "", lambda: list(obstore.list(self.store, prefix, **options)))
        return [[self._aged(meta) for meta in page] for page in pages]

    def list_with_delimiter(self, _, prefix: str | None = None, **options: Any):
        return self._asked("list", prefix or "", lambda: obstore.list_with_delimiter(self.store, prefix, **options))

    def _asked(self, what: str, path: str, do):
        if not running:
            return do()
        process = running[-1]
        process.step(what, path)
        if process.trouble == "away":
            raise oe.GenericError("the server is away")
        if process.trouble == "busy":
            process.refused += 1
            if process.refused < _REFUSALS:
                raise oe.GenericError("503 Slow Down")
            process.trouble = ""
        done = do()
        if process.trouble == "lost":
            process.trouble = ""
            raise oe.GenericError("connection reset by peer")
        return done

    def _aged(self, meta):
        then = meta["last_modified"]
        passed = sum(seconds for moment, seconds in self._jumps if moment >= then.timestamp())
        return {**meta, "last_modified": then - timedelta(seconds=passed)}

    # What the keeper of the bucket does by hand

    def all(self):
        return [meta for page in obstore.list(self.store) for meta in page]

    def names(self, prefix: str) -> list[str]:
        return sorted(meta["path"] for meta in self.all() if meta["path"].startswith(prefix))

    def read(self, path: str) -> bytes:
        return bytes(obstore.get(self.store, path).bytes())

    def write(self, path: str, data: bytes | None) -> None:
        """data: None removes the object."""
        self.version += 1
        if data is None:
            obstore.delete(self.store, path)
        else:
            obstore.put(self.store, path, data, use_multipart=False)


@contextmanager
def served(server: Server):
    """Inside, every address is this bucket's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "obstore", server)
        patch.setattr(network, "_store", lambda url: server.store)
        yield
