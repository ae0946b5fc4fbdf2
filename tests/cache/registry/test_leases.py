"""Leases in a bucket: one builder has a shard, the dead are succeeded, and clocks of machines do not matter."""

import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kdcache.cache import care
from kdcache.cache import errors as e
from kdcache.cache.registry import leases as module
from kdcache.cache.registry.backends import open_objects
from kdcache.cache.registry.leases import ObjectLeases
from kdcache.cache.store import leases as store
from kdcache.pipeline.share import push
from kdcache.tests.helpers.caches import Filled
from kdcache.tests.helpers.registries import OLD, about, collect, quiet, refused, run

pytestmark = pytest.mark.usefixtures("impatient", "own_home")

KEY = about().key
NAME, OTHER = "v00000-p0001", "v00000-p0002"


@pytest.fixture
def objects(bucket, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    return open_objects(bucket)


def builder(objects, token=None, say=quiet):
    return ObjectLeases(objects, KEY, token or secrets.token_hex(8), say)


def leave(objects, token, lease=NAME, **changed):
    """What a builder leaves that dies; `changed` of it may be untrue."""
    gone = builder(objects, token)
    gone._owner = gone._owner.model_copy(update=changed)
    gone._content = store.canonical(gone._owner)
    gone._touch()
    assert gone.take(lease)
    return gone


def there(objects):
    return set(objects.times("leases"))


@pytest.fixture
def age(objects, monkeypatch):
    """Tells the server's times as if signs of life of some tokens were so many seconds older than they are."""
    ages, times = {}, objects.times

    def older(folder):
        return {path: made - ages.get(path.partition(".json")[0], 0) for path, made in times(folder).items()}

    monkeypatch.setattr(objects, "times", older)
    return ages


def test_of_many_that_want_a_shard_at_once_one_gets_it_and_after_its_death_one_succeeds(objects, age):
    builders = [builder(objects, f"b{i}") for i in range(16)]
    for one in builders:
        one._touch()
    for turn in range(3):
        at_once = threading.Barrier(len(builders))

        def take(one, at_once=at_once):
            at_once.wait()
            return one.take(NAME)

        with ThreadPoolExecutor(len(builders)) as threads:
            won = [one for one, done in zip(builders, threads.map(take, builders), strict=True) if done]
        assert len(won) == 1 and not won[0].lost(NAME)
        holders = [one.holder(NAME) for one in builders]
        assert {holder.token for holder in holders} == {won[0]._owner.token}
        assert {name for name in there(objects) if NAME in name} == {f"{KEY}/{NAME}.{turn}"}
        builders.remove(won[0])
        age[won[0]._owner.token] = 1000


def test_who_is_dead_is_told_by_the_servers_clock_alone_or_by_the_end_of_its_process(objects, age, monkeypatch):
    elsewhere = {"machine": "another", "process": 2**31 - 1}
    for i, (changed, seconds, free) in enumerate(
        [
            ({}, 0, False),
            ({}, 40, False),
            ({}, 70, True),  # stopped, perhaps
            ({"process": 2**31 - 1}, 0, True),  # of this machine
            ({"started": 1}, 0, True),
            (elsewhere, 40, False),
            (elsewhere, 70, True),
            ({**elsewhere, "seconds": 5.0}, 10, True),
            ({**elsewhere, "seconds": 500.0}, 450, False),
        ]
    ):
        lease = f"v{i:05d}-p0000"
        leave(objects, f"first{i}", lease, **changed)
        age[f"first{i}"] = seconds
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 4e9)
            with builder(objects) as second:
                assert second.take(lease) == free, (changed, seconds)
                assert second.holder(lease).token == (second._owner.token if free else f"first{i}")
                assert (f"first{i}" in [owner.token for owner in second.others()]) != free
                before = there(objects)
                second.clear()
                gone = {f"{KEY}/first{i}.json"} if free else set()
                assert before - there(objects) == gone
    living = {f"{KEY}/first{i}.json" for i in (0, 1, 5, 8)} | {f"{KEY}/v0000{i}-p0000.0" for i in (0, 1, 5, 8)}
    assert there(objects) == living


def test_a_builder_that_was_frozen_notices_and_is_in_nobodys_way(objects, age):
    said = []
    first = builder(objects, "first", said.append)
    first._touch()
    assert first.take(NAME) and first.take(OTHER) and first.take(NAME)  # its own it keeps
    age["first"] = 1000
    with builder(objects, "second") as second:
        assert second.take(NAME)
        second.clear()
        assert there(objects) == {f"{KEY}/second.json", f"{KEY}/{NAME}.1"}
        age.clear()
        assert first._renew() == [NAME, OTHER]
        first.release(NAME)
        assert second.holder(NAME).token == "second" and not second.lost(NAME) and second._renew() == []
        assert not first.take(NAME) and first.take(OTHER)
    assert there(objects) == {f"{KEY}/first.json", f"{KEY}/{OTHER}.0"}


def test_a_lease_that_its_owner_gives_back_while_it_is_taken_over_is_left_alone(objects, age, monkeypatch):
    first = leave(objects, "first")
    age["first"] = 1000
    with builder(objects) as second:
        make = second._make
        monkeypatch.setattr(second, "_make", lambda lease: (first.release(NAME), make(lease))[1])
        assert not second.take(NAME) and not any(NAME in name for name in there(objects))
        monkeypatch.undo()
        assert second.take(NAME)


def test_a_builder_says_so_when_it_loses_a_lease_or_cannot_reach_the_bucket_and_leaves_at_once(objects, monkeypatch):
    monkeypatch.setattr(store, "EXPIRES", 0.2)
    said, reached, replace = [], [True], objects.replace

    def unreachable(*args):
        if not reached[0]:
            raise e.UnreadableError("s3://there: no route: check the network, then run the same command again")
        return replace(*args)

    monkeypatch.setattr(objects, "replace", unreachable)
    with builder(objects, say=said.append) as mine:
        assert mine.take(NAME) and mine.take(OTHER)
        objects.remove([f"leases/{KEY}/{NAME}.0"])
        until = time.monotonic() + 5
        while not (mine.lost(NAME) and said) and time.monotonic() < until:
            time.sleep(0.02)
        reached[0] = False
        while len(said) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        # Neither is anything removed now: what is left expires.
        monkeypatch.setattr(objects, "remove", lambda *a: unreachable())
        monkeypatch.setattr(objects, "read", unreachable)
    assert said[0].startswith(f"lost the lease of {NAME} (0.2 s without a sign of life)")
    assert said[1:] == ["s3://there: no route: other builds may take this one for dead, and do its work"]
    assert there(objects) == {f"{KEY}/{mine._owner.token}.json", f"{KEY}/{OTHER}.0"}


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 9999])
def test_a_lease_that_is_none_is_nobodys_and_is_taken_over(objects, content):
    for name in (f"{NAME}.0", "dead.json"):
        objects.create(f"leases/{KEY}/{name}", content)
    with builder(objects) as mine:
        assert mine.others() == [] and mine.holder(NAME) is None
        assert mine.take(NAME) and mine.holder(NAME) == mine._owner
        mine.clear()
        assert there(objects) == {f"{KEY}/{mine._owner.token}.json", f"{KEY}/{NAME}.1"}


def test_gc_finds_what_builders_left_in_a_bucket_after_an_hour(objects, bucket, monkeypatch):
    leave(objects, "first")
    leave(objects, "dead", OTHER, process=2**31 - 1)
    objects.create("leases/abc", b"kdcache")
    line = f"gc --registry {bucket}"
    assert collect(line)["found"] == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + OLD)
    found = collect(line)["found"]
    assert {one["path"] for one in found} == {f"{bucket}/leases/{KEY}", f"{bucket}/leases/abc"}
    assert {one["why"] for one in found} == {"left by builders that have died"} and all(one["bytes"] for one in found)
    assert run(f"{line} --delete").exit_code == 0
    assert there(objects) == {f"{KEY}/first.json", f"{KEY}/{NAME}.0"}  # it lives by the server's clock


def test_a_cache_that_somebody_builds_in_a_bucket_or_pushes_is_not_removed(objects, bucket, tmp_path, monkeypatch):
    """What was put there after the removal had begun would stay, as commits of chunks that are gone."""
    create, met = type(objects).create, []

    def removed(self, path, data):
        if path.endswith("commits/labels.json"):
            with pytest.raises(e.BusyError, match="is being built or pushed by"):
                care.remove(*care.find(KEY, bucket))
            met.append(path)
        return create(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(type(objects), "create", removed)
        push(Filled(tmp_path / "built", about()).cache.path, bucket, say=quiet)
    assert len(met) == 2 and there(objects) == set()
    with builder(objects, "other"):
        refused(f"rm {KEY} --registry {bucket} --yes", f"{bucket}/caches/{KEY} is being built or pushed by")
    leave(objects, "dead", process=2**31 - 1)
    assert run(f"rm {KEY} --registry {bucket} --yes").exit_code == 0
    assert there(objects) == set() and objects.sizes("caches") == {}
