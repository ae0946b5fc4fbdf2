"""Packs a cache folder into one HDF5 file, and unpacks it. Both check the rows against the digests in the commits."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kdcache.cache import files
from kdcache.cache.errors import BusyError, CorruptError, InputError, KdcacheError, MismatchError, NotFoundError
from kdcache.cache.identity import canonical
from kdcache.cache.signing.signatures import all_signatures, copy_signatures, into_folder
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache, place_of
from kdcache.cache.store.hdf5 import Packer, Target
from kdcache.cache.store.publish import SplitStore

Advance = Callable[[int], object]


def packed_rows_bytes(cache: Cache, views: Sequence[int]) -> int:
    """Bytes of all rows of these views, labels and evaluation split, before compression."""
    return sum(_bytes(store, name) for store, name in cache.contents(views))


def _bytes(store: SplitStore, name: str) -> int:
    """Bytes of the rows that a commit names, before compression."""
    return sum(chunk.spec.chunk_bytes for chunk in store.chunks(name))


def choose_views(cache: Cache, views: range | None) -> tuple[int, ...]:
    """The views asked for, or all complete ones; NotFoundError if one, or anything else to be packed, is missing."""
    complete = cache.views
    chosen = complete if views is None else tuple(views)
    if not chosen or not cache.complete:
        raise NotFoundError(f"{cache.where} is not complete: run kdcache build again to finish it")
    if missing := sorted(set(chosen) - set(complete)):
        raise NotFoundError(
            f"{cache.where} has no complete view {missing[0]}: choose --views among its {len(complete)} complete ones"
        )
    return chosen


def pack_hdf5(cache: Cache, out: Path, views: Sequence[int], advance: Advance = lambda n: None) -> bool:
    """Write these complete views, and all that belongs to them, into the new file `out`; False if it is there already.

    All rows are compared with the digests in the commits as they are read, and again in the new file before it gets its
    name. advance: is called with numbers of bytes, each byte of the rows counted twice. A call that is killed leaves a
    temporary file, which the next call removes. InputError if `out` is another file, BusyError if another process is
    packing into it.
    """
    files.make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.packing")
    clear_leaving(temporary)
    if out.exists():
        _require_equal(cache, out, views)
        return False
    with new_file(temporary) as target:
        try:
            _write(cache, views, target, advance)
            _compare(temporary, views, advance)
            os.link(temporary, out)
        except FileExistsError:
            raise InputError(f"{out} has just been made by another process: remove it, or give another --out") from None
        except OSError as e:
            e.filename, e.filename2 = str(out), None
            raise
        files.sync_folder(out.parent)
    return True


def unpack_hdf5(cache: Cache, out: Path, advance: Advance = lambda n: None) -> int:
    """Write the packed `cache` as a folder, or complete that folder. Returns how many commits name other bytes now.

    Rows are compared with the digests in their commits, and chunks are encoded again. Equal bytes give the same commit;
    another version of the compressor may give other bytes. The next call goes on where a stopped one ended.
    MismatchError if `out` holds another cache, or other records of the same cache.
    """
    target = Cache.create(out, cache.identity)
    changed = 0
    with target.writing():
        for store, name in cache.contents(cache.views):
            into, commit = target.split(store.split), store.commit(name)
            if not into.has(name):
                data = list(zip(store.chunks(name), store.load(name), strict=True))
                into.write(name, data, commit.writer, commit.parameters)
            elif into.commit(name).content() != commit.content():
                raise MismatchError(f"{into.where} has another {name} than {cache.where}: give another --out")
            changed += into.commit_bytes(name) != store.commit_bytes(name)
            advance(_bytes(store, name))
    copy_signatures(all_signatures(place_of(cache))[0], place_of(target), into_folder(out))
    return changed


def _write(cache: Cache, views: Sequence[int], target: Target, advance: Advance) -> None:
    with Packer(target, cache.key) as packer:
        packer.put("identity.json", canonical(cache.identity))
        for store, name in cache.contents(views):
            commit = store.commit(name)
            for chunk, rows in zip(store.chunks(name), store.load(name), strict=True):
                if chunks.rows_digest(chunk.spec, rows) != commit.files[chunk.file].rows:
                    raise CorruptError(f"{store.where}/{chunk.file} holds other rows than its commit, {name}, says")
                packer.rows(store.prefix, chunk, rows)
                advance(chunk.spec.chunk_bytes)
            packer.put(store.layout.commit_file(name), store.commit_bytes(name))
        for one in all_signatures(place_of(cache))[0]:
            packer.put(f"{one.name}.sha256", one.signed)
            packer.put(f"{one.name}.sig", one.signature)
        packer.finish()


def _compare(path: Path, views: Sequence[int], advance: Advance) -> None:
    """Read the whole new file, as its readers will."""
    for store, name in Cache(path).contents(views):
        store.load(name)
        advance(_bytes(store, name))


def _require_equal(cache: Cache, out: Path, views: Sequence[int]) -> None:
    """InputError unless `out` is this cache, packed with these views and undamaged."""
    try:
        there = Cache(out)
        there.check_rest()
    except KdcacheError as e:
        raise InputError(f"{out} exists already: remove it, or give another --out ({e})") from e
    same = there.packed and there.key == cache.key and there.views == tuple(views)
    same = same and all_signatures(place_of(there)) == all_signatures(place_of(cache))
    if not same or any(
        store.commit_bytes(name) != mine.commit_bytes(name)
        for (store, name), (mine, _) in zip(there.contents(views), cache.contents(views), strict=True)
    ):
        raise InputError(f"{out} exists and holds something else: remove it, or give another --out")


def clear_leaving(temporary: Path) -> None:
    """Remove what a killed process has left; BusyError if that process is still alive."""
    # It is removed and never written into again, since it may be a second name of a finished file.
    if temporary.exists():
        with _locked(temporary, 0):
            temporary.unlink()


@contextmanager
def new_file(temporary: Path) -> Iterator[Target]:
    """Create an empty, locked file that is removed afterwards."""
    with _locked(temporary, os.O_CREAT | os.O_EXCL) as target:
        try:
            yield target
        finally:
            temporary.unlink()


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[Target]:
    busy = BusyError(f"another process is packing into {path.parent} ({path.name}): wait for it, or stop it first")
    try:
        target = Target(path, "r+b", opener=lambda p, f: os.open(p, f | flags | os.O_NOFOLLOW, 0o666))
    except (FileExistsError, FileNotFoundError):
        raise busy from None
    with target:
        try:
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as e:
            raise InputError(
                f"{path.parent} has no file locks ({e.strerror}): give --out in another folder, then copy the file"
            ) from e
        # Another process may have removed it before we held the lock.
        try:
            ours = os.path.samestat(path.stat(), os.fstat(target.fileno()))
        except FileNotFoundError:
            ours = False
        if not ours:
            raise busy
        yield target
