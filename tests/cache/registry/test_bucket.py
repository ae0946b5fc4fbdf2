"""Builders with homes of their own and nothing but a bucket in common: they share the work, whoever dies or freezes."""

import json
import re
from collections import Counter

import pytest

from kdcache.cache import Cache, open_cache
from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder, home, open_registry
from kdcache.cache.registry import bucket as module
from kdcache.cache.registry import leases
from kdcache.cache.registry.backends import open_objects
from kdcache.cache.registry.kinds import network
from kdcache.pipeline import share
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build.plan import plan_build
from kdcache.pipeline.share import pull
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.tests.helpers.building import TOY, as_json, content, ended_well, equal, quiet, settings, start_build
from kdcache.tests.helpers.servers import faulty
from kdcache.train.teach import build_and_teach

pytestmark = pytest.mark.usefixtures("own_home", "impatient")

IMAGES = 40 + 3 * 150
VIEWS, ROWS = ("v00000-", "v00001-", "v00002-"), (64, 64, 22)

# Builders in processes that are forked before any of them has asked the bucket. What each answers is noted in a file.
BUILDERS = """
import threading
from kdcache.cache.registry import bucket, leases as inbucket
from kdcache.cache.registry.backends import open_objects
from kdcache.cache.registry.kinds import network
from kdcache.cache.store import leases
from kdcache.pipeline import share
from kdcache.pipeline.build.plan import plan_build
leases.EXPIRES, inbucket.PAUSE, bucket.PAUSE, bucket.LONGEST_PAUSE, network._LONGEST_WAIT = 3.0, 0.1, 0.1, 0.2, 0.2
module.probe = lambda *a: (1e9, 1.0)
folder = Path(sys.argv[2])

def build_in_bucket(me, root, stop=None, by=None, machine=None):
    # machine: where it is, with a home of its own. stop: the answer at which the process gets the signal `by`.
    os.environ["KDCACHE_HOME"] = str(folder / (machine or me))
    leases._machine = lambda: machine or me
    copy, left = builder._copy, [stop]
    def noted(lot, answer):
        with (folder / f"{me}.answers").open("a") as f:
            f.write(f"{lot.shard.lease} {len(answer.rows)}\\n")
        time.sleep(0.02)
        if stop and answer.rows.stop < lot.shard.rows.stop and lot.shard.lease.startswith("v"):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), by)
        return copy(lot, answer)
    builder._copy = noted
    with (folder / f"{me}.said").open("a") as said:
        share.build_shared(plan_build(config, source), share.open_shared(root, True), True,
                           lambda line: print(line, file=said, flush=True))

def beside(me, root):
    # Once the two have begun whose end is planned.
    while not all((folder / f"{name}.answers").exists() for name in ("killed", "frozen")):
        time.sleep(0.01)
    build_in_bucket(me, root)

def as_rank(rank, root):
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", 2)):
        os.environ[name] = str(value)
    build_in_bucket(f"rank{rank}", root, machine="both")

def race(me, root):
    # Four threads, each a builder, who want the same shards as those of the other processes.
    leases._machine, leases.EXPIRES = lambda: None, 60.0  # so that none of them is taken for dead
    objects, won = open_objects(root), []
    def builder():
        one = inbucket.ObjectLeases(objects, "0" * 64, os.urandom(8).hex(), quiet)
        one._touch()
        won.extend(i for i in range(5) if one.take(f"v{i:05d}-p0000"))
    threads = [threading.Thread(target=builder) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    (folder / f"{me}.won").write_text(json.dumps(won))

def all_end(works):
    return [ended(child) for child in [in_child(work) for work in works]]
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "kd_toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def source(toy):
    return build_module.open_source(settings())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
    """Three views, built by one process in a folder."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    build_module.build(settings(views=3, out=str(path)), quiet, source)
    return path


@pytest.fixture
def at(tmp_path, monkeypatch, source):
    """Builds in a bucket as if on the machine of that name, which has a home of its own."""
    monkeypatch.setattr(build_module, "probe", lambda *a: (1e9, 1.0))
    for name, seconds in ((leases, 0.0), (module, 0.0)):
        monkeypatch.setattr(name, "PAUSE", seconds)

    def build(machine, root, say=quiet, whole=False, **changes):
        monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / machine))
        shared = share.open_shared(root, True)
        return share.build_shared(plan_build(settings(**changes), source), shared, True, say, whole=whole)

    return build


def pulled(key, root, out):
    pull(key, root, out=str(out), say=quiet)
    return content(out)


def answered(folder, me):
    """How many images of each shard a builder's teacher has answered for."""
    found, file = Counter(), folder / f"{me}.answers"
    for line in file.read_text().splitlines() if file.exists() else ():
        lease, images = line.split()
        found[lease] += int(images)
    return found


def test_four_builders_share_a_bucket_though_one_is_killed_and_one_frozen(toy, tmp_path, s3, bucket, whole):
    """No shard is computed twice but those that these two had begun; ranks and a crowd of takers come on top."""
    script = """
root, other = sys.argv[3:]
assert all_end([lambda me=me: race(f"race{me}", root) for me in range(4)]) == [0] * 4
children = [in_child(lambda: build_in_bucket("killed", root, 2, signal.SIGKILL)),
            in_child(lambda: build_in_bucket("frozen", root, 2, signal.SIGSTOP)),
            in_child(lambda: beside("c", root)), in_child(lambda: beside("d", root))]
codes = [ended(child) for child in (children[0], *children[2:])]
os.kill(children[1], signal.SIGCONT)
assert [*codes, ended(children[1])] == [-signal.SIGKILL, 0, 0, 0]
assert all_end([lambda: as_rank(0, other), lambda: as_rank(1, other)]) == [0, 0]
"""
    with faulty(s3, 0.1, content=False) as proxy:
        arguments = as_json(settings(views=3)), tmp_path, bucket, f"{bucket}-ranks"
        with start_build(toy, BUILDERS + script, *arguments, AWS_ENDPOINT_URL=proxy.address) as process:
            ended_well(process)
        assert proxy.kinds.keys() == {"reset", "busy", "lost"}
    won = [shard for me in range(4) for shard in json.loads((tmp_path / f"race{me}.won").read_text())]
    assert sorted(won) == [0, 1, 2, 3, 4]

    each = {me: answered(tmp_path, me) for me in ("killed", "frozen", "c", "d")}
    said = {me: (tmp_path / f"{me}.said").read_text() for me in each}
    assert each["killed"] and each["frozen"] and each["c"] + each["d"]
    assert each["killed"].total() + each["frozen"].total() < IMAGES / 2
    total, rows = sum(each.values(), Counter()), {f"{n}p{part:04d}": r for n in VIEWS for part, r in enumerate(ROWS)}
    twice = {lease: images - rows.get(lease, 40) for lease, images in total.items() if images > rows.get(lease, 40)}
    # What these two had under way, one shard at the teacher and perhaps one that was being published; and where a lease
    # of another expired, on a machine that is very busy.
    busy = {lease for me in ("c", "d") for lease in re.findall("lost the lease of (.+) [(]3 s without", said[me])}
    begun = twice.keys() - busy
    assert begun <= each["killed"].keys() | each["frozen"].keys() and 1 <= len(begun) <= 4
    assert total.total() == IMAGES + sum(twice.values())
    key = Cache(whole).key
    assert pulled(key, bucket, tmp_path / "pulled") == content(whole)
    assert "sharing the work with" in said["d"] and "images by this build" in said["frozen"]
    # Nothing is left of anybody but the dead one, and that only here.
    assert not [path for path in open_objects(bucket).times("leases") if path.startswith(key)]
    spools = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.block")}
    assert spools <= {"killed"}

    ranks = answered(tmp_path, "rank0") + answered(tmp_path, "rank1")
    assert ranks.total() == IMAGES and pulled(key, f"{bucket}-ranks", tmp_path / "ranks") == content(whole)
    assert content(tmp_path / "both/caches" / key) == content(whole)  # all of it was computed on that machine


def test_a_machine_that_is_stopped_goes_on_from_its_spool_and_gives_its_leases_back(
    tmp_path, at, bucket, whole, monkeypatch
):
    answer, answers = Teacher.logits, []

    def interrupted(self, images):
        answers.append(len(images))
        if len(answers) == 6:
            assert {path.rpartition(".")[2] for path in open_objects(bucket).times("leases")} == {"0", "json"}
            raise KeyboardInterrupt
        return answer(self, images)

    monkeypatch.setattr("kdcache.pipeline.build.spool.SPOOL_SECONDS", 0.0)
    monkeypatch.setattr(Teacher, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        at("a", bucket, views=3)
    assert open_objects(bucket).times("leases") == {}
    result = at("a", bucket, views=3)
    assert result.teacher_images == IMAGES - 40 - 32
    assert content(result.path) == content(whole) == pulled(result.key, bucket, tmp_path / "pulled")
    # Nothing is held twice.
    kept = {p.name for p in (home() / "remote/chunks").rglob("*") if p.is_file()}
    for name in Cache(whole).train.layout.shards(range(3)):
        assert not kept & {file.sha256 for file in Cache(result.path).train.commit(name).files.values()}


def test_what_a_machine_has_is_put_there_before_anything_is_computed(tmp_path, at, bucket, source, whole, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "a"))
    path = build_module.build(settings(views=2), quiet, source).path
    (path / "commits/v00001-p0002.json").unlink()  # a view that is not whole
    said = []
    result = at("a", bucket, said.append, views=3)
    assert result.teacher_images == 22 + 150 and content(result.path) == content(whole)
    assert any(line.startswith("put 9 parts of cache") for line in said)
    assert pulled(result.key, bucket, tmp_path / "pulled") == content(whole)
    again = []
    assert at("a", bucket, again.append, views=3).teacher_images == 0
    assert not [line for line in again if line.startswith("put")] and "nothing to compute" in again[-1]


def test_readers_see_the_views_that_are_complete_while_others_are_built(tmp_path, at, bucket, whole, monkeypatch):
    write, seen = module.BucketStore.write_shard, []

    def watched(self, view, part, *args):
        shared = open_registry(bucket)
        if self.split == "train" and (view, part) != (0, 0):
            cache = shared.open(shared.keys()[0])
            assert all(equal(cache.read(v), Cache(whole).read(v)) for v in cache.views)
            seen.append(cache.views)
        return write(self, view, part, *args)

    monkeypatch.setattr(module.BucketStore, "write_shard", watched)
    at("a", bucket, views=3)
    assert seen == [(), (), (0,), (0,), (0,), (0, 1), (0, 1), (0, 1)]


def test_what_was_computed_elsewhere_is_read_from_there_and_fetched_only_when_it_is_asked_for(
    tmp_path, at, bucket, whole
):
    at("a", bucket, views=2)
    said = []
    built = at("b", bucket, said.append, views=3)
    assert built.teacher_images == 150 and "kdcache pull" in said[-1]
    assert built.where == f"{bucket}/caches/{built.key}"
    here = Cache(built.path)
    assert here.views == () and here.complete and equal(here.read_evaluation(), Cache(whole).read_evaluation())
    for name in (built.key, built.key[:12]):
        read = open_cache(name, bucket)
        assert not read.local and read.views == (0, 1, 2)
        assert open_cache(name).local
    fetched = at("b", bucket, views=3, whole=True)
    assert fetched.teacher_images == 0 and fetched.where is None and content(fetched.path) == content(whole)
    assert open_cache(built.key, bucket).local


def test_a_file_to_pack_or_a_folder_to_build_in_asks_for_the_whole(tmp_path, at, bucket, whole, monkeypatch):
    at("a", bucket, views=1)
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "b"))
    built, packed = build_and_teach(settings(views=3), bucket, True, quiet, store="hdf5")
    assert built.teacher_images == 300 and Cache(packed.path).views == (0, 1, 2)
    out = at("c", bucket, views=3, out=str(tmp_path / "out"))
    assert out.teacher_images == 0 and content(tmp_path / "out") == content(whole)
    assert not list(caches_folder().glob("*"))


def test_where_nothing_can_be_published_safely_no_teacher_runs(tmp_path, at, bucket, monkeypatch):
    asked = []
    monkeypatch.setattr(Teacher, "logits", lambda *a: asked.append(a))
    real = network.obstore.put
    monkeypatch.setattr(network.obstore, "put", lambda *a, mode="overwrite", **k: real(*a, **k))
    with pytest.raises(InputError, match="overwrites objects that exist although asked not to") as caught:
        build_and_teach(settings(), bucket, True, quiet)
    assert len(str(caught.value).splitlines()) == 1 and asked == []
    assert open_objects(bucket).sizes("leases") == {} == open_objects(bucket).sizes("caches")
