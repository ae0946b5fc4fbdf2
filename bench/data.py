"""The data path alone, without a model: images/s of every loader, each beside the plain way.

    python bench/data.py [--samples 50000] [--images 480] [--rounds 9] [--out FILE]

In memory: random 32x32 pixels and dense float16 records of 10 classes, two views of crop,flip, batches of 256, as many
threads as cores. An epoch of CachedLoader, as uint8 and normalised to float32, and of FFCV's from a .beton, as uint8.

Files: JPEGs of 256 to 400 pixels (files.py), boxes of rrc,flip resized to 224, batches of 32, as many processes as
cores: kdcache's renderer, and plain torchvision (decode_image, resized_crop, flip in a DataLoader) with equal boxes.

All take turns epoch by epoch; medians, and the fastest and slowest. Images per second of processor time, of all threads
of this process together, say what is left of that on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional as tv

sys.path.insert(0, str(Path(__file__).parent))
from files import make_folder
from pixels import images

from kdcache.cache import Cache, Identity
from kdcache.cache.identity import ViewsIdentity, id_dtype
from kdcache.cache.store.chunks import as_arrays, encode_as
from kdcache.pipeline.build.answers import labels_in, view_parameters
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.pipeline.data.split import describe_data
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.views.parameters import ViewParameters, draw
from kdcache.pipeline.views.policy import check_policy, parse_policy
from kdcache.pipeline.views.render import RENDERER, Renderer
from kdcache.train import CachedLoader
from kdcache.train.bench.bench import machine
from kdcache.train.loaders.ffcv import FFCVLoader

BATCH, VIEWS, CLASSES, SIDE = 256, 2, 10, 32
FILES_BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/data.json")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = measure(Path(place), a.samples, a.images, a.rounds)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, rates in result["images_per_second"].items():
        work = result["images_per_processor_second"][name]
        span = f"{rates['slowest']:,.0f} to {rates['fastest']:,.0f}"
        print(f"{name:26}{rates['median']:10,.0f} images/s ({span}), {work:,.0f} a second of processor time")
    print(f"files over plain torchvision: {result['files_over_torchvision']:.3f}")


def measure(place: Path, samples: int, images: int, rounds: int) -> dict[str, Any]:
    """All figures, in one run."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    data = pixels(samples, "train")
    cache = filled(place / "cache", data)
    started = time.perf_counter()
    path = pack_ffcv(cache, data, place / "data.beton", None, lambda line: print(line, file=sys.stderr))
    packing = time.perf_counter() - started
    started = time.perf_counter()
    ffcv = FFCVLoader(FFCVFile(path), BATCH, workers=threads)
    next(ffcv.steps())
    first = time.perf_counter() - started
    cached = CachedLoader(cache, data, BATCH)
    os.environ["KDCACHE_HOME"] = str(place / "home")
    make_folder(place / "images", images)
    files = open_data(f"imagefolder:{place / 'images'}", "train")
    cases: dict[str, Callable[[int], Iterator[int]]] = {
        "in memory, uint8": lambda epoch: loaded(cached, cached.steps, epoch),
        "in memory, normalised": lambda epoch: loaded(cached, cached.__iter__, epoch),
        ".beton by FFCV, uint8": lambda epoch: loaded(ffcv, ffcv.steps, epoch),
        "files": lambda epoch: rendered(files, epoch, threads),
        "files, plain torchvision": lambda epoch: plain(files, epoch, threads),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    work: dict[str, list[float]] = {name: [] for name in cases}
    for epoch in range(rounds + 1):
        for name, case in cases.items():
            started, used = time.perf_counter(), time.process_time()
            count = sum(case(epoch))
            rates[name].append(count / (time.perf_counter() - started))
            work[name].append(count / (time.process_time() - used))
    ours, theirs = rates["files"][1:], rates["files, plain torchvision"][1:]
    return {
        "machine": {**machine(), "ffcv": version("ffcv"), "numba": version("numba"), "load": os.getloadavg()[0]},
        "command": "python bench/data.py",
        "samples": samples,
        "images": images,
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
        "files_over_torchvision": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def loaded(loader: CachedLoader | FFCVLoader, batches: Callable[[], Iterator[Any]], epoch: int) -> Iterator[int]:
    """The sizes of an epoch's batches."""
    loader.set_epoch(epoch)
    return (len(images) for images, _, _ in batches())


def rendered(data: Dataset, epoch: int, workers: int) -> Iterator[int]:
    drawn = draw("rrc,flip", 0, epoch, range(len(data)), data.sizes)
    renderer = Renderer(data, 224, torch.device("cpu"), "rrc,flip", workers)
    return (len(images) for images in renderer.batches(drawn, shuffled(data, epoch)))


def plain(data: Dataset, epoch: int, workers: int) -> Iterator[int]:
    drawn = draw("rrc,flip", 0, epoch, range(len(data)), data.sizes)
    loader = DataLoader(
        Plain(data, drawn), batch_sampler=[b.tolist() for b in shuffled(data, epoch)], num_workers=workers,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )  # fmt: skip
    return (len(images) for images in loader)


def shuffled(data: Dataset, epoch: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(epoch).permutation(len(data)), len(data) // FILES_BATCH)


@dataclass
class Plain(TorchDataset[torch.Tensor]):
    """What people write: decode, cut, resize, flip."""

    data: Dataset
    drawn: ViewParameters

    def __getitem__(self, index: int) -> torch.Tensor:
        image = decode_image(str(self.data.file(index)))
        top, left, height, width = self.drawn.boxes[index].tolist()
        image = tv.resized_crop(image, top, left, height, width, [224, 224], antialias=True)
        return tv.horizontal_flip(image) if self.drawn.flips[index] else image


def pixels(count: int, split: str, side: int = SIDE, classes: int = CLASSES) -> ArrayDataset:
    noise, labels = images(count, classes, side)
    return ArrayDataset(
        name="noise",
        split=split,
        labels=labels[:, None],
        class_names=tuple(map(str, range(classes))),
        sizes=np.full((count, 2), side, np.int32),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        pixels=torch.from_numpy(noise),
    )


def filled(
    path: Path,
    data: ArrayDataset,
    classes: int = CLASSES,
    views: int = VIEWS,
    name: str = "noise",
    policy: str = "crop,flip",
    part: int | None = None,
) -> Cache:
    """A cache of random logits for these images. part: samples a part, by default all."""
    side = int(data.sizes[0, 0])
    data, evaluation = (replace(split, name=name) for split in (data, pixels(100, "eval", side, classes)))
    teacher = {
        "architecture": "none", "weights": "0" * 64, "mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": side,
        "numeric": "float32",
    }  # fmt: skip
    mixed = parse_policy(policy).mixed
    shown = ViewsIdentity(policy=check_policy(policy), seed=0, renderer=RENDERER, mixed=mixed)
    identity = Identity.model_validate(
        {
            "teacher": teacher,
            "data": describe_data(data, False).model_dump(),
            "evaluation": describe_data(evaluation, False).model_dump(),
            "format": shown.format,
            "views": shown.model_dump(),
            "record": {
                "classes": classes,
                "k": None,
                "temperatures": (),
                "precision": "float16",
                "labels": 1 + mixed,
                "tail_std": False,
            },
            "class_map": None,
            "part": part or len(data),
        }
    )
    cache = Cache.create(path, identity)
    generator = torch.Generator().manual_seed(0)
    for store, split, count in ((cache.evaluation, evaluation, 1), (cache.train, data, views)):
        store.write_labels(split.labels.astype(id_dtype(classes)), {})
        for view in range(count):
            logits = torch.randn(len(split), classes, generator=generator)
            drawn = view_parameters(split, identity, view, range(len(split)))
            labels = labels_in(split.labels, drawn, range(len(split)))
            records = encode_as(identity.record_of(store.split), logits, torch.from_numpy(labels))
            for number in range(store.parts):
                rows = slice(store.rows(number).start, store.rows(number).stop)
                store.write_shard(view, number, as_arrays(records[rows]), drawn[rows].digest(), {})
    return cache


if __name__ == "__main__":
    main()
