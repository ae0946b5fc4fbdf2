"""A folder shared by a group: its members work in it under any umask, and others read or are refused."""

import contextlib
import multiprocessing
import os
import shlex
import stat
import traceback

import pytest
from click.testing import CliRunner

from kdcache.cache import Cache, open_cache
from kdcache.cache.files import make_folder
from kdcache.cli import main
from kdcache.pipeline.share import push
from kdcache.tests.helpers.caches import Filled, identity, same

GROUP = 64200
ANNA, BEN, CARL = 64201, 64202, 64203  # the first two are in the group
KEPT_TO_ONESELF, USUAL = 0o077, 0o022  # umasks
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def root(tmp_path):
    """As docs/sharing.md sets it up."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2775)
    if os.geteuid() == 0:
        os.chown(folder, 0, GROUP)
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == os.geteuid() and above != above.parent:
            above.chmod(above.stat().st_mode | 0o755)
    return folder


@pytest.fixture
def toy(tmp_path, one_thread):
    """Each user's own copy of a cache with 3 views."""
    return Filled(tmp_path / "toy", identity(), views=3)


def be(user, umask, work, result):
    try:
        os.setgroups([GROUP] if user in (ANNA, BEN) else [])
        os.setgid(user)
        os.setuid(user)
        os.umask(umask)
        result.send((True, work()))
    except BaseException:
        result.send((False, traceback.format_exc()))


def by(user, umask, work):
    """What `work` gives in a process of that user."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=be, args=(user, umask, work, theirs))
    process.start()
    worked, result = ours.recv()
    process.join()
    assert worked, result
    return result


def command(line, home):
    def work():
        os.environ["KDCACHE_HOME"], os.environ["USER"] = str(home), f"user{os.getuid()}"
        done = CliRunner().invoke(main, shlex.split(line), catch_exceptions=False)
        return done.exit_code, done.output

    return work


def modes(root):
    return {path: stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*")}


@pytest.mark.parametrize("umask", [USUAL, KEPT_TO_ONESELF])
def test_what_is_pushed_is_the_groups_whatever_the_umask(root, toy, umask):
    before = os.umask(umask)
    try:
        push(toy.cache.path, str(root), name="toy-v1", say=lambda line: None)
    finally:
        os.umask(before)
    others = 0o005 & ~umask
    assert {mode for path, mode in modes(root).items() if path.is_dir()} == {0o2770 | others}
    assert {mode for path, mode in modes(root).items() if path.is_file()} == {0o660 | others & 0o004}


def test_elsewhere_the_umask_counts(tmp_path, toy):
    plain = tmp_path / "plain"
    plain.mkdir(0o700)
    push(toy.cache.path, str(plain / "kd"), say=lambda line: None)
    assert not any(mode & stat.S_IWGRP for mode in modes(plain).values())


@as_root
@pytest.mark.parametrize("umask", [USUAL, KEPT_TO_ONESELF])
def test_two_members_push_one_cache(root, toy, tmp_path, umask):
    """Each some of its views; a name is given by one and moved by the other; both read and verify all of it."""
    homes = {}
    for user in (ANNA, BEN):
        homes[user] = tmp_path / f"home{user}"
        homes[user].mkdir()
        os.chown(homes[user], user, user)
    line = f"push {toy.cache.path} --registry {root}"
    for user, more in [(ANNA, "--views 0:1 --name toy"), (BEN, "--views 0:3 --name toy"), (ANNA, "--views 0:3")]:
        assert by(user, umask, command(f"{line} {more}", homes[user]))[0] == 0
    for user in (ANNA, BEN):
        code, said = by(user, umask, command(f"verify --depth contents {root}/caches/{toy.cache.key}", homes[user]))
        assert code == 0, said
    assert same(open_cache(root / "caches" / toy.cache.key).read(2), toy.cache.read(2))


class Died(Exception):
    pass


@as_root
@pytest.mark.parametrize("umask", [USUAL, KEPT_TO_ONESELF])
def test_what_one_has_decided_another_finishes(root, toy, umask):
    """Anna's builder dies with a shard decided; Ben's puts her files in their places and commits them."""
    path = root / "caches" / toy.about.key
    mine = toy.cache.train

    def decide():
        make_folder(path)
        store = Cache.create(path, toy.about).train
        rows, shard = mine.rows(0), mine.read_shard(1, 0)

        def die(name, just_written):
            raise Died

        store.finish = die
        with contextlib.suppress(Died):
            store.write_shard(1, 0, shard, "of view 1", {"host": "anna's"})
        return store.decided(), len(rows)

    def finish():
        cache = Cache(path)
        with cache.writing():
            pass
        return cache.train.decided(), cache.train.has("v00001-p0000")

    assert by(ANNA, umask, decide)[0] == ["v00001-p0000"]
    assert by(BEN, umask, finish) == ([], True)
    theirs, ours = Cache(path).train.read_shard(1, 0), mine.read_shard(1, 0)
    assert all((theirs[name] == ours[name]).all() for name in ours)


@as_root
def test_who_is_not_in_the_group_reads_or_is_told(root, toy, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, CARL, CARL)
    push(toy.cache.path, str(root), say=lambda line: None)
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    line = f"verify --depth contents {root}/caches/{toy.cache.key}"
    assert by(CARL, USUAL, command(line, home))[0] == 0
    assert by(CARL, USUAL, command(f"pull {toy.cache.key} --registry {root}", home))[0] == 0
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before
    for refused in (f"push {toy.cache.path} --name mine", f"rm {toy.cache.key} --yes"):
        code, said = by(CARL, USUAL, command(f"{refused} --registry {root}", home))
        assert code == 2 and len(said.strip().splitlines()) == 1 and "ermission" in said, said
    (root / "caches").chmod(0o2770)
    code, said = by(CARL, USUAL, command(line, home))
    assert code == 2 and len(said.strip().splitlines()) == 1 and "ermission" in said, said
