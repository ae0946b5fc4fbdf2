"""The examples beside the trainer: what each learns from one cache; and what CachedDataset costs beside CachedLoader.

    python bench/own_loops.py --out bench/results/own_loops.json

Costs are this process's own time for a batch without a student, with the loaders in turns; the fastest round counts.
They are of no worker processes, so that a busy machine changes little. `read` is what set_epoch takes for a view.
"""

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
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
# Crops alone; and mixed views, in which a batch of CachedDataset has the partners of its samples rendered too.
POLICIES = "crop,flip", "crop,flip,mixup(0.2),cutmix(1)"
UNTRAINED = {"teacher_size": 32, "allow_low_accuracy": True, "workers": 0}
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
    single = DataLoader(
        dataset, BATCH, sampler=range(4 * BATCH), collate_fn=lambda samples: dataset.collate([*samples])
    )

    def all_of(batches: Any) -> Callable[[], object]:
        return lambda: [None for _ in batches]

    best = {"cached_loader": float("inf"), "cached_dataset": float("inf"), "sample_by_sample": float("inf")}
    read = float("inf")
    for epoch in range(rounds):
        read = min(read, seconds_of(lambda epoch=epoch: dataset.set_epoch(epoch)) or float("inf"))
        loader.set_epoch(epoch)
        images = BATCH * len(loader)
        loops = {"cached_loader": (loader, images), "cached_dataset": (shuffled, images)}
        loops["sample_by_sample"] = single, 4 * BATCH
        for name, (batches, count) in loops.items():
            best[name] = min(best[name], seconds_of(all_of(batches)) / count)
    return {**{name: round(1e6 * value, 2) for name, value in best.items()}, "read": round(1e3 * read, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", help="image files to measure too, as --data wants them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {**machine(), "epochs": args.epochs, "batch": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDCACHE_HOME"] = folder
        os.chdir(Path(__file__).parent)  # for --data pixels:noise
        teach(TeachConfig(TEACHER, epochs=TEACHER_EPOCHS), quiet)
        cache = str(build(BuildConfig(TEACHER, views=VIEWS), quiet).path)
        found["learnt"] = learnt(cache, args.epochs, args.seeds, Path(folder))
        found["microseconds_an_image"] = {}
        for kind, data in {"in memory": "pixels:noise", "files": args.files}.items():
            for policy in POLICIES if data else ():
                made = build(BuildConfig("own_loops:teacher", data=data, augment=policy, views=2, **UNTRAINED), quiet)
                cost = costs(open_cache(str(made.path)), data, args.rounds)
                found["microseconds_an_image"][f"{kind}, {policy}"] = cost
                print(kind, policy, cost, flush=True)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
