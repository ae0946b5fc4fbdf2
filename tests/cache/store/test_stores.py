"""The same cache from every kind of store: equal records, and no damage, forgery or interruption that is read."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings

from kdcache.cache import Cache, Identity, KdcacheError, files, open_cache
from kdcache.cache import errors as e
from kdcache.cache import packing as packing
from kdcache.cache.home import list_caches
from kdcache.cache.packing import choose_views, pack_hdf5, unpack_hdf5
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import ArraySpec
from kdcache.cli import main
from kdcache.pipeline.ffcv.beton import Beton, pack_beton
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.caches import WRITER, Filled, identity, same, shapes
from kdcache.tests.helpers.images import toy_data

BLOCK = 512


def folder(cache, place):
    return cache


def hdf5_file(cache, place):
    assert pack_hdf5(cache, place / "c.h5", cache.views)
    return Cache(place / "c.h5")


def unpacked(cache, place):
    unpack_hdf5(hdf5_file(cache, place), place / "u")
    return Cache(place / "u")


def beton(cache, place):
    return Beton(pack_beton(cache, toy_data(cache, place), place / "c.beton", None, lambda line: None))


# Each makes, of a cache folder, what has `identity`, `views` and `read(view)`; CACHES can do all that a folder can.
CACHES = {"folder": folder, "hdf5": hdf5_file, "unpacked": unpacked}
STORES = {**CACHES, "ffcv": beton}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small, more only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)  # takes most of the time
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A cache with 2 views, and the file packed from it: not to be changed."""
    place = tmp_path_factory.mktemp("toy")
    written = Filled(place / "c", identity(part=16))
    hdf5_file(written.cache, place)
    return written, place / "c.h5"


@pytest.fixture
def packed(toy, tmp_path):
    """A packed file of one's own."""
    return Path(shutil.copy(toy[1], tmp_path / "c.h5"))


def read_all(cache):
    assert cache.train.sizes.min() > 0 < cache.evaluation.sizes.min()
    return [cache.read_evaluation(), *(cache.read(v) for v in cache.views)]


def tree(path):
    """Contents by name, without what a build keeps for itself."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if not name.startswith("scratch/")}


# ---- what is written is read back ----


@settings(max_examples=6, deadline=None)
@given(shapes())
def test_every_store_gives_the_same(tmp_path_factory, about):
    place = tmp_path_factory.mktemp("stores")
    written = Filled(place / "c", about)
    for name, make in STORES.items():
        (place / name).mkdir()
        store = make(written.cache, place / name)
        assert store.identity == about and store.views == (0, 1)
        for view in store.views:
            got = store.read(view)
            assert same(got, written.encode(written.cache.train, view)[0])
            assert got.labels.equal(written.labels["train"].to(got.labels.dtype))
            assert (got.prior is None) == about.record.dense
            assert got.prior is None or got.prior.equal(written.cache.prior)
        if name in CACHES:
            assert same(store.read_evaluation(), written.encode(written.cache.evaluation, 0)[0])
            assert np.array_equal(store.evaluation.labels, written.cache.evaluation.labels)
            assert store.finished and verify(store).passed
    assert tree(place / "unpacked" / "u") == tree(place / "c")  # to the byte, commits and all
    shutil.rmtree(place)


@pytest.mark.parametrize("k", [None, 4])
def test_h5py_alone_reads_the_arrays(tmp_path, k):
    cache = Filled(tmp_path / "c", identity(k=k, temperatures=(1.0, 4.0) if k else ())).cache
    hdf5_file(cache, tmp_path)
    with h5py.File(tmp_path / "c.h5") as f:
        assert bytes(f["identity.json"][:]) == (cache.path / "identity.json").read_bytes()
        for name in ("commits/v00001-p0002.json", "eval/commits/labels.json"):
            assert bytes(f[name][:]) == (cache.path / name).read_bytes()
        for store, name in cache.contents(cache.views):
            for where, spec, part in store.chunks(name):
                found = f["/".join(filter(None, ["" if store is cache.train else "eval", where, spec.name]))]
                assert (found.shape, found.dtype, found.chunks) == (spec.shape, spec.dtype, spec.chunk_shape)
                assert (found.compression, found.shuffle, found.fletcher32) == ("gzip", True, True)
                assert tuple(d.label for d in found.dims) == spec.dims
                assert dict(found.attrs).keys() == {"DIMENSION_LABELS", *dict(spec.attributes)}
                np.testing.assert_array_equal(found.fillvalue, spec.fill)
                rows = found[spec.interval(part)]
                if where:
                    records = cache.read(int(where[-5:])) if store is cache.train else cache.read_evaluation()
                    np.testing.assert_array_equal(rows, chunks.as_arrays(records)[spec.name][spec.interval(part)])
        np.testing.assert_array_equal(f["labels"][:], cache.train.labels)
        if k:
            np.testing.assert_array_equal(f["prior"][:], cache.prior.numpy())
            assert list(f["views/v00000/tail"].attrs["temperatures"]) == [1.0, 4.0]


def test_packing_twice_gives_the_same_bytes(toy, tmp_path):
    pack_hdf5(toy[0].cache, tmp_path / "again.h5", (0, 1))
    assert (tmp_path / "again.h5").read_bytes() == toy[1].read_bytes()
    # And packing what is packed.
    pack_hdf5(Cache(toy[1]), tmp_path / "third.h5", (0, 1))
    assert (tmp_path / "third.h5").read_bytes() == toy[1].read_bytes()


def test_chosen_views_are_all_there_is_and_the_prior_stays(tmp_path):
    written = Filled(tmp_path / "c", identity(), views=4)
    pack_hdf5(written.cache, tmp_path / "c.h5", choose_views(written.cache, range(2, 4)))
    cache = Cache(tmp_path / "c.h5")
    assert cache.views == (2, 3) and cache.finished and verify(cache).passed
    assert same(cache.read(3), written.cache.read(3)) and cache.prior.equal(written.cache.prior)
    with pytest.raises(e.NotFoundError, match=r"view 0 is not complete in .*c\.h5 .*kdcache unpack"):
        cache.read(0)
    assert cache.size() < written.cache.size()


def test_only_what_is_complete_is_packed(tmp_path):
    written = Filled(tmp_path / "c", identity(), views=2)
    cache = written.cache
    written.logits["train", 2] = written.draw(cache.train)
    written.write(cache.train, 2, 0)
    assert choose_views(cache, None) == (0, 1)
    for views in (range(2, 3), range(0, 4)):
        with pytest.raises(e.NotFoundError, match="has no complete view 2, but 2 others"):
            choose_views(cache, views)
    for name in ("commits/prior.json", "eval/commits/v00000-p0001.json"):
        kept = (cache.path / name).read_bytes()
        (cache.path / name).unlink()
        with pytest.raises(KdcacheError, match="run kdcache build again"):
            choose_views(Cache(cache.path), None)
        (cache.path / name).write_bytes(kept)


# ---- readers in other processes ----


def _sum(cache):
    return [float(r.gaps.float().sum()) for r in read_all(cache)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_cache_is_read_in_other_processes_at_once(toy, method):
    shards = [(view, part) for view in (0, 1) for part in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where threads are: those are meant here
        with ProcessPoolExecutor(2 if method == "fork" else 1, multiprocessing.get_context(method)) as processes:
            for cache in (toy[0].cache, Cache(toy[1])):
                want = [cache.train.check_shard(*shard) for shard in shards]
                futures = [processes.submit(cache.train.check_shard, *shard) for shard in shards]
                for found, shard in zip([f.result(100) for f in futures], want, strict=True):
                    assert found.keys() == shard.keys() and all(np.array_equal(found[n], shard[n]) for n in shard)


def test_threads_read_one_cache_at_once(toy):
    for cache in (toy[0].cache, Cache(toy[1])):
        want = _sum(cache)
        with ThreadPoolExecutor(8) as threads:
            assert all(found == want for found in threads.map(lambda _, c=cache: _sum(c), range(24)))


def test_a_packed_file_needs_no_right_to_write_and_may_lie_behind_a_link(packed, tmp_path):
    want = _sum(Cache(packed))
    packed.chmod(0o400)
    (tmp_path / "link.h5").symlink_to(packed)
    assert _sum(Cache(tmp_path / "link.h5")) == want


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


@pytest.mark.parametrize("kind", ["folder", "hdf5"])
def test_a_flipped_bit_is_found_or_harmless(toy, tmp_path, kind):
    if kind == "hdf5":
        path = Path(shutil.copy(toy[1], tmp_path / "c.h5"))
    else:
        path = Path(shutil.copytree(toy[0].cache.path, tmp_path / "c"))
    want, rng = read_all(Cache(path)), random.Random(4)
    read, messages = 0, []
    for _ in range(100 if kind == "hdf5" else 40):
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
                assert problem.startswith(f"{path} is not what was packed: copy it anew")
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


# ---- packing, interrupted and in another's way ----

# Each child packs (or unpacks) and kills itself before its n-th step, the parent looks at what is left.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from kdcache.cache import Cache
from kdcache.cache import packing
from kdcache.cache.store.hdf5 import Packer
from kdcache.cache.store.publish import SplitStore
place, what = Path(sys.argv[1]), sys.argv[2]
os.fsync = lambda fd: None  # takes most of the time, and what is killed here is not the machine
steps = {
    "pack": [
        (Packer, "rows"), (Packer, "put"), (Packer, "finish"), (packing.os, "link"), (packing.files, "sync_folder")
    ],
    "unpack": [(SplitStore, "write"), (SplitStore, "commit"), (packing.chunks, "encode_part")],
}[what]

def run():
    if what == "pack":
        return packing.pack_hdf5(Cache(place / "c"), place / "out.h5", (0, 1))
    return packing.unpack_hdf5(Cache(place / "c.h5"), place / "out")

def child(n):
    left = [n]
    for owner, name in steps:
        def step(*args, real=getattr(owner, name), **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(owner, name, step)
    run()
    os._exit(0)

killed = 0
for n in range(1, 1000, 4):
    pid = os.fork()
    if not pid:
        child(n)
    _, status = os.waitpid(pid, 0)
    if what == "pack":
        out, temporary = place / "out.h5", place / ".out.h5.packing"
        if out.exists():
            Cache(out).check_rest()
            assert Cache(out).views == (0, 1)
        if n % 3 == 1:
            run()
            assert not temporary.exists() and out.read_bytes() == (place / "c.h5").read_bytes()
            out.unlink()
        else:
            out.unlink(missing_ok=True)
    elif (place / "out/identity.json").exists():
        cache = Cache(place / "out")
        for view in cache.views:
            cache.train.read(view, None)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    killed += 1
run()
print(killed)
"""


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_killed_at_any_step_nothing_half_made_is_seen_and_the_next_run_ends_it(toy, tmp_path, what):
    written, file = toy
    shutil.copytree(written.cache.path, tmp_path / "c")
    shutil.copy(file, tmp_path / "c.h5")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > (8 if what == "pack" else 4)
    if what == "pack":
        assert (tmp_path / "out.h5").read_bytes() == file.read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.h5", "out.h5"]
    else:
        assert tree(tmp_path / "out") == tree(written.cache.path)


@pytest.mark.parametrize("steps", [1, 5, 25])
def test_stopped_by_the_user_packing_leaves_nothing(toy, tmp_path, steps):
    left = iter(range(steps))

    def stop(_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_hdf5(toy[0].cache, tmp_path / "c.h5", (0, 1), stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1000, 9000, 20_000])
def test_a_full_disk_is_one_error_that_names_the_file(toy, tmp_path, capfd, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            pack_hdf5(toy[0].cache, tmp_path / "c.h5", (0, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "c.h5")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")  # the HDF5 library prints what it cannot raise


def test_nothing_is_ever_overwritten(toy, tmp_path):
    cache, out = toy[0].cache, tmp_path / "c.h5"
    other = Filled(tmp_path / "other", identity(k=3)).cache
    pack_hdf5(cache, out, (0, 1))
    whole = out.read_bytes()
    assert pack_hdf5(cache, out, (0, 1)) is False
    for source, views in ((cache, (0,)), (other, (0, 1))):
        with pytest.raises(e.InputError, match="exists and holds something else: remove it, or give another --out"):
            pack_hdf5(source, out, views)
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"mine"):
        out.write_bytes(content)
        with pytest.raises(e.InputError, match="exists already: remove it, or give another --out"):
            pack_hdf5(cache, out, (0, 1))
        assert out.read_bytes() == content
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(e.InputError, match="exists already"):
        pack_hdf5(cache, tmp_path / "folder.h5", (0, 1))


def test_a_file_that_appears_meanwhile_is_kept(toy, tmp_path, monkeypatch):
    real = os.link
    monkeypatch.setattr(packing.os, "link", lambda a, b: (Path(b).write_bytes(b"mine"), real(a, b)))
    with pytest.raises(e.InputError, match="made by another process"):
        pack_hdf5(toy[0].cache, tmp_path / "c.h5", (0, 1))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("c.h5", b"mine")]


def test_two_packers_do_not_share_a_temporary_file(toy, tmp_path):
    def second(_):
        with pytest.raises(e.BusyError, match="another process is packing"):
            pack_hdf5(toy[0].cache, tmp_path / "c.h5", (0, 1))

    assert pack_hdf5(toy[0].cache, tmp_path / "c.h5", (0, 1), second)
    assert (tmp_path / "c.h5").read_bytes() == toy[1].read_bytes()


def test_what_a_killed_packer_left_is_not_written_into(toy, tmp_path):
    """Killed just after the last step, it leaves a second name of the finished file, which may have moved since."""
    moved = Path(shutil.copy(toy[1], tmp_path / "moved.h5"))
    (tmp_path / ".c.h5.packing").hardlink_to(moved)
    assert pack_hdf5(toy[0].cache, tmp_path / "c.h5", (0,))
    assert moved.read_bytes() == toy[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "moved.h5"]


def test_a_temporary_name_that_leads_elsewhere_is_not_followed(toy, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / ".c.h5.packing").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(OSError, match="symbolic links"):
        pack_hdf5(toy[0].cache, tmp_path / "c.h5", (0, 1))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_damaged_cache_is_not_packed(toy, tmp_path):
    shutil.copytree(toy[0].cache.path, tmp_path / "c")
    (chunk,) = (tmp_path / "c" / "views/v00001/gaps/c/1").iterdir()
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(e.CorruptError, match="is not what was committed"):
        pack_hdf5(Cache(tmp_path / "c"), tmp_path / "c.h5", (0, 1))
    shutil.copy(toy[0].cache.path / chunk.relative_to(tmp_path / "c"), chunk)
    commit = tmp_path / "c" / "commits/v00001-p0001.json"
    about = json.loads(commit.read_bytes())
    about["files"]["views/v00001/gaps/c/1/0"]["rows"] = "0" * 64
    commit.write_text(json.dumps(about))
    with pytest.raises(e.CorruptError, match="holds other rows than v00001-p0001"):
        pack_hdf5(Cache(tmp_path / "c"), tmp_path / "c.h5", (0, 1))
    assert not list(tmp_path.glob("*c.h5*"))


# ---- unpacking ----


def test_an_unpacked_cache_is_built_on(toy, tmp_path):
    store = unpacked(toy[0].cache, tmp_path)
    assert unpack_hdf5(Cache(tmp_path / "c.h5"), tmp_path / "u") == 0  # again: nothing to do
    more = Filled.__new__(Filled)
    more.__dict__ = {**toy[0].__dict__, "cache": store, "logits": dict(toy[0].logits)}
    more.logits["train", 2] = more.draw(store.train)
    for part in range(store.train.parts):
        more.write(store.train, 2, part)
    store.write_prior(WRITER)
    assert Cache(tmp_path / "u").views == (0, 1, 2) and verify(store).passed
    assert unpack_hdf5(Cache(tmp_path / "c.h5"), tmp_path / "u") == 0


def test_another_compressor_gives_other_commits_of_the_same_rows(toy, packed, tmp_path, monkeypatch):
    real = chunks.BloscCodec
    monkeypatch.setattr(chunks, "BloscCodec", lambda **options: real(**{**options, "cname": "lz4"}))
    changed = unpack_hdf5(Cache(packed), tmp_path / "u")
    assert changed == len(list(toy[0].cache.path.rglob("commits/*.json")))
    again = Cache(tmp_path / "u")
    assert verify(again).passed and again.key == toy[0].cache.key
    assert all(same(a, b) for a, b in zip(read_all(again), read_all(toy[0].cache), strict=True))
    assert unpack_hdf5(Cache(packed), tmp_path / "u") == changed


def test_unpacking_into_other_records_is_refused(toy, packed, tmp_path):
    Filled(tmp_path / "u", identity(part=16), seed=9)
    with pytest.raises(e.MismatchError, match=r"u(/eval)? has another labels than .*c\.h5"):
        unpack_hdf5(Cache(packed), tmp_path / "u")
    Filled(tmp_path / "v", identity(k=3))
    with pytest.raises(e.MismatchError, match=r"record\.k: the cache has 3, asked for 4"):
        unpack_hdf5(Cache(packed), tmp_path / "v")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "notes").touch()
    with pytest.raises(e.InputError, match="not empty and no cache"):
        unpack_hdf5(Cache(packed), tmp_path / "w")


def test_a_damaged_part_is_not_unpacked(packed, tmp_path):
    with h5py.File(packed) as f:
        place = f["views/v00001/gaps"].id.get_chunk_info_by_coord((16, 0)).byte_offset
    content = bytearray(packed.read_bytes())
    content[place + 12] ^= 1
    packed.write_bytes(content)
    with pytest.raises(e.CorruptError, match=r"views/v00001/gaps/c/1/0.*pack the cache again"):
        unpack_hdf5(Cache(packed), tmp_path / "u")
    assert not Cache(tmp_path / "u").train.has("v00001-p0001")
    assert Cache(tmp_path / "u").train.complete_views() == (0,)


def test_a_packed_cache_is_not_built_into(packed):
    before = packed.read_bytes()
    with pytest.raises(e.InputError, match=r"is a file where a folder is needed: .*kdcache unpack"):
        Cache.create(packed, identity(part=16))
    assert packed.read_bytes() == before


# ---- found by key ----


def test_a_packed_cache_is_found_by_its_key(toy, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    key, caches = toy[0].cache.key, tmp_path / "home" / "caches"
    caches.mkdir(parents=True)
    shutil.copy(packed, caches / f"{key}.h5")
    (caches / f".{key}.h5.packing").touch()
    (caches / f"{key}.beton").touch()
    assert open_cache(key[:8]).path == caches / f"{key}.h5"
    good, bad = list_caches()
    assert [c.packed for c in good] == [True] and bad == []
    shutil.copytree(toy[0].cache.path, caches / key)
    assert open_cache(key[:8]).path == caches / key
    good, bad = list_caches()
    assert [c.packed for c in good] == [False, True] and bad == []
    (caches / "other.h5").write_bytes(b"mine")
    assert len(list_caches()[1]) == 1


# ---- the command line ----

TEACHER = """
import numpy as np, torch
from torch import nn

def images(split):
    rng = np.random.default_rng(split == "train")
    labels = np.arange(150 if split == "train" else 40) % 5
    patterns = np.random.default_rng(2).integers(0, 256, (5, 8, 8, 3))
    noisy = patterns[labels] + rng.normal(0, 60, (len(labels), 8, 8, 3))
    return np.clip(noisy, 0, 255).astype("u1"), labels, tuple("abcde")

def net(classes):
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, classes))
"""


def run(line, status=0):
    result = CliRunner().invoke(main, shlex.split(line), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def test_build_pack_train_and_unpack(tmp_path, monkeypatch):
    (tmp_path / "kd_stores.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    data = "--data kd_stores:images"
    build = f"build --teacher kd_stores:net {data} --topk 3 --allow-low-accuracy --batch-size 32"
    facts = json.loads(run(f"{build} --views 3 --store hdf5 --out c --json").stdout)
    assert facts["packed"] | {"seconds": 0} == {
        "path": "c.h5", "key": facts["key"], "views": 3, "bytes": Path("c.h5").stat().st_size, "seconds": 0,
    }  # fmt: skip
    assert "holds these views already" in run("pack c --to hdf5").stderr
    few = json.loads(run("pack c --to hdf5 --views 1:3 --json").stdout)
    assert (few["path"], few["views"]) == ("c-views-1-3.h5", 2)
    assert "about" in run("pack c --to hdf5 --views 0:1 --out one.h5").stderr
    for views in ("3:3", "2", "a:b", "1:", "-1:2", "0:100001"):
        assert "is not a range A:B of views" in run(f"pack c --to hdf5 --views {views}", 2).stderr
    assert "no complete view 3" in run("pack c --to hdf5 --views 2:9", 2).stderr
    shutil.move("c", "away")

    assert json.loads(run("info c.h5 --json").stdout)["store"] == "hdf5"
    assert "3 complete" in run("info c.h5").stdout
    assert "passed" in run(f"verify c.h5 {data} --teacher kd_stores:net").stdout
    train = f"train --student resnet8 {data} --cache c.h5 --epochs 2 --batch-size 32 --out run --json"
    summary = json.loads(run(train).stdout)
    assert summary["top1"] == json.loads(run(f"eval run {data} --json").stdout)["top1"]
    assert "kdcache unpack c.h5" in run(f"{build} --views 4 --out c.h5", 2).stderr

    assert json.loads(run("unpack c.h5 --json").stdout)["views"] == 3
    again = json.loads(run(f"{build} --views 4 --json").stdout)
    assert (again["views"], again["teacher_images"]) == (4, 150) and again["key"] == facts["key"]
    shutil.copy("c.h5", tmp_path / "home" / "caches" / f"{facts['key']}.h5")
    assert run("ls").stdout.count("\n") == 2
    # A folder and its packed copy are one cache to choose from.
    run(f"train --student resnet8 {data} --epochs 1 --batch-size 32 --out second")
    assert "is a folder already" in run("unpack away", 2).stderr
    with Path("c.h5").open("r+b") as f:
        f.seek(600)
        f.write(b"damage")
    assert "is not what was packed" in run("verify c.h5 --depth contents", 1).stdout
