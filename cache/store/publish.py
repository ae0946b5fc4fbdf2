"""Publishes what a split holds: writes files whole, decides between builders, and commits what is decided.

Any number of builders may write one name at once, and stop, wake up or die at any step, because

- a builder syncs its files and its commit in a folder of its own, and decides by renaming that folder to
  scratch/decided/NAME, which only one can do: the decision and its bytes are one thing, and outlive their builder;
- only what is decided is put in place, by any builder, for all of them put the same bytes;
- a decision is removed when its commit is there, never before. So a decision that was read *before* the commit was
  found missing is the only one there ever was; one that comes after the commit is void, and nobody puts it in place.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, NotFoundError
from kdcache.cache.files import Content
from kdcache.cache.identity import MAX_JSON_BYTES, Identity, SplitName, canonical, parse
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import Chunk, Commit, StoredFile, shard_name
from kdcache.cache.store.place import Place, path_of
from kdcache.cache.store.split import THREADS, SplitReader

T = TypeVar("T")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = "commit.sha256"  # in a decision, of its commit, which nothing else names yet
_CHUNK = re.compile(r"(views/v[0-9]{5,9}/)?[a-z_]+/c(/[0-9]+)+")


class Decisions(SplitReader):
    """One split of a cache, and what builders decide to commit there.

    token: names the builder's own folder in scratch/.
    """

    def __init__(self, place: Place, split: SplitName, identity: Identity, token: str | None = None) -> None:
        super().__init__(place, split, identity)
        self._token = token or secrets.token_hex(8)

    @cached_property
    def _root(self) -> Path:
        return path_of(self._place) / self.prefix

    @cached_property
    def _scratch(self) -> Path:
        return path_of(self._place) / "scratch" / self._token

    @cached_property
    def _decided(self) -> Path:
        return path_of(self._place) / "scratch" / "decided" / self.split

    def _publish(self, name: str, contents: Mapping[str, Content]) -> None:
        while not self.has(name):
            self.finish(name, self._decide(name, contents))

    def _decide(self, name: str, contents: Mapping[str, Content]) -> bool:
        """Write the files aside and decide for them. Returns whether it was this call that decided."""
        decided, folder = False, self._scratch / secrets.token_hex(8)
        # The folder is missing if this builder was stopped for so long that another took it for dead. The caller tries
        # again then.
        with suppress(FileNotFoundError):
            files.make_folder(folder)
            for file, content in contents.items():
                files.write(folder / file, content)
            files.write(folder / _DIGEST, files.sha256(contents["commit.json"]).encode())
            files.sync_folder(folder)
            files.make_folder(self._decided)
            try:
                folder.rename(self._decided / name)
                decided = True
            except OSError as e:
                if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            files.sync_folder(self._decided)
        shutil.rmtree(folder, ignore_errors=True)
        return decided

    def decided(self) -> list[str]:
        """The names that are decided and perhaps not committed yet: their builder is at work on them, or has died."""
        return files.names(self._decided)

    def finish(self, name: str, just_written: bool = False) -> None:
        """Put what is decided for `name` in its place and commit it; nothing happens if nothing is decided.

        just_written: whether this process has just written it, so that nothing of it needs to be read again.
        """
        decided = self._decided / name
        advice = f"remove {decided} and run kdcache build again"
        try:
            content = files.read_bounded(decided / "commit.json", MAX_JSON_BYTES)
        except NotFoundError:
            names = files.names(decided)
            if names and "commit.json" not in names and not self.has(name):
                raise CorruptError(f"{decided} lacks its commit; {advice}") from None
            return
        self.refresh()
        if not self.has(name):
            commit = self._decided_commit(name, content)
            for file, stored in commit.files.items():
                if not self._put(file, stored, decided, just_written) and not self.has(name):
                    raise CorruptError(f"{decided} does not hold the bytes of {file} that were decided; {advice}")
            for folder in {(self._root / file).parent for file in commit.files}:
                files.sync_folder(folder)  # another builder may not have synced what it has put there
            files.publish(self._root / "commits" / f"{name}.json", content, self._scratch)
        files.remove_folder(decided, self._scratch)

    def _decided_commit(self, name: str, content: bytes) -> Commit:
        """The commit in the bytes that were decided for `name`; CorruptError where they hold none."""
        decided = self._decided / name
        advice = f"remove {decided} and run kdcache build again"
        commit = parse(Commit, content, str(decided / "commit.json"), advice)
        if (commit.key, commit.name, commit.format) != (self._key, name, self._format) or not all(
            _CHUNK.fullmatch(file) and _SHA256.fullmatch(stored.sha256) for file, stored in commit.files.items()
        ):
            raise CorruptError(f"{decided} holds no commit of {name}; {advice}")
        if not _has_digest(decided, content):
            raise CorruptError(f"{decided} holds another commit than was decided; {advice}")
        return commit

    def require_decision(self, name: str) -> None:
        """CorruptError if something is decided for `name` that can never be finished. Nothing is changed."""
        decided = self._decided / name
        try:
            content = files.read_bounded(decided / "commit.json", MAX_JSON_BYTES)
        except NotFoundError:
            if not files.names(decided):
                return  # finished just now
            raise CorruptError(f"{decided} lacks its commit") from None
        if not self.has(name):
            for file, stored in self._decided_commit(name, content).files.items():
                if not _is(decided / stored.sha256, stored) and not _is(self._root / file, stored):
                    if self.has(name):
                        return
                    raise CorruptError(f"{decided} does not hold the bytes of {file} that were decided")

    def forget(self, name: str) -> None:
        """Drop what is decided for `name`, and cannot be finished, so that it can be computed again."""
        files.remove_folder(self._decided / name, self._scratch)
        files.discard(self._decided / name)  # a link that leads nowhere

    def _put(self, file: str, stored: StoredFile, decided: Path, just_written: bool) -> bool:
        """Put a decided file in its place. Returns whether the bytes there are the decided ones."""
        path, source = self._root / file, decided / stored.sha256
        if just_written or not (_is(path, stored) or source.is_dir()):
            # The file is missing if another builder has finished this decision and removed it.
            with suppress(FileNotFoundError):
                _in_place(
                    path_of(self._place), self.prefix + file, lambda: files.link_file(path, source, self._scratch)
                )
                if just_written:
                    return True
        return _is(path, stored)

    def refresh(self) -> None:
        """Touch the folder of commits, so that `committed` and `has` show what other builders have done."""
        # An NFS client remembers for a while that a file was missing, but not beyond a change of the file's folder.
        folder = self._root / "commits"
        _in_place(path_of(self._place), f"{self.prefix}commits/any", lambda: files.make_folder(folder))
        os.utime(folder)


class SplitStore(Decisions):
    """One split of a cache, which can be read and, in a folder, written."""

    def write_shard(
        self,
        view: int,
        part: int,
        rows: Mapping[str, NDArray[Any]],
        parameters: str,
        writer: Mapping[str, str],
        tail_sums: NDArray[np.float64] | None = None,
    ) -> bool:
        """Publish and commit a shard. Returns whether these bytes are now the committed ones.

        rows: by array name. tail_sums: [T, C], with view 0 of top-k records.
        """
        named = {**rows} if tail_sums is None else {**rows, "tail_sums": tail_sums[None]}
        name = shard_name(view, part)
        data = [(chunk, named[chunk.spec.name]) for chunk in self.chunks(name)]
        return self.write(name, data, writer, parameters)

    def write_labels(self, labels: NDArray[Any], writer: Mapping[str, str]) -> None:
        """Commit the labels [N, L], or require that those committed are the same."""
        self._write_whole("labels", labels, writer)
        self.require_labels(labels)

    def write_sizes(self, sizes: NDArray[np.int32], writer: Mapping[str, str]) -> None:
        """Commit the image sizes [N, 2] of a dataset in files, or require that those committed are the same."""
        if self.layout.sizes is not None:
            self._write_whole("sizes", sizes, writer)
        self.require_sizes(sizes)

    def write_prior(self, writer: Mapping[str, str]) -> None:
        """Commit the class prior [T, C], from the tail sums of view 0, which has to be complete."""
        import torch

        from kdcache.cache.records.encoding import class_prior

        sums = np.zeros(self.layout.prior.shape)
        for part in range(self.parts):
            sums += self.load(shard_name(0, part), only=("tail_sums",))[0][0]
        self._write_whole("prior", class_prior(torch.from_numpy(sums)).numpy(), writer)

    def _write_whole(self, name: str, array: NDArray[Any], writer: Mapping[str, str]) -> None:
        if not self.has(name):
            self.write(name, [(chunk, array[chunk.rows]) for chunk in self.chunks(name)], writer)

    def write(
        self,
        name: str,
        data: Sequence[tuple[Chunk, NDArray[Any]]],
        writer: Mapping[str, str],
        parameters: str | None = None,
    ) -> bool:
        """Publish the rows of chunks, and commit them as `name`.

        Returns whether these bytes are now the committed ones. Of several builders the first decides (see `finish`).
        """
        stored: dict[str, StoredFile] = {}
        contents: dict[str, Content] = {}
        with ThreadPoolExecutor(THREADS, thread_name_prefix="kdcache-encode") as threads:
            encoded = list(threads.map(lambda at: chunks.encode_part(at[0].spec, at[0].part, at[1]), data))
        for (chunk, rows), content in zip(data, encoded, strict=True):
            self._describe(chunk)
            digest = chunks.rows_digest(chunk.spec, rows)
            file = StoredFile(size=len(content), sha256=files.sha256(content), rows=digest)
            stored[chunk.file] = file
            contents[file.sha256] = content
        commit = Commit(
            format=self._format, key=self._key, name=name, parameters=parameters, files=stored, writer=dict(writer)
        )
        contents["commit.json"] = canonical(commit)
        self._publish(name, contents)
        return self.commit(name).files == stored

    def adopt(self, name: str, commit: bytes, contents: Mapping[str, Content]) -> None:
        """Publish what another copy of this cache has committed as `name`, unless there is such a commit already.

        commit: its bytes. contents: the files that it names, by their sha256, as `files_of` gives them.
        """
        for chunk in self.chunks(name):
            self._describe(chunk)
        self._publish(name, {"commit.json": commit, **contents})

    def remove(self, name: str) -> None:
        """Remove a commit and its files, so that the next build makes them again. For folders only.

        Whatever stands in a file's place goes, and of links only these: they may lead to what belongs to others.
        """
        top = path_of(self._place)
        require_folder(top)
        # The commit goes first, because what no commit names does not exist.
        for file in (f"commits/{name}.json", *(chunk.file for chunk in self.chunks(name))):
            files.remove_below(top, self.prefix + file)

    def _describe(self, chunk: Chunk) -> None:
        # This is for people who use plain zarr. kdcache reads none of it, so another zarr may write it differently.
        for file, content in chunks.metadata_files(chunk):
            if not (self._root / file).exists():
                self.write_metadata(self.prefix + file, content())

    def write_metadata(self, file: str, content: bytes) -> None:
        """Write a file for plain zarr, by its name in the cache, in place of whatever is there. For folders only."""
        top = path_of(self._place)
        path = top / file
        _in_place(top, file, lambda: files.publish(path, content, self._scratch, replace=True))


def _in_place(top: Path, file: str, put: Callable[[], T]) -> T:
    """What `put` returns, which makes a file of the cache in the folder `top`; what stands in its way goes first.

    CorruptError where a link leads elsewhere.
    """
    files.require_no_link(top, file)
    try:
        return put()
    except (FileExistsError, IsADirectoryError, NotADirectoryError):
        files.clear_way(top, file)
        return put()


def require_folder(path: Path) -> None:
    """InputError if `path`, where a cache is to be written, is a file."""
    if path.is_file():
        raise InputError(
            f"{path} is a file where a folder is needed: give another --out, or run kdcache unpack {path} first"
        )


def _has_digest(decided: Path, content: bytes) -> bool:
    """Whether the bytes are those of the commit that was decided."""
    try:
        return files.read_bounded(decided / _DIGEST, 64) == files.sha256(content).encode()
    except NotFoundError:  # an earlier version decided it, or somebody has finished it just now
        return True
    except CorruptError:
        return False


def _is(path: Path, stored: StoredFile) -> bool:
    """Whether the file there has the stored bytes."""
    try:
        content = files.read_bounded(path, stored.size)
    except (NotFoundError, CorruptError):
        return False
    return files.sha256(content) == stored.sha256
