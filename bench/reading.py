"""Reading and encoding at ImageNet's size, beside peers' layouts, and a soak of the loader; writes JSON.

    python bench/reading.py --logits PATH/imagenet-logits.npz --work FOLDER

A cache of one view of 1,281,167 records (K = 20 of 1,000 classes) is made once in FOLDER, from real logits with noise
of one nat, so that no two rows are equal. Peers' layouts (train/bench/layouts.py) hold its records too. All are read in
shuffled order, in turns, from files that the system has in memory; torch computes on one thread, kdcache reads parts in
several.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from kdcache.cache import Cache, Identity, encode
from kdcache.cache.identity import DataIdentity, RecordIdentity, TeacherIdentity, ViewsIdentity
from kdcache.cache.packing import pack_hdf5
from kdcache.cache.records.choices import TEMPERATURES
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import ArraySpec
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.process.progress import Progress
from kdcache.train.bench.bench import machine
from kdcache.train.bench.layouts import noise_cache, reading_cases
from kdcache.train.config import TeachConfig
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.teach import teach

SAMPLES, CLASSES, K, PART, BATCH = 1_281_167, 1000, 20, 262_144, 1024
PEER_RECORDS, FKD_IMAGES = 200_000, 4_000


def imagenet_sized(path: Path, logits: Tensor) -> Cache:
    """The cache of SAMPLES records; made where it is not there yet."""
    record = RecordIdentity(
        classes=CLASSES, k=K, temperatures=TEMPERATURES, precision="uint8", labels=1, tail_std=False
    )
    data = DataIdentity(
        name="imagenet", split="train", samples=SAMPLES, fingerprint="0" * 64, full_contents=False, files=False
    )
    identity = Identity(
        teacher=TeacherIdentity(
            architecture="noise", weights="0" * 64, mean=(0, 0, 0), std=(1, 1, 1), input_size=224, numeric="float32"
        ),
        data=data,
        evaluation=data.model_copy(update={"split": "eval", "samples": 1}),
        views=ViewsIdentity(policy="rrc,flip", seed=0, renderer="none"),
        record=record,
        class_map=None,
        part=PART,
    )
    with Progress("make", SAMPLES, "records") as progress:
        return noise_cache(path, identity, logits, progress.advance)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reading(work: Path, cache: Cache, rounds: int) -> dict[str, Any]:
    packed = work / "imagenet.h5"
    packed.unlink(missing_ok=True)
    packing = timed(lambda: pack_hdf5(cache, packed, cache.views))

    def packed_slab() -> None:
        Cache(packed).read(0)

    cases = reading_cases(cache, work, BATCH, PEER_RECORDS, FKD_IMAGES)
    cases["slab, hdf5"] = (packed_slab, SAMPLES)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (case, _) in cases.items():
            taken[name].append(timed(case))
            gc.collect()
    rates = {name: cases[name][1] / statistics.median(times) for name, times in taken.items()}
    return {
        "bytes_a_record": cache.size() / SAMPLES,
        "hdf5": {"bytes_a_record": packed.stat().st_size / SAMPLES, "pack_seconds": packing},
        "seconds": {name: {"median": statistics.median(times), "all": times} for name, times in taken.items()},
        "records_per_second": rates,
        "times_one_seek_a_record": rates["shuffled epoch"] / rates["one seek a record"],
        "times_one_file_an_image": rates["shuffled epoch"] / rates["one file an image"],
    }


def encoding(logits: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds a record: encode and compress against resnet34's forward pass at 224, in turns."""
    model = torchvision.models.resnet34().eval().to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    z, y = logits[:1024].clone(), logits[:1024].argmax(1)

    def encode_them() -> None:
        stored = chunks.as_arrays(encode(z, y, K))
        for name, rows in stored.items():
            spec = ArraySpec(name, rows.shape, len(rows), str(rows.dtype), ("sample", "column"))
            chunks.encode_part(spec, 0, rows)

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    encode_them(), forward()
    encoded, answered = [], []
    for _ in range(rounds):
        encoded.append(timed(encode_them) / len(z))
        answered.append(timed(forward) / len(images))
    found = {"encode_us": 1e6 * statistics.median(encoded), "resnet34_us": 1e6 * statistics.median(answered)}
    return {**found, "ratio": found["resnet34_us"] / found["encode_us"]}


def resident() -> float:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def soak(work: Path, epochs: int) -> dict[str, Any]:
    """Memory over many epochs of CachedLoader on digits, four views."""
    path = work / "digits"
    os.environ["KDCACHE_HOME"] = str(work / "home")
    teach(TeachConfig("resnet8", epochs=1, force=True), lambda _: None)
    build(BuildConfig("resnet8", views=4, topk=3, out=str(path)), lambda _: None)
    cache, data = Cache(path), open_data("digits", "train")
    loader = CachedLoader(cache, data, batch_size=256)
    held = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for _images, _labels, records in loader:
            records.softened(1.0).target()
        gc.collect()
        held.append(resident())
    fifth = epochs // 5
    return {
        "epochs": epochs,
        "mib_after": {str(e): round(held[e - 1], 1) for e in (1, fifth, epochs // 2, epochs)},
        "growth_after_the_first_fifth_mib": round(held[-1] - held[fifth - 1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/reading.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.work.mkdir(parents=True, exist_ok=True)
    stored = np.load(a.logits)
    logits = torch.from_numpy(stored["logits"].reshape(-1, CLASSES).astype(np.float32))
    cache = imagenet_sized(a.work / "imagenet", logits)
    result = {
        "machine": machine(),
        "command": f"python bench/reading.py --logits {a.logits.name} --work FOLDER --rounds {a.rounds}",
        "threads": 1,
        "records": SAMPLES,
        "k": K,
        "reading": reading(a.work, cache, a.rounds),
        "encoding": encoding(logits, a.rounds),
        "soak": soak(a.work, a.epochs),
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("reading", "encoding", "soak")}, indent=1))


if __name__ == "__main__":
    main()
