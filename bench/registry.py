"""A registry in a bucket, on loopback: pull against plain download, training from afar, faults, a crowd. Writes JSON.

    python bench/registry.py [--only pull --only train --only faults --only crowd] [--minutes 3]

The bucket is moto's server, in a process of its own. Parts that are not run keep their figures in the file.

pull    ImageNet's number of samples and record layout with random contents, 4 views; kdcache pull, and the same objects
        by obstore with as many threads into files, in turn.
train   50,000 random images of 32 pixels, 4 views: the loader's epochs from a folder, from the bucket by a warm local
        store, and by a cold one while each object takes so long that a slab needs half an epoch.
faults  push and pull of caches through a proxy that spoils every fourth request, until there were 500 and more, while
        a reader looks. Then everything is compared.
crowd   16 readers and 2 writers, who publish the same keys with other records at once, for some minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import torch

sys.path += [str(Path(__file__).parent)]
from cifar10 import machine

from kdcache.cache import Cache
from kdcache.cache.home import open_registry
from kdcache.cache.identity import Identity
from kdcache.cache.registry.kinds import network
from kdcache.cache.registry.kinds.network import NetworkObjects
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.share import pull, push
from kdcache.tests.helpers.caches import WRITER, Filled, identity, same
from kdcache.tests.helpers.registries import content, stored
from kdcache.tests.helpers.servers import Faulty
from kdcache.train.loaders.cached import CachedLoader

TRIALS, THREADS, READERS, FAULTS = 9, 16, 16, 500
IMAGES = """
import numpy as np, torch
from torch import nn

def images(split):
    rng = np.random.default_rng(split == "train")
    n = 50_000 if split == "train" else 1_000
    return rng.integers(0, 256, (n, 32, 32, 3), dtype="u1"), rng.integers(0, 1000, n), tuple(map(str, range(1000)))

def net(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1000))
"""


def quiet(line: str) -> None:
    pass


@contextmanager
def bucket_server() -> Iterator[str]:
    """moto's server in a process of its own; the address of a bucket."""
    script = (
        "import sys, time; from moto.server import ThreadedMotoServer; s = ThreadedMotoServer('127.0.0.1', 0, False);"
        "s.start(); print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as server:
        assert server.stdin and server.stdout
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
        }  # fmt: skip
        network._store.cache_clear()
        urllib.request.urlopen(urllib.request.Request(f"{address}/shared", method="PUT")).close()
        try:
            yield "s3://shared/kd"
        finally:
            server.stdin.close()


# ---- pull ----


def large(path: Path, views: int) -> Cache:
    """ImageNet's samples and layout of records; random contents, which make more bytes than real ones."""
    about = identity(samples=1_281_167, held_out=50_000, part=262_144, classes=1000, k=20, precision="uint8")
    cache, rng = Cache.create(path, about), np.random.default_rng(0)
    for store in (cache.evaluation, cache.train):
        n = store.samples
        store.write_labels(rng.integers(0, 1000, (n, 1)).astype("u2"), WRITER)
        store.write_sizes(rng.integers(200, 600, (n, 2)).astype("i4"), WRITER)
        for view in range(views if store.split == "train" else 1):
            for part in range(store.parts):
                rows = len(store.rows(part))
                arrays = {
                    "classes": rng.integers(0, 1000, (rows, 20)).astype("u2"),
                    "gaps": rng.integers(0, 30, (rows, 19)).astype("u1"),
                    "target_gap": rng.random((rows, 1)).astype("f2"),
                    "tail": rng.integers(0, 40, (rows, len(about.record.temperatures))).astype("u1"),
                }
                sums = rng.random((len(about.record.temperatures), 1000)) if store.carries_tail_sums(view) else None
                store.write_shard(view, part, arrays, "digest", WRITER, sums)
    cache.write_prior(WRITER)
    return cache


def measure_pull(work: Path) -> dict[str, Any]:
    cache = large(work / "large", 4)
    with bucket_server() as root:
        pushed = push(cache.path, root, say=quiet)
        there = NetworkObjects(root, bucket=True)
        prefix = f"caches/{cache.key}"
        names = [name for name in there.sizes(prefix) if not name.startswith("published/")]
        seconds: dict[str, list[float]] = {"plain": [], "pull": []}

        def plain() -> None:
            def one(name: str) -> None:
                file = work / "plain" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(obstore.get(there._store, f"{prefix}/{name}").bytes())

            with ThreadPoolExecutor(THREADS) as threads:
                list(threads.map(one, names))

        def pulled() -> None:
            pull(cache.key, root, out=str(work / "pulled"), say=quiet)

        for trial in range(TRIALS):
            for name, run in sorted((("plain", plain), ("pull", pulled)), reverse=trial % 2 == 1):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
                if name == "pull" and trial == 0:
                    assert content(work / "pulled") == content(cache.path)
                shutil.rmtree(work / "plain", ignore_errors=True)
                shutil.rmtree(work / "pulled", ignore_errors=True)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["pull"], strict=True)]
    return {
        "objects": len(names),
        "bytes": pushed.bytes,
        "push_seconds": pushed.seconds,
        "seconds": seconds,
        "pull_throughput_over_plain_download": statistics.median(ratios),
    }


# ---- training ----


def measure_train(work: Path) -> dict[str, Any]:
    (work / "bench_images.py").write_text(IMAGES)
    sys.path.insert(0, str(work))
    views, batch = 4, 256
    built = build(
        BuildConfig("bench_images:net", data="bench_images:images", augment="crop,flip", views=views, device="cpu",
                    allow_low_accuracy=True), quiet,
    )  # fmt: skip
    local = Cache(built.path)
    seconds: dict[str, list[float]] = {"folder": [], "warm": [], "cold": []}

    def epoch(loader: CachedLoader, number: int) -> float:
        loader.set_epoch(number)
        start = time.perf_counter()
        for _ in loader.steps():
            pass
        return time.perf_counter() - start

    with bucket_server() as root:
        push(built.path, root, say=quiet)
        loaders = {
            "folder": CachedLoader(local, "bench_images:images", batch),
            "warm": CachedLoader(open_registry(root).cache(local.key), "bench_images:images", batch),
        }
        for number in range(views + 1):  # the first round warms the store
            for loader in loaders.values():
                epoch(loader, number)
        # More views than the loader holds slabs: every epoch reads one.
        for number in range(views + 1, views + 1 + 6 * TRIALS):
            for name in sorted(loaders, reverse=number % 2 == 1):
                seconds[name].append(epoch(loaders[name], number))
        usual, real = statistics.median(seconds["folder"]), obstore.get
        each = usual / 2 / len(local.train.chunks(shard_name(0, 0)))

        def slow(store: Any, path: str) -> Any:
            time.sleep(each if "/views/" in path else 0)
            return real(store, path)

        network.obstore.get = slow  # type: ignore[assignment]
        try:
            for _ in range(TRIALS):
                shutil.rmtree(Path(os.environ["KDCACHE_HOME"]) / "remote")
                cold = CachedLoader(open_registry(root).cache(local.key), "bench_images:images", batch)
                seconds["cold"] += [epoch(cold, number) for number in range(views)][1:]
        finally:
            network.obstore.get = real  # type: ignore[assignment]
    folder = statistics.median(seconds["folder"])
    return {
        "samples": local.train.samples,
        "slab_bytes": local.read(0).nbytes,
        "median_epoch_seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "epochs": {name: len(found) for name, found in seconds.items()},
        "warm_over_folder": statistics.median(
            w / f for w, f in zip(seconds["warm"], seconds["folder"], strict=True)
        ),
        "cold_over_folder_when_a_slab_takes_half_an_epoch": statistics.median(seconds["cold"]) / folder,
    }  # fmt: skip


# ---- faults ----


def measure_faults(work: Path) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    rounds = reads = 0
    with bucket_server() as root:
        direct = os.environ["AWS_ENDPOINT_URL"]
        while sum(kinds.values()) < FAULTS:
            written = Filled(work / f"f{rounds}", identity(part=6), views=6, seed=rounds)
            cache, registry = written.cache, f"{root}/{rounds}"
            proxy = Faulty(direct, 0.25, rounds)
            os.environ["AWS_ENDPOINT_URL"] = proxy.address
            network._store.cache_clear()
            done = threading.Event()

            def look(cache: Cache = cache, registry: str = registry, done: threading.Event = done) -> int:
                """Whatever is visible while it is pushed is whole and right."""
                count = 0
                while not done.is_set():
                    shared = open_registry(registry)
                    if shared.has(cache.key):
                        seen = shared.cache(cache.key)
                        for view in seen.views:
                            assert same(seen.read(view), cache.read(view))
                            count += 1
                    time.sleep(0.01)
                return count

            with ThreadPoolExecutor(1) as threads:
                reader = threads.submit(look)
                push(cache.path, registry, say=quiet)
                pull(cache.key, registry, out=str(work / f"p{rounds}"), say=quiet)
                done.set()
                reads += reader.result()
            os.environ["AWS_ENDPOINT_URL"] = direct
            network._store.cache_clear()
            assert content(work / f"p{rounds}") == content(cache.path)
            prefix = f"caches/{cache.key}/"
            there = {p.removeprefix(prefix): d for p, d in stored(registry).items() if "/published/" not in p}
            assert there == content(cache.path)
            kinds.update(proxy.kinds)
            proxy.close()
            rounds += 1
    return {"faulty_requests": sum(kinds.values()), "kinds": kinds, "rounds": rounds, "views_read_meanwhile": reads}


# ---- a crowd ----


def _writer(root: str, work: Path, share: float, stop: float) -> dict[str, int]:
    counts, number = Counter[str](), 0
    while time.time() < stop:
        about = identity(samples=21 + number)  # each number is another key, of which both publish their own records
        path = work / f"w{share}-{number}"
        cache = Filled(path, about).cache if share == 1 else _other(path, about, share)
        result = push(cache.path, root, say=quiet)
        counts.update(pushes=1, new=result.new, kept=len(result.kept))
        number += 1
    return dict(counts)


def _other(path: Path, about: Identity, share: float) -> Cache:
    class Another(Filled):
        def draw(self, store: Any) -> torch.Tensor:
            return share * super().draw(store)

    return Another(path, about).cache


def _reader(root: str, work: Path, seed: int, stop: float) -> dict[str, int]:
    os.environ["KDCACHE_HOME"] = str(work / f"home{seed % 4}")  # four machines' readers
    counts, rng = Counter[str](), random.Random(seed)
    while time.time() < stop:
        registry = open_registry(root, store_bytes=200_000)
        keys = registry.keys()
        if not keys:
            time.sleep(0.1)
            continue
        cache = registry.cache(rng.choice(keys[-50:]))
        for view in cache.views:
            records = cache.read(view)  # every byte against its commit
            assert len(records) == cache.train.samples
            counts.update(views=1)
        if cache.views and rng.random() < 0.1:
            out = work / f"pull{seed}-{counts['pulls']}"
            pull(cache.key, root, out=str(out), say=quiet)
            assert Cache(out).views
            shutil.rmtree(out)
            counts.update(pulls=1)
    return dict(counts)


def _guarded(run: Callable[..., dict[str, int]], *args: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    try:
        return run(*args)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}


def measure_crowd(work: Path, minutes: float) -> dict[str, Any]:
    found: dict[str, Any] = {"minutes": minutes, "readers": READERS, "writers": 2}
    for kind in ("folder", "bucket"):
        folder = work / kind
        folder.mkdir()
        with bucket_server() as address:
            root, stop = (str(folder / "shared") if kind == "folder" else address), time.time() + 60 * minutes / 2
            context = multiprocessing.get_context("fork")  # nothing was read over a network here yet
            with context.Pool(READERS + 2) as pool:
                writers = [pool.apply_async(_guarded, (_writer, root, folder, share, stop)) for share in (1.0, 0.9)]
                readers = [pool.apply_async(_guarded, (_reader, root, folder, i, stop)) for i in range(READERS)]
                sums: dict[str, Counter[str]] = {}
                errors = []
                for name, jobs in (("writers", writers), ("readers", readers)):
                    sums[name] = Counter()
                    for job in jobs:
                        result = job.get()
                        errors += [result.pop("error")] if "error" in result else []
                        sums[name].update(result)
        found[kind] = {**{name: dict(count) for name, count in sums.items()}, "errors": errors}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The crowd first: it forks.
    parts = ("crowd", "pull", "train", "faults")
    parser.add_argument("--only", action="append", choices=parts)
    parser.add_argument("--minutes", type=float, default=3.0, help="of the crowd")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/registry.json")
    a = parser.parse_args()
    result = json.loads(a.out.read_text()) if a.out.exists() else {}
    result |= {"machine": machine(), "command": "python bench/registry.py", "load": os.getloadavg()}
    for part in parts:
        if part in (a.only or parts):
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder)
                os.environ["KDCACHE_HOME"] = str(work / "home")
                measure = {"pull": measure_pull, "train": measure_train, "faults": measure_faults}.get(part)
                result[part] = measure(work) if measure else measure_crowd(work, a.minutes)
            print(json.dumps({part: result[part]}, indent=2))
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
