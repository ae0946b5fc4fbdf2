"""The data path alone, without a model: images/s from a .beton by FFCV's loader, beside CachedLoader.

    python bench/beton.py [--samples 50000] [--rounds 9] [--out FILE]

Random 32x32 pixels and dense float16 records of 10 classes, two views of crop,flip, batches of 256, as many threads as
cores for both. What is timed is an epoch of loader.steps(): uint8 images, labels and records on the CPU. The two take
turns epoch by epoch; medians, and the fastest and slowest. Images per second of processor time, of all threads
together, say what is left of that on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kdcache.cache import Cache, Identity
from kdcache.cache.arrays import as_arrays, encode_as
from kdcache.pipeline.beton import Beton, pack_beton
from kdcache.pipeline.build import describe_data
from kdcache.pipeline.datasets import Dataset
from kdcache.pipeline.render import RENDERER
from kdcache.pipeline.views import draw
from kdcache.train import CachedLoader
from kdcache.train.bench import machine
from kdcache.train.beton import BetonLoader

BATCH, VIEWS, CLASSES, SIDE = 256, 2, 10, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("bench/results/beton.json"))
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = measure(Path(place), a.samples, a.rounds)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, rates in result["images_per_second"].items():
        work = result["images_per_processor_second"][name]
        span = f"{rates['slowest']:,.0f} to {rates['fastest']:,.0f}"
        print(f"{name:14}{rates['median']:10,.0f} images/s ({span}), {work:,.0f} a second of processor time")


def measure(place: Path, samples: int, rounds: int) -> dict[str, Any]:
    """All figures, in one run."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    data = pixels(samples, "train")
    cache = filled(place / "cache", data)
    started = time.perf_counter()
    path = pack_beton(cache, data, place / "data.beton", None, lambda line: print(line, file=sys.stderr))
    packing = time.perf_counter() - started
    started = time.perf_counter()
    loader = BetonLoader(Beton(path), BATCH, workers=threads)
    next(loader.steps())
    first = time.perf_counter() - started
    loaders = {"FFCV": loader, "CachedLoader": CachedLoader(cache, data, BATCH)}
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    work: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(rounds + 1):
        for name, each in loaders.items():
            each.set_epoch(epoch)
            started, used = time.perf_counter(), time.process_time()
            count = sum(len(images) for images, _, _ in each.steps())
            rates[name].append(count / (time.perf_counter() - started))
            work[name].append(count / (time.process_time() - used))
    return {
        "machine": {**machine(), "ffcv": version("ffcv"), "numba": version("numba"), "load": os.getloadavg()[0]},
        "command": "python bench/beton.py",
        "samples": samples,
        "rounds": rounds,
        "threads": threads,
        "pack_seconds": packing,
        "pack_bytes": path.stat().st_size,
        "seconds_to_first_batch": first,  # the first time on a machine it compiles
        "images_per_second": {
            name: {"median": statistics.median(r[1:]), "slowest": min(r[1:]), "fastest": max(r[1:])}
            for name, r in rates.items()
        },
        "images_per_processor_second": {name: statistics.median(w[1:]) for name, w in work.items()},
    }


def pixels(count: int, split: str) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(
        name="noise",
        split=split,
        labels=rng.integers(0, CLASSES, (count, 1)),
        class_names=tuple("abcdefghij"),
        sizes=np.full((count, 2), SIDE, np.int32),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        images=torch.from_numpy(rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)),
    )


def filled(path: Path, data: Dataset) -> Cache:
    """A cache of random logits for these images."""
    evaluation = pixels(100, "eval")
    teacher = {
        "architecture": "none", "weights": "0" * 64, "mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": SIDE,
        "numeric": "float32",
    }  # fmt: skip
    identity = Identity.model_validate(
        {
            "teacher": teacher,
            "data": describe_data(data, False).model_dump(),
            "evaluation": describe_data(evaluation, False).model_dump(),
            "views": {"policy": "crop,flip", "seed": 0, "renderer": RENDERER},
            "record": {
                "classes": CLASSES,
                "k": None,
                "temperatures": (),
                "precision": "float16",
                "labels": 1,
                "tail_std": False,
            },
            "class_map": None,
            "part": len(data),
        }
    )
    cache = Cache.create(path, identity)
    generator = torch.Generator().manual_seed(0)
    for store, split, views in ((cache.evaluation, evaluation, 1), (cache.train, data, VIEWS)):
        store.write_labels(split.labels.astype(np.uint8), {})
        for view in range(views):
            logits = torch.randn(len(split), CLASSES, generator=generator)
            records = encode_as(identity.record, logits, torch.from_numpy(split.labels))
            drawn = draw("crop,flip", 0, view, range(len(split)), split.sizes)
            store.write_shard(view, 0, as_arrays(records), drawn.digest(), {})
    return cache


if __name__ == "__main__":
    main()
