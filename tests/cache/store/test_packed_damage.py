"""Damage in a packed file, by accident and on purpose: none of it is read."""

import contextlib
import json
import os
import random
import resource
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from kdcache.cache import Cache, Identity, KdcacheError, files, open_cache
from kdcache.cache import errors as e
from kdcache.cache import packing as packing
from kdcache.cache.store.layout import ArraySpec
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import BOTH, same
from kdcache.tests.helpers.oddthings import ODD, put_in_place
from kdcache.tests.helpers.stores import read_all, tree

BLOCK = 512
pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


# ---- damage ----


def flip(path, rng):
    """Flip one bit of a cache, all bytes being equally likely; the file, and what was in it."""
    candidates = [path] if path.is_file() else [path / name for name in tree(path)]
    (file,) = rng.choices(candidates, [p.stat().st_size for p in candidates])
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(damaged)
    return file, content


@pytest.mark.parametrize("toy", ["format-1"], indirect=True)
@pytest.mark.parametrize("other", ODD)
@pytest.mark.timeout(20)
def test_another_thing_in_the_files_place_while_it_is_open(toy, tmp_path, other):
    path = Path(shutil.copy(toy[1], tmp_path / "c.h5"))
    cache = open_cache(path)
    put_in_place(path, other)
    for read in (lambda: cache.read(0), cache.size, cache._place.check, lambda: open_cache(path)):
        with pytest.raises(KdcacheError, match=r"c\.h5"):
            read()


@pytest.mark.parametrize(
    ("toy", "kind", "flips"),
    [("format-1", "folder", 40), ("format-1", "hdf5", 100), (BOTH[1], "hdf5", 40)],
    indirect=["toy"],
)
def test_a_flipped_bit_is_found_or_harmless(toy, tmp_path, kind, flips):
    if kind == "hdf5":
        path = Path(shutil.copy(toy[1], tmp_path / "c.h5"))
    else:
        path = Path(shutil.copytree(toy[0].cache.path, tmp_path / "c"))
    want, rng = read_all(Cache(path)), random.Random(4)
    read, messages = 0, []
    for _ in range(flips):
        file, content = flip(path, rng)
        try:
            found = read_all(Cache(path))
            read += 1
        except KdcacheError as error:
            messages.append(str(error))
        else:
            # Of a folder: plain zarr's metadata, or what people read in a commit. Of a file: what h5py alone reads.
            assert all(same(a, b) for a, b in zip(found, want, strict=True))
            assert kind == "hdf5" or file.name == "zarr.json" or file.parent.name == "commits"
            if kind == "hdf5":
                (problem,) = verify(Cache(path)).problems
                assert problem.startswith(f"{path} is not what was packed: copy it again")
        file.write_bytes(content)
    assert read and messages and all(str(path) in text and "\n" not in text for text in messages)


def test_a_file_cut_anywhere_or_with_more_behind_is_refused(toy, packed):
    content, rng = toy[1].read_bytes(), random.Random(5)
    for size in [0, 1, 7, 8, 511, 512, 519, 520, 600, len(content) - 1, *rng.sample(range(len(content)), 30)]:
        packed.write_bytes(content[:size])
        # Of all bytes: the last may be HDF5's own, which no record is read from.
        with pytest.raises(KdcacheError, match=r"c\.h5"):
            Cache(packed).check_rest()
    packed.write_bytes(content + b"\0")
    (problem,) = verify(Cache(packed)).problems
    assert "is not what was packed" in problem


def test_what_is_no_packed_cache_is_refused_with_one_line(packed, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as f:
        f["gaps"] = np.zeros(4)
    with h5py.File(tmp_path / "block.h5", "w", userblock_size=BLOCK) as f:
        f["gaps"] = np.zeros(4)
    (tmp_path / "text.h5").write_text("gaps")
    (tmp_path / "gap").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    for path, kind, message in (
        (other, e.InputError, "an HDF5 file that kdcache did not pack"),
        (tmp_path / "block.h5", e.CorruptError, "the head of .* is not valid JSON"),
        (tmp_path / "text.h5", e.InputError, "neither a cache folder nor a packed cache"),
        (tmp_path / "gap", e.CorruptError, "not a plain file"),
        (tmp_path / "pipe", e.CorruptError, "not a plain file"),
        (tmp_path / "none.h5", e.NotFoundError, "no cache at"),
    ):
        with pytest.raises(kind, match=message):
            open_cache(path)


# ---- forged: digests that fit the damage ----


def forge(path, change=lambda index: None, head=lambda header: None, patches=()):
    """Change index and head of a packed file, with digests that fit; patches: (offset, bytes) written before."""
    content = bytearray(path.read_bytes())
    header = json.loads(content[:BLOCK])
    offset, size = header["index"]
    index = json.loads(content[offset : offset + size])
    for at, data in patches:
        content[at : at + len(data)] = data
    change(index["files"])
    text = json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    header |= {"index": [len(content), len(text)], "index_sha256": files.sha256(text)}
    content += text
    header["sha256"] = files.sha256(bytes(content[BLOCK:]))
    head(header)
    content[:BLOCK] = json.dumps(header, sort_keys=True, separators=(",", ":")).encode().ljust(BLOCK, b"\n")
    path.write_bytes(content)


GAPS = "views/v00001/gaps/c/0/0"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ([10**15, 10], "ends at byte"),
        ([-1, 10], "ends at byte"),
        ([2**64, 10], "ends at byte"),
        ([600, -1], "more than the"),
        ([600, 10**12], "more than the"),
        ([600, 0], "cannot hold the"),
        ([600, 200], r"gaps/c/0/0: Error -3|does not inflate"),
        ([True, 10], "the index of .* is not what kdcache writes"),
        ([1.5, 10], "the index of .* is not what kdcache writes"),
        ([1, 2, 3], "the index of .* is not what kdcache writes"),
        (None, "holds no views/v00001/gaps/c/0/0"),
    ],
)
def test_an_index_that_lies_is_refused(packed, place, message):
    forge(packed, lambda index: index.pop(GAPS) if place is None else index.update({GAPS: place}))
    with pytest.raises(e.CorruptError, match=message) as caught:
        Cache(packed).read(1)
    assert str(packed) in str(caught.value) and "pack" in str(caught.value)


@pytest.mark.parametrize("toy", BOTH, indirect=True)
def test_the_rows_of_another_part_view_or_split_are_refused(packed):
    names = ["views/v00000/gaps/c/0/0", "views/v00001/gaps/c/1/0", "eval/views/v00000/gaps/c/0/0"]
    original = packed.read_bytes()
    for other in names:
        packed.write_bytes(original)
        forge(packed, lambda index, o=other: index.update({GAPS: index[o]}))
        assert Cache(packed).check_rest() is None
        with pytest.raises(e.CorruptError, match=r"gaps/c/0/0 (is not what was committed|does not inflate)"):
            Cache(packed).read(1)
    packed.write_bytes(original)
    commits = [f"commits/v0000{v}-p0000.json" for v in (0, 1)]
    forge(packed, lambda index: index.update({commits[1]: index[commits[0]]}))
    with pytest.raises(e.CorruptError, match="is that of v00000-p0000"):
        Cache(packed).read(1)


def test_a_chunk_that_inflates_to_more_costs_nothing(packed):
    bomb = zlib.compress(bytes(2 * 10**8), 1) + b"sum."
    end = packed.stat().st_size
    limit = ArraySpec("x", (16, 3), 16, "float16", ("a", "b")).max_file_bytes
    for size in (len(bomb), limit):
        forge(packed, lambda index, s=size: index.update({GAPS: [end, s]}), patches=[(end, bomb)])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(e.CorruptError, match=r"more than the|does not inflate to the 96 bytes"):
            Cache(packed).read(1)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def replant(path, small, about):
    """The commits of a small cache under the key of the identity `about`; that key."""
    key = Identity.model_validate_json(json.dumps(about)).key
    content = {name: small._place.read(name, 10**6) for name in small._place._index if name.startswith("commits/")}
    content = {name: text.replace(small.key.encode(), key.encode()) for name, text in content.items()}
    content["identity.json"] = json.dumps(about).encode()
    places, end = {}, path.stat().st_size
    for name, text in content.items():
        places[name] = [end, len(text)]
        end += len(text)
    forge(path, lambda index: index.update(places), patches=[(path.stat().st_size, b"".join(content.values()))])
    return key


def test_an_identity_of_monstrous_shapes_costs_nothing(packed):
    small = Cache(packed)
    about = small.identity.model_dump(mode="json")
    about["record"]["k"], about["part"], about["data"]["samples"] = 11, 2**24, 2**24
    key = replant(packed, small, about)
    cache = Cache(packed)
    assert cache.key == key
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(e.CorruptError, match=r"c\.h5.*bytes cannot hold the \d{9} that belong there"):
        cache.train.check_shard(1, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": 1, "samples": 2**40}, "declares 1099511627776 parts a view"),
        ({"k": 2**31, "classes": 2**32 - 1, "part": 2**24, "samples": 2**24}, "cannot hold the"),
        ({"classes": 2**31, "part": 2**24, "samples": 2**24}, "cannot hold the|not what was committed"),
    ],
)
def test_numbers_that_overflow_are_refused(packed, changes, message):
    small = Cache(packed)
    about = small.identity.model_dump(mode="json")
    about["data"]["samples"] = changes.pop("samples")
    about |= {"part": changes.pop("part")}
    about["record"] |= changes
    replant(packed, small, about)
    with pytest.raises(e.CorruptError, match=message):
        Cache(packed).train.check_shard(1, 0)


def test_a_name_with_more_digits_than_a_number_may_have_is_none(packed):
    forge(packed, lambda index: index.update({f"commits/v{'9' * 5000}-p0000.json": [600, 5]}))
    assert Cache(packed).views == (0, 1)


@pytest.mark.parametrize(
    ("head", "kind", "message"),
    [
        ({"format": 9}, e.MismatchError, r"the head of .* has format 9; this kdcache reads up to"),
        ({"more": 1}, e.CorruptError, "more: Extra"),
        ({"index": [0, 2**40]}, e.CorruptError, "declares an index of"),
        ({"index": [0, -5]}, e.CorruptError, "declares an index of"),
        ({"index": [2**60, 5]}, e.CorruptError, "ends at byte"),
        ({"index": [-5, 5]}, e.CorruptError, "ends at byte"),
        ({"index": [600, 5]}, e.CorruptError, "the index of .* is damaged"),
        ({"index_sha256": "0" * 64}, e.CorruptError, "the index of .* is damaged"),
        ({"index": "x"}, e.CorruptError, "index"),
    ],
)
def test_a_head_that_lies_is_refused(packed, head, kind, message):
    forge(packed, head=lambda header: header.update(head))
    with pytest.raises(kind, match=message) as caught:
        Cache(packed)
    assert str(packed) in str(caught.value)


def test_files_made_up_of_pieces_are_refused_or_the_same(toy, packed):
    """Stretches of the file copied, zeroed and filled at random: what HDF5's own library does not always survive."""
    original, rng = toy[1].read_bytes(), random.Random(6)
    want = read_all(Cache(toy[1]))
    for _ in range(150):
        content = bytearray(original)
        for _ in range(rng.randrange(1, 6)):
            size = rng.choice([1, 8, 64, 512, 4096])
            at, source = rng.randrange(len(content)), rng.randrange(len(content))
            filling = rng.choice([bytes(size), rng.randbytes(size), bytes(content[source : source + size])])
            content[at : at + size] = filling[: len(content) - at]
        packed.write_bytes(content)
        with contextlib.suppress(KdcacheError):
            assert all(same(a, b) for a, b in zip(read_all(Cache(packed)), want, strict=True))
            assert content == original or not verify(Cache(packed)).passed
