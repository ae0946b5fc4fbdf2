"""`make bench`: what a training step costs by loss, and a build beside the bare teacher; a table, and JSON.

    python bench/run.py [--out FILE]

32x32 random pixels, teacher resnet56, student resnet20, batches of 128: times do not depend on the pixels. The
losses take turns step by step, so that a noisy machine is noisy to all of them alike; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from cifar10 import machine

from kdcache.cache import open_cache
from kdcache.pipeline.build import BuildConfig, build, open_source
from kdcache.pipeline.networks import build_network
from kdcache.pipeline.teachers import Classifier
from kdcache.train.loader import CachedLoader, OnlineLoader
from kdcache.train.presets import make_loss

TEACHER, STUDENT, BATCH, SAMPLES = "resnet56", "resnet20", 128, 2048
ROUNDS = 10


def random_images(split: str) -> tuple[Any, Any]:
    """A dataset by module:function: seeded noise in ten classes."""
    generator = torch.Generator().manual_seed(len(split))
    count = SAMPLES if split == "train" else 256
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return pixels.numpy(), (torch.arange(count) % 10).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/steps.json"))
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["KDCACHE_HOME"] = home
        result = measure(Path(home))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    step = result["step_milliseconds"]
    print(f"{'step of ' + STUDENT + f', batch {BATCH}':32}{'ms':>8}{'over ce':>10}")
    for name, value in step.items():
        print(f"{name:32}{value:8.1f}{value / step['ce from the cache']:10.3f}")
    print(
        f"build {result['build_images_per_second']:.0f} images/s, bare teacher {result['bare_images_per_second']:.0f}"
    )


def measure(work: Path) -> dict[str, Any]:
    """All figures, in one run."""
    torch.manual_seed(0)
    teacher = Classifier(build_network(TEACHER, 10, 32), (0.5,) * 3, (0.25,) * 3)
    weights = work / "teacher.safetensors"
    save_file(teacher.network.state_dict(), weights)
    config = BuildConfig(
        TEACHER, str(weights), "run:random_images", augment="crop,flip", views=1, allow_low_accuracy=True
    )
    source = open_source(config)
    pixels = torch.zeros((256, 3, 32, 32), dtype=torch.uint8).to(memory_format=torch.channels_last)
    source.teacher.logits(pixels)
    started = time.perf_counter()
    for _ in range(4):
        source.teacher.logits(pixels)
    bare = 4 * len(pixels) / (time.perf_counter() - started)
    built = build(config, say=lambda _: None, source=source)
    cache = open_cache(built.path)
    cached = CachedLoader(cache, source.train, BATCH)
    online = OnlineLoader(cache, source.train, source.teacher, BATCH)
    kinds = {
        "ce from the cache": (cached, make_loss("ce", 32)),
        "nkd from the cache": (cached, make_loss("nkd", 32)),
        "nkd with the live teacher": (online, make_loss("nkd", 32)),
    }
    model = Classifier(build_network(STUDENT, 10, 32), (0.5,) * 3, (0.25,) * 3).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    steps = {name: endless(loader) for name, (loader, _) in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS + 2):
        for name, (_, loss) in kinds.items():
            started = time.perf_counter()
            images, labels, records = next(steps[name])
            optimiser.zero_grad()
            loss(model(images), labels, records).backward()
            optimiser.step()
            times[name].append(1000 * (time.perf_counter() - started))
    return {
        "machine": machine(),
        "command": "python bench/run.py",
        "rounds": ROUNDS,
        "step_milliseconds": {name: statistics.median(t[2:]) for name, t in times.items()},
        "build_images_per_second": built.teacher_images / built.seconds,
        "bare_images_per_second": bare,
    }


def endless(loader: Any) -> Any:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader.steps()
        epoch += 1


if __name__ == "__main__":
    main()
