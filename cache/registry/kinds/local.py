"""A registry in a folder: its objects, and reading a cache right there."""

from __future__ import annotations

import os
from pathlib import Path

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, NotFoundError
from kdcache.cache.files import Content
from kdcache.cache.identity import Identity
from kdcache.cache.registry.localstore import LocalStore
from kdcache.cache.store.place import Folder


class FolderObjects:
    """Files below a folder, none of which is reached through a symbolic link. Objects describes the methods."""

    listable = writable = True

    def __init__(self, root: Path) -> None:
        if not root.is_dir() and not root.absolute().parent.is_dir():
            raise NotFoundError(f"there is no folder {root.absolute().parent} for the registry {root}: is it mounted?")
        self._root, self.url, self.address = root, str(root), str(root.absolute())

    def require_there(self) -> None:
        if not self._root.is_dir():
            raise NotFoundError(f"there is no registry in {self._root}: is it mounted?")

    def require_create_only(self, path: str) -> None:
        """A link is never made over a file."""

    def at(self, path: str) -> Path:
        """The file's path; CorruptError where a link would lead elsewhere."""
        parent = (self._root / path).parent
        if parent.resolve() != self._root.resolve() / Path(path).parent:
            raise CorruptError(f"{parent} is, or lies behind, a symbolic link, which is not followed: remove it")
        return self._root / path

    def folder(self, path: str) -> Path:
        return self.at(f"{path}/x").parent

    def place(self, prefix: str, identity: Identity, mirror: Path, store: LocalStore) -> SharedFolder:
        return SharedFolder(self, self._root / prefix, prefix)

    def read(self, path: str, limit: int) -> bytes:
        return files.read_bounded(self.at(path), limit)

    def size(self, path: str) -> int | None:
        file = self.at(path)
        return file.lstat().st_size if file.is_file() else None

    def create(self, path: str, data: Content) -> bool:
        try:
            files.publish(self.at(path), bytes(data), self.folder("scratch"))
        except CorruptError:
            return False
        return True

    def replace(self, path: str, data: bytes) -> None:
        file = self.at(path)
        files.make_folder(file.parent)
        files.replace_file(file, data)

    def remove(self, paths: list[str]) -> None:
        for path in paths:
            files.discard(self.at(path))

    def sizes(self, folder: str) -> dict[str, int]:
        top, found = self.folder(folder), {}
        for where, _, names in os.walk(top):
            for name in names:
                file = Path(where, name)
                found[file.relative_to(top).as_posix()] = file.lstat().st_size
        return found

    def folders(self, folder: str, holding: str) -> list[str]:
        top = self.folder(folder)
        there = sorted(p for p in top.iterdir() if p.is_dir()) if top.is_dir() else []
        return [path.name for path in there if (path / holding).exists()]

    def newest(self, folder: str) -> float:
        return max(self.times(folder).values(), default=0.0)

    def times(self, folder: str) -> dict[str, float]:
        top = self.folder(folder)
        found = (Path(where, name) for where, _, names in os.walk(top) for name in names)
        return {file.relative_to(top).as_posix(): file.lstat().st_mtime for file in found}

    def changed(self, path: str) -> float:
        file = self.at(path)
        if not file.is_file():
            raise NotFoundError(f"{file} is missing")
        return file.lstat().st_mtime


class SharedFolder(Folder):
    """A cache in the folder of a registry.

    No link in it is followed, and people who only use it do not repair it.
    """

    writable = False

    def __init__(self, objects: FolderObjects, path: Path, prefix: str) -> None:
        super().__init__(path)
        self._objects, self._prefix = objects, prefix

    def at(self, file: str) -> Path:
        return self._objects.at(f"{self._prefix}/{file}")

    def remedy(self, file: str) -> str:
        return f"ask whoever keeps the registry to run kdcache verify {self.where} --repair, then to build it again"
