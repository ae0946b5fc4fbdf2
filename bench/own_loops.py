"""The examples beside the trainer: what each learns from one cache; and what CachedDataset costs beside CachedLoader.

    python bench/own_loops.py --out bench/results/own_loops.json

Costs are this process's own time for a batch without a student, with the loaders in turns; the fastest round counts.
They are of no worker processes, so that a busy machine changes little. read_milliseconds is what set_epoch takes for a
view.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kdcache.cache import Cache, open_cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.train import CachedDataset, CachedLoader
from kdcache.train.bench.bench import machine
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.run import train
from kdcache.train.teach import teach

ROOT = Path(__file__).resolve().parent.parent
TEACHER, TEACHER_EPOCHS, VIEWS = "resnet20", 10, 8
MIXES = ",mixup(0.2),cutmix(1)"  # a batch of CachedDataset then has the partners of its samples rendered too
FILES = 520
BATCH = 256


def teacher() -> torch.nn.Module:
    """An untrained network of ten classes, which costs little."""
    torch.manual_seed(0)
    pool = torch.nn.AdaptiveAvgPool2d(4)
    return torch.nn.Sequential(pool, torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 10))


def quiet(_: str) -> None:
    pass


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"kdcache_example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def learnt(cache: str, epochs: int, seeds: int, folder: Path) -> dict[str, dict[str, Any]]:
    """The top-1 of the trainer and of each example by seed, on digits."""
    names = [path.stem for path in sorted((ROOT / "examples").glob("*.py"))]
    top1: dict[str, list[float]] = {"kdcache train": [], **{name: [] for name in names}}
    for seed in range(seeds):
        config = TrainConfig("kd", cache, student="resnet8", epochs=epochs, seed=seed, out=str(folder / f"run{seed}"))
        top1["kdcache train"].append(train(config, quiet)["top1"])
        for name in names:
            top1[name].append(example(name).main(cache, epochs=epochs, seed=seed)["top1"])
        print(seed, {name: round(values[-1], 4) for name, values in top1.items()}, flush=True)
    rounded = {name: [round(value, 4) for value in values] for name, values in top1.items()}
    return {name: {"top1": values, "mean": round(statistics.mean(values), 4)} for name, values in rounded.items()}


def seconds_of(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def costs(cache: Cache, data: str, rounds: int) -> dict[str, float]:
    """Microseconds of processor time an image, and milliseconds to read a view."""
    loader, dataset = CachedLoader(cache, data, BATCH, workers=0), CachedDataset(cache, data)
    shuffled = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, collate_fn=dataset.collate)
    one_by_one = DataLoader(dataset, None, sampler=range(BATCH))  # as where a wrapper knows nothing of batches

    def all_of(batches: Any) -> Callable[[], object]:
        return lambda: [None for _ in batches]

    best = {"cached_loader": float("inf"), "cached_dataset": float("inf"), "sample_by_sample": float("inf")}
    read = float("inf")
    for epoch in range(1, rounds + 1):  # view 0 has been read
        read = min(read, seconds_of(lambda epoch=epoch: dataset.set_epoch(epoch)))
        loader.set_epoch(epoch)
        images = BATCH * len(loader)
        loops = {"cached_loader": (loader, images), "cached_dataset": (shuffled, images)}
        loops["sample_by_sample"] = one_by_one, BATCH
        for name, (batches, count) in loops.items():
            best[name] = min(best[name], seconds_of(all_of(batches)) / count)
    return {**{name: round(1e6 * value, 2) for name, value in best.items()}, "read_milliseconds": round(1e3 * read, 2)}


def photos(folder: Path) -> str:
    """Image files of smooth noise in ten classes, as large as many photos are kept for training: their --data."""
    rng = np.random.default_rng(0)
    for i in range(FILES + 10):
        place = folder / ("train" if i < FILES else "val") / str(i % 10)
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)
    return f"imagefolder:{folder}"


def all_costs(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """The costs of images in memory and in files, with and without mixing."""
    found = {}
    for kind, data, size in (("in memory", "pixels:noise", 32), ("files", photos(folder / "photos"), 224)):
        for mixes in ("", MIXES):
            policy = ("crop,flip" if kind == "in memory" else "rrc,flip") + mixes
            config = BuildConfig(
                "own_loops:teacher", data=data, augment=policy, views=2, teacher_size=size, allow_low_accuracy=True,
                workers=0,
            )  # fmt: skip
            found[f"{kind}, {policy}"] = costs(open_cache(str(build(config, quiet).path)), data, rounds)
            print(kind, policy, found[f"{kind}, {policy}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["learnt", "costs"], help="only this; the rest of --out is kept")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))  # for pixels:noise and for the teacher here
    before = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    found: dict[str, Any] = {**before, **machine(), "epochs": args.epochs, "batch": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDCACHE_HOME"] = folder
        if args.part != "costs":
            teach(TeachConfig(TEACHER, epochs=TEACHER_EPOCHS), quiet)
            cache = str(build(BuildConfig(TEACHER, views=VIEWS), quiet).path)
            found["learnt"] = learnt(cache, args.epochs, args.seeds, Path(folder))
        if args.part != "learnt":
            found["microseconds_an_image"] = all_costs(args.rounds, Path(folder))
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
