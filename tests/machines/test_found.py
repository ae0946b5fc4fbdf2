"""Sequences that machines found, in which something went wrong once; each is kept as it was found, but shorter."""

import shutil

import pytest

from kdcache.cache import Cache
from kdcache.pipeline.verify import verify
from kdcache.tests.machines.buckets import BucketWorld
from kdcache.tests.machines.folders import damage
from kdcache.tests.machines.processes import Fate
from kdcache.tests.machines.server import Server, served
from kdcache.tests.machines.world import VIEWS, World, toy


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with toy(tmp_path_factory.mktemp("toy")) as found:
        yield found


@pytest.fixture
def world(made, tmp_path):
    found = World(made, tmp_path)
    assert found.run("a", lambda: found.build(VIEWS)) == "done"
    return found


def test_a_folder_in_the_place_of_a_commit_is_no_end_of_repair(world):
    """verify --repair ended with IsADirectoryError."""
    damage(world.cache("a") / "commits" / "labels.json", "folder", 0, [], None)
    assert world.run("a", lambda: world.look("a", True)) == "done"
    world.heal("a", "a")


def test_a_commit_of_another_cache_is_no_end_of_repair(world, made):
    """verify --repair left it there, and build said to copy the cache again."""
    name = "eval/commits/labels.json"
    damage(world.cache("a") / name, "foreign", 0, [], made.other[name])
    world.heal("a", "a")


@pytest.mark.parametrize("name", ["leases", "scratch"])
def test_a_file_in_the_place_of_a_folder_of_builders_is_cleared_away(world, name):
    """Every build stopped there, as at an empty lease."""
    shutil.rmtree(world.cache("a") / name)
    (world.cache("a") / name).write_bytes(b"")
    world.heal("a", "a")
    assert len(Cache(world.cache("a")).views) == VIEWS


@pytest.mark.parametrize("step", [133, 250])
def test_nobody_waits_for_the_dead_until_a_clock_is_right_again(made, tmp_path, step):
    """A builder died, then the clock was set back: others waited for its lease for as many hours."""
    died = Fate("killed", step)
    world = World(made, tmp_path)
    assert world.run("a", lambda: world.build(2, "shared"), died) == "ended"
    assert list((world.cache("shared") / "leases").glob("*-p000?.0"))
    world.pass_time(-36_000.0)
    assert world.run("b", lambda: world.build(2, "shared")) == "done"


def test_nobody_waits_for_the_dead_of_a_bucket_either(made, tmp_path):
    server = Server()
    with served(server):
        world = BucketWorld(made, tmp_path, server)
        assert world.run("a", lambda: world.build(2, "shared"), Fate("killed", 178)) == "ended"
        assert [name for name in server.names("leases") if name.endswith("v00000-p0000.0")]
        world.pass_time(-36_000.0)
        assert world.run("b", lambda: world.build(2, "shared")) == "done"


def test_a_cache_with_a_folder_in_the_place_of_a_commit_is_removed(world):
    """rm ended with IsADirectoryError."""
    damage(world.cache("a") / "commits" / "labels.json", "folder", 0, [], None)
    assert world.run("a", lambda: world.remove("a")) == "done"
    assert not world.cache("a").exists()


def test_verify_of_a_cache_that_is_hardly_begun_says_to_build_it(made, tmp_path):
    """It said too that files were missing which the build makes, and not what helps."""
    world = World(made, tmp_path)
    begun = []
    for step in range(30, 90, 4):
        shutil.rmtree(world.cache("a"), ignore_errors=True)
        world.run("a", lambda: world.build(1), Fate("killed", step))
        if (world.cache("a") / "identity.json").exists():
            problems = verify(Cache(world.cache("a"))).problems
            assert all("run kdcache build again" in problem for problem in problems), problems
            begun.append(len(problems))
    assert max(begun) > 1
