"""Several builders of one cache share the work, whoever dies, stops or looks on."""

import json
import os
import shutil
import signal
import socket
import time
from dataclasses import replace

import pytest

from kdcache.cache import Cache, open_cache
from kdcache.cache.home import list_caches
from kdcache.cache.store import leases
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build import builder
from kdcache.pipeline.build.build import build
from kdcache.pipeline.info import describe, facts, one_line
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.verify import verify
from kdcache.tests.helpers.building import (
    MIXED,
    as_json,
    content,
    ended_well,
    equal,
    quiet,
    settings,
    spooled,
    start_build,
)

pytestmark = pytest.mark.usefixtures("home")


def test_a_build_that_was_overtaken_computes_nothing_again(tmp_path, reference, source, monkeypatch):
    create, path = Cache.create.__func__, tmp_path / "c"

    def overtaken(cls, *args):
        monkeypatch.undo()
        build(settings(out=str(path), views=1), quiet, source)
        return create(cls, *args)

    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Cache, "create", classmethod(overtaken))
    assert build(settings(out=str(path)), quiet, source).teacher_images == 150
    assert content(path) == content(reference)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("changes", "rounds"), [({}, 3), (MIXED, 2)], ids=["format-1", "mixed-and-spread"])
def test_builders_share_the_work_though_one_is_killed_and_one_stopped(toy, tmp_path, changes, rounds):
    """Four at once; in the later rounds one dies and one is stopped until others have taken over, then goes on."""
    script = """
from kdcache.cache.store import chunks, leases
leases.EXPIRES = 1.0
answer = Teacher.logits
def slow(*args):
    time.sleep(0.02)
    return answer(*args)
Teacher.logits = slow
folder, rng = Path(sys.argv[2]), random.Random(1)
for i in range(int(sys.argv[3])):
    place = folder / str(i)
    place.mkdir()
    moments = rng.randrange(20, 90), rng.randrange(20, 90)
    def work(me):
        if i and me < 2:
            killed_at(moments[me], (signal.SIGKILL, signal.SIGSTOP)[me])
        run(place / "cache", place / str(me))
    children = [in_child(lambda: work(me)) for me in range(4)]
    codes = [ended(child) for child in (children[0], *children[2:])]  # who do not wait for the one that has stopped
    os.kill(children[1], signal.SIGCONT)
    codes.append(ended(children[1]))
    print(json.dumps(codes))
"""
    env = {"KDCACHE_HOME": tmp_path / "home"}
    with start_build(toy, script, as_json(settings(views=3, **changes)), tmp_path, rounds, **env) as process:
        codes = [json.loads(line) for line in ended_well(process).splitlines()]
    assert codes == [[0, 0, 0, 0], *(rounds - 1) * [[-signal.SIGKILL, 0, 0, 0]]]
    want = content(tmp_path / "0" / "cache")
    for i in range(rounds):
        computed = [json.loads(p.read_text()) for p in (tmp_path / str(i)).glob("[0-3]")]
        assert len(computed) == (4 if i == 0 else 3)
        assert (sum(computed) == 40 + 3 * 150) if i == 0 else sum(computed) <= 2 * (40 + 3 * 150)
        assert sum(n > 0 for n in computed) >= 2
        assert content(tmp_path / str(i) / "cache") == want
        assert verify(Cache(tmp_path / str(i) / "cache")).passed
    assert spooled(tmp_path) == []


def test_readers_beside_a_build_see_what_is_committed_and_no_errors(tmp_path, reference, source, monkeypatch):
    path, write, seen = tmp_path / "home" / "caches" / source.identity.key, SplitStore.write_shard, []

    def look():
        cache = open_cache(source.identity.key)
        line = one_line(cache).rpartition(",")[0]  # the size may grow meanwhile, as the build goes on
        assert [c.key for c in list_caches()[0]] == [cache.key] and describe(cache, facts(cache)).startswith(line)
        assert not any("remove" in problem for problem in verify(cache).problems)
        for view in cache.train.complete_views():
            assert equal(cache.train.read(view, None), replace(Cache(reference).read(view), prior=None))
        seen.append(len(cache.views))

    def watched(self, *args):
        look()
        assert write(self, *args)
        look()

    monkeypatch.setattr(SplitStore, "write_shard", watched)
    build(settings(), quiet, source)
    assert content(path) == content(reference) and set(seen) == {0, 1, 2}


def test_a_build_that_is_interrupted_gives_its_leases_back(tmp_path, source, monkeypatch):
    path, answers, answer = tmp_path / "c", [], Teacher.logits

    def interrupted(self, images):
        answers.append(len(images))
        if len(answers) == 8:
            assert {p.name.split(".")[1] for p in (path / "leases").iterdir()} == {"0", "json"}
            raise KeyboardInterrupt
        return answer(self, images)

    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
    monkeypatch.setattr(Teacher, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(settings(out=str(path)), quiet, source)
    assert not [p for name in ("leases", "scratch") for p in (path / name).rglob("*") if p.is_file()]


def test_a_build_says_for_whom_it_waits_and_does_not_wait_for_the_dead(tmp_path, reference, source, monkeypatch):
    path, said = tmp_path / "c", []
    monkeypatch.setattr(builder, "_POLL_SECONDS", 0.01)
    shutil.copytree(reference, path)
    (path / "commits" / "v00001-p0001.json").unlink()
    with Cache(path).writing() as other:
        assert other.take("v00001-p0001")
        sleep, polls = time.sleep, []

        def poll(seconds):
            polls.append(seconds)
            if len(polls) == 5:
                other.release("v00001-p0001")
            sleep(seconds)

        monkeypatch.setattr(builder.time, "sleep", poll)
        assert build(settings(out=str(path)), said.append, source).teacher_images == 64
    who = f"{socket.gethostname()} (process {os.getpid()}, since 20"
    assert [line for line in said if line.startswith(f"sharing the work with {who}")] != []
    assert len([line for line in said if line.startswith(f"waiting for the last 1 shards, at {who}")]) == 1
    assert len(polls) == 5 and content(path) == content(reference)


def test_a_lease_lost_under_way_ends_in_what_the_other_committed(tmp_path, reference, source, monkeypatch):
    path, answers, answer = tmp_path / "c", [], Teacher.logits

    def overtaken(self, images):
        answers.append(len(images))
        if len(answers) == 6:  # in the first shard of view 0: stopped here, while another builds all
            while not (path / "eval" / "commits" / "v00000-p0000.json").exists():
                time.sleep(0.01)
            monkeypatch.setattr(Teacher, "logits", answer)
            for file in (path / "leases").iterdir():
                file.unlink()
            for folder in (path / "scratch").iterdir():
                shutil.rmtree(folder, ignore_errors=True)  # the writer removes its own at the same moment
            assert build(settings(out=str(path)), quiet, source).teacher_images == 300
        return answer(self, images)

    monkeypatch.setattr(leases, "EXPIRES", 0.05)
    monkeypatch.setattr(build_module, "probe", lambda *a: (1.0, 1.0))
    monkeypatch.setattr(Teacher, "logits", overtaken)
    said = []
    result = build(settings(out=str(path)), said.append, source)
    assert 40 + 64 >= result.teacher_images > 40
    assert "by this build" in said[-1] and content(path) == content(reference)
    assert spooled(tmp_path) == []


def test_a_builders_leavings_lie_under_the_token_of_its_lease(tmp_path, source, monkeypatch):
    decide, places = SplitStore._decide, []

    def watched(self, *args):
        places.append((self._scratch.name, {p.stem for p in (tmp_path / "c" / "leases").glob("*.json")}))
        return decide(self, *args)

    monkeypatch.setattr(SplitStore, "_decide", watched)
    build(settings(out=str(tmp_path / "c")), quiet, source)
    assert len({token for token, _ in places}) == 1 and all(token in leased for token, leased in places)
