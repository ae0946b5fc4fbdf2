"""How long the first batch of an epoch takes to come; writes JSON. What ranks hold is in memory.py.

    python bench/first_batch.py [--before COMMIT] [--size imagenet-1k,imagenet-21k] [--work FOLDER] [--out FILE]

Caches are of random records, 1,281,167 of K = 20 of 1,000 classes or 14,200,000 of K = 100 of 21,841 (3.3 GB a view),
in two views of rrc,flip. Images are decoded from 16 JPEGs of 500 x 375 in memory and cut to 224 pixels by one worker
process for each core, in batches of 256 of all ranks together. Files of the cache are in the system's memory. Each case
is a set of processes of its own, one for each rank, which begin together:

    first        from making a loader to the first batch
    fourth       to the fourth, when all worker processes are busy
    turned       from the end of the first epoch's last batch to the next epoch's first, which was read ahead

With --before the same is done by the code of an older commit, in turns.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import decode_jpeg

sys.path.insert(0, str(Path(__file__).parent))
from versions import checked_out

from kdcache.cache import Cache, Identity
from kdcache.cache.identity import DataIdentity, RecordIdentity, TeacherIdentity, ViewsIdentity, id_dtype
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import ArraySpec
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import RENDERER
from kdcache.train import CachedLoader
from kdcache.train.bench.bench import machine

SIZES = {"imagenet-1k": (1_281_167, 1000, 20), "imagenet-21k": (14_200_000, 21_841, 100), "small": (40_000, 1000, 20)}
PART, VIEWS, BATCH, RANKS = 262_144, 2, 256, (1, 2)


class Synthetic:
    """A dataset in files, as a loader sees it, whose images are 16 JPEGs again and again."""

    name, split, in_memory, pixels, note, paths = "synthetic", "train", False, None, None, ()
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, samples: int, classes: int) -> None:
        rng = np.random.default_rng(0)
        self.sizes = np.broadcast_to(np.array([375, 500], np.int32), (samples, 2))
        self.labels = rng.integers(0, classes, (samples, 1))
        self._classes = classes

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self._classes)))

    @cached_property
    def _files(self) -> list[torch.Tensor]:
        rng, files = np.random.default_rng(1), []
        for _ in range(16):
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375))
            small.save(file := io.BytesIO(), "JPEG", quality=90)
            files.append(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
        return files

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> torch.Tensor:
        return decode_jpeg(self._files[index % 16])

    def fingerprint(self, full: bool = False) -> str:
        return "0" * 64

    def where(self, index: int) -> str:
        return f"image {index}"


def made(path: Path, samples: int, classes: int, k: int) -> Path:
    """A cache of random records, which compress about as well as real ones; made where it is not there yet."""
    record = RecordIdentity(
        classes=classes, k=k, temperatures=(1.0, 2.0, 3.0, 4.0), precision="uint8", labels=1, tail_std=False
    )
    data = DataIdentity(
        name="synthetic", split="train", samples=samples, fingerprint="0" * 64, full_contents=False, files=True
    )
    teacher = TeacherIdentity(
        architecture="none", weights="0" * 64, mean=(0, 0, 0), std=(1, 1, 1), input_size=224, numeric="float32"
    )
    evaluation = data.model_copy(update={"split": "eval", "samples": 1, "name": "synthetic"})
    identity = Identity(
        teacher=teacher,
        data=data,
        evaluation=evaluation,
        views=ViewsIdentity(policy="rrc,flip", seed=0, renderer=RENDERER),
        record=record,
        class_map=None,
        part=min(PART, samples),
    )
    cache, images = Cache.create(path, identity), Synthetic(samples, classes)
    if cache.complete and len(cache.views) == VIEWS:
        return path
    print(f"making {path}", file=sys.stderr)
    rng, ids, store = np.random.default_rng(2), id_dtype(classes), cache.train
    store.write_labels(images.labels.astype(ids), {})
    store.write_sizes(np.ascontiguousarray(images.sizes), {})
    cache.evaluation.write_labels(np.zeros((1, 1), ids), {})
    cache.evaluation.write_sizes(images.sizes[:1].copy(), {})
    rows = identity.part
    drawn = {
        "classes": rng.integers(0, classes, (rows, k)).astype(ids),
        "gaps": np.minimum(rng.geometric(0.3, (rows, k - 1)), 255).astype(np.uint8),
        "target_gap": rng.random((rows, 1)).astype(np.float16),
        "tail": rng.integers(0, 200, (rows, 4)).astype(np.uint8),
    }
    one = {name: of[:1] for name, of in drawn.items()}
    cache.evaluation.write_shard(0, 0, one, "0" * 64, {})
    sums = np.full(store.layout.tail_sums.shape[1:], 1.0)
    encode, encoded = chunks.encode_part, dict[tuple[str, int], bytes]()

    def encode_once(spec: ArraySpec, part: int, rows: NDArray[Any]) -> bytes:
        """All parts have the same rows: compressing them takes most of the time, and reading them as long as others."""
        key = spec.name, len(rows)
        if key not in encoded:
            encoded[key] = encode(spec, part, rows)
        return encoded[key]

    chunks.encode_part = encode_once
    for view in range(VIEWS):
        for part in range(store.parts):
            of = store.rows(part)
            shard = {name: rows[: len(of)] for name, rows in drawn.items()}
            digest = draw("rrc,flip", 0, view, of, images.sizes).digest()
            store.write_shard(view, part, shard, digest, {}, sums if store.carries_tail_sums(view) else None)
    chunks.encode_part = encode
    cache.write_prior({})
    return path


def run_rank(path: str, size: str, rank: int, world: int) -> None:
    """One rank: begins when its parent says so, and prints what it found."""
    torch.set_num_threads(1)
    samples, classes, _ = SIZES[size]
    cache, data = Cache(Path(path)), Synthetic(samples, classes)
    workers = max(1, (os.cpu_count() or 1) // world)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    loader = CachedLoader(cache, data, BATCH, rank, world, workers=workers)  # type: ignore[arg-type]
    steps, seconds = loader.steps(), []
    for _ in range(4):
        next(steps)
        seconds.append(time.perf_counter() - started)
    steps.close()
    until_read(loader)
    time.sleep(1)
    turned = time.perf_counter()
    steps = loader.steps()
    next(steps)
    turned = time.perf_counter() - turned
    print(json.dumps({"first": seconds[0], "fourth": seconds[3], "turned": turned}), flush=True)
    sys.stdin.readline()
    steps.close()


def until_read(loader: CachedLoader) -> None:
    """Wait for what is read ahead, by old code and new."""
    slabs: Any = loader._slabs
    kept = list(slabs.values() if isinstance(slabs, dict) else slabs._slabs.values())
    for slab in kept:
        slab.result() if isinstance(slabs, dict) else slab.settle()


def case(code: Path, path: Path, size: str, world: int) -> dict[str, float]:
    """The seconds of the slowest rank."""
    env = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(path), size, str(rank), str(world)],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    for rank in ranks:
        say(rank)
    found = [json.loads(rank.stdout.readline()) for rank in ranks]  # type: ignore[union-attr]
    for rank in ranks:
        say(rank)
        assert rank.wait(60) == 0
    return {name: max(one[name] for one in found) for name in found[0]}


def say(rank: subprocess.Popen[str]) -> None:
    assert rank.stdin is not None
    rank.stdin.write("go\n")
    rank.stdin.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a commit")
    parser.add_argument("--size", default="imagenet-1k", help=f"some of {','.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where caches are made and stay")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/first_batch.json")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.rank:
        return run_rank(a.rank[0], a.rank[1], int(a.rank[2]), int(a.rank[3]))
    result: dict[str, Any] = {"machine": machine(), "command": f"python bench/first_batch.py --size {a.size}"}
    with tempfile.TemporaryDirectory() as temporary:
        versions = {"now": checked_out(Path(temporary) / "now", None)}
        if a.before:
            versions = {"before": checked_out(Path(temporary) / "before", a.before), **versions}
            result |= {"before": a.before, "command": f"{result['command']} --before {a.before}"}
        for size in a.size.split(","):
            result[size] = of_size(size, versions, a.rounds, (a.work or Path(temporary)) / size)
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def of_size(size: str, versions: dict[str, Path], rounds: int, place: Path) -> dict[str, Any]:
    """Medians of all cases with a cache of that size, which take turns."""
    samples, classes, k = SIZES[size]
    path = made(place, samples, classes, k)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for world in RANKS:
            for version, code in versions.items():
                found.setdefault(f"{version}, {world} ranks", []).append(case(code, path, size, world))
    medians = {
        name: {what: round(statistics.median(one[what] for one in all_), 3) for what in all_[0]}
        for name, all_ in found.items()
    }
    return {"samples": samples, "k": k, "seconds": medians}


if __name__ == "__main__":
    main()
