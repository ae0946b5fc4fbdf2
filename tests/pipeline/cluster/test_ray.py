"""Builds on a real Ray cluster of two nodes, both on this machine: the bytes of one process, whatever dies."""

import json
import logging
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdcache.cache import Cache, KdcacheError
from kdcache.pipeline.build.answers import teacher_renderer, view_parameters
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.plan import plan_build
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.cluster import builder, session
from kdcache.pipeline.cluster.apart import Apart
from kdcache.pipeline.cluster.layout import Layout
from kdcache.pipeline.cluster.worker import Work, Worker
from kdcache.pipeline.process.rank import Rank
from kdcache.tests.helpers.building import MIXED_FILES, content, of_files, quiet
from kdcache.tests.helpers.commands import invoke, works
from kdcache.tests.helpers.lazily import Lazily

ray = Lazily("ray", optional=True)
pytestmark = pytest.mark.usefixtures("home")

# The network of these tests is watched: while a build is under way, the first worker to come so far kills itself, and
# the next one tells on which node it is.
NETWORK = """
import os, signal, time
import kd_toy
from pathlib import Path
from torch import nn

def first(name, text=""):
    try:
        with Path(os.environ["KDCACHE_HOME"], name).open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True

class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.answers = kd_toy.net(12), 0

    def forward(self, images):
        logits = self.network(images)
        if "RAY_JOB_ID" in os.environ and Path(os.environ["KDCACHE_HOME"], "..", "there", "leases").exists():
            self.answers += 1
            self.happens()
        return logits

    def happens(self):
        import ray
        time.sleep(0.1)
        if self.answers == 3 and first("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.answers == 4:
            first("next", ray.get_runtime_context().get_node_id())
"""
BUILD = "build --data kd_toy:images --augment crop,flip --views 2 --topk 4 --batch-size 16 --allow-low-accuracy"


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and two nodes with one CPU each, to which this process belongs."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # below a longer path there is no room for Ray's sockets
    small = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    patch = pytest.MonkeyPatch()
    (Path(folder) / "ray").mkdir()
    patch.setenv("RAY_TMPDIR", folder)  # where it notes the cluster's address
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    found = Cluster(True, head_node_args={"num_cpus": 0, "temp_dir": folder, **small})
    try:
        for _ in range(2):
            found.add_node(num_cpus=1, **small)
        ray.init(found.address, log_to_driver=False, logging_level=logging.CRITICAL)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()
        shutil.rmtree(folder)
        patch.undo()


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch):
    (tmp_path / "kd_ray.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))


def awaited(path, seconds=120):
    """The content of a file that somebody is to write."""
    end = time.monotonic() + seconds
    while not path.exists() or not (text := path.read_text()):
        assert time.monotonic() < end, path
        time.sleep(0.05)
    return text


def in_background(do):
    thread = threading.Thread(target=do)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("ray://10.0.0.1:10001", "Ray's client does not stream .* --ray auto"),
        ("http://10.0.0.1:8265", "is no address: give auto, HOST:PORT"),
        ("nonsense", "is no address"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: ConnectionRefusedError: .*ray start --head"),
    ],
)
def test_addresses_that_cannot_be_joined_are_refused_at_once(address, says):
    assert not ray.is_initialized() or address != "127.0.0.1:1"
    with pytest.raises(KdcacheError, match=says) as caught, session.joined(address, 0):
        pass
    assert "\n" not in str(caught.value)


def test_a_worker_and_a_node_are_killed_and_the_bytes_are_those_of_one_process(cluster, tmp_path):
    """The first build ends on the node that is left; the second one is stopped by Ctrl-C, and goes on without Ray."""
    line = f"{BUILD} --teacher kd_ray:Watched --device cpu"
    works(f"{line} --out {tmp_path / 'alone'}")
    home, there = tmp_path / "home", tmp_path / "there"

    def kill_node():
        at_work = awaited(home / "next")
        cluster.remove_node(next(n for n in cluster.worker_nodes if n.node_id == at_work), allow_graceful=False)

    killer = in_background(kill_node)
    result = works(f"{line} --ray --json --out {there}")
    killer.join()
    built = json.loads(result.stdout)
    assert (home / "died").exists() and len(cluster.worker_nodes) == 1
    # What was lost is at most what waited to be fetched.
    assert 340 <= built["teacher_images"] < 2 * 340
    assert content(there) == content(tmp_path / "alone")
    cache = Cache(there)
    processes = {cache.train.commit(name).writer["process"] for name in cache.train.layout.shards(cache.views)}
    assert str(os.getpid()) not in processes

    shutil.rmtree(there)
    (home / "next").unlink()
    stopped = in_background(lambda: awaited(home / "next") and os.kill(os.getpid(), signal.SIGINT))
    result = invoke(f"{line} --ray --out {there}")
    stopped.join()
    assert result.exit_code == 130 and time.time() - (home / "next").stat().st_mtime < 10
    assert not list((there / "leases").iterdir())
    works(f"{line} --out {there}")
    assert content(there) == content(tmp_path / "alone")


@pytest.fixture
def given(tmp_path, photos):
    """Mixed views of image files, planned, and what the workers of that build are given."""
    shutil.copytree(photos, tmp_path / "photos")
    config = of_files(tmp_path / "photos", tmp_path / "c", **MIXED_FILES)
    plan = plan_build(config, open_source(config, quiet))
    layout = Layout(gpus=0, cpus=1, decoders=2, processes=0, capacity=1)
    return plan, layout, builder.given(plan, config, layout)


def test_images_that_tasks_decode_elsewhere_have_the_same_pixels(cluster, given, tmp_path):
    plan, _, (_, place) = given
    source = plan.source
    device = torch.device("cpu")
    for split, data, views in (("eval", source.evaluation, (0,)), ("train", source.train, (0, 1))):
        for rows in (range(len(data)), range(8, len(data))):
            drawn = [view_parameters(data, plan.identity, view, rows) for view in views]
            batches = [(torch.arange(i, i + 4).numpy(), views[: 1 + (i > 8)]) for i in range(rows.start, rows.stop, 4)]
            want = teacher_renderer(data, source, 0).views(drawn, batches, rows.start)
            found = Apart(place, split, device, 2).views(drawn, batches, rows.start)
            for (*at, a), (*there, b) in zip(want, found, strict=True):
                assert at == there and a.equal(b)
    gone = source.train.file(3)
    gone.unlink()
    drawn = [view_parameters(source.train, plan.identity, 0, range(24))]
    with pytest.raises(KdcacheError, match=rf"{gone.name}.* \(on the Ray node {socket.gethostname()}\)$") as caught:
        list(Apart(place, "train", device, 2).views(drawn, [(torch.arange(4).numpy(), (0,))], 0))
    assert "\n" not in str(caught.value)


def test_a_worker_answers_as_the_build_and_names_its_node_in_errors(cluster, given, tmp_path, monkeypatch):
    """Here without a process of its own."""
    _, _, references = given
    job, place = ray.get(list(references))
    job = replace(job, decoders=0)
    monkeypatch.setattr(type(place), "enter", lambda self: None)  # which would change this process
    worker = Worker()
    opened = worker.open(job, place)
    assert opened.node == socket.gethostname() and opened.way == "cpu"
    build(of_files(tmp_path / "photos", tmp_path / "c", **MIXED_FILES), quiet)
    stored = Cache(tmp_path / "c").train
    work = Work("train", range(10, 20), [0, 1], [14, 10], [True, False])
    blocks = [block for found in worker.answer(work) for block in found]
    assert [(b.place, b.rows) for b in blocks] == [
        (1, range(10, 14)), (0, range(14, 18)), (1, range(14, 18)), (0, range(18, 20)), (1, range(18, 20)),
    ]  # fmt: skip
    for block in blocks:
        whole = stored.read_shard(work.views[block.place], 1)
        for name, array in block.arrays.items():
            assert (array == whole[name][block.rows.start - 10 : block.rows.stop - 10]).all()
        assert (block.sums is not None) == work.sums[block.place]
    broken = pickle.loads(job.teacher)
    broken.model.network[-1].bias.data[5] = float("nan")
    worker.open(replace(job, teacher=pickle.dumps(broken)), place)
    with pytest.raises(KdcacheError, match=r"logits are not finite: view 1, sample 10 of train \(on the Ray node"):
        list(worker.answer(work))
    node = rf" \(on the Ray node {socket.gethostname()}\)$"
    for wrong, says in (
        (replace(job, teacher=b"no pickle"), f"the teacher's network cannot be made here: .*{node}"),
        (replace(job, device="cuda"), f"device 'cuda' cannot be used here: .*{node}"),
    ):
        with pytest.raises(KdcacheError, match=says):
            Worker().open(wrong, place)
    (tmp_path / "photos" / "train" / "a" / "0.jpg").unlink()
    says = f"is not the same data on every node: samples: the command's machine has 24, this node has 23; .*{node}"
    with pytest.raises(KdcacheError, match=says):
        Worker().open(job, place)
    monkeypatch.undo()
    with pytest.raises(KdcacheError, match=r"this node has torch 2\..* instead of 1\.0"):
        replace(place, versions={**place.versions, "torch": "1.0"}).enter()


def test_ray_is_asked_for_where_it_is_missing(monkeypatch):
    find = session.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(session.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
        result = invoke("build --teacher resnet8 --ray")
    assert result.exit_code == 2 and result.stderr.endswith("--ray needs the package ray: pip install ray\n")
    monkeypatch.setattr(session, "this_rank", lambda: Rank(1, 2, 1, 2))
    with pytest.raises(KdcacheError, match="run it without torchrun"):
        session.require_address("auto")
