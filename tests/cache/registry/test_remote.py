"""Training and building with a registry: by a local store, over networks that fail."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest

from kdcache.cache import Cache, files, open_cache
from kdcache.cache import errors as e
from kdcache.cache.home import caches_folder, home, open_registry
from kdcache.cache.registry.backends import open_objects
from kdcache.cache.registry.kinds import network
from kdcache.cache.registry.localstore import LocalStore
from kdcache.cache.store.place import StoredFile
from kdcache.pipeline import share
from kdcache.pipeline.build import build as build_module
from kdcache.pipeline.build.plan import plan_build
from kdcache.pipeline.share import pull, push
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.tests.helpers.building import TOY, settings
from kdcache.tests.helpers.caches import Filled, same
from kdcache.tests.helpers.registries import about, content, quiet, refused, run, stored
from kdcache.tests.helpers.servers import faulty, web_server
from kdcache.train.config import TrainConfig
from kdcache.train.run import train
from kdcache.train.teach import build_and_teach


@pytest.fixture(scope="module", autouse=True)
def _settings(tmp_path_factory, one_thread, no_fsync):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "kd_toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(network, "PATIENCE", 20.0)
        patch.setattr(network, "AT_FIRST", 2.0)
        patch.setattr(network, "_LONGEST_WAIT", 0.2)
        yield


pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Filled(tmp_path_factory.mktemp("toy") / "c", about(), views=3)


warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")


# ---- building with a registry ----


def build_shared(*args, **kwargs):
    return build_and_teach(*args, **kwargs)[0]


@contextlib.contextmanager
def counted(monkeypatch):
    """The images that a teacher answers for, as a list of batches."""
    asked = []
    real = Teacher.logits
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "logits", lambda self, images: asked.append(len(images)) or real(self, images))
        yield asked


def live_in(tmp_path, monkeypatch, name):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / name))


def metrics(cache, out, **changes):
    toy = {"data": "kd_toy:images", "student": "kd_toy:net", "epochs": 2, "batch_size": 50}
    summary = train(TrainConfig("nkd:temperature=1", cache=cache, out=str(out), **toy, **changes), quiet)
    return {name: summary[name] for name in ("loss", "top1", "nll", "agreement")}


def test_what_a_publishes_b_does_not_compute_and_trains_from_to_equal_metrics(tmp_path, root, monkeypatch):
    live_in(tmp_path, monkeypatch, "a")
    with counted(monkeypatch) as asked:
        a = build_shared(settings(), root, publish=True, say=quiet)
    assert a.teacher_images == 40 + 2 * 150 and sum(asked) > 340
    name = metrics(str(a.path), tmp_path / "run-a")
    live_in(tmp_path, monkeypatch, "b")
    with counted(monkeypatch) as asked:
        b = build_shared(settings(), root, say=quiet)
    assert asked == [] and b.teacher_images == 0 and b.key == a.key and b.path == tmp_path / "b/caches" / a.key
    assert content(b.path) == content(a.path)
    assert metrics(str(b.path), tmp_path / "run-b") == name
    # Straight from the registry too, found there as the only one that matches.
    live_in(tmp_path, monkeypatch, "c")
    assert metrics(None, tmp_path / "run-c", registry=root) == name
    assert not caches_folder().exists()


def test_only_the_views_that_nobody_published_are_computed(tmp_path, root, monkeypatch):
    live_in(tmp_path, monkeypatch, "a")
    build_shared(settings(views=2), root, publish=True, say=quiet)
    live_in(tmp_path, monkeypatch, "c")
    lines = []
    found = build_shared(settings(views=4), root, publish=True, say=lines.append)
    assert found.teacher_images == 2 * 150
    live_in(tmp_path, monkeypatch, "d")
    with counted(monkeypatch) as asked:
        assert build_shared(settings(views=4), root, say=quiet).teacher_images == 0
    assert asked == []
    whole = build_module.build(settings(views=4, out=str(tmp_path / "whole")), quiet)
    for view in range(4):
        assert same(open_cache(found.key, root).read(view), Cache(whole.path).read(view))


def test_in_a_shared_folder_builders_divide_the_work(tmp_path, monkeypatch):
    """Two members publish the same key at once: every image is computed once."""
    root = tmp_path / "shared"
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as processes:
        done = list(processes.map(_member, [tmp_path / "a", tmp_path / "b"], [root] * 2))
    assert sum(done) == 40 + 4 * 150
    cache = open_registry(str(root)).cache(open_registry(str(root)).keys()[0])
    assert cache.views == (0, 1, 2, 3) and cache.path.parent == root / "caches"


def _member(home, root):
    os.environ["KDCACHE_HOME"] = str(home)
    return build_shared(settings(views=4), str(root), publish=True, say=quiet).teacher_images


def test_a_local_cache_is_taken_along_when_it_is_published_in_a_folder(tmp_path, monkeypatch):
    build_shared(settings(), say=quiet)
    found = build_shared(settings(views=3), str(tmp_path / "shared"), publish=True, say=quiet)
    assert found.teacher_images == 150 and found.path.parent == tmp_path / "shared/caches"


def test_a_published_cache_of_the_other_numeric_type_is_taken_and_named(tmp_path, root, monkeypatch):
    live_in(tmp_path, monkeypatch, "a")
    a = build_shared(settings(amp="bf16"), root, publish=True, say=quiet)
    live_in(tmp_path, monkeypatch, "b")
    lines = []
    b = build_shared(settings(), root, say=lines.append)
    assert b.key == a.key and b.teacher_images == 0 and any("bf16" in line for line in lines)
    more = build_shared(settings(views=3), root, say=quiet)
    assert more.key != a.key and more.teacher_images == 40 + 3 * 150


@pytest.mark.parametrize("publish", [False, True])
def test_one_of_the_other_numeric_type_that_is_under_way_is_not_gone_on_with(tmp_path, root, monkeypatch, publish):
    """Its evaluation split would be answered in float32 under an identity that says bf16."""
    live_in(tmp_path, monkeypatch, "a")
    a = build_shared(settings(amp="bf16"), root, publish=True, say=quiet)
    shutil.copytree(a.path, tmp_path / "whole")
    # As while another builder, who has leased it, still computes the records of the evaluation split.
    there, folder = open_objects(root), f"caches/{a.key}/eval"
    gone = [name for name in there.sizes(folder) if name.startswith(("commits/v", "views/"))]
    there.remove([f"{folder}/{name}" for name in gone])
    theirs = open_registry(root).cache(a.key) if publish else open_registry(root).open(a.key)
    assert len(gone) > 3 and theirs.finished and theirs.views == (0, 1) and not theirs.complete
    live_in(tmp_path, monkeypatch, "b")
    b = build_shared(settings(), root, publish=publish, say=quiet)
    assert b.key != a.key and b.teacher_images == 40 + 2 * 150
    made, whole = Cache(b.path), Cache(tmp_path / "whole")
    alone = Cache(build_module.build(settings(out=str(tmp_path / "alone")), quiet).path)
    assert made.identity == alone.identity and alone.identity.teacher.numeric == "float32"
    assert same(made.read_evaluation(), alone.read_evaluation())
    assert not open_registry(root).open(a.key).evaluation.complete_views()
    # Who asks for bf16 completes it, in bf16.
    live_in(tmp_path, monkeypatch, "c")
    c = build_shared(settings(amp="bf16"), root, publish=publish, say=quiet)
    assert c.key == a.key and same(Cache(c.path).read_evaluation(), whole.read_evaluation())
    assert not same(whole.read_evaluation(), made.read_evaluation())


def test_a_source_of_the_other_numeric_type_answers_in_it(tmp_path, root, monkeypatch):
    """Whatever of the published cache has still to be computed, it is in the type that its identity says."""
    live_in(tmp_path, monkeypatch, "a")
    a = build_shared(settings(amp="bf16"), root, publish=True, say=quiet)
    live_in(tmp_path, monkeypatch, "b")
    config = settings()
    plan = plan_build(config, build_module.open_source(config))
    source = share._as_published(plan, open_registry(root), quiet).source
    assert source.identity == open_registry(root).cache(a.key).identity
    assert source.teacher.identity == source.identity.teacher and source.teacher.identity.numeric == "bf16"
    build_module.build(settings(out=str(tmp_path / "anew")), quiet, source)
    anew, want = Cache(tmp_path / "anew"), open_registry(root).cache(a.key)
    assert all(same(anew.read(view), want.read(view)) for view in (0, 1))


def test_a_cache_whose_evaluation_split_alone_is_missing_here_is_completed_from_there(tmp_path, root, monkeypatch):
    live_in(tmp_path, monkeypatch, "a")
    build_shared(settings(), root, publish=True, say=quiet)
    live_in(tmp_path, monkeypatch, "b")
    b = build_shared(settings(), root, say=quiet)
    (b.path / "eval/commits/v00000-p0000.json").unlink()
    again = build_shared(settings(), root, say=quiet)
    assert again.teacher_images == 0 and Cache(b.path).complete


def test_what_is_complete_here_needs_no_registry(tmp_path):
    build_shared(settings(), say=quiet)
    assert build_shared(settings(), "http://127.0.0.1:9/kd", say=quiet).teacher_images == 0
    refused(
        "build --teacher kd_toy:net --data kd_toy:images --push --registry http://127.0.0.1:9/kd", "can only be read"
    )
    refused("build --teacher kd_toy:net --data kd_toy:images --push", "no registry is named")


# ---- the local store ----


def chunk(number, size=1000):
    data = number.to_bytes(4, "big") * (size // 4)
    return StoredFile(size=len(data), sha256=files.sha256(data), rows=""), data


def bytes_in(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_the_store_fetches_once_and_keeps_what_was_read_last(tmp_path):
    store = LocalStore(tmp_path, limit=10_000)
    fetched = []

    def get(number):
        stored, data = chunk(number)
        assert store.get(stored, lambda: fetched.append(number) or data) == data

    for number in [0, 1, 2, 3, 0, 4, 5, 6, 7, 0, 8, 9, 10, 0, 11, 12, 0]:
        get(number)
        time.sleep(0.003)  # beyond the clock of the file system
    assert fetched == list(range(13))  # 0 was read now and then, and stayed
    assert bytes_in(tmp_path) <= 10_000
    fetched.clear()
    get(12), get(0), get(1)
    assert fetched == [1]


def test_damage_in_the_store_is_fetched_anew(tmp_path):
    store = LocalStore(tmp_path)
    stored, data = chunk(7)
    for damage in (b"", data[:-1], data[:-1] + b"x", data + b"x"):
        file = tmp_path / stored.sha256[:2] / stored.sha256
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(damage)
        assert store.get(stored, lambda: data) == data == file.read_bytes()


def test_what_is_larger_than_the_store_passes_through(tmp_path):
    stored, data = chunk(1)
    assert LocalStore(tmp_path, limit=999).get(stored, lambda: data) == data
    assert not list(tmp_path.rglob("*"))


def _hammer(folder, seed):
    """Reads many chunks of a store that holds a fifth of them; how many were fetched."""
    store, rng, fetched = LocalStore(folder, limit=40_000), random.Random(seed), 0
    for _ in range(400):
        stored, data = chunk(rng.randrange(200))

        def fetch(data=data):
            nonlocal fetched
            fetched += 1
            return data

        assert store.get(stored, fetch) == data
    return fetched


def test_processes_share_a_store_that_is_too_small(tmp_path):
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as processes:
        fetched = list(processes.map(_hammer, [tmp_path] * 3, range(3)))
    assert all(0 < n < 400 for n in fetched)
    assert bytes_in(tmp_path) <= 40_000 * 1.2


# ---- reading from afar ----


def test_a_warm_store_needs_the_network_for_no_record(tmp_path, toy, bucket, monkeypatch):
    push(toy.cache.path, bucket, say=quiet)
    cold = open_registry(bucket).cache(toy.cache.key)
    for view in cold.views:
        cold.read(view)
    warm = open_registry(bucket).cache(toy.cache.key)
    assert warm.views == (0, 1, 2)
    monkeypatch.setattr(network.obstore, "get", lambda *a: pytest.fail("asked the network"))
    assert all(same(warm.read(view), toy.cache.read(view)) for view in warm.views)


def test_what_is_here_comes_before_what_is_there(tmp_path, toy, root):
    push(toy.cache.path, root, name="toy-v1", say=quiet)
    assert open_cache("toy-v1", root).where != str(caches_folder() / toy.cache.key)
    pull("toy-v1", root, say=quiet)
    assert open_cache("toy-v1", root).path == caches_folder() / toy.cache.key


def test_a_remote_cache_crosses_a_process_boundary(toy, bucket):
    push(toy.cache.path, bucket, say=quiet)
    cache = open_registry(bucket).cache(toy.cache.key)
    cache.read(0)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        assert same(processes.submit(cache.read, 1).result(), toy.cache.read(1))


def test_a_forked_process_is_told_that_it_cannot_read_over_a_network(toy, bucket):
    """It would wait for ever."""
    push(toy.cache.path, bucket, say=quiet)
    cache = open_registry(bucket).cache(toy.cache.key)
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as processes,
        pytest.raises(e.UnreadableError, match="by spawn"),
    ):
        processes.submit(cache.read, 1).result()


@pytest.fixture
def trained(tmp_path, bucket, monkeypatch):
    """A cache in a bucket that was built in another home, and its key."""
    live_in(tmp_path, monkeypatch, "a")
    found = build_shared(settings(views=3), bucket, publish=True, say=quiet)
    live_in(tmp_path, monkeypatch, "b")
    return bucket, found.key


def test_a_network_that_dies_in_an_epoch_is_one_line_and_the_run_resumes(tmp_path, trained, monkeypatch):
    root, key = trained
    monkeypatch.setattr(network, "PATIENCE", 0.5)
    options = ["--cache", key, "--registry", root, "--data", "kd_toy:images", "--student", "kd_toy:net"]
    line = " ".join(["train --loss nkd:temperature=1 --epochs 3 --batch-size 50 --device cpu", *options])
    whole = run(f"{line} --out whole --json")
    assert whole.exit_code == 0, whole.output
    shutil.rmtree(home() / "remote/chunks")
    real, views = network.obstore.get, set()

    def dies(store, path):
        views.update({path.split("/")[3]} if "/views/" in path and "/eval/" not in path else ())
        if len(views) > 2:  # of the third view
            raise network.oe.GenericError("the cable was pulled")
        return real(store, path)

    monkeypatch.setattr(network.obstore, "get", dies)
    result = run(f"{line} --out run")
    assert result.exit_code == 2
    last = result.output.strip().splitlines()[-1]
    assert "the cable was pulled" in last and "--resume" in last and "tries" in last
    monkeypatch.setattr(network.obstore, "get", real)
    again = run(f"{line} --out run --resume --json")
    assert again.exit_code == 0, again.output
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run"))
    assert {k: one[k] for k in ("loss", "top1", "nll")} == {k: two[k] for k in ("loss", "top1", "nll")}


def test_evaluation_finds_the_remote_cache_of_a_run(tmp_path, trained):
    root, key = trained
    line = "train --loss nkd:temperature=1 --epochs 1 --batch-size 50 --data kd_toy:images --student kd_toy:net"
    assert run(f"{line} --cache {root}/caches/{key} --out run").exit_code == 0
    assert run("eval run --data kd_toy:images --student kd_toy:net").exit_code == 0
    settled = json.loads((tmp_path / "run/config.json").read_text())
    assert settled["cache_path"] == f"{root}/caches/{key}"
    assert run(f"{line} --resume --out run").exit_code == 0


# ---- faults between client and server ----


def test_faults_on_the_way_change_nothing(tmp_path, toy, s3, bucket, monkeypatch):
    with faulty(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        network._store.cache_clear()
        push(toy.cache.path, bucket, name="toy-v1", say=quiet)
        pull("toy-v1", bucket, say=quiet)
        cache = open_registry(bucket).cache(toy.cache.key)
        assert all(same(cache.read(view), toy.cache.read(view)) for view in cache.views)
        assert sum(proxy.kinds.values()) > 20 and len(proxy.kinds) == 6, proxy.kinds
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    network._store.cache_clear()
    assert content(caches_folder() / toy.cache.key) == content(toy.cache.path)
    prefix = f"caches/{toy.cache.key}/"
    there = {path.removeprefix(prefix): data for path, data in stored(bucket).items() if "/published/" not in path}
    assert there == content(toy.cache.path)


def test_wrong_bytes_of_a_plain_web_server_are_not_believed(tmp_path, toy, monkeypatch):
    """Nothing but another answer says that a commit came whole."""
    monkeypatch.setattr("kdcache.cache.registry.kinds.network._AT_ONCE", 8)
    push(toy.cache.path, str(tmp_path / "shared"), say=quiet)
    with web_server(tmp_path / "shared") as address, faulty(address, share=0.5) as proxy:
        pull(toy.cache.key, proxy.address, say=quiet)
        assert proxy.kinds["wrong"] > 0
    assert content(caches_folder() / toy.cache.key) == content(toy.cache.path)


def test_a_server_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(network, "AT_FIRST", 0.3)
    assert "tries" in refused(f"pull {'a' * 64} --registry http://127.0.0.1:9/kd", "check the network")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    network._store.cache_clear()
    assert "tries" in refused("ls --registry s3://bucket/kd", "check the network")
    network._store.cache_clear()
