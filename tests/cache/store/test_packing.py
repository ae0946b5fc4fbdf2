"""Packing a cache into a file and back: interrupted, in another's way, and by another compressor."""

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import h5py
import pytest

from kdcache.cache import Cache
from kdcache.cache import errors as e
from kdcache.cache import packing as packing
from kdcache.cache.packing import pack_hdf5, unpack_hdf5
from kdcache.cache.store import chunks
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.caches import BOTH, WRITER, Filled, identity, same
from kdcache.tests.helpers.stores import read_all, tree, unpacked

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


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
for n in range(1, 1000, int(sys.argv[3])):
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


@pytest.mark.parametrize(
    ("toy", "what", "step"),
    [("format-1", "pack", 4), ("format-1", "unpack", 4), (BOTH[1], "unpack", 29)],
    indirect=["toy"],
)
def test_killed_at_any_step_nothing_half_made_is_seen_and_the_next_run_ends_it(toy, tmp_path, what, step):
    written, file = toy
    shutil.copytree(written.cache.path, tmp_path / "c")
    shutil.copy(file, tmp_path / "c.h5")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, str(tmp_path), what, str(step)]
    done = warm.run(command, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > (8 if what == "pack" else 4) * 4 / step
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
    with pytest.raises(e.CorruptError, match="holds other rows than its commit, v00001-p0001"):
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
    with pytest.raises(e.InputError, match="not empty and is no cache"):
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
