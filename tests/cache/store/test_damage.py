"""Damage in a cache's folder, by accident and on purpose: none of it is read."""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import threading
from pathlib import Path

import google_crc32c  # zarr's
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import Cache, KdcacheError
from kdcache.cache import errors as e
from kdcache.cache.files import read_bounded
from kdcache.cache.identity import MAX_JSON_BYTES
from kdcache.cache.store.chunks import array_metadata, encode_part
from kdcache.cache.store.layout import record_arrays
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import Filled, identity, same

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- damage ----

KINDS = ("flip", "flip", "flip", "truncate", "extend", "empty", "delete", "swap", "folder", "link", "pipe")


def committed_files(path):
    return sorted(
        p.relative_to(path).as_posix()
        for p in path.rglob("*")
        if p.is_file() and p.name != "zarr.json" and p.parent.name != "scratch"
    )


def damage(path, file, kind, rng):
    """Do it; the files that are no longer what was committed."""
    target = path / file
    content = bytearray(target.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        target.write_bytes(content)
    elif kind == "truncate":
        os.truncate(target, rng.randrange(len(content)))
    elif kind == "extend":
        target.write_bytes(content + bytes(rng.randrange(1, 50)))
    elif kind == "empty":
        target.write_bytes(b"")
    elif kind == "swap":
        same_kind = [f for f in committed_files(path) if f != file and ("commits/" in f) == ("commits/" in file)]
        other = path / rng.choice([f for f in same_kind if (path / f).read_bytes() != content] or same_kind)
        target.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return [target, other]
    else:
        target.rename(path / "scratch" / "away")
        if kind == "folder":
            target.mkdir()
        elif kind == "link":
            target.symlink_to(path / "scratch" / "away")
        elif kind == "pipe":
            os.mkfifo(target)
    return [target]


def read_all(path):
    """Every record of the cache, in order; what stops a reader is a KdcacheError or a failure of the test."""
    cache = Cache(path)
    assert cache.train.sizes.min() > 0 < cache.evaluation.sizes.min()
    return [cache.read_evaluation(), *(cache.read(v) for v in (0, 1))]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("k", "mixed"), [(None, False), (4, False), (4, True)])
def test_no_damage_is_read(tmp_path, k, mixed):
    about = identity(part=16, k=k, temperatures=(1.0, 4.0) if k else (), mixed=mixed)
    good = Filled(tmp_path / "good", about).cache.path
    want = read_all(good)
    rng = random.Random(3)
    files = committed_files(good)
    assert len(files) > 20
    cases = [(file, KINDS[(i + 4 * j) % len(KINDS)]) for i, file in enumerate(files) for j in range(2)]
    cases += [("identity.json", kind) for kind in KINDS if kind != "swap"]
    unseen, path = 0, tmp_path / "damaged"
    shutil.copytree(good, path)
    for i, (file, kind) in enumerate(cases):
        if file == "identity.json" and kind == "swap":
            kind = "flip"
        touched = damage(path, file, kind, rng)
        try:
            found = read_all(path)
        except KdcacheError as error:
            # The file itself; of commits and the identity at least one that no longer fits them.
            text = str(error)
            named = touched if "/c/" in file else [path]
            assert any(str(p) in text for p in named), (file, kind, text)
            if "identity" not in file:
                assert "kdcache build" in text, (file, kind, text)
            assert "\n" not in text
            if i % 3 == 0 and path.joinpath("identity.json").is_file():
                assert not _passes(path), (file, kind)
        else:
            # Only what people may read in a commit, and never a record.
            assert ("commits/" in file) and kind == "flip", (file, kind)
            unseen += 1
            assert all(same(a, b) for a, b in zip(found, want, strict=True))
        for p in touched:
            shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink(missing_ok=True)
            shutil.copy(good / p.relative_to(path), p)
    assert unseen < len(cases) / 10


def _passes(path):
    """Whether verify passes; its problems are lines, not exceptions, unless the identity cannot be read."""
    try:
        return verify(Cache(path)).passed
    except KdcacheError:
        return False


def test_swapped_shards_and_foreign_commits_are_refused(tmp_path):
    a = Filled(tmp_path / "a", identity()).cache.path
    b = Filled(tmp_path / "b", identity(k=3)).cache.path

    def put(source, target):
        for name in ("classes", "gaps", "target_gap", "tail"):
            shutil.copy(source[0] / f"views/v{source[1]:05d}/{name}/c/{source[2]}/0", a / f"views/v00001/{name}/c/0/0")
        shutil.copy(source[0] / f"commits/v{source[1]:05d}-p{source[2]:04d}.json", a / "commits/v00001-p0000.json")
        return Cache(a).read(1)

    keep = tmp_path / "keep"
    shutil.copytree(a, keep)
    for source, message in (
        ((a, 0, 0), "is that of v00000-p0000; remove"),
        ((a, 1, 1), "is that of v00001-p0001; remove"),
        ((a / "eval", 0, 0), "is that of v00000-p0000; remove"),
        ((b, 1, 0), r"belongs to cache .*, and .*/identity\.json is that of .*: one of the two is damaged"),
    ):
        with pytest.raises((e.CorruptError, e.MismatchError), match=message):
            put(source, a)
    # The files of another shard alone, each whole and with a good checksum of its own.
    shutil.rmtree(a)
    shutil.copytree(keep, a)
    shutil.copy(a / "views/v00000/gaps/c/0/0", a / "views/v00001/gaps/c/0/0")
    with pytest.raises(e.CorruptError, match=r"views/v00001/gaps/c/0/0 is not what was committed \(v00001-p0000 of"):
        Cache(a).read(1)


def test_a_pipe_that_someone_feeds_and_devices_are_no_files(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=lambda: _feed(pipe), daemon=True)
    feeder.start()
    for path in (pipe, Path("/dev/zero"), Path("/dev/tty"), tmp_path):
        with pytest.raises(KdcacheError, match=str(path)):
            read_bounded(path, 100)
    os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
    feeder.join(1)


def _feed(pipe):
    with contextlib.suppress(BrokenPipeError):
        pipe.write_bytes(b"x" * 200)


def test_json_that_kdcache_does_not_write_is_refused(filled):
    path = filled.cache.path / "commits" / "v00001-p0000.json"
    good = json.loads(path.read_bytes())
    text, own = path.read_text(), f'"format":{filled.about.format}'
    cases = {
        "unknown": (json.dumps({**good, "more": 1}), "more: Extra"),
        "missing": (json.dumps({k: v for k, v in good.items() if k != "files"}), "files: Field required"),
        "twice": (text[:-1] + f",{own}}}", "stands twice"),
        "NaN": (text.replace('"size":', '"size":NaN,"s":', 1), "v00001-p0000.json"),
        "type": (text.replace(own, '"format":"0"'), "format"),
        "bool": (text.replace(own, '"format":true'), "format"),
        "list": ("[1]", "the whole"),
        "deep": ("[" * 100_000, "JSON"),
        "digits": ('{"format":' + "9" * 5000 + "}", "JSON"),
        "bytes": (b"\xff\xfe{}", "JSON"),
        "surrogate": (text.replace('"host":"test"', '"host":"\\ud800"'), "v00001-p0000.json"),
        "huge": (text + " " * MAX_JSON_BYTES, "longer than"),
        "nothing": ("", "JSON"),
    }
    for name, (content, message) in cases.items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(e.CorruptError, match=message) as caught:
            Cache(filled.cache.path).read(1)
        assert str(path) in str(caught.value) and "run kdcache build again" in str(caught.value), name
    path.write_text(text.replace(own, '"format":3'))
    with pytest.raises(e.MismatchError, match="has format 3; this kdcache reads up to format 2: update kdcache"):
        Cache(filled.cache.path).read(1)


def test_an_identity_that_cannot_be_read_says_what_to_do(filled):
    path = filled.cache.path / "identity.json"
    text, own = path.read_text(), f'"format":{filled.about.format}'
    other = own.translate({ord("1"): "2", ord("2"): "1"})
    for content, kind, message in (
        (text.replace(own, '"format":3'), e.MismatchError, "format 3; this kdcache reads up to format 2"),
        (text.replace(own, other), e.CorruptError, f"such views belong to format {filled.about.format}"),
        (text.replace(own, '"format":0'), e.MismatchError, "format 0, from before the first release: build"),
        (text.replace('"k":4', '"k":4,"k":4'), e.CorruptError, "stands twice"),
        (text.replace("4.0", "NaN"), e.CorruptError, "temperatures"),
        (text.replace("4.0", "1e999"), e.CorruptError, "temperatures"),
        (text.replace('"k":4', '"k":4,"j":1'), e.CorruptError, "record.j: Extra"),
        (text[: len(text) // 2], e.CorruptError, "or remove"),
    ):
        path.write_text(content)
        with pytest.raises(kind, match=message) as caught:
            Cache(filled.cache.path)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(e.NotFoundError, match="not a kdcache cache"):
        Cache(filled.cache.path)


# ---- forged: the commit names the damage's own hash ----


def forge(path, file, content, commit):
    """Put `content` in place, with a commit that fits it."""
    (path / file).write_bytes(content)
    commit = path / "commits" / f"{commit}.json"
    about = json.loads(commit.read_bytes())
    about["files"][file] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    commit.write_text(json.dumps(about))


def blosc_header(content, at, value):
    return content[:at] + value.to_bytes(4, "little") + content[at + 4 :]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, 2**31 - 17, "declares 2147483631 bytes of data"),
        (4, 0, "declares 0 bytes"),
        (12, 2**31 - 17, "declares 2147483631 compressed bytes"),  # blosc reads that far, and beyond its input
        (12, 0, "declares 0 compressed bytes"),
    ],
)
def test_a_header_that_declares_other_sizes_is_refused_before_it_is_believed(filled, at, value, message):
    file = "views/v00001/gaps/c/1/0"
    path = filled.cache.path
    forge(path, file, blosc_header((path / file).read_bytes(), at, value), "v00001-p0001")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(e.CorruptError, match=message) as caught:
        Cache(path).read(1)
    assert f"{file}: " in str(caught.value) and "v00001-p0001" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_forged_at_random_are_refused_or_values(tmp_path_factory, data):
    path = _forgeable(tmp_path_factory)
    file = "views/v00001/gaps/c/0/0"
    good = (path / "good" / "chunk").read_bytes()
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.sampled_from([len(good), len(good), len(good) - 1, 17, 3]))])
    if checksum_too := data.draw(st.booleans()):
        content = content[:-4] + google_crc32c.value(content[:-4]).to_bytes(4, "little")
    forge(path, file, content, "v00001-p0000")
    if content != good and not checksum_too:
        with pytest.raises(e.CorruptError, match="v00001-p0000"):
            Cache(path).read(1)
    else:
        with contextlib.suppress(e.CorruptError):
            gaps = Cache(path).read(1).gaps
            assert bool((gaps >= 0).all()) and bool(torch.isfinite(gaps).all())


def _forgeable(factory, kept=[]):  # noqa: B006
    if not kept:
        kept.append(Filled(factory.mktemp("forged") / "c", identity()).cache.path)
        (kept[0] / "good").mkdir()
        shutil.copy(kept[0] / "views/v00001/gaps/c/0/0", kept[0] / "good" / "chunk")
    return kept[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("classes", 12, "classes holds a class id above 11"),
        ("classes", 255, "classes holds a class id above 11"),
        ("gaps", np.nan, "gaps holds values that are not finite"),
        ("gaps", np.inf, "gaps holds values that are not finite"),
        ("gaps", -0.5, "gaps holds values below zero"),
        ("target_gap", -1, "target_gap holds values below zero"),
        ("target_gap", np.nan, "target_gap holds values that are not finite"),
        ("tail", np.nan, "tail holds values that are not finite"),
        ("tail", np.inf, "tail holds values that are not finite"),
        ("tail_std", np.nan, "tail_std holds values that are not finite"),
    ],
)
def test_values_that_no_teacher_gives_are_refused_whatever_the_commit_says(tmp_path, name, value, message):
    filled = Filled(tmp_path / "c", identity(tail_std=True))
    store = filled.cache.train
    spec = {s.name: s for s in record_arrays(filled.about.record, store.samples, store.part)}[name]
    rows = store.read_shard(1, 2)[name].copy()
    rows[-1, -1] = value
    forge(filled.cache.path, f"views/v00001/{name}/c/2/0", encode_part(spec, 2, rows), "v00001-p0002")
    with pytest.raises(e.CorruptError, match=f"view 1, part 2 of .*{message}.*kdcache build"):
        Cache(filled.cache.path).read(1)
    assert Cache(filled.cache.path).read(0) is not None
    assert [message in p for p in verify(filled.cache).problems] == [True]


def test_a_coded_tail_that_shows_a_hole_is_refused(tmp_path):
    filled = Filled(tmp_path / "c", identity(precision="uint8"))
    store = filled.cache.train
    spec = {s.name: s for s in record_arrays(filled.about.record, store.samples, store.part)}["tail"]
    rows = store.read_shard(1, 0)["tail"].copy()
    rows[3, 0] = spec.fill
    forge(filled.cache.path, "views/v00001/tail/c/0/0", encode_part(spec, 0, rows), "v00001-p0000")
    with pytest.raises(e.CorruptError, match="tail holds holes"):
        Cache(filled.cache.path).read(1)


def test_forged_labels_priors_and_sums_are_refused(filled):
    cache, path = filled.cache, filled.cache.path
    for name, spec, value, message in (
        ("labels", cache.train.layout.labels, 12, "labels holds a class id above 11"),
        ("sizes", cache.train.layout.sizes, 0, "sizes holds sizes below 1"),
        ("prior", cache.train.layout.prior, 0, "prior holds values that are not probabilities"),
        ("prior", cache.train.layout.prior, np.nan, "prior holds values that are not probabilities"),
        ("tail_sums", cache.train.layout.tail_sums, -1, "tail_sums holds values below zero"),
    ):
        file = spec.chunk_file(0)
        kept = (path / file).read_bytes()
        rows = np.full((min(spec.rows, spec.shape[0]), *spec.shape[1:]), value, spec.dtype)
        forge(path, file, encode_part(spec, 0, rows), "v00000-p0000" if name == "tail_sums" else name)
        with pytest.raises(e.CorruptError, match=f"{message}.*kdcache build"):
            _ = Cache(path).read(0) and Cache(path).train.sizes
        assert not verify(cache).passed
        forge(path, file, kept, "v00000-p0000" if name == "tail_sums" else name)
    assert verify(cache).passed


def test_images_of_other_sizes_are_refused(filled):
    store = filled.cache.train
    sizes = store.sizes.copy()
    store.require_sizes(sizes)
    (h, w), sizes[5] = sizes[5].tolist(), (7, 3)
    with pytest.raises(e.MismatchError, match=rf"1 of 21 differ; sample 5 was {h} x {w}, now 7 x 3"):
        store.require_sizes(sizes)


def test_an_array_of_another_shape_or_type_is_refused(filled):
    """Shapes and types go by the identity: metadata in the cache is for others to read."""
    store, path = filled.cache.train, filled.cache.path
    other = {s.name: s for s in record_arrays(identity(k=7).record, store.samples, store.part)}["gaps"]
    file = "views/v00001/gaps/c/0/0"
    forge(path, file, encode_part(other, 0, np.zeros((8, 6), np.float16)), "v00001-p0000")
    (path / "views/v00001/gaps/zarr.json").write_bytes(array_metadata(other))
    with pytest.raises(e.CorruptError, match="declares 96 bytes of data where 48 belong"):
        Cache(path).read(1)
    (path / "views/v00000/gaps/zarr.json").write_text('{"codecs": [{"name": "pickle"}]}')
    assert same(Cache(path).read(0), filled.encode(store, 0)[0])


def test_a_commit_may_not_name_other_files(filled):
    path = filled.cache.path / "commits" / "v00001-p0000.json"
    good = json.loads(path.read_bytes())
    name = "views/v00001/gaps/c/0/0"
    for other in ("../../etc/passwd", "/etc/passwd", "views/v00000/gaps/c/0/0", name + "/", "./" + name):
        files = {**good["files"], other: good["files"][name]}
        for changed in (files, {k: v for k, v in files.items() if k != name}):
            path.write_text(json.dumps({**good, "files": changed}))
            with pytest.raises(e.CorruptError, match=r"v00001-p0000\.json does not name the files of v00001-p0000"):
                Cache(filled.cache.path).read(1)


def test_an_identity_of_monstrous_shapes_costs_nothing(tmp_path):
    about = identity(samples=2**40, part=2**24, classes=2**31, k=2**30, precision="uint8")
    cache = Cache.create(tmp_path / "c", about)
    with pytest.raises(e.NotFoundError, match="view 0 is not complete"):
        cache.read(0)
    small = Filled(tmp_path / "small", identity()).cache
    text = (
        (small.path / "identity.json")
        .read_text()
        .replace('"k":4', f'"k":{2**30}')
        .replace('"classes":12', f'"classes":{2**31}')
    )
    (small.path / "identity.json").write_text(text)
    key = Cache(small.path).key
    for commit in small.path.rglob("commits/*.json"):
        commit.write_text(commit.read_text().replace(small.key, key))
    with pytest.raises(e.CorruptError, match="bytes of data where"):
        Cache(small.path).train.read(0, None)
