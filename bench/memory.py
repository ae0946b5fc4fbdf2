"""Peak memory of training from a cache: flat over epochs, views and ranks, and what it is made of; writes JSON.

    python bench/memory.py [--samples 30000] [--before COMMIT] [--out FILE]

Each case is a set of processes of its own, one for each rank, that train resnet8 by nkd on random 8x8 pixels with dense
float16 records of 1,000 classes in parts of 4,096 samples, so that a slab (the records of one view) is far larger than
model and images: of 1, 2 and 12 views, for 2 and 12 epochs, by 1, 2 and 4 ranks of one machine. Peaks are those that
the system counts (VmHWM), added up over the ranks, and the peak of the sum of their memory that is no file's (PSS, in
which what several processes share counts once), looked at every 100 ms; less those of as many ranks that have trained
on 512 of the samples. With --before the same is measured with the code of an older commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from data import filled, pixels
from versions import checked_out

from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.train.bench.bench import machine
from kdcache.train.config import TrainConfig
from kdcache.train.run import train

CLASSES, SIDE, BATCH, PART = 1000, 8, 512, 4096
CASES = {
    "1 view, 2 epochs": (1, 2, 1),
    "2 views, 2 epochs": (2, 2, 1),
    "12 views, 2 epochs": (12, 2, 1),
    "12 views, 12 epochs": (12, 12, 1),
    "2 ranks, 12 views, 4 epochs": (12, 4, 2),
    "4 ranks, 12 views, 4 epochs": (12, 4, 4),
}


def images(split: str) -> ArrayDataset:
    """A dataset by module:function."""
    return pixels(int(os.environ["SAMPLES"]) if split == "train" else 100, split, SIDE, CLASSES)


def case(code: Path, place: Path, samples: int, views: int, epochs: int, world: int) -> tuple[float, float]:
    """Peak MiB of all ranks together: by VmHWM, and by PSS."""
    environment = os.environ | {"SAMPLES": str(samples), "KDCACHE_HOME": str(place), "PYTHONPATH": str(code)}
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--case", str(place / f"cache{samples}"), str(views), str(epochs)]
    with tempfile.TemporaryDirectory() as out:
        ranks = [
            subprocess.Popen(
                [*command, out], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True,
                env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
            )
            for rank in range(world)
        ]  # fmt: skip
        pss = 0.0
        while any(rank.poll() is None for rank in ranks):
            pss = max(pss, sum(own_memory(rank.pid) for rank in ranks))
            time.sleep(0.1)
        if any(rank.returncode for rank in ranks):
            sys.exit(f"a rank of {views} views, {epochs} epochs failed")
        return sum(float(rank.communicate()[0].split()[-1]) for rank in ranks), pss


def own_memory(process: int) -> float:
    """MiB of a process, libraries and other files left out, which other processes may share."""
    return sum(counted(field, f"/proc/{process}/smaps_rollup") for field in ("Pss_Anon", "Pss_Shmem"))


def counted(field: str, file: str) -> float:
    """What the system counts of a process, in MiB; 0 of one that has ended."""
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", Path(file).read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def run_case(cache: str, views: int, epochs: int, out: str) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(
        "nkd", cache, data="memory:images", student="resnet8", epochs=epochs, out=f"{out}/run", views=views,
        batch_size=BATCH, lr=0.01, device="cpu",
    )  # fmt: skip
    train(config, lambda _: None)
    # Not getrusage's, which begins with what the parent process had.
    print(counted("VmHWM", "/proc/self/status"))


def measure(code: Path, place: Path, samples: int) -> dict[str, dict[str, float]]:
    """The peaks of each case, over those of as many ranks that have trained on few samples."""
    least = {world: case(code, place, BATCH, 1, 2, world) for world in {of[2] for of in CASES.values()}}
    found: dict[str, dict[str, float]] = {"vmhwm": {}, "pss": {}}
    for name, (views, epochs, world) in CASES.items():
        peaks = case(code, place, samples, views, epochs, world)
        for kind, peak, base in zip(found, peaks, least[world], strict=True):
            found[kind][name] = peak - base
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=30_000)
    parser.add_argument("--before", help="a commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/memory.json")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        return run_case(a.case[0], int(a.case[1]), int(a.case[2]), a.case[3])
    mib = 2**20
    slab = a.samples * (2 * CLASSES + 2 + 2) / mib
    result: dict[str, Any] = {
        "machine": machine(),
        "command": f"python bench/memory.py --samples {a.samples}" + (f" --before {a.before}" if a.before else ""),
        "samples": a.samples,
        "classes": CLASSES,
        "mib": {
            "slab": slab,
            "images": a.samples * SIDE * SIDE * 3 / mib,
            "images, padded": a.samples * (SIDE + 2) ** 2 * 3 / mib,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for samples in (BATCH, a.samples):
            os.environ["SAMPLES"] = str(samples)
            views = 12 if samples == a.samples else 1
            filled(place / f"cache{samples}", images("train"), CLASSES, views, "memory:images", part=PART)
        versions = {"now": checked_out(place / "now", None)}
        if a.before:
            versions["before"] = checked_out(place / "before", a.before)
        for version, code in versions.items():
            peaks = measure(code, place, a.samples)
            in_slabs = {kind: {name: peak / slab for name, peak in of.items()} for kind, of in peaks.items()}
            result[version] = {"peak_mib": peaks, "peak_in_slabs": in_slabs}
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
