"""Two processes on two cores beside one process with one thread, and with two: images/s of training; JSON.

    python bench/ranks.py [--rounds N] [--out FILE]

resnet20 with nkd on 32x32 random pixels, batch 256: times do not depend on the pixels. All processes are started once
and take turns epoch by epoch, the others asleep, so that a noisy machine is noisy to all kinds alike; medians, the
first epoch of each left out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from pixels import images

from kdcache.cache import open_cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train import group
from kdcache.train.bench.bench import machine
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import fit, seeded
from kdcache.train.losses.options import make_loss

TEACHER, STUDENT, BATCH, STEPS = "resnet8", "resnet20", 256, 8
KINDS = {
    "one process, one thread": (1, 1),
    "two processes, one thread each": (2, 1),
    "one process, two threads": (1, 2),
}


def random_images(split: str) -> tuple[Any, Any]:
    """A dataset by module:function."""
    return images(BATCH * STEPS if split == "train" else 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="epochs of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ranks.json")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["KDCACHE_HOME"] = home
        weights = Path(home) / "teacher.safetensors"
        save_file(build_network(TEACHER, 10, 32).state_dict(), weights)
        config = BuildConfig(
            TEACHER, str(weights), data="ranks:random_images", augment="crop,flip", views=1, allow_low_accuracy=True
        )
        cache = build(config, say=lambda _: None).path
        seconds = take_turns(cache, a.rounds)
    speed = {kind: BATCH * STEPS / statistics.median(times[1:]) for kind, times in seconds.items()}
    base = speed["one process, one thread"]
    result = {
        "machine": machine(),
        "command": f"python bench/ranks.py --rounds {a.rounds}",
        "student": STUDENT,
        "batch_size": BATCH,
        "epoch_seconds": seconds,
        "images_per_second": speed,
        "over_one_process_one_thread": {kind: found / base for kind, found in speed.items()},
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    for kind, found in speed.items():
        print(f"{kind:32}{found:8.0f} images/s{found / base:8.2f}")


def take_turns(cache: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each epoch of each kind."""
    started = {kind: start(cache, rounds, *shape) for kind, shape in KINDS.items()}
    for processes in started.values():
        for process in processes:
            process.stdout.readline()  # it is ready
    for _ in range(rounds):
        for processes in started.values():
            go(processes)
            for process in processes:
                process.stdout.readline()
    seconds = {}
    for kind, processes in started.items():
        go(processes)
        ends = [process.communicate()[0] for process in processes]
        seconds[kind] = json.loads(ends[0])
    return seconds


def go(processes: list[Any]) -> None:
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def start(cache: Path, rounds: int, world: int, threads: int) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    code = f"from ranks import epochs; epochs({str(cache)!r}, {rounds})"
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def epochs(path: str, rounds: int) -> None:
    """One process: each epoch as the parent says go; in the end, the seconds of each."""

    def turn(_: Any) -> dict[str, float]:
        print("done", flush=True)
        sys.stdin.readline()
        return {}

    with group.joined("cpu"):
        data = open_data("ranks:random_images", "train")
        loader = CachedLoader(open_cache(path), data, BATCH, group.rank(), group.world())
        network = seeded(0, lambda: build_network(STUDENT, 10, 32))
        model = Classifier(network, data.mean, data.std).to(memory_format=torch.channels_last)
        turn(model)
        recipe = Recipe(epochs=rounds, lr=0.1)
        history = fit(model, make_loss("nkd", 10), loader, recipe, turn, say=lambda _: None)
    print(json.dumps([line["seconds"] for line in history]))


if __name__ == "__main__":
    main()
