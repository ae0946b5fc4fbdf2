"""A build and a training at the size of ImageNet-1k and 21k, by the real code, without images; writes JSON.

    python bench/scale.py [--work FOLDER] [--rows 65536] [--out FILE]

The images are computed (noise of 40 to 72 pixels, cut to 32), and the teacher is a stub that looks its logits up in a
table, so that what remains is kdcache's own work: opening, drawing, cutting, encoding, spooling, compressing and
committing. Labels and image sizes are those of all N samples. Of the records one shard of a later view is built, since
all that is done for a shard depends on its rows alone; a quarter of one of view 0, which also sums the class prior up;
and with 21k a sixteenth of one in four views that are cut from one decode. `extrapolated` is what this makes for whole
views: products with numbers of rows and shards, nothing else. A trainer then opens the same data and cache, draws a
view, compares it with the shard's commit, makes an order, cuts its first batch and reads the shard.

Each build and each trainer is a process of its own. Memory is VmHWM, the most that a process had, and what it had once
torch and kdcache were imported; worker processes are not counted. Seconds of steps are those of the thread that does
them, on one core each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.cache.identity import Identity, RecordIdentity, TeacherIdentity, ViewsIdentity, id_dtype
from kdcache.cache.records.choices import TEMPERATURES
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import SplitLayout, shard_name
from kdcache.pipeline.build import answers, builder
from kdcache.pipeline.build.builder import Builder, Shard
from kdcache.pipeline.build.plan import BuildPlan
from kdcache.pipeline.build.source import Source
from kdcache.pipeline.build.spool import Spool
from kdcache.pipeline.data.defaults import defaults_for
from kdcache.pipeline.data.kinds.base import Described
from kdcache.pipeline.data.split import describe_data
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.pipeline.views.parameters import DrawnView
from kdcache.pipeline.views.render import RENDERER, Renderer
from kdcache.train.bench.bench import machine
from kdcache.train.loaders.order import EpochOrder

SCENES = {
    "imagenet-1k": {"samples": 1_281_167, "classes": 1000, "k": 20, "views": 100},
    "imagenet-21k": {"samples": 14_200_000, "classes": 21_841, "k": 100, "views": 90},
}
PART, BATCH, SIDE, EVALUATION, TOGETHER = 262_144, 256, 32, 2_000, 4
SIZES = np.array([(48, 64), (64, 48), (40, 64), (72, 72)], np.int32)
TABLE = 1 << 22


class Computed(Described):
    """Images that are computed, each by its place."""

    pixels = None
    paths = ()

    def decode(self, index: int) -> Tensor:
        height, width = self.sizes[index].tolist()
        return _NOISE[:, :height, index % 97 : index % 97 + width].add(index * 7 % 251)

    def _fingerprint(self, full: bool) -> str:
        digest = self._begun("computed", full)
        digest.update(self.sizes.data)
        return digest.hexdigest()

    def _contents(self, places: Any) -> dict[str, Any]:
        return {}


_NOISE = torch.randint(0, 256, (3, 72, 200), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Lookup(nn.Module):
    """The stub of a teacher: an image's logits are numbers of a table, from a place that depends on its pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = torch.randn(TABLE + classes, generator=torch.Generator().manual_seed(1)) * 2.5

    def forward(self, images: Tensor) -> Tensor:
        sums = images.flatten(1).to(torch.int64)[:, ::5].sum(1) * 2_654_435_761 % TABLE
        return self.table.unfold(0, self.classes, 1)[sums]


def data_of(scene: dict[str, int], split: str) -> Computed:
    n, classes = scene["samples"] if split == "train" else EVALUATION, scene["classes"]
    labels = np.random.default_rng(0).integers(0, classes, (n, 1))
    names = tuple(f"n{i:08d}" for i in range(classes))
    return Computed(split, split, labels, names, np.resize(SIZES, (n, 2)), (0.5,) * 3, (0.25,) * 3)  # type: ignore[arg-type]


def source_of(scene: dict[str, int], part: int) -> Source:
    train, evaluation = data_of(scene, "train"), data_of(scene, "eval")
    shown = TeacherIdentity(
        architecture="lookup", weights="0" * 64, mean=(0, 0, 0), std=(1, 1, 1), input_size=SIDE, numeric="float32"
    )
    record = RecordIdentity(
        classes=scene["classes"], k=scene["k"], temperatures=TEMPERATURES, precision="uint8", labels=1, tail_std=False
    )
    identity = Identity(
        teacher=shown, data=describe_data(train, False), evaluation=describe_data(evaluation, False),
        views=ViewsIdentity(policy="rrc,flip", seed=0, renderer=RENDERER), record=record, class_map=None, part=part,
    )  # fmt: skip
    teacher = Teacher(shown, Lookup(scene["classes"]).eval(), scene["classes"], None, torch.device("cpu"))
    return Source(train, evaluation, train.labels, evaluation.labels, teacher, identity, defaults_for(train))


class Steps:
    """Seconds of threads in the functions that are watched, by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, place: Any, name: str, step: str) -> None:
        work = getattr(place, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds[step] += time.thread_time() - started

        setattr(place, name, timed)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.thread_time()
        yield
        self.seconds[name] += time.thread_time() - started


def memory(what: str) -> float:
    return int(re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def shards_of(source: Source, cache: Cache, rows: int, views: range) -> list[Shard]:
    """The first `rows` rows of these views: a whole part of each, or less of it."""
    split = source.split(cache.train)
    return [Shard(split, view, range(rows)) for view in views]


def build(scene: dict[str, int], folder: Path, part: int, rows: int, views: range) -> dict[str, Any]:
    """Build shards of some views, which are cut from one decode."""
    imported, steps, opened = memory("VmRSS"), Steps(), time.process_time()
    source = source_of(scene, part)
    opened = time.process_time() - opened
    cache = Cache.create(folder, source.identity)
    with_data = memory("VmRSS")
    if rows < part:  # a shard of fewer rows would be no shard: encode and spool it all the same, and write it nowhere
        builder.SplitStore.write_shard = lambda self, *rest: True  # type: ignore[method-assign, assignment]
    steps.watch(builder, "view_parameters", "draw")
    steps.watch(answers.chunks, "encode_as", "encode")
    steps.watch(source.teacher.model, "forward", "teacher (stub)")
    steps.watch(builder, "tail_distribution", "prior, view 0 alone")
    steps.watch(Spool, "_sync", "spool")
    steps.watch(builder.SplitStore, "write_shard", "compress, write and commit")
    plan = BuildPlan(source, len(views), BATCH, folder, "no", 2, len(views), True, True)
    writer = {"host": "bench"}
    todo = shards_of(source, cache, rows, views)
    with cache.writing() as leases, Progress("build", sum(len(s.rows) for s in todo), "images") as progress:
        started, cpu = time.perf_counter(), time.process_time()
        for split in source.splits(cache):
            split.store.write_labels(split.labels.astype(id_dtype(scene["classes"])), writer)
            split.store.write_sizes(split.data.sizes, writer)
        written = time.process_time() - cpu
        renderers: dict[str, Renderer] = {}
        work = Builder(plan, cache, leases, folder.parent / "spool", writer, progress, lambda _: None, renderers)
        work.build(todo)
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        renderers.clear()
        del work
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    records = sum(len(s.rows) for s in todo)
    shard = [f for f in folder.rglob("*") if f.is_file() and f"v{views.stop - 1:05d}" in str(f)]
    return {
        "views": [*views],
        "part": part,
        "records": records,
        "memory_mib": {"imported": imported, "with the data": with_data, "peak": memory("VmHWM")},
        "open_cpu_seconds": opened,
        "labels_and_sizes_cpu_seconds": written,
        "wall_seconds": wall,
        "main_process_cpu_seconds": cpu,
        "workers_cpu_seconds": children.ru_utime + children.ru_stime,
        "thread_seconds": dict(steps.seconds),
        "last_view": {
            "files": sorted(f.relative_to(folder).as_posix() for f in shard),
            "bytes": sum(f.stat().st_size for f in shard),
        },
    }


def train(scene: dict[str, int], folder: Path, view: int) -> dict[str, Any]:
    """What a trainer has and does before its first batch, but for the records of its views."""
    imported, steps = memory("VmRSS"), Steps()
    with steps.step("open the data"):
        data = data_of(scene, "train")
    cache, n = Cache(folder), len(data)
    with_data = memory("VmRSS")
    with steps.step("compare data and cache"):
        cache.train.require_sizes(data.sizes)
        cache.train.require_labels(data.labels)
    drawn = DrawnView(cache.identity.views, view, data.sizes)
    with steps.step("draw the view, its digests"):
        digests = [drawn[i : i + cache.identity.part].digest() for i in range(0, n, cache.identity.part)]
    built = cache.train.committed().get(view, set())
    for part in built:
        assert cache.train.commit(shard_name(view, part)).parameters == digests[part], "another view was built"
    with steps.step("order of the epoch"):
        batches = EpochOrder(n, BATCH, 0, 1, 0).batches(0)
    renderer = Renderer(data, SIDE, torch.device("cpu"), "rrc,flip", 0)
    with steps.step("first batch of pixels"):
        rendered = renderer.batches(drawn, batches)
        next(rendered)
    before = memory("VmHWM")
    seconds = dict(steps.seconds)
    if built:
        with steps.step("read a shard: read, verify, decompress"):
            cache.train.check_shard(view, 0)
        rows = len(cache.train.rows(0))
        seconds["read a record: microseconds"] = steps.seconds["read a shard: read, verify, decompress"] / rows * 1e6
    return {
        "memory_mib": {"imported": imported, "with the data": with_data, "peak before records": before},
        "thread_seconds": seconds,
        "shards_compared_with_commits": len(built),
    }


def extrapolated(scene: dict[str, int], built: dict[str, dict[str, Any]], trained: dict[str, Any]) -> dict[str, Any]:
    """What a whole cache takes: products of what one shard took."""
    n, v = scene["samples"], scene["views"]
    later, layout = built["a later view"], SplitLayout(source_of(scene, PART).identity, "train")
    parts, records = layout.parts, later["records"]
    per_view = {
        step: seconds / records * n / 3600
        for step, seconds in later["thread_seconds"].items()
        if step != "teacher (stub)"
    }
    files, size = later["last_view"]["files"], later["last_view"]["bytes"]
    of_shard = [f for f in files if "/c/" in f or f.startswith("commits/")]
    in_memory = sum(spec.chunk_bytes / spec.chunk_shape[0] for spec in layout.records)
    return {
        "parts": parts,
        "shards": parts * v,
        "objects": len(of_shard) * parts * v + (len(files) - len(of_shard)) * v + 2 * (parts + 1),
        "bytes_a_record": {"stored": size / records, "in memory": in_memory},
        "cache_gb": size / records * n * v / 1e9,
        "view_gb": {"stored": size / records * n / 1e9, "in memory": in_memory * n / 1e9},
        "core_hours_of_overhead_a_view": per_view | {"sum": sum(per_view.values())},
        "trainer_reads_a_view_core_seconds": trained["thread_seconds"].get("read a record: microseconds", 0) * n / 1e6,
    }


def run(*words: str) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "--case", *words], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(*words[1:2], words[0], json.dumps(found["memory_mib"]), flush=True)
    return found


def case(kind: str, name: str, folder: str, part: str, rows: str, first: str, last: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    scene = SCENES[name]
    if kind == "train":
        return train(scene, Path(folder), int(first))
    return build(scene, Path(folder), int(part), int(rows), range(int(first), int(last)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for the caches, by default a temporary one")
    parser.add_argument("--rows", type=int, default=PART // 4, help="samples a part; fewer are soon built")
    parser.add_argument("--scenes", default=",".join(SCENES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/scale.json")
    parser.add_argument("--case", nargs=7, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        print(json.dumps(case(*a.case)))
        return
    started, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(dir=a.work) as work:
        for name in a.scenes.split(","):
            place, rows = f"{work}/{name}", str(a.rows)
            few = str(a.rows // 16)
            os.environ["KDCACHE_HOME"] = f"{work}/home"
            built = {
                "view 0": run("build", name, place, rows, str(a.rows // 4), "0", "1"),
                "a later view": run("build", name, place, rows, rows, "1", "2"),
            }
            if name == "imagenet-21k":
                built["four views of one decode"] = run("build", name, place, rows, few, "2", str(2 + TOGETHER))
            trained = run("train", name, place, rows, rows, "1", "2")
            found[name] = SCENES[name] | {
                "build": built, "train": trained, "extrapolated": extrapolated(SCENES[name], built, trained)
            }  # fmt: skip
    result = {
        "machine": machine() | {"numpy": np.__version__},
        "command": f"python bench/scale.py --rows {a.rows}",
        "seconds": time.perf_counter() - started,
        "scenes": found,
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: one["extrapolated"] for name, one in found.items()}, indent=1))


if __name__ == "__main__":
    main()
