"""A cache on disk: immutable files, made visible by commits.

    identity.json                 what the cache is; its hash is the key
    labels/, prior/               Zarr arrays [N, L] and [T, C]
    sizes/                        Zarr array [N, 2]: of the images, where they are files
    tail_sums/                    Zarr array [P, T, C]: each part's share of the prior, from view 0
    views/v00042/                 a Zarr group: classes, gaps, target_gap, tail; of an imported cache also boxes and
                                  flips, or seeds
    commits/v00042-p0003.json     sizes and hashes of one shard's files and rows: its creation commits the shard
    eval/                         labels, views and commits of the evaluation split
    leases/, scratch/             of builders at work, without files otherwise

Readers go by the commits alone: what no commit names does not exist. They read a folder, a packed file (hdf5.py) and
what is far away (remote.py) alike; writing is for folders.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import (
    CorruptError,
    InputError,
    KdcacheError,
    MismatchError,
    NotFoundError,
    UnreadableError,
)
from kdcache.cache.files import Content
from kdcache.cache.identity import FORMAT, MAX_JSON_BYTES, NO_TAIL, Identity, Strict, canonical, parse
from kdcache.cache.store import chunks
from kdcache.cache.store.chunks import ArraySpec
from kdcache.cache.store.hdf5 import PackedFile
from kdcache.cache.store.leases import Leases
from kdcache.cache.store.place import Folder, Place, StoredFile

if TYPE_CHECKING:  # torch takes seconds to import, and what only lists, moves or checks a cache needs no tensors
    import torch

    from kdcache.cache.records import Records

T = TypeVar("T")
_SHARD = re.compile(r"v([0-9]{5,9})-p([0-9]{4,9})\.json")
_COMMIT = re.compile(r"[a-z0-9-]+\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = re.compile(r"(views/v[0-9]{5,9}/)?[a-z_]+/c(/[0-9]+)+")
_THREADS = 4  # parts or arrays at once: hashing and blosc need no lock of Python's
# Far above any real one: work is in proportion to it.
_MAX_PARTS = 1 << 16


class Commit(Strict):
    """Makes the files of one shard (or of labels or prior) part of the cache.

    parameters: digest of the view parameters of the shard's samples. writer: who built it, for people.
    """

    format: Literal[1] = FORMAT
    key: str
    name: str
    parameters: str | None
    files: dict[str, StoredFile]
    writer: dict[str, str]

    def content(self) -> tuple[str | None, dict[str, str]]:
        """What it says of parameters and rows, whatever the bytes that hold them."""
        return self.parameters, {file: stored.rows for file, stored in self.files.items()}


def metadata_files(folder: str, spec: ArraySpec) -> list[tuple[str, Callable[[], bytes]]]:
    """The zarr.json of an array, and of its view's group, by their names from the split's folder."""
    group = [(f"{folder}/zarr.json", chunks.group_metadata)] if folder else []
    return [*group, (join(folder, f"{spec.name}/zarr.json"), partial(chunks.array_metadata, spec))]


def shard_name(view: int, part: int) -> str:
    return f"v{view:05d}-p{part:04d}"


class SplitStore:
    """The shards of one split of the cache at `path` (N samples); a shard is (view, part).

    place: where they are read from, by default a folder. token: names the builder's own folder in scratch/.
    """

    def __init__(
        self,
        path: Path,
        split: Literal["train", "eval"],
        identity: Identity,
        place: Place | None = None,
        token: str | None = None,
    ) -> None:
        self.split = split
        self._place, self._prefix = place or Folder(path), "" if split == "train" else "eval/"
        self.root = path if split == "train" else path / "eval"
        self.samples = samples = (identity.data if split == "train" else identity.evaluation).samples
        self.part = identity.part
        self._scratch = path / "scratch" / (token or secrets.token_hex(8))
        self._decided = path / "scratch" / "decided" / split
        self._key, self._record = identity.key, identity.record
        self.parts = -(-samples // self.part)
        labels = identity.record.labels
        data = identity.data if split == "train" else identity.evaluation
        policy = identity.views.policy if split == "train" else "none"
        self._view_arrays = chunks.view_arrays(policy, samples, self.part)
        self._sizes = ArraySpec("sizes", (samples, 2), self.part, "int32", ("sample", "height_and_width"))
        self._has_sizes = data.files
        self._labels = ArraySpec(
            "labels", (samples, labels), self.part, chunks.id_dtype(identity.record.classes), ("sample", "label")
        )

    def rows(self, part: int) -> range:
        """The samples of a part."""
        return range(part * self.part, min((part + 1) * self.part, self.samples))

    # Commits

    def committed(self) -> dict[int, set[int]]:
        """The committed parts of each view."""
        found: dict[int, set[int]] = {}
        for file in self._place.names(f"{self._prefix}commits"):
            m = _SHARD.fullmatch(file)
            if m and file == f"{shard_name(int(m[1]), int(m[2]))}.json":
                found.setdefault(int(m[1]), set()).add(int(m[2]))
        return found

    def complete_views(self) -> tuple[int, ...]:
        every = set(range(self.parts))
        return tuple(sorted(v for v, parts in self.committed().items() if parts >= every))

    def has(self, name: str) -> bool:
        return self._place.has(self._commit_file(name))

    def _commit_file(self, name: str) -> str:
        return f"{self._prefix}commits/{name}.json"

    def _again(self, name: str) -> str:
        return self._place.remedy(self._commit_file(name))

    def commit_bytes(self, name: str) -> bytes:
        """The commit of that name as it stands."""
        return self._place.read(self._commit_file(name), MAX_JSON_BYTES)

    def commit(self, name: str) -> Commit:
        """The commit of that name; MismatchError when it is of another cache, CorruptError when of another name."""
        path = self.root / "commits" / f"{name}.json"
        try:
            content = self.commit_bytes(name)
        except NotFoundError as e:
            raise NotFoundError(f"{e}: {self._place.again}") from None
        except CorruptError as e:
            raise CorruptError(f"{e}; {self._again(name)}") from e
        commit = parse(Commit, content, str(path), self._again(name))
        if commit.key != self._key:
            # Nothing to repair by removing it: a bit in identity.json would take all shards with it.
            raise MismatchError(
                f"{path} belongs to cache {commit.key[:12]}, and {self._place.path / 'identity.json'} is that of "
                f"{self._key[:12]}: one of the two is damaged or from elsewhere, copy it anew"
            )
        if commit.name != name:
            raise CorruptError(f"{path} is that of {commit.name}; {self._again(name)}")
        return commit

    def write(
        self,
        name: str,
        data: Sequence[tuple[str, ArraySpec, int, NDArray[Any]]],
        writer: Mapping[str, str],
        parameters: str | None = None,
    ) -> bool:
        """Publish parts of arrays, given as (folder, spec, part, rows), and commit them as `name`.

        True if these bytes are now the committed ones: of several builders the first decides (`finish`).
        """
        stored: dict[str, StoredFile] = {}
        contents: dict[str, Content] = {}
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kdcache-encode") as threads:
            encoded = list(threads.map(lambda at: chunks.encode_part(*at[1:]), data))
        for (folder, spec, part, rows), content in zip(data, encoded, strict=True):
            self._describe(folder, spec)
            file = StoredFile(size=len(content), sha256=files.sha256(content), rows=chunks.rows_digest(spec, rows))
            stored[join(folder, spec.chunk_file(part))] = file
            contents[file.sha256] = content
        commit = Commit(key=self._key, name=name, parameters=parameters, files=stored, writer=dict(writer))
        contents["commit.json"] = canonical(commit)
        self._publish(name, contents)
        return self.commit(name).files == stored

    def adopt(
        self,
        name: str,
        commit: bytes,
        wanted: Sequence[tuple[str, ArraySpec, int]],
        contents: Mapping[str, Content],
    ) -> None:
        """Publish what another copy of this cache has committed as `name`, unless there is such a commit already.

        commit: its bytes. contents: the files that it names, by their sha256, as `files_of` gives them.
        """
        for folder, spec, _ in wanted:
            self._describe(folder, spec)
        self._publish(name, {"commit.json": commit, **contents})

    def _publish(self, name: str, contents: Mapping[str, Content]) -> None:
        while not self.has(name):
            self.finish(name, self._decide(name, contents))

    def _decide(self, name: str, contents: Mapping[str, Content]) -> bool:
        """Whether it is decided so, by this call."""
        decided, folder = False, self._scratch / secrets.token_hex(8)
        with suppress(FileNotFoundError):  # another builder took this one, stopped for long, for dead: once more
            files.make_folder(folder)
            for file, content in contents.items():
                files.write(folder / file, content)
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

    def finish(self, name: str, just_written: bool = False) -> None:
        """Put what is decided for `name` in its place and commit it; nothing if nothing is decided.

        just_written: by this process, so that nothing of it needs to be read again.

        Any number of builders may write one name at once, and stop, wake up or die at any step, because
        - a builder syncs its files and its commit in a folder, and decides by renaming that to scratch/decided/NAME,
          which only one can: the decision and its bytes are one thing, and outlive their builder;
        - only what is decided is put in place: by anyone, for all put the same bytes;
        - a decision goes when the commit is there, never before. So one that was read *before* the commit was found
          missing is the only one there ever was; one that comes after the commit is void, and nobody puts it in place.
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
            commit = parse(Commit, content, str(decided / "commit.json"), advice)
            if (commit.key, commit.name) != (self._key, name) or not all(
                _CHUNK.fullmatch(file) and _SHA256.fullmatch(stored.sha256) for file, stored in commit.files.items()
            ):
                raise CorruptError(f"{decided} holds no commit of {name}; {advice}")
            for file, stored in commit.files.items():
                path, sound = self.root / file, False
                if just_written or not _is(path, stored):
                    # Not found where another builder is done with it, and has removed it.
                    with suppress(FileNotFoundError):
                        files.link_file(path, decided / stored.sha256, self._scratch)
                        sound = just_written
                if not sound and not _is(path, stored) and not self.has(name):
                    raise CorruptError(f"{decided} does not hold the bytes of {file} that were decided; {advice}")
            for folder in {(self.root / file).parent for file in commit.files}:
                files.sync_folder(folder)  # nor may another builder have synced what it has put there
            files.publish(self.root / "commits" / f"{name}.json", content, self._scratch)
        files.remove_folder(decided, self._scratch)

    def decided(self) -> list[str]:
        """What is decided and may not be committed: its builder is at it, or has died."""
        return files.names(self._decided)

    def refresh(self) -> None:
        """Have `committed` and `has` show what other builders have done; changes the folder of commits."""
        # NFS clients remember for a while that a file was missing, but not beyond a change of its folder.
        folder = self.root / "commits"
        files.make_folder(folder)
        os.utime(folder)

    def _describe(self, folder: str, spec: ArraySpec) -> None:
        # For people with plain zarr; kdcache reads none of it, so a later zarr may word it otherwise.
        for file, content in metadata_files(folder, spec):
            if not (self.root / file).exists():
                files.publish(self.root / file, content(), self._scratch, replace=True)

    def files_of(self, name: str, wanted: Sequence[tuple[str, ArraySpec, int]]) -> dict[str, Content]:
        """The committed files of parts of arrays as they lie in a folder, checked against the commit; by sha256."""

        def content(file: str, stored: StoredFile, spec: ArraySpec, part: int) -> tuple[str, Content]:
            return stored.sha256, self._place.content(file, stored, spec, part)

        return dict(self._each(name, wanted, content))

    def load(
        self,
        name: str,
        wanted: Sequence[tuple[str, ArraySpec, int]],
        out: Mapping[str, NDArray[Any]] = MappingProxyType({}),
        only: Collection[str] | None = None,
    ) -> list[NDArray[Any]]:
        """The committed parts of arrays, their bytes checked against the commit before they are decoded.

        out: whole arrays by name, in which the parts are to lie. only: the names of those that are read.
        """

        def rows(file: str, stored: StoredFile, spec: ArraySpec, part: int) -> NDArray[Any]:
            there = out[spec.name][spec.interval(part)] if spec.name in out else None
            return self._place.rows(file, stored, spec, part, there)

        return self._each(name, wanted, rows, only)

    def require(self, name: str, wanted: Sequence[tuple[str, ArraySpec, int]]) -> None:
        """CorruptError unless the commit is sound and its files are there, unread."""
        self._each(name, wanted, lambda file, stored, spec, part: self._place.require(file, stored))

    def _each(
        self,
        name: str,
        wanted: Sequence[tuple[str, ArraySpec, int]],
        get: Callable[[str, StoredFile, ArraySpec, int], T],
        only: Collection[str] | None = None,
    ) -> list[T]:
        commit = self.commit(name)
        expected = {join(folder, spec.chunk_file(part)) for folder, spec, part in wanted}
        if set(commit.files) != expected:
            path = self.root / "commits" / f"{name}.json"
            raise CorruptError(f"{path} does not name the files of {name}; {self._again(name)}")
        out = []
        for folder, spec, part in wanted:
            if only is not None and spec.name not in only:
                continue
            file = join(folder, spec.chunk_file(part))
            try:
                out.append(get(self._prefix + file, commit.files[file], spec, part))
            except UnreadableError as e:
                raise UnreadableError(f"{e} ({name} of {self.root})") from e
            except KdcacheError as e:
                raise CorruptError(f"{e} ({name} of {self.root}); {self._again(name)}") from e
        return out

    def remove(self, name: str, wanted: Sequence[tuple[str, ArraySpec, int]]) -> None:
        """Take back a commit and its files, so that the next build makes them anew. Folders only."""
        require_folder(self._place.path)
        # The commit first: what no commit names does not exist.
        gone = [f"commits/{name}.json", *(join(folder, spec.chunk_file(part)) for folder, spec, part in wanted)]
        for file in gone:
            (self.root / file).unlink(missing_ok=True)

    # Shards and labels

    def shard_arrays(self, view: int, part: int, with_tail_sums: bool = False) -> list[tuple[str, ArraySpec, int]]:
        specs = [*chunks.record_arrays(self._record, self.samples, self.part), *self._view_arrays]
        found = [(f"views/v{view:05d}", spec, part) for spec in specs]
        return [*found, ("", self.tail_sums_array, part)] if with_tail_sums else found

    def write_shard(
        self,
        view: int,
        part: int,
        rows: Mapping[str, NDArray[Any]],
        parameters: str,
        writer: Mapping[str, str],
        tail_sums: NDArray[np.float64] | None = None,
    ) -> bool:
        """Publish and commit a shard; `rows` by array name, `tail_sums` [T, C] with view 0 of top-k records.

        True if these bytes are now the committed ones.
        """
        data = [(folder, spec, p, rows[spec.name]) for folder, spec, p in self.shard_arrays(view, part)]
        if tail_sums is not None:
            data.append(("", self.tail_sums_array, part, tail_sums[None]))
        return self.write(shard_name(view, part), data, writer, parameters)

    @property
    def tail_sums_array(self) -> ArraySpec:
        shape = (self.parts, self._record.tails, self._record.classes)
        return ArraySpec("tail_sums", shape, 1, "float64", ("part", "temperature", "class"))

    def read_shard(
        self,
        view: int,
        part: int,
        with_tail_sums: bool = False,
        out: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> dict[str, NDArray[Any]]:
        """The arrays of a shard by name; in those of the whole view that are given in `out`."""
        wanted = self.shard_arrays(view, part, with_tail_sums)
        return {
            spec.name: rows
            for (_, spec, _), rows in zip(wanted, self.load(shard_name(view, part), wanted, out), strict=True)
        }

    def write_labels(self, labels: NDArray[Any], writer: Mapping[str, str]) -> None:
        """Commit the labels, or require that those committed are the same."""
        if not self.has("labels"):
            rows = [(*at, labels[self._labels.interval(at[2])]) for at in self.label_arrays]
            self.write("labels", rows, writer)
        self.require_labels(labels)

    @property
    def label_arrays(self) -> list[tuple[str, ArraySpec, int]]:
        """The parts of the labels; none of them without labels."""
        return [("", self._labels, p) for p in range(self.parts if self._labels.shape[1] else 0)]

    def write_sizes(self, sizes: NDArray[np.int32], writer: Mapping[str, str]) -> None:
        """Commit the image sizes [N, 2] of a dataset in files, or require that those committed are the same."""
        if self._has_sizes and not self.has("sizes"):
            self.write("sizes", [(*at, sizes[self._sizes.interval(at[2])]) for at in self.size_arrays], writer)
        self.require_sizes(sizes)

    @property
    def size_arrays(self) -> list[tuple[str, ArraySpec, int]]:
        """The parts of the image sizes; none of them for images in memory."""
        return [("", self._sizes, p) for p in range(self.parts if self._has_sizes else 0)]

    def require_sizes(self, sizes: NDArray[np.int32]) -> None:
        """MismatchError unless these are the cache's: a view's parameters depend on them."""
        if not self._has_sizes:
            return
        if len(wrong := np.flatnonzero((self.sizes != sizes).any(1))):
            (h, w), (height, width) = self.sizes[wrong[0]], sizes[wrong[0]]
            raise MismatchError(
                f"{self.root} was built from images of other sizes ({len(wrong)} of {self.samples} differ; sample "
                f"{wrong[0]} was {h} x {w}, now {height} x {width})"
            )

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """[N, 2] height and width of the images of a dataset in files."""
        sizes = np.concatenate(self.load("sizes", self.size_arrays))
        if int(sizes.min()) < 1:
            raise CorruptError(f"{self.root / 'sizes'} holds sizes below 1; {self._again('sizes')}")
        return sizes

    def require_labels(self, labels: NDArray[Any]) -> None:
        """MismatchError unless these are the cache's."""
        if not np.array_equal(self.labels, labels):
            differing = int((self.labels != labels).any(1).sum()) if self.labels.shape == labels.shape else len(labels)
            raise MismatchError(f"{self.root} has other labels than asked for ({differing} of {self.samples} differ)")

    @cached_property
    def labels(self) -> NDArray[Any]:
        """[N, L] class ids."""
        parts = self.load("labels", self.label_arrays)
        labels = np.concatenate(parts) if parts else np.empty(self._labels.shape, self._labels.dtype)
        if labels.size and int(labels.max()) >= self._record.classes:
            raise CorruptError(
                f"{self.root / 'labels'} holds a class id above {self._record.classes - 1}; " + self._again("labels")
            )
        return labels

    def read(self, view: int, prior: torch.Tensor | None, out: Records | None = None) -> Records:
        """All records of a view, checked; they lie in memory as stored, in that of `out` where given."""
        missing = set(range(self.parts)) - self.committed().get(view, set())
        if missing:
            raise NotFoundError(
                f"view {view} is not complete in {self.root} ({len(missing)} of {self.parts} parts missing): "
                + self._place.more(view)
            )
        slab = {} if out is None else chunks.as_arrays(out)
        first = self.check_shard(view, 0, slab)
        if not slab and self.parts == 1:
            slab = first
        elif not slab:
            # Only now, when a shard has been found to be of the sizes that the identity claims.
            specs = chunks.record_arrays(self._record, self.samples, self.part)
            slab = {spec.name: np.empty(spec.shape, spec.dtype) for spec in specs}
            for name, rows in slab.items():
                rows[: self.part] = first[name]
        del first
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kdcache-read") as threads:
            list(threads.map(lambda part: self.check_shard(view, part, slab), range(1, self.parts)))
        return chunks.as_records(self._record, slab, self.labels, prior)

    def view_arrays(self, view: int) -> dict[str, NDArray[Any]]:
        """How an imported view was made, by name: boxes [N, 4] and flips [N], or seeds [N]."""
        names = [spec.name for spec in self._view_arrays]
        sums = self.carries_tail_sums(view)
        parts = [
            self.load(shard_name(view, part), self.shard_arrays(view, part, sums), only=names)
            for part in range(self.parts if names else 0)
        ]
        return {name: np.concatenate(rows) for name, rows in zip(names, zip(*parts, strict=True), strict=True)}

    def carries_tail_sums(self, view: int) -> bool:
        """Whether the commits of a view also name the part's share of the prior."""
        return view == 0 and not self._record.dense and self.split == "train"

    def check_shard(
        self, view: int, part: int, out: Mapping[str, NDArray[Any]] = MappingProxyType({})
    ) -> dict[str, NDArray[Any]]:
        """The arrays of a shard by name, as `read_shard`; CorruptError unless bytes and values are sound."""
        if part >= self.parts:
            commit = self.root / "commits" / f"{shard_name(view, part)}.json"
            raise CorruptError(f"{commit}: there is no part {part}, the last one is {self.parts - 1}; remove it")
        shard = self.read_shard(view, part, self.carries_tail_sums(view), out)
        for name, rows in shard.items():
            if problem := self._unsound(name, rows):
                again = self._again(shard_name(view, part))
                raise CorruptError(f"view {view}, part {part} of {self.root}: {name} holds {problem}; {again}")
        return shard

    def _unsound(self, name: str, rows: NDArray[Any]) -> str | None:
        """What no teacher's answer encodes to, if it is in there."""
        low, high = rows.min(), rows.max()  # both are NaN where one value is
        if name == "classes":
            return f"a class id above {self._record.classes - 1}" if int(high) >= self._record.classes else None
        if rows.dtype == np.uint8:
            return "holes" if name == "tail" and high > NO_TAIL else None
        if np.isnan(low) or np.isposinf(high):
            return "values that are not finite"
        return f"values below zero ({low:g})" if name not in ("tail", "tail_std") and low < 0 else None


class Cache:
    """A cache in a folder or a packed file. `identity` says what it is; `train` and `evaluation` hold the records.

    place: where it is read from, if elsewhere than in that folder or file.
    """

    def __init__(self, path: Path, place: Place | None = None) -> None:
        self.path = path
        self._place = place or (Folder(path) if path.is_dir() or not path.exists() else PackedFile(path))
        if not self._place.has("identity.json"):
            there = not isinstance(self._place, Folder) or path.exists()
            reason = f"{path} is not a kdcache cache: it has no identity.json" if there else f"there is no {path}"
            raise NotFoundError(reason)
        content = self._place.read("identity.json", MAX_JSON_BYTES)
        advice = f"copy it anew, or remove {path} and {self._place.again}"
        self.identity = parse(Identity, content, str(path / "identity.json"), advice)
        self._token = secrets.token_hex(8)
        self.train = SplitStore(path, "train", self.identity, self._place, self._token)
        self.evaluation = SplitStore(path, "eval", self.identity, self._place, self._token)
        if (parts := max(self.train.parts, self.evaluation.parts)) > _MAX_PARTS:
            raise CorruptError(f"{path} declares {parts} parts a view, at most {_MAX_PARTS} are read; {advice}")
        self._prior: torch.Tensor | None = None

    @classmethod
    def create(cls, path: Path, identity: Identity) -> Cache:
        """The cache in folder `path`, made if there is none; MismatchError if it is another one."""
        require_folder(path)
        file = path / "identity.json"
        if not file.exists():
            # Its own scratch folder is what a builder that was stopped, or is just ahead of this one, left there.
            if path.is_dir() and any(p.name != "scratch" for p in path.iterdir()) and not file.exists():
                raise InputError(f"{path} is not empty and no cache: give another --out")
            files.publish(file, canonical(identity), path / "scratch")
        cache = cls(path)
        cache.identity.require(identity, str(path))
        return cache

    @property
    def key(self) -> str:
        return self.identity.key

    @property
    def views(self) -> tuple[int, ...]:
        """The complete views; none before the prior is there too, which follows the last shard of view 0."""
        complete = self.train.complete_views()
        return complete if self.identity.record.dense or self.train.has("prior") or 0 not in complete else ()

    def read(self, view: int, out: Records | None = None) -> Records:
        """All records of one view; NotFoundError if it is not complete, CorruptError if bytes are damaged.

        out: another view's, on the CPU and no longer needed: its memory is taken, as new memory costs much of the time.
        """
        return self.train.read(view, self.prior, out)

    def read_evaluation(self) -> Records:
        """The records of the unaugmented evaluation split."""
        if not self.evaluation_views:
            raise NotFoundError(f"{self.path} was imported, without the teacher's answers on the evaluation split")
        return self.evaluation.read(0, self.prior)

    @property
    def evaluation_views(self) -> tuple[int, ...]:
        """The views that the evaluation split has in such a cache: one, but none where it was imported without."""
        return () if "evaluation" in self.identity.record.lacks else (0,)

    @property
    def complete(self) -> bool:
        """Whether it is finished, and the evaluation split's records are there."""
        return self.finished and set(self.evaluation_views) <= set(self.evaluation.complete_views())

    @property
    def finished(self) -> bool:
        """Whether labels, sizes and prior are committed too: a build can be stopped between them and the shards."""
        stores = (self.train, self.evaluation)
        has = all(store.has("labels") and (store.has("sizes") or not store.size_arrays) for store in stores)
        return has and (self.identity.record.dense or self.train.has("prior") or 0 not in self.train.complete_views())

    @property
    def prior(self) -> torch.Tensor | None:
        """float32 [T, C], or None for dense records and until view 0 is complete."""
        if self.identity.record.dense or self._prior is not None:
            return self._prior
        if not self.train.has("prior"):
            if 0 in self.train.complete_views():
                raise NotFoundError(f"{self.path} lacks its prior: {self._place.again}")
            return None
        prior = self.train.load("prior", self.prior_arrays)[0]
        if not np.isfinite(prior).all() or not (prior > 0).all():
            again = self._place.remedy("commits/prior.json")
            raise CorruptError(f"{self.path / 'prior'} holds values that are no probabilities; {again}")
        import torch

        self._prior = torch.from_numpy(prior)
        return self._prior

    def write_prior(self, writer: Mapping[str, str]) -> None:
        """Fix the prior from view 0, once that is complete; it never changes later."""
        if self.identity.record.dense or self.train.has("prior") or 0 not in self.train.complete_views():
            return
        import torch

        from kdcache.cache.records import class_prior

        sums = np.zeros(self._prior_array.shape)
        for part in range(self.train.parts):
            sums += self.train.read_shard(0, part, with_tail_sums=True)["tail_sums"][0]
        prior = class_prior(torch.from_numpy(sums)).numpy()
        self.train.write("prior", [("", self._prior_array, 0, prior)], writer)

    @property
    def _prior_array(self) -> ArraySpec:
        record = self.identity.record
        shape = (record.tails, record.classes)
        return ArraySpec("prior", shape, shape[0], "float32", ("temperature", "class"))

    @contextmanager
    def writing(self, say: Callable[[str], None] = lambda _: None) -> Iterator[Leases]:
        """Be one of the builders here. What dead ones have left is finished or cleared away.

        `say` is told, perhaps from another thread, what goes wrong with the leases.
        """
        for folder in (self.path / "scratch", self.path / "leases"):
            if folder.is_symlink():
                raise CorruptError(f"{folder} is a symbolic link: what lies there is not ours to clear; remove it")
            files.make_folder(folder)
        with Leases(self.path, self._token, say) as leases:
            self._finish(leases)
            yield leases
            self._finish(leases)

    def _finish(self, leases: Leases) -> None:
        for store in (self.train, self.evaluation):
            for name in store.decided():
                store.finish(name)
        leases.clear()

    def tidy(self) -> None:
        """Clear away what dead builders have left, where there is something and it can be."""
        folders = [self.path / "leases", self.path / "scratch"]
        left = any(names for folder in folders for _, _, names in os.walk(folder))
        if left and all(os.access(folder, os.W_OK) for folder in folders):
            with self.writing():
                pass

    def size(self) -> int:
        """Bytes of all files."""
        return self._place.size()

    @property
    def packed(self) -> bool:
        """Whether it is one file."""
        return isinstance(self._place, PackedFile)

    @property
    def writable(self) -> bool:
        """Whether it can be built into and repaired: a folder of one's own."""
        return self._place.writable

    def fresh(self) -> Cache:
        """The same with nothing in memory that was read before."""
        return Cache(self.path, self._place.fresh())

    def check_rest(self) -> None:
        """CorruptError where bytes are damaged that no record is read from, as far as the store can tell."""
        self._place.check()

    @property
    def prior_arrays(self) -> list[tuple[str, ArraySpec, int]]:
        """What the prior's commit names; nothing for dense records."""
        return [] if self.identity.record.dense else [("", self._prior_array, 0)]

    def commits(self) -> list[str]:
        """The files of all commits, sorted."""
        folders = ("commits", "eval/commits")
        return sorted(
            f"{folder}/{name}" for folder in folders for name in self._place.names(folder) if _COMMIT.fullmatch(name)
        )

    def contents(self, views: Sequence[int]) -> Iterator[tuple[SplitStore, str, list[tuple[str, ArraySpec, int]]]]:
        """The commits that make up a cache of these views, in the order to make them: split, name, parts of arrays."""
        for store in (self.evaluation, self.train):
            yield store, "labels", store.label_arrays
            if store.size_arrays:
                yield store, "sizes", store.size_arrays
        for store, chosen in ((self.evaluation, self.evaluation_views), (self.train, views)):
            for view in chosen:
                for part in range(store.parts):
                    wanted = store.shard_arrays(view, part, store.carries_tail_sums(view))
                    yield store, shard_name(view, part), wanted
        if self.prior_arrays:
            yield self.train, "prior", self.prior_arrays


def require_folder(path: Path) -> None:
    """InputError where the path of a cache to write into is a file's."""
    if path.is_file():
        raise InputError(
            f"{path} is a file where a folder is needed: give another --out, or kdcache unpack {path} first"
        )


def _is(path: Path, stored: StoredFile) -> bool:
    try:
        content = files.read_bounded(path, stored.size)
    except (NotFoundError, CorruptError):
        return False
    return files.sha256(content) == stored.sha256


def join(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file
