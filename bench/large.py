"""Builds and trains from images whose pixels are larger than the memory that there is; writes JSON.

    python bench/large.py --work FOLDER [--pixels 4] [--memory 2] [--kinds wds,hf,parquet]

The images are JPEG files of 375 x 500 pixels, all different, cut from scikit-learn's two photographs: --pixels GB of
them when they are decoded. `kdcache build` and `kdcache train`, of a small teacher and a small student, run in a
control group of Linux (version 1 of the memory controller) that limits the whole tree of processes to --memory GB, so
that one that needs more is killed, and this script fails. What processes read of files counts towards the limit too,
but is given back when memory is short; so the peak that is stated is that of the processes' own memory, sampled every
0.1 s. Where no such group can be made, nothing limits the memory, and the result says so.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from kdcache.train.bench.bench import machine

HEIGHT, WIDTH, CLASSES, IN_A_FILE, EVAL, EVERY = 375, 500, 100, 1000, 200, 0.1
GIGABYTE = 1e9
TEACHER = """
import torch
from torch import nn

def small(classes=100):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, classes)
    return nn.Sequential(*layers)
"""


def jpegs(n: int, seed: int) -> Iterator[tuple[bytes, int]]:
    """n different images, and their classes."""
    photographs, rng = load_sample_images().images, np.random.default_rng(seed)
    for i in range(n):
        top, left = rng.integers(0, (427 - HEIGHT, 640 - WIDTH))
        cut = photographs[i % 2][top : top + HEIGHT, left : left + WIDTH] ^ np.uint8(rng.integers(0, 8))
        file = io.BytesIO()
        Image.fromarray(cut).save(file, "JPEG", quality=75)
        yield file.getvalue(), i % CLASSES


def write_tars(folder: Path, n: int) -> str:
    """Tars of 1,000 samples."""
    for split, count in (("train", n), ("val", EVAL)):
        images = jpegs(count, len(split))
        for first in range(0, count, IN_A_FILE):
            with tarfile.open(
                folder / f"{split}-{first // IN_A_FILE:04d}.tar", "w", format=tarfile.USTAR_FORMAT
            ) as tar:
                for i in range(first, min(first + IN_A_FILE, count)):
                    content, label = next(images)
                    for ending, member in (("jpg", content), ("cls", str(label).encode())):
                        about = tarfile.TarInfo(f"{i:08d}.{ending}")
                        about.size = len(member)
                        tar.addfile(about, io.BytesIO(member))
    return f"wds:{folder}"


def write_hf(folder: Path, n: int) -> str:
    """What save_to_disk writes."""
    import datasets

    datasets.disable_progress_bars()
    names = [str(i) for i in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for split, count in (("train", n), ("validation", EVAL)):
        made = ({"image": {"bytes": one, "path": None}, "label": label} for one, label in jpegs(count, len(split)))
        splits[split] = datasets.Dataset.from_generator(
            lambda made=made: made, features=features, cache_dir=str(folder / "made"), fingerprint=split
        )
    datasets.DatasetDict(splits).save_to_disk(str(folder / "set"), max_shard_size="100MB")
    shutil.rmtree(folder / "made")
    return f"hf:{folder}/set"


def write_parquet(folder: Path, n: int) -> str:
    """Parquet files of 1,000 rows, which the library `datasets` copies to Arrow at the first opening."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, count in (("train", n), ("validation", EVAL)):
        images = jpegs(count, len(split))
        for first in range(0, count, IN_A_FILE):
            rows = [next(images) for _ in range(first, min(first + IN_A_FILE, count))]
            table = pa.table({"image": [one for one, _ in rows], "label": [label for _, label in rows]})
            pq.write_table(table, folder / f"{split}-{first // IN_A_FILE:04d}.parquet", row_group_size=100)
    return f"hf:{folder}"


WRITERS: dict[str, Callable[[Path, int], str]] = {"wds": write_tars, "hf": write_hf, "parquet": write_parquet}


@contextmanager
def limited(gigabytes: float) -> Iterator[Path | None]:
    """A control group within this process's own, with a limit of memory; None where none can be made."""
    own = next(
        (line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), ""
    )
    group = Path(f"/sys/fs/cgroup/memory{own}") / f"kdcache-large-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(int(gigabytes * GIGABYTE)))
    except OSError as e:
        print(f"no limit of memory: {e}", file=sys.stderr)
        if group.is_dir():
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def own_memory(group: Path | None, pid: int) -> int:
    """Bytes that the processes hold themselves: private memory and shared memory, not the files that they read."""
    if group is not None:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(stat["total_rss"]) + int(stat.get("total_shmem", 0))
    total = 0
    for one in tree(pid):
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        found = dict(line.split()[:2] for line in rollup.splitlines()[1:])
        total += 1024 * (int(found["Pss_Anon:"]) + int(found["Pss_Shmem:"]))
    return total


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in tree(int(child)))]


def measured(command: list[str], environment: dict[str, str], gigabytes: float) -> dict[str, Any]:
    """Run a command of kdcache within the limit: how long it took, and the largest sum of its processes' memory."""
    with limited(gigabytes) as group:
        enter = f"echo $$ > {group}/cgroup.procs && " if group else ""
        start, most = time.monotonic(), 0
        with subprocess.Popen(
            ["/bin/sh", "-c", f'{enter}exec "$@"', "sh", sys.executable, "-m", "kdcache.cli", *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            while process.poll() is None:
                most = max(most, own_memory(group, process.pid))
                time.sleep(EVERY)
            assert process.stdout is not None
            said = process.stdout.read()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed with {process.returncode}:\n{said[-3000:]}")
        found: dict[str, Any] = {
            "seconds": round(time.monotonic() - start, 1),
            "peak_own_gb": round(most / GIGABYTE, 3),
        }
        if group is not None:
            found["peak_with_files_gb"] = round(int((group / "memory.max_usage_in_bytes").read_text()) / GIGABYTE, 3)
        found["limited_by"] = f"a control group of {gigabytes:g} GB" if group else "nothing"
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for a third of the pixels")
    parser.add_argument("--pixels", type=float, default=4, help="GB of decoded pixels")
    parser.add_argument("--memory", type=float, default=2, help="GB that all processes may use")
    parser.add_argument("--kinds", default="wds,hf,parquet")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "large.json")
    a = parser.parse_args()
    n = -(-int(a.pixels * GIGABYTE) // (HEIGHT * WIDTH * 3))
    results: dict[str, Any] = {}
    for kind in a.kinds.split(","):
        folder = a.work / kind
        folder.mkdir(parents=True)
        data = folder / "data"  # alone, since a folder is read whole
        data.mkdir()
        spec = WRITERS[kind](data, n)
        size = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
        (folder / "large_teacher.py").write_text(TEACHER)
        environment = os.environ | {
            "KDCACHE_HOME": str(folder / "home"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        teacher = [
            "--teacher",
            "large_teacher:small",
            "--teacher-size",
            "64",
            "--views",
            "2",
            "--augment",
            "rrc,flip",
            "--allow-low-accuracy",
        ]
        results[kind] = {"files_gb": round(size / GIGABYTE, 3)}
        results[kind]["build"] = measured(["build", "--data", spec, *teacher, "--device", "cpu"], environment, a.memory)
        train = [
            "--student",
            "resnet8",
            "--image-size",
            "32",
            "--epochs",
            "2",
            "--device",
            "cpu",
            "--out",
            str(folder / "run"),
        ]
        results[kind]["train"] = measured(["train", "--loss", "nkd", "--data", spec, *train], environment, a.memory)
        shutil.rmtree(folder)
        print(kind, json.dumps(results[kind]), flush=True)
    command = f"python bench/large.py --pixels {a.pixels:g} --memory {a.memory:g} --kinds {a.kinds}"
    about = {"machine": machine(), "command": command, "images": n, "image": [HEIGHT, WIDTH], "pixels_gb": a.pixels}
    a.out.write_text(json.dumps(about | {"memory_gb": a.memory, "kinds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
