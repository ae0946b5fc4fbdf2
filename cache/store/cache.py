"""A cache on disk: immutable files, made visible by commits.

    identity.json                 what the cache is; its hash is the key
    labels/, prior/               Zarr arrays [N, L] and [T, C]
    sizes/                        Zarr array [N, 2]: height and width of each image, where images are files
    tail_sums/                    Zarr array [P, T, C]: each part's share of the prior, from view 0
    views/v00042/                 a Zarr group: classes, gaps, target_gap, tail; of an imported cache also boxes and
                                  flips, or seeds
    commits/v00042-p0003.json     sizes and hashes of one shard's files and rows: its creation commits the shard
    signatures/                   who vouches for it: statements and their signatures (signing/signatures.py)
    eval/                         labels, views and commits of the evaluation split
    leases/, scratch/             what builders need while they work; without files at other times

Readers go by the commits alone: what no commit names does not exist. They read a folder, a packed file (hdf5.py) and
a place over a network (registry/kinds/network.py) alike; only folders are written.
"""

from __future__ import annotations

import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import CorruptError, InputError, MismatchError, NotFoundError
from kdcache.cache.identity import MAX_JSON_BYTES, Identity, SplitName, canonical, parse
from kdcache.cache.store.hdf5 import PackedFile
from kdcache.cache.store.layout import Commit
from kdcache.cache.store.leases import FolderLeases, Leases, unreadable
from kdcache.cache.store.place import Folder, Place, path_of
from kdcache.cache.store.publish import SplitStore, require_folder
from kdcache.cache.store.split import THREADS

if TYPE_CHECKING:  # torch takes seconds to import, and listing, moving or checking a cache needs no tensors
    import torch

    from kdcache.cache.records.records import Records

_COMMIT = re.compile(r"[a-z0-9-]+\.json")
_COMMITS = ("commits", "eval/commits")
_WORK = ("scratch", "leases")  # the folders of builders
# Far above any real number of parts. A damaged identity may declare any number, and work grows with it.
_MAX_PARTS = 1 << 16


class Cache:
    """A cache in a folder, in a packed file, or at another place. `identity` says what it is.

    train, evaluation: the splits, which hold the records. where: the path or the address, for people.
    """

    def __init__(self, at: Path | Place) -> None:
        self._place = place = _open(at) if isinstance(at, Path) else at
        self.where = where = place.where
        if not place.has("identity.json"):
            there = not isinstance(at, Path) or files.is_there(at)
            reason = f"{where} is not a kdcache cache: it has no identity.json" if there else f"there is no {where}"
            raise NotFoundError(reason)
        content = place.read("identity.json", MAX_JSON_BYTES)
        anew = f"{place.again}, which writes it anew, " if place.writable else ""
        advice = f"{anew}copy it again, or remove {where} and {place.again}"
        self.identity = parse(Identity, content, place.locate("identity.json"), advice)
        self._token = secrets.token_hex(8)
        self.train = SplitStore(place, "train", self.identity, self._token)
        self.evaluation = SplitStore(place, "eval", self.identity, self._token)
        if (parts := max(self.train.parts, self.evaluation.parts)) > _MAX_PARTS:
            raise CorruptError(f"{where} declares {parts} parts a view, more than the {_MAX_PARTS} allowed; {advice}")
        self._prior: torch.Tensor | None = None

    @classmethod
    def create(cls, path: Path, identity: Identity) -> Cache:
        """Open the cache in folder `path`, or make it if there is none; MismatchError if another cache is there."""
        require_folder(path)
        restore_identity(path, identity)
        file = path / "identity.json"
        if not file.exists():
            # There may be a scratch folder already, of a builder that was stopped or is just ahead of this one.
            if path.is_dir() and any(p.name != "scratch" for p in path.iterdir()) and not file.exists():
                raise InputError(f"{path} is not empty and is no cache: give another --out")
            files.publish(file, canonical(identity), path / "scratch")
        cache = cls(path)
        cache.identity.require(identity, str(path))
        return cache

    # What it is and where

    @property
    def key(self) -> str:
        return self.identity.key

    @property
    def local(self) -> bool:
        """Whether it is a folder or a file on this machine, and so has a path."""
        return self._place.path is not None

    @property
    def path(self) -> Path:
        """The folder or file; InputError for a cache at an address (`where` names any cache)."""
        return path_of(self._place)

    @property
    def packed(self) -> bool:
        """Whether it is one file."""
        return self._place.kind == "hdf5"

    @property
    def writable(self) -> bool:
        """Whether it can be built into and repaired, because it is a folder of one's own."""
        return self._place.writable

    def fresh(self) -> Cache:
        """The same cache, without anything in memory from earlier reads."""
        return Cache(self._place.fresh())

    def size(self) -> int:
        """Bytes of all files."""
        return self._place.size()

    def check_rest(self) -> None:
        """CorruptError if bytes that hold no records are damaged, as far as the place can tell."""
        self._place.check()

    # Reading

    @property
    def splits(self) -> tuple[SplitStore, SplitStore]:
        """Both splits, the evaluation split first, as a build makes them."""
        return self.evaluation, self.train

    def split(self, name: SplitName) -> SplitStore:
        """The split of that name."""
        return self.train if name == "train" else self.evaluation

    @property
    def views(self) -> tuple[int, ...]:
        """The complete views. There are none until the prior is there too, which follows the last shard of view 0."""
        return self.train.complete_views() if self._has_prior else ()

    @property
    def evaluation_views(self) -> tuple[int, ...]:
        """The views of the evaluation split: one, or none for a cache that was imported without that split."""
        return () if "evaluation" in self.identity.record.lacks else (0,)

    @property
    def complete(self) -> bool:
        """Whether it is finished and holds the evaluation split's records."""
        return self.finished and set(self.evaluation_views) <= set(self.evaluation.complete_views())

    @property
    def finished(self) -> bool:
        """Whether labels, sizes and prior are committed, since a build can be stopped between these and the shards."""
        has = all(store.has("labels") and (store.has("sizes") or not store.layout.sizes) for store in self.splits)
        return has and (self._has_prior or 0 not in self.train.complete_views())

    @property
    def _has_prior(self) -> bool:
        """Whether the prior is committed, or a cache of this kind has none."""
        return not self.train.layout.has_prior or self.train.has("prior")

    def read(
        self, view: int, out: Records | None = None, samples: NDArray[np.int64] | None = None, threads: int = THREADS
    ) -> Records:
        """All records of one view; NotFoundError if it is not complete, CorruptError if bytes are damaged.

        out: as many records on the CPU whose memory is used again. samples: ascending places, to read these alone.
        """
        return self.train.read(view, self.prior, out, samples, threads)

    def read_evaluation(self) -> Records:
        """The records of the unaugmented evaluation split."""
        if not self.evaluation_views:
            raise NotFoundError(f"{self.where} was imported without the teacher's answers on the evaluation split")
        return self.evaluation.read(0, self.prior)

    @property
    def prior(self) -> torch.Tensor | None:
        """float32 [T, C], or None for dense records and until view 0 is complete."""
        if not self.train.layout.has_prior or self._prior is not None:
            return self._prior
        if not self.train.has("prior"):
            if 0 in self.train.complete_views():
                raise NotFoundError(f"{self.where} lacks its prior: {self._place.again}")
            return None
        prior = self.train.load("prior")[0]
        if not np.isfinite(prior).all() or not (prior > 0).all():
            again = self._place.remedy("commits/prior.json")
            raise CorruptError(f"{self._place.locate('prior')} holds values that are not probabilities; {again}")
        import torch

        self._prior = torch.from_numpy(prior)
        return self._prior

    def commits(self) -> list[str]:
        """The files of all commits, sorted."""
        return sorted(
            f"{folder}/{name}" for folder in _COMMITS for name in self._place.names(folder) if _COMMIT.fullmatch(name)
        )

    def contents(self, views: Sequence[int]) -> Iterator[tuple[SplitStore, str]]:
        """Yield the split and name of each commit in a cache of these views, in the order in which to make them."""
        for store in self.splits:
            yield store, "labels"
            if store.layout.sizes:
                yield store, "sizes"
        for store, chosen in ((self.evaluation, self.evaluation_views), (self.train, views)):
            for name in store.layout.shards(chosen):
                yield store, name
        if self.train.layout.has_prior:
            yield self.train, "prior"

    # Building

    def write_prior(self, writer: Mapping[str, str]) -> None:
        """Compute the prior from view 0, once that view is complete. It never changes later."""
        if not self._has_prior and 0 in self.train.complete_views():
            self.train.write_prior(writer)

    @contextmanager
    def writing(self, say: Callable[[str], None] = lambda _: None) -> Iterator[Leases]:
        """Join the builders of this cache. What dead builders left is finished or cleared away.

        say: is called, perhaps from another thread, when something goes wrong with the leases.
        """
        make_work_folders(self.path)
        with FolderLeases(self.path, self._token, say) as leases:
            _finish(self, leases)
            yield leases
            _finish(self, leases)

    def tidy(self) -> None:
        """Clear away what dead builders left, if there is anything and this user may remove it."""
        folders = [self.path / name for name in _WORK]
        left = any(names for at in folders for _, _, names in os.walk(at))
        left = left or any(at.exists() and not at.is_dir() for at in folders)
        if left and all(os.access(at, os.W_OK) or not at.exists() for at in folders):
            with self.writing():
                pass


def place_of(cache: Cache) -> Place:
    """Where the files of a cache lie."""
    return cache._place


def _finish(cache: Cache, leases: Leases) -> None:
    """Commit what is decided, drop what never can be, and clear away what dead builders left."""
    for store in cache.splits:
        for name in store.decided():
            try:
                store.finish(name)
            except CorruptError:
                if leases.others():  # of whom one may be at work on it
                    raise
                store.forget(name)
    leases.clear()


def restore_identity(path: Path, identity: Identity) -> bool:
    """Write identity.json in the folder of a cache anew if it is missing or damaged; whether that was done.

    It is written only where most of the commits that are there name the key of this identity, and so it is theirs.
    """
    file, content = path / "identity.json", canonical(identity)
    if not path.is_dir() or files.holds(file, content):
        return False
    with suppress(CorruptError, MismatchError, NotFoundError):
        if parse(Identity, files.read_bounded(file, MAX_JSON_BYTES), str(file), "") == identity:
            return False  # the same in other words
    keys: Counter[str] = Counter()
    for folder in _COMMITS:
        for name in filter(_COMMIT.fullmatch, files.names(path / folder)):
            with suppress(CorruptError, MismatchError, NotFoundError):
                commit = files.read_bounded(path / folder / name, MAX_JSON_BYTES)
                keys[parse(Commit, commit, name, "").key] += 1
    if 2 * keys[identity.key] <= keys.total():
        return False
    make_work_folders(path)
    files.clear_way(path, file.name)
    files.publish(file, content, path / "scratch", replace=True)
    return True


def make_work_folders(path: Path) -> None:
    """Make the folders that builders of the cache at `path` work in, in place of what is no folder.

    Whatever lies there belongs to builders, and no reader looks at it. CorruptError for links.
    """
    for folder in (path / name for name in _WORK):
        if folder.is_symlink():
            raise CorruptError(
                f"{folder} is a symbolic link, which is not followed: remove it, or run kdcache verify {path} --repair"
            )
        files.clear_way(path, f"{folder.name}/any")
        files.make_folder(folder)
    for folder in _decisions(path):
        if folder.is_symlink() or not folder.is_dir():
            with suppress(FileNotFoundError, IsADirectoryError):  # there is none, or another builder has just made it
                folder.unlink()


def _decisions(path: Path) -> list[Path]:
    top = path / "scratch" / "decided"
    return [top, top / "train", top / "eval"]


def odd_leavings(cache: Cache) -> list[str]:
    """What lies in a cache's folder, is named by no commit and is nothing that kdcache leaves there: a line for each.

    That is links to folders, and what in the folders of builders no builder has left as it is.
    """
    path, advice = cache.path, "the next build clears it away, as kdcache verify --repair does"
    links = [link for link in files.links_below(path) if link.relative_to(path).parts[0] not in _WORK]
    folders = [*(path / name for name in _WORK), *_decisions(path)]
    odd = [folder for folder in folders if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir())]
    found = [f"{folder} is no folder of builders" for folder in odd]
    if path / "leases" not in odd:
        found += [f"{file} is no lease" for file in unreadable(path / "leases")]
    for store in cache.splits if not set(odd) - {path / "leases"} else ():
        for name in store.decided():
            try:
                store.require_decision(name)
            except CorruptError as e:
                found.append(str(e).partition(";")[0])
    refused = [f"{link} is a symbolic link, which is not followed: remove it" for link in links]
    return refused + [f"{one}: {advice}" for one in found]


def clear_leavings(cache: Cache) -> None:
    """Clear away what `odd_leavings` tells and all that dead builders have left; what they had decided is committed."""
    for link in [*files.links_below(cache.path), *(cache.path / name for name in _WORK)]:
        if link.is_symlink():
            link.unlink()
    with cache.writing():
        pass


def _open(path: Path) -> Place:
    """The folder or packed file at a path; a path where nothing is counts as a folder."""
    return Folder(path) if not files.is_there(path) or path.is_dir() else PackedFile(path)
