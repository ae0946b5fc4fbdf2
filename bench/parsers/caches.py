"""Parsers of caches and registries: identity, commits, chunks, leases, packed files, names, publications."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from damages import BYTES, JSON
from forgeries import CHUNK, PACKED, packed_images
from fuzz_caches import contents as of_cache
from fuzz_caches import small_cache
from fuzz_images import sources

from kdcache.cache import Cache, Identity
from kdcache.cache.identity import canonical, parse
from kdcache.cache.packing import pack_hdf5
from kdcache.cache.registry.backends import open_objects
from kdcache.cache.registry.leases import ObjectLeases
from kdcache.cache.registry.registry import Registry
from kdcache.cache.store.chunks import decode_part
from kdcache.cache.store.layout import Commit
from kdcache.cache.store.leases import EXPIRES, FolderLeases, Owner
from kdcache.pipeline.ffcv.format import HEADER
from kdcache.pipeline.ffcv.headers import read_headers
from kdcache.tests.helpers.ffcv import everything, packed_arrays, packed_files
from parsers.parser import Parser, Prepared, always, contents, in_place, quiet

_NAME = "v00000-p0000"


@lru_cache(1)
def template() -> dict[str, bytes]:
    """The files of a small cache. Called before processes are forked, it is built once for all of them."""
    with tempfile.TemporaryDirectory() as top:
        path = small_cache(Path(top) / "c").path
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def copied_cache(path: Path) -> Cache:
    """A small cache of its own at that path."""
    for name, content in template().items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return Cache(path)


def _identity(top: Path) -> Prepared:
    sound = canonical(copied_cache(top / "c").identity)
    mixed = sound.replace(b'"crop,flip"', b'"crop,flip,mixup(0.2)"').replace(b'"format":1', b'"format":2')
    mixed = mixed.replace(b'"labels":1', b'"labels":2').replace(b'"policy"', b'"mixed":true,"policy"')
    mixed = canonical(Identity.model_validate_json(mixed))

    def read(name: str, content: bytes) -> Any:
        found = parse(Identity, content, "identity.json", "copy it again")
        return found.key, found.without_teacher, found.record.tails

    return Prepared({"format 1": sound, "format 2": mixed}, read, JSON)


def _commit(top: Path) -> Prepared:
    cache = copied_cache(top / "c")
    found = {p.name: p.read_bytes() for p in (cache.path / "commits").iterdir()}

    def read(name: str, content: bytes) -> Any:
        return canonical(parse(Commit, content, name, "copy it again"))

    return Prepared(found, read, JSON)


def _folder(top: Path) -> Prepared:
    """identity.json and the commits of a folder, up to the records that are read by them."""
    cache = copied_cache(top / "c")
    files = {str(p.relative_to(cache.path)): p for p in cache.path.rglob("*.json") if p.name != "zarr.json"}
    return Prepared(contents(files), in_place(files, lambda: of_cache(cache.path)), JSON, always)


def _chunks(top: Path) -> Prepared:
    cache = copied_cache(top / "c")
    found, specs = {}, {}
    for name in (_NAME, "labels", "sizes", "prior"):
        for one in cache.train.chunks(name):
            found[one.file], specs[one.file] = (cache.path / one.file).read_bytes(), one

    def read(name: str, content: bytes) -> Any:
        one = specs[name]
        rows = decode_part(one.spec, one.part, content, name)
        into = np.zeros((one.rows.stop - one.rows.start, *one.spec.shape[1:]), one.spec.dtype)
        assert np.array_equal(decode_part(one.spec, one.part, content, name, into), rows, equal_nan=True)
        return rows.tobytes()

    return Prepared(found, read, CHUNK)


def _owner(top: Path) -> bytes:
    """What describes a builder on another machine."""
    return canonical(
        Owner(token="a" * 16, host="far", process=7, machine=None, started=None, since="now", seconds=EXPIRES)
    )


def _leases(top: Path) -> Prepared:
    return _of_leases(top, top / "leases", lambda: FolderLeases(top, "b" * 16, quiet))


def _bucket_leases(top: Path) -> Prepared:
    key = "c" * 64
    return _of_leases(top, top / "leases" / key, lambda: ObjectLeases(open_objects(str(top)), key, "b" * 16, quiet))


def _of_leases(top: Path, folder: Path, begun: Callable[[], FolderLeases | ObjectLeases]) -> Prepared:
    """The files of another builder in a folder, while this one begins, looks for work and ends."""
    folder.mkdir(parents=True)
    sound = _owner(top)
    files = {"builder": folder / f"{'a' * 16}.json", "lease": folder / f"{_NAME}.0"}

    def read(name: str, content: bytes) -> Any:
        for other, path in files.items():
            path.write_bytes(content if other == name else sound)
        leases = begun()
        leases._touch()  # and no thread, which __enter__ would begin
        try:
            return sorted(map(str, leases.others())), str(leases.holder(_NAME)), leases.take(_NAME), leases.clear()
        finally:
            leases._leave()
            for path in folder.iterdir():
                path.unlink()

    return Prepared(dict.fromkeys(files, sound), read, JSON)


def _registry(top: Path) -> Prepared:
    """Names, publications, identities and what was seen of a cache before, in a registry that is a folder."""
    root = top / "registry"
    cache = copied_cache(top / "c")
    (root / "caches").mkdir(parents=True)
    cache.path.rename(root / "caches" / cache.key)
    cache = Cache(root / "caches" / cache.key)
    shared = Registry(str(root), top / "local", 0)
    shared.record(cache, "0.1.0", 0.5)
    shared.give_name("best", cache.key, move=False)
    shared.give_name("other", cache.key, move=False)
    shared.cache(cache.key)
    (published,) = (root / "caches" / cache.key / "published").iterdir()
    (seen,) = (top / "local").rglob("seen.json")
    files = {
        "name": root / "names" / "best",
        "published": published,
        "seen": seen,
        "identity": cache.path / "identity.json",
    }

    def read() -> Any:
        again = Registry(str(root), top / "local", 0)
        key = again.find("best")
        caches, wrong = again.caches()
        about = again.published(cache.key)
        return (
            key,
            again.names,
            again.all_names(),
            [c.key for c in caches],
            len(wrong),
            about,
            again.cache(key).commits(),
        )

    return Prepared(contents(files), in_place(files, read), JSON)


def _hdf5(top: Path) -> Prepared:
    cache = copied_cache(top / "c")
    pack_hdf5(cache, top / "c.h5", cache.views)
    files = {"packed": top / "c.h5"}

    def read() -> Any:
        packed = Cache(top / "c.h5")
        packed.check_rest()
        return of_cache(top / "c.h5")

    return Prepared(contents(files), in_place(files, read), PACKED, always)


def _beton(top: Path) -> Prepared:
    """Files packed with their images, raw and JPEG. JPEG files have no digest there, so only raw pixels are covered."""
    for name, pack in (("raw", packed_arrays), ("files", packed_files)):
        (top / name).mkdir()
        pack(top / name)
    files = {name: top / name / "x.beton" for name in ("raw", "files")}
    ends = {}
    for name, path in files.items():
        found = read_headers(path)
        ends[name] = HEADER.itemsize + found.layout.descriptors.nbytes + found.table.nbytes
        del found

    def reading(path: Path) -> Any:
        images, labels, records, evaluation, identity = everything(path)
        digest = hashlib.sha256(labels.tobytes())
        for image in images:
            digest.update(image.numpy().tobytes())
        for one in (*records, evaluation):
            for field in (one.classes, one.gaps, one.target_gap, one.tail, one.labels):
                digest.update(b"none" if field is None else field.numpy().tobytes())
        return digest.hexdigest(), identity.key

    def read(name: str, content: bytes) -> Any:
        (top / "x.beton").write_bytes(content)
        return reading(top / "x.beton")

    ways = tuple(BYTES[:14]) * 2 + tuple(packed_images(end) for end in ends.values()) * 12
    return Prepared(contents(files), read, ways, lambda name, content: name == "raw", tuple(sources().values()))


PARSERS = (
    Parser("identity.json", 60, _identity),
    Parser("commits", 60, _commit),
    Parser("a folder's JSON", 20, _folder),
    Parser("chunks of zarr", 120, _chunks),
    Parser("leases in a folder", 20, _leases),
    Parser("leases in a bucket", 20, _bucket_leases),
    Parser("names and publications", 20, _registry),
    Parser(".h5", 25, _hdf5),
    Parser(".beton", 12, _beton, slow=True),
)
