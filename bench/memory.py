"""Peak memory of training from a cache: flat over epochs and over views, and what it is made of; writes JSON.

    python bench/memory.py [--samples 30000] [--out FILE]

Each case is a process of its own that trains resnet8 by nkd on random 8x8 pixels with dense float16 records of 1,000
classes, so that a slab (the records of one view) is far larger than model and images: of 1, 2 and 12 views, for 2 and
12 epochs. Peaks are those that the system counts (VmHWM), less that of a process that has trained on 512 of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from data import filled, pixels

from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.train.bench.bench import machine
from kdcache.train.config import TrainConfig
from kdcache.train.run import train

CLASSES, SIDE, BATCH = 1000, 8, 512
CASES = {"1 view, 2 epochs": (1, 2), "2 views, 2 epochs": (2, 2), "12 views, 2 epochs": (12, 2), "12, 12": (12, 12)}


def images(split: str) -> ArrayDataset:
    """A dataset by module:function."""
    return pixels(int(os.environ["SAMPLES"]) if split == "train" else 100, split, SIDE, CLASSES)


def case(place: Path, samples: int, views: int, epochs: int) -> float:
    """Peak MiB of a process."""
    environment = os.environ | {"SAMPLES": str(samples), "KDCACHE_HOME": str(place)}
    command = [sys.executable, __file__, "--case", str(place / f"cache{samples}"), str(views), str(epochs)]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def run_case(cache: str, views: int, epochs: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(
            "nkd", cache, data="memory:images", student="resnet8", epochs=epochs, out=f"{out}/run", views=views,
            batch_size=BATCH, lr=0.01,
        )  # fmt: skip
        train(config, lambda _: None)
    # Not getrusage's, which begins with what the parent process had.
    print(int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=30_000)
    parser.add_argument("--out", type=Path, default=Path("bench/results/memory.json"))
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        return run_case(a.case[0], int(a.case[1]), int(a.case[2]))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for samples in (BATCH, a.samples):
            os.environ["SAMPLES"] = str(samples)
            views = 12 if samples == a.samples else 1
            filled(place / f"cache{samples}", images("train"), CLASSES, views, "memory:images")
        least = case(place, BATCH, 1, 2)
        peaks = {name: case(place, a.samples, *what) - least for name, what in CASES.items()}
    mib = 2**20
    result: dict[str, Any] = {
        "machine": machine(),
        "command": f"python bench/memory.py --samples {a.samples}",
        "samples": a.samples,
        "classes": CLASSES,
        "mib": {
            "slab": a.samples * (2 * CLASSES + 2 + 2) / mib,
            "images": a.samples * SIDE * SIDE * 3 / mib,
            "images, padded": a.samples * (SIDE + 2) ** 2 * 3 / mib,
        },
        "peak_mib": peaks,
        "peak_in_slabs": {},
    }
    result["peak_in_slabs"] = {name: peak / result["mib"]["slab"] for name, peak in peaks.items()}
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
