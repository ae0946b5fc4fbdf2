"""Two Ray workers beside one on the same machine: images/s of a build's shards, from ready workers on; JSON.

    python bench/ray_workers.py [--images 12000] [--rounds 3] [--out FILE]

resnet20 answers for two views of random 32x32 images in memory, in four parts, batches of 250. Each worker has one CPU
and one thread. The cases take turns, each on a Ray that is started for it; medians, and all times. Starting processes
and trying the teacher out are not counted: they take the same seconds however long the build is.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from pixels import images

from kdcache.pipeline.build.build import carry_out
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.plan import BuildPlan, plan_build
from kdcache.pipeline.build.source import Say, open_source
from kdcache.pipeline.cluster.builder import Cluster, ClusterBuilder
from kdcache.pipeline.cluster.layout import Layout
from kdcache.pipeline.teachers.networks import build_network
from kdcache.train.bench.bench import machine

TEACHER, VIEWS, PARTS, BATCH = "resnet20", 2, 4, 250


def random_images(split: str) -> tuple[Any, Any]:
    """A dataset by module:function."""
    return images(int(os.environ["IMAGES"]) if split == "train" else BATCH)


class Timed(Cluster):
    """A cluster whose workers are all ready before the shards are begun with; started: when that was."""

    started = 0.0

    def probe(self, plan: BuildPlan, images: int, say: Say) -> tuple[float, float]:
        found = super().probe(plan, images, say)
        pool = self._workers(plan)
        while pool.waits:
            done, _ = ray.wait(pool.waits)
            pool.ready(done[0])
        return found

    def builder(self, *given: Any) -> ClusterBuilder:
        self.started = time.perf_counter()
        return super().builder(*given)


def seconds(config: BuildConfig, workers: int) -> float:
    """How long the shards take."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as place:
        ray.init(
            "local", num_cpus=workers, include_dashboard=False, log_to_driver=False, _temp_dir=place,
            logging_level=logging.CRITICAL, object_store_memory=200 * 2**20,
        )  # fmt: skip
        cluster = Timed(Layout(gpus=0, cpus=1, decoders=0, processes=0, capacity=workers), config)
        plan = plan_build(config, open_source(config, lambda _: None), cluster)
        try:
            with tempfile.TemporaryDirectory() as out:
                carry_out(replace(plan, folder=Path(out) / "cache"), lambda _: None)
                return time.perf_counter() - cluster.started
        finally:
            cluster.close()
            ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ray.json")
    a = parser.parse_args()
    os.environ |= {"IMAGES": str(a.images), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        os.environ["KDCACHE_HOME"] = home
        weights = Path(home) / "teacher.safetensors"
        save_file(build_network(TEACHER, 10, 32).state_dict(), weights)
        config = BuildConfig(
            TEACHER, str(weights), data="ray_workers:random_images", augment="crop,flip", views=VIEWS, device="cpu",
            batch_size=BATCH, allow_low_accuracy=True, part=a.images // PARTS,
        )  # fmt: skip
        took: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(a.rounds):
            for workers, times in took.items():
                times.append(seconds(config, workers))
    total = VIEWS * a.images + BATCH
    speed = {workers: total / statistics.median(times) for workers, times in took.items()}
    result = {
        "machine": {**machine(), "ray": ray.__version__},
        "command": f"python bench/ray_workers.py --images {a.images} --rounds {a.rounds}",
        "teacher": TEACHER,
        "images": total,
        "seconds": took,
        "images_per_second": speed,
        "two_over_one": speed[2] / speed[1],
        "two_over_one_by_round": [one / two for one, two in zip(took[1], took[2], strict=True)],
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    for workers, found in speed.items():
        print(f"{workers} worker{'s' if workers > 1 else ' '} {found:8.0f} images/s {found / speed[1]:6.2f}")


if __name__ == "__main__":
    main()
