"""Reads one split of a cache: its commits, its labels and image sizes, and the records of its views.

Readers go by the commits alone: what no commit names does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import (
    CorruptError,
    ForeignError,
    KdcacheError,
    MismatchError,
    NotFoundError,
    UnreadableError,
)
from kdcache.cache.files import Content
from kdcache.cache.identity import MAX_JSON_BYTES, Identity, SplitName, parse
from kdcache.cache.records.pairs import partners
from kdcache.cache.store import chunks
from kdcache.cache.store.chunks import metadata_files
from kdcache.cache.store.layout import Chunk, Commit, SplitLayout, StoredFile, parse_shard_name, shard_name
from kdcache.cache.store.place import Place

if TYPE_CHECKING:  # torch takes seconds to import, and listing, moving or checking a cache needs no tensors
    import torch

    from kdcache.cache.records.records import Records

T = TypeVar("T")
Arrays = Mapping[str, NDArray[Any]]
_NONE: Arrays = MappingProxyType({})
THREADS = 4  # parts or arrays at once: neither hashing nor blosc holds Python's lock


class CommitReader:
    """Reads the commits of one split of the cache at a place, and the rows that they name.

    N samples lie in parts; a shard is the records of one view and part. where: the split's folder, for people. prefix:
    the same, as the beginning of a file's name in the cache.
    """

    def __init__(self, place: Place, split: SplitName, identity: Identity) -> None:
        self._place, self._key, self._format = place, identity.key, identity.format
        self._views = identity.views
        self.layout = SplitLayout(identity, split)
        self._record = self.layout.record
        self.split, self.prefix = split, self.layout.prefix
        self.samples, self.part, self.parts = self.layout.samples, self.layout.part, self.layout.parts
        self.where = place.locate(self.prefix.rstrip("/")) if self.prefix else place.where

    def rows(self, part: int) -> range:
        """The samples of a part."""
        return range(part * self.part, min((part + 1) * self.part, self.samples))

    def chunks(self, name: str) -> list[Chunk]:
        """The chunks that the commit of that name has to name."""
        return self.layout.chunks(name)

    def carries_tail_sums(self, view: int) -> bool:
        """Whether the commits of a view also name the part's share of the prior."""
        return self.layout.carries_tail_sums(view)

    def committed(self) -> dict[int, set[int]]:
        """The committed parts of each view."""
        found: dict[int, set[int]] = {}
        for file in self._place.names(f"{self.prefix}commits"):
            if file.endswith(".json") and (shard := parse_shard_name(file.removesuffix(".json"))):
                found.setdefault(shard[0], set()).add(shard[1])
        return found

    def complete_views(self) -> tuple[int, ...]:
        """The views of which every part is committed."""
        every = set(range(self.parts))
        return tuple(sorted(v for v, parts in self.committed().items() if parts >= every))

    def has(self, name: str) -> bool:
        """Whether there is a commit of that name."""
        return self._place.has(self.layout.commit_file(name))

    def commit_bytes(self, name: str) -> bytes:
        """The commit of that name, as it is stored."""
        return self._place.read(self.layout.commit_file(name), MAX_JSON_BYTES)

    def commit(self, name: str) -> Commit:
        """The commit of that name; ForeignError when another cache's is there, CorruptError when another name's is."""
        where = self._commit_where(name)
        try:
            content = self.commit_bytes(name)
        except NotFoundError as e:
            raise NotFoundError(f"{e}: {self._place.again}") from None
        except CorruptError as e:
            raise CorruptError(f"{e}; {self._remedy(name)}") from e
        commit = parse(Commit, content, where, self._remedy(name))
        if commit.key != self._key:
            # Which of the two is wrong only the other commits tell: one wrong bit in identity.json makes all foreign.
            repair = f", or run kdcache verify {self._place.where} --repair" if self._place.writable else ""
            raise ForeignError(
                f"{where} belongs to cache {commit.key[:12]}, and {self._place.locate('identity.json')} is that of "
                f"{self._key[:12]}: one of the two is damaged or from elsewhere, copy it again{repair}"
            )
        if commit.name != name:
            raise CorruptError(f"{where} is that of {commit.name}; {self._remedy(name)}")
        if commit.format != self._format:
            raise CorruptError(
                f"{where} has format {commit.format}, its cache has {self._format}; {self._remedy(name)}"
            )
        return commit

    def _commit_where(self, name: str) -> str:
        return self._place.locate(self.layout.commit_file(name))

    def _remedy(self, name: str) -> str:
        return self._place.remedy(self.layout.commit_file(name))

    # What commits name

    def files_of(self, name: str, decode: bool = False) -> dict[str, Content]:
        """The files that a commit names as they lie in a folder, checked against the commit; by their sha256.

        decode: whether the commit is checked too, against the rows that these files hold.
        """

        def content(file: str, stored: StoredFile, chunk: Chunk) -> tuple[str, Content]:
            found, where = self._place.content(file, stored, chunk), self._place.locate(file)
            if decode:
                rows = chunks.decode_part(chunk.spec, chunk.part, found, where)
                if chunks.rows_digest(chunk.spec, rows) != stored.rows:
                    raise CorruptError(f"the commit of {where} names other rows than are there")
            return stored.sha256, found

        return dict(self._each(name, content))

    def load(self, name: str, out: Arrays = _NONE, only: Collection[str] | None = None) -> list[NDArray[Any]]:
        """The rows of each chunk that a commit names; bytes are checked against the commit before they are decoded.

        out: whole arrays by name, in which the rows are to lie. only: the names of the arrays that are read.
        """

        def rows(file: str, stored: StoredFile, chunk: Chunk) -> NDArray[Any]:
            there = out[chunk.spec.name][chunk.rows] if chunk.spec.name in out else None
            return self._place.rows(file, stored, chunk, there)

        return self._each(name, rows, only)

    def require(self, name: str) -> None:
        """CorruptError unless the commit is sound and its files are there; they are not read."""
        self._each(name, lambda file, stored, chunk: self._place.require(file, stored))

    def metadata(self, name: str) -> list[tuple[str, Callable[[], bytes]]]:
        """The files for plain zarr beside what a commit names: each by its name in the cache, and its content."""
        return [(self.prefix + file, content) for chunk in self.chunks(name) for file, content in metadata_files(chunk)]

    def require_metadata(self, file: str, content: bytes) -> None:
        """CorruptError or NotFoundError unless a file for plain zarr, if this kind of place has it, says that."""
        where, advice = self._place.where, self._place.remedy(file)
        if self._place.writable:
            advice = f"kdcache verify {where} --repair writes it again"
        try:
            found = self._place.metadata(file)
        except (NotFoundError, CorruptError) as e:
            raise type(e)(f"{e}; {advice}") from None
        if found is not None and not chunks.same_metadata(found, content):
            raise CorruptError(
                f"{self._place.locate(file)} does not describe what lies there: plain zarr would go wrong, though "
                f"it means nothing to kdcache; {advice}"
            )

    def _each(
        self, name: str, get: Callable[[str, StoredFile, Chunk], T], only: Collection[str] | None = None
    ) -> list[T]:
        try:
            return self._all(name, get, only)
        except CorruptError:
            # What was kept here of a commit may be out of date, or may have come wrong: then it is asked for again.
            if not self._place.distrust(self.layout.commit_file(name)):
                raise
        return self._all(name, get, only)

    def _all(self, name: str, get: Callable[[str, StoredFile, Chunk], T], only: Collection[str] | None) -> list[T]:
        commit, wanted = self.commit(name), self.chunks(name)
        if set(commit.files) != {chunk.file for chunk in wanted}:
            raise CorruptError(f"{self._commit_where(name)} does not name the files of {name}; {self._remedy(name)}")
        out = []
        for chunk in wanted:
            if only is not None and chunk.spec.name not in only:
                continue
            try:
                out.append(get(self.prefix + chunk.file, commit.files[chunk.file], chunk))
            except UnreadableError as e:
                raise UnreadableError(f"{e} ({name} of {self.where})") from e
            except KdcacheError as e:
                raise CorruptError(f"{e} ({name} of {self.where}); {self._remedy(name)}") from e
        return out


class SplitReader(CommitReader):
    """Reads the labels, the image sizes and the records of one split."""

    @cached_property
    def labels(self) -> NDArray[Any]:
        """Class ids [N, L] of the samples, L being the number of labels that a single sample has."""
        spec = self.layout.labels
        labels = np.empty(spec.shape, spec.dtype)
        self.load("labels", {spec.name: labels})
        if labels.size and int(labels.max()) >= self._record.classes:
            where = self._place.locate(f"{self.prefix}labels")
            raise CorruptError(f"{where} holds a class id above {self._record.classes - 1}; {self._remedy('labels')}")
        return labels

    def labels_in(self, view: int) -> NDArray[Any]:
        """Class ids [N, L] of the records of a view: where views are mixed, the partner's follow the sample's own."""
        if self.split == "eval" or not self._views.mixed:
            return self.labels
        partner = partners(self._views.seed, view, range(self.samples), self.samples)
        return np.concatenate([self.labels, self.labels[partner]], 1)

    def require_labels(self, labels: NDArray[Any]) -> None:
        """MismatchError unless these are the cache's."""
        if not np.array_equal(self.labels, labels):
            differing = int((self.labels != labels).any(1).sum()) if self.labels.shape == labels.shape else len(labels)
            raise MismatchError(f"{self.where} has other labels than asked for ({differing} of {self.samples} differ)")

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """[N, 2] height and width of the images of a dataset in files."""
        return self._sizes()

    def _sizes(self) -> NDArray[np.int32]:
        assert self.layout.sizes is not None
        sizes = np.empty(self.layout.sizes.shape, np.int32)
        self.load("sizes", {"sizes": sizes})
        if int(sizes.min()) < 1:
            where = self._place.locate(f"{self.prefix}sizes")
            raise CorruptError(f"{where} holds sizes below 1; {self._remedy('sizes')}")
        return sizes

    def require_sizes(self, sizes: NDArray[np.int32]) -> None:
        """MismatchError unless these are the cache's, since a view's parameters depend on them."""
        if self.layout.sizes is None:
            return
        own = vars(self).get("sizes")
        own = self._sizes() if own is None else own  # not kept, since the dataset holds the same
        if len(wrong := np.flatnonzero((own != sizes).any(1))):
            (h, w), (height, width) = own[wrong[0]], sizes[wrong[0]]
            raise MismatchError(
                f"{self.where} was built from images of other sizes ({len(wrong)} of {self.samples} differ; sample "
                f"{wrong[0]} was {h} x {w}, now {height} x {width})"
            )

    def read(
        self,
        view: int,
        prior: torch.Tensor | None,
        out: Records | None = None,
        samples: NDArray[np.int64] | None = None,
        threads: int = THREADS,
    ) -> Records:
        """All records of a view, checked, in memory as they are stored. out: records whose memory is used again.

        samples: places in ascending order, to read the records of these alone. Parts that hold none of them are not
        read. The bytes of every other part are checked as a whole, but only what holds them is decompressed. Each
        thread holds one array of one part at a time.
        """
        missing = set(range(self.parts)) - self.committed().get(view, set())
        if missing:
            raise NotFoundError(
                f"view {view} is not complete in {self.where} ({len(missing)} of {self.parts} parts missing): "
                + self._place.more(view)
            )
        slab = {} if out is None else chunks.as_arrays(out)
        chosen = None if samples is None else _in_parts(samples, self.part)
        first, *others = range(self.parts) if chosen is None else chosen

        def read_part(part: int) -> Arrays:
            if chosen is None:
                return self.check_shard(view, part, slab)
            places, rows = chosen[part]
            return self._chosen_rows(view, part, rows, {name: array[places] for name, array in slab.items()})

        of_first = read_part(first)
        if not slab and not others:
            slab = dict(of_first)
        elif not slab:
            # Memory is taken only now that a shard was found to have the sizes that the identity claims.
            count = self.samples if samples is None else len(samples)
            slab = {spec.name: np.empty((count, *spec.shape[1:]), spec.dtype) for spec in self.layout.records}
            for name, rows in slab.items():
                rows[: len(of_first[name])] = of_first[name]
        del of_first
        with ThreadPoolExecutor(threads, thread_name_prefix="kdcache-read") as pool:
            list(pool.map(read_part, others))
        labels = self.labels_in(view)
        return chunks.as_records(self._record, slab, labels if samples is None else labels[samples], prior)

    def _chosen_rows(self, view: int, part: int, rows: NDArray[np.int64], out: Arrays) -> Arrays:
        """Some rows of each array of records in a shard, in `out` if given, checked like `check_shard`'s."""

        def chosen(file: str, stored: StoredFile, chunk: Chunk) -> NDArray[Any]:
            name, found = chunk.spec.name, self._place.some_rows(file, stored, chunk, rows)
            self._require_sound(view, part, name, found)
            return chunks.filled(out.get(name), found)

        names = [spec.name for spec in self.layout.records]
        return dict(zip(names, self._each(shard_name(view, part), chosen, names), strict=True))

    def view_arrays(self, view: int) -> dict[str, NDArray[Any]]:
        """How an imported view was made, by name: boxes [N, 4] and flips [N], or seeds [N]."""
        names = [spec.name for spec in self.layout.view_arrays]
        parts = [self.load(shard_name(view, part), only=names) for part in range(self.parts if names else 0)]
        return {name: np.concatenate(rows) for name, rows in zip(names, zip(*parts, strict=True), strict=True)}

    def read_shard(self, view: int, part: int, out: Arrays = _NONE) -> dict[str, NDArray[Any]]:
        """The arrays of a shard by name. out: arrays of the whole view by name, in which they are to lie."""
        name = shard_name(view, part)
        return {chunk.spec.name: rows for chunk, rows in zip(self.chunks(name), self.load(name, out), strict=True)}

    def check_shard(self, view: int, part: int, out: Arrays = _NONE) -> dict[str, NDArray[Any]]:
        """The arrays of a shard as `read_shard` gives them; CorruptError unless bytes and values are sound."""
        if part >= self.parts:
            commit = self._commit_where(shard_name(view, part))
            raise CorruptError(f"{commit}: there is no part {part}, the last one is {self.parts - 1}; remove it")
        shard = self.read_shard(view, part, out)
        for name, rows in shard.items():
            self._require_sound(view, part, name, rows)
        return shard

    def examine(self, name: str) -> None:
        """Read all that a commit names, and compare it with all that the commit says; CorruptError where they differ.

        Beside `check_shard` this covers the digests of rows, which readers of a folder do without. Whether a shard's
        view parameters are those of its view is not known here.
        """
        shard = parse_shard_name(name)
        rows = self.load(name) if shard is None else list(self.check_shard(*shard).values())
        commit = self.commit(name)
        if (shard is None) != (commit.parameters is None):
            raise CorruptError(
                f"{self._commit_where(name)} {'has' if shard is None else 'lacks'} parameters of a view; "
                f"{self._remedy(name)}"
            )
        for chunk, part in zip(self.chunks(name), rows, strict=True):
            if chunks.rows_digest(chunk.spec, part) != commit.files[chunk.file].rows:
                raise CorruptError(
                    f"{self._commit_where(name)} names another digest of rows than "
                    f"{self._place.locate(self.prefix + chunk.file)} has; {self._remedy(name)}"
                )

    def _require_sound(self, view: int, part: int, name: str, rows: NDArray[Any]) -> None:
        if problem := chunks.unsound(name, rows, self._record.classes):
            again = self._remedy(shard_name(view, part))
            raise CorruptError(f"view {view}, part {part} of {self.where}: {name} holds {problem}; {again}")


def _in_parts(samples: NDArray[np.int64], part: int) -> dict[int, tuple[slice, NDArray[np.int64]]]:
    """The parts that hold ascending samples: which of the samples these are, and their rows in the part."""
    parts, starts = np.unique(samples // part, return_index=True)
    stops = [*starts[1:].tolist(), len(samples)]
    return {
        number: (slice(start, stop), samples[start:stop] - number * part)
        for number, start, stop in zip(parts.tolist(), starts.tolist(), stops[: len(parts)], strict=True)
    } or {0: (slice(0, 0), samples)}
