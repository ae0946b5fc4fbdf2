"""What is removed is what was listed or named, and nothing that anybody uses; a stopped removal is finished."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import click.testing
import numpy as np
import pytest

from kdcache.cache import Cache, KdcacheError, care, files, open_cache
from kdcache.cache import errors as e
from kdcache.cache.home import caches_folder, home, open_registry
from kdcache.cli import main
from kdcache.pipeline.build.spool import Spool, spool_folder
from kdcache.pipeline.share import pull, push
from kdcache.tests.helpers.caches import Filled
from kdcache.tests.helpers.registries import OLD, about, age, collect, quiet, refused, run

pytestmark = pytest.mark.usefixtures("impatient", "own_home")


@pytest.fixture
def mine():
    """A cache under KDCACHE_HOME."""
    identity = about()
    return Filled(caches_folder() / identity.key, identity).cache


def tree(*tops):
    """Everything below: what it is, its bytes, when it was changed."""
    found = {}
    for path in (p for top in tops for p in [top, *top.rglob("*")]):
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path)] = (content, path.lstat().st_mtime_ns)
    return found


def spooled(path, key, name):
    """What a build that was killed leaves of one shard."""
    with contextlib.closing(Spool(spool_folder(path, key) / name, 12)) as spool:
        spool.add({"gaps": np.zeros((3, 2))}, None)
        spool._sync()
        return spool._folder


# ---- rm ----


def test_rm_removes_the_cache_and_nothing_else(mine, tmp_path, monkeypatch):
    packed = tmp_path / "c.h5"
    run(f"pack {mine.key[:8]} --to hdf5 --out {packed}")
    other = Filled(tmp_path / "other", about(k=3)).cache
    before = tree(other.path)
    assert json.loads(run(f"rm {mine.key[:8]} --yes --json").stdout)["key"] == mine.key
    assert not mine.path.exists() and packed.exists()
    run(f"rm {packed} --yes")
    assert not packed.exists() and tree(other.path) == before
    monkeypatch.chdir(other.path)
    run("rm . --yes")
    assert not other.path.exists()


def test_rm_asks_first(mine, monkeypatch):
    before = tree(mine.path)
    refused(f"rm {mine.key}", "give --yes")
    monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda self: True, raising=False)
    asked = click.testing.CliRunner().invoke(main, ["rm", mine.key], input="n\n")
    assert asked.exit_code == 1 and "nothing was removed" in asked.stderr
    assert f"Remove {mine.path} ({mine.key[:12]}  toy:teacher on toy (21), crop,flip, 2 views" in asked.stderr
    assert tree(mine.path) == before
    assert click.testing.CliRunner().invoke(main, ["rm", mine.key], input="y\n").exit_code == 0
    assert not mine.path.exists()


def test_rm_refuses_what_is_no_cache(mine, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"a")
    wrong = caches_folder() / ("0" * 64)
    Filled(tmp_path / "c", about(k=3)).cache.path.rename(wrong)
    (tmp_path / "link").symlink_to(mine.path)
    before = tree(tmp_path / "photos", caches_folder())
    refused(f"rm {tmp_path / 'photos'} --yes", "not a kdcache cache")
    refused(f"rm {wrong.name} --yes", "but is named after another")
    refused(f"rm {tmp_path / 'link'} --yes", "symbolic link")
    assert tree(tmp_path / "photos", caches_folder()) == before
    (mine.path / "thesis.tex").write_text("x")
    refused(f"rm {mine.key} --yes", "thesis.tex, which is no part of a cache")
    assert (mine.path / "thesis.tex").exists() and Cache(mine.path).views == (0, 1)


@pytest.mark.parametrize("name", ["commits", "eval", "eval/commits", "views", "views/v00001", "scratch", "labels/c"])
def test_rm_touches_nothing_behind_a_link(mine, tmp_path, name):
    there = tmp_path / "elsewhere"
    if (mine.path / name).exists():
        (mine.path / name).rename(there)
    else:
        there.mkdir()
    (there / "mine.txt").write_text("x")
    (mine.path / name).symlink_to(there)
    before = tree(there)
    if name == "scratch":
        refused(f"rm {mine.key} --yes", "symbolic link")
    else:
        assert run(f"rm {mine.key} --yes").exit_code == 0 and not mine.path.exists()
    assert tree(there) == before


def test_rm_and_gc_leave_a_live_builder_alone(mine):
    with mine.writing():
        (mine.path / "scratch/x").mkdir()
        age(mine.path / "scratch/x")
        refused(f"rm {mine.key} --yes", "is being built or pushed by")
        assert Cache(mine.path).views == (0, 1)
        assert collect("gc --delete")["found"] == [] and (mine.path / "scratch/x").exists()
    assert run(f"rm {mine.key} --yes").exit_code == 0


def test_rm_that_is_stopped_anywhere_shows_no_corrupt_cache_and_is_finished(tmp_path, monkeypatch):
    """By every step at which it can stop; so far as the cache is still there, it is a sound one with fewer views."""
    unlink, rmtree = Path.unlink, files.shutil.rmtree
    for stop in range(200):
        cache, steps = Filled(tmp_path / "c", about()).cache, iter(range(stop))

        def step(do, path, steps=steps, **options):
            if Path(path).parent.name != "leases" and "scratch" not in str(path) and next(steps, None) is None:
                raise KeyboardInterrupt
            do(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda path, step=step, **o: step(unlink, path, **o))
            patch.setattr(files.shutil, "rmtree", lambda path, step=step, **o: step(rmtree, path, **o))
            with contextlib.suppress(KeyboardInterrupt):
                care.remove(cache)
        if not cache.path.exists():
            break
        left = Cache(cache.path)
        for view in left.views:
            left.read(view)
        if 0 in left.evaluation.complete_views():
            left.read_evaluation()
        care.remove(care.find(str(cache.path))[0])
        assert not cache.path.exists()
    assert stop > 15


def _die_removing(path):
    rmtree = files.shutil.rmtree

    def die(folder, **options):
        if Path(folder).name == "views":
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(folder, **options)

    files.shutil.rmtree = die
    care.remove(Cache(path))


def test_rm_that_is_killed_is_finished_by_another(mine):
    process = multiprocessing.get_context("fork").Process(target=_die_removing, args=(mine.path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert Cache(mine.path).views == () and (mine.path / "views").exists()
    assert run(f"rm {mine.key} --yes").exit_code == 0 and not mine.path.exists()


def test_rm_in_a_registry(mine, root):
    push(mine.path, root, name="best", say=quiet)
    shared = open_registry(root)
    open_cache("best", root)
    shared.cache(mine.key)  # is seen, so that an older state would be refused
    refused(f"rm best --registry {root} --yes", "first run kdcache rm --name best")
    refused(f"rm --name other --registry {root} --yes", "no cache named other")
    assert json.loads(run(f"rm --name best --registry {root} --yes --json").stdout)["name"] == "best"
    assert open_registry(root).names == {} and shared.has(mine.key)
    assert "by " in run(f"rm {mine.key} --registry {root} --yes").stdout
    assert shared.keys() == [] and shared.objects.sizes(f"caches/{mine.key}") == {}
    assert Cache(mine.path).views == (0, 1)  # what is here stays
    push(mine.path, root, say=quiet)
    assert shared.cache(mine.key).views == (0, 1)


def test_a_registry_of_the_settings_is_not_removed_from(mine, tmp_path):
    push(mine.path, str(tmp_path / "shared"), say=quiet)
    run(f"rm {mine.key} --yes", KDCACHE_REGISTRY=str(tmp_path / "shared"))
    assert not mine.path.exists()
    again = run(f"rm {mine.key} --yes", KDCACHE_REGISTRY=str(tmp_path / "shared"))
    assert again.exit_code == 2 and open_registry(str(tmp_path / "shared")).has(mine.key)


# ---- gc ----


def test_gc_lists_changing_nothing_then_removes_exactly_that(mine, tmp_path):
    shared = tmp_path / "shared"
    push(mine.path, str(shared), name="best", say=quiet)
    unnamed, young = (Filled(tmp_path / f"c{k}", about(k=k)).cache for k in (2, 3))
    for cache in (unnamed, young):
        push(cache.path, str(shared), say=quiet)
    for key in (mine.key, unnamed.key):
        age(shared / "caches" / key)
    registry = open_registry(str(shared))
    registry.cache(mine.key)
    mirror = registry.mirrors()[0].parent
    (mirror / ("1" * 64)).mkdir()
    (mirror / ("1" * 64) / "seen.json").write_text("[]")
    shutil.rmtree(mine.path / "scratch")
    (mine.path / "leases").mkdir()
    (mine.path / "scratch/dead").mkdir(parents=True)
    (mine.path / "scratch/dead/half").write_bytes(b"12345")
    age(mine.path)
    old = [spooled(mine.path, mine.key, "v00000-p0000-b8"), spooled(tmp_path / "gone", mine.key, "v00000-p0000-b8")]
    kept = [spooled(mine.path, mine.key, "v00009-p0000-b8"), spooled(tmp_path / "late", mine.key, "v00000-p0000-b8")]
    for folder in (*old, kept[0]):
        age(folder)
    age(kept[1], 2 * care.HOUR)
    chunks = home() / "remote/chunks/ab"
    chunks.mkdir(parents=True)
    for i in range(4):
        (chunks / f"{i}").write_bytes(bytes(1000))
        age(chunks / f"{i}", 100 - i)
    for seconds in (10, OLD):
        for folder in (home(), shared / "scratch"):
            folder.mkdir(exist_ok=True)
            (folder / f".x.{seconds:016.0f}.tmp").write_bytes(b"123")
            age(folder / f".x.{seconds:016.0f}.tmp", seconds)
    temporary = [folder / f".x.{OLD:016.0f}.tmp" for folder in (home(), shared / "scratch")]
    gone = [mine.path / "scratch/dead", *old, mirror / ("1" * 64), shared / "caches" / unnamed.key, *temporary]
    gone += [chunks / "0", chunks / "1"]

    before = tree(home(), shared)
    listed = collect(f"gc --registry {shared} --local-store-size 2500")
    assert tree(home(), shared) == before and listed["freed"] == 0
    shown = {one["path"] for one in listed["found"]}
    named = {f"{mine.path}/{{leases,scratch}}", str(chunks.parent), *map(str, gone[1:-2])}
    assert shown == named
    sizes = sum(len(content) for path, (content, _) in before.items() if content and _below(path, gone))
    assert listed["bytes"] == sizes

    done = collect(f"gc --registry {shared} --local-store-size 2500 --delete")
    assert done["freed"] == sizes and all(one["kept"] is None for one in done["found"])
    after = {path: what[0] for path, what in tree(home(), shared).items()}
    lost = {path for path in before if not _below(path, gone)} - after.keys() - {str(old[1].parent)}  # empty now
    made = {path for path in after.keys() - before.keys() if Path(path).name != "lock"}
    assert not lost and not made and not any(path.exists() for path in gone)
    assert all(after[path] == before[path][0] for path in after.keys() & before.keys())
    assert collect(f"gc --registry {shared} --local-store-size 2500")["found"] == []


def _below(path, tops):
    return any(Path(path).is_relative_to(top) for top in tops)


def test_gc_leaves_a_spool_that_is_in_use(mine):
    with contextlib.closing(Spool(spool_folder(mine.path, mine.key) / "v00000-p0000-b8-cpu", 12)) as spool:
        age(spool._folder)
        found = collect("gc --delete")["found"]
        assert [one["path"] for one in found] == [str(spool._folder)] and "in use" in found[0]["kept"]
        assert spool._folder.exists()


def test_gc_in_a_registry_asks_again_before_it_removes(mine, root, monkeypatch):
    """Someone may have named the cache, or added to it, or be building it, since it was listed."""
    push(mine.path, root, say=quiet)
    shared = open_registry(root)
    assert list(care.leavings(0, root)) == []  # younger than an hour
    monkeypatch.setattr(care, "HOUR", -60)
    (one,) = care.leavings(-1, root)
    shared.give_name("best", mine.key, False)
    assert "best" in care.gc([one], True)["found"][0]["kept"]
    assert list(care.leavings(-1, root)) == []
    shared.remove_name("best")
    assert list(care.leavings(1, root)) == []
    with pytest.raises(e.BusyError, match="just now"):
        care._remove_old(shared.open(mine.key), shared, 0.0)
    assert care.gc([one], True)["freed"] == one.bytes > 0 and shared.keys() == []


def test_gc_trusts_no_damaged_name_and_no_missing_registry(mine, tmp_path):
    shared = tmp_path / "shared"
    push(mine.path, str(shared), name="best", say=quiet)
    (shared / "names/best").write_text("{")
    age(shared)
    refused(f"gc --registry {shared} --delete", "names/best")
    assert open_registry(str(shared)).has(mine.key)
    refused(f"gc --registry {tmp_path / 'nowhere'}", "is it mounted?")
    with pytest.raises(KdcacheError, match="can only be read"):
        list(care.leavings(30, "http://127.0.0.1:9/kd"))


def _die_writing(what, times):
    """Ends this process by SIGKILL once it has written so many temporary files."""
    write, left = files.write, [times]

    def dies(path, data):
        write(path, data)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    files.write = dies
    what()


@pytest.mark.parametrize("into", ["push", "pull", "group"])
def test_gc_takes_what_killed_pushes_and_pulls_leave(tmp_path, mine, into, monkeypatch):
    """Killed at one of their first files, which come before the identity, or later."""
    shared, left = tmp_path / "shared", 0
    if into == "group":
        shared.mkdir()
        shared.chmod(0o2775)
    if into == "pull":
        push(mine.path, str(shared), name="best", say=quiet)
    for times in (1, 2, 3, 12):
        if into == "pull":
            monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / f"home{times}"))
            move = partial(pull, mine.key, str(shared), say=quiet)
        else:
            move = partial(push, mine.path, str(shared), name="best", say=quiet)
        process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(move, times))
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        left += len(_temporaries(home(), shared))
        age(home()), age(shared)
        found = list(care.leavings(60, str(shared)))
        assert all(one["kept"] is None for one in care.gc(found, True)["found"])
        assert _temporaries(home(), shared) == [] and list(care.leavings(60, str(shared))) == []
    assert left
    move()
    assert open_registry(str(shared)).cache(mine.key).views == Cache(caches_folder() / mine.key).views == (0, 1)


def _temporaries(*tops):
    return [path for top in tops for path in top.rglob(".*.tmp")]
