"""Reading and encoding at ImageNet's size, beside peers' layouts, and a soak of the loader; writes JSON.

    python bench/reading.py --logits PATH/imagenet-logits.npz --work FOLDER

A cache of one view of 1,281,167 records (K = 20 of 1,000 classes) is made once in FOLDER, from real logits with noise
of one nat, so that no two rows are equal. Peers' layouts are written from their descriptions: TinyViT's one file of
4 + 4 K bytes a record, read by one seek a record and stacked to batches; FKD's one torch file an image with the top 5
of all its crops, of which an epoch uses one. All are read in shuffled order, in turns, from files that the system has
in memory; torch computes on one thread, kdcache reads parts in several.
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
from cifar10 import machine
from torch import Tensor

from kdcache.cache import Cache, Identity, arrays, encode
from kdcache.cache.identity import DataIdentity, RecordIdentity, TeacherIdentity, ViewsIdentity
from kdcache.cache.pack import pack_hdf5
from kdcache.cache.records import TEMPERATURES, tail_distribution
from kdcache.pipeline.build import BuildConfig, build
from kdcache.pipeline.datasets import open_data
from kdcache.pipeline.progress import Progress
from kdcache.train.loader import CachedLoader, epoch_batches, gathered
from kdcache.train.teach import TeachConfig, teach

SAMPLES, CLASSES, K, PART, BATCH = 1_281_167, 1000, 20, 262_144, 1024
PEER_RECORDS, FKD_IMAGES, FKD_CROPS = 200_000, 4_000, 12


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
    cache = Cache.create(path, identity)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (SAMPLES, 1), generator=generator)
    writer = {"host": "bench"}
    cache.train.write_labels(labels.numpy().astype(arrays.id_dtype(CLASSES)), writer)
    # One sample stands for the evaluation split, without which a cache is not complete.
    cache.evaluation.write_labels(labels[:1].numpy().astype(arrays.id_dtype(CLASSES)), writer)
    one = arrays.as_arrays(arrays.encode_as(record, logits[:1], labels[:1]))
    cache.evaluation.write_shard(0, 0, one, "0" * 64, writer)
    with Progress("make", SAMPLES, "records") as progress:
        for part in range(cache.train.parts):
            rows, blocks = cache.train.rows(part), []
            sums = torch.zeros(len(TEMPERATURES), CLASSES, dtype=torch.float64)
            if part in cache.train.committed().get(0, set()):
                progress.advance(len(rows))
                continue
            for start in range(rows.start, rows.stop, 4096):
                y = labels[start : min(start + 4096, rows.stop)]
                base = logits[torch.randint(0, len(logits), (len(y),), generator=generator)]
                z = base + torch.randn(base.shape, generator=generator)
                records = arrays.encode_as(record, z, y)
                sums += tail_distribution(z[:64], records[torch.arange(64)])  # enough for a prior
                blocks.append(arrays.as_arrays(records))
                progress.advance(len(y))
            shard = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
            cache.train.write_shard(0, part, shard, "0" * 64, writer, sums.numpy())
    cache.write_prior(writer)
    return cache


def tinyvit_file(path: Path, records: Any) -> None:
    """PEER_RECORDS records of a seed, K fp16 probabilities and K int16 ids."""
    some = records[torch.arange(PEER_RECORDS)]
    rows = np.empty(PEER_RECORDS, [("seed", "<i4"), ("p", "<f2", (K,)), ("ids", "<i2", (K,))])
    rows["seed"] = np.arange(PEER_RECORDS)
    rows["p"] = some.softened(1.0, "uniform").ranked()[1].numpy()
    rows["ids"] = some.classes.numpy()
    rows.tofile(path)


def fkd_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in range(FKD_IMAGES):
        crops = (torch.rand(FKD_CROPS, 4), torch.rand(FKD_CROPS) < 0.5)
        labels = [(torch.rand(5).half(), torch.randint(0, CLASSES, (5,)).short()) for _ in range(FKD_CROPS)]
        torch.save((*crops, labels), folder / f"{image}.tar")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reading(work: Path, cache: Cache, rounds: int) -> dict[str, Any]:
    tinyvit, fkd = work / "tinyvit.bin", work / "fkd"
    if not tinyvit.exists():
        tinyvit_file(tinyvit, cache.read(0))
    if not (fkd / f"{FKD_IMAGES - 1}.tar").exists():
        fkd_files(fkd)
    rng = np.random.default_rng(0)
    packed = work / "imagenet.h5"
    packed.unlink(missing_ok=True)
    packing = timed(lambda: pack_hdf5(cache, packed, cache.views))

    def slab() -> None:
        Cache(cache.path).read(0)

    def packed_slab() -> None:
        Cache(packed).read(0)

    def epoch() -> None:
        records = Cache(cache.path).read(0)
        batches = epoch_batches(SAMPLES, BATCH, 0, int(rng.integers(1000)))
        for _ in gathered(records, records.labels, batches):
            pass

    def one_seek_a_record() -> None:
        size = 4 + 4 * K
        with tinyvit.open("rb") as f:
            for batch in np.array_split(rng.permutation(PEER_RECORDS), PEER_RECORDS // BATCH):
                probabilities, ids = [], []
                for i in batch.tolist():
                    f.seek(i * size)
                    row = f.read(size)
                    probabilities.append(np.frombuffer(row, "<f2", K, 4))
                    ids.append(np.frombuffer(row, "<i2", K, 4 + 2 * K))
                torch.from_numpy(np.stack(probabilities)), torch.from_numpy(np.stack(ids))

    def one_file_an_image() -> None:
        for i in rng.permutation(FKD_IMAGES).tolist():
            _, _, labels = torch.load(fkd / f"{i}.tar", weights_only=True)
            labels[int(rng.integers(FKD_CROPS))]

    cases = {
        "slab": (slab, SAMPLES), "slab, hdf5": (packed_slab, SAMPLES), "shuffled epoch": (epoch, SAMPLES),
        "one seek a record": (one_seek_a_record, PEER_RECORDS), "one file an image": (one_file_an_image, FKD_IMAGES),
    }  # fmt: skip
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
        stored = arrays.as_arrays(encode(z, y, K))
        for name, rows in stored.items():
            spec = arrays.ArraySpec(name, rows.shape, len(rows), str(rows.dtype), ("sample", "column"))
            arrays.encode_part(spec, 0, rows)

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
    parser.add_argument("--out", type=Path, default=Path("bench/results/reading.json"))
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
