"""How fast a build reads the images of each kind of data, beside imagefolder; and what opening an index costs.

    python bench/kinds.py speed [--images 600] [--rounds 9]
    python bench/kinds.py build [--images 600] [--rounds 9]
    python bench/kinds.py index [--samples 1281167] [--kinds imagefolder,table,parquet,paths,wds,hf,own]

speed: the same JPEG files of ImageNet's sizes (cuts of scikit-learn's two photographs, enlarged) in every kind of data.
All kinds take turns, in an order that changes from round to round: each renders one view of every image at 224 pixels
by as many worker processes as there are cores, which is all that a build does before its teacher. Ratios are of two
rates of the same round. Rates by processor time, of this process and its workers, hold on a busy machine too. Decoding
alone is timed in one process, by processor time, 20 images at a time in turns. "PIL, RGB" is what torchvision's own
Datasets give: user's code decodes with PIL there, and kdcache cannot make it quicker.

build: `kdcache build` of one view of the same files by a ResNet-18 at 224 pixels: whole builds, each in a process of
its own, in turns. images_per_second is what the teacher answered for by the seconds that the build itself states.

index: the train split is opened for the first and for the second time, each in a process of its own, and with labels.
Files are hard links to 64 images, in 1,000 folders. Of the tars every second is a link to another. The Dataset gives
bytes. seconds are of the clock, processor_seconds of all processes together, peak_memory_mb of the largest one.

Each part writes its results into one JSON file, and removes what it has written for them.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import Renderer
from kdcache.train.bench.bench import machine

CLASSES, BATCH, AT_ONCE, IN_A_TAR, LINKS = 1000, 32, 20, 10_000, 64
OWN = """
import os
from pathlib import Path

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

def files():
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk({files!r}) for name in names)

class Own(torch.utils.data.Dataset):
    classes = [str(i) for i in range({classes})]

    def __init__(self, read, n=None):
        self.read, self.files = read, files()
        self.n = n or len(self.files)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.read(self.files[i % len(self.files)]), i % {classes}

def some(split):
    return None if split == "train" else 2

def lazy(split):
    return Own(Image.open, n=some(split))

def converted(split):
    return Own(lambda path: Image.open(path).convert("RGB"), n=some(split))

def contents(split):
    return Own(lambda path: Path(path).read_bytes(), n=some(split))

def tensors(split):
    return Own(lambda path: decode_image(path, ImageReadMode.RGB), n=some(split))

def paths(split):
    found = files()[: some(split)]
    return found, [i % {classes} for i in range(len(found))]

def many(split):
    contents = {{path: Path(path).read_bytes() for path in files()}}
    return Own(contents.__getitem__, {samples})
"""


def photographs(n: int, seed: int = 0) -> list[bytes]:
    """JPEG files of ImageNet's sizes, about 500 by 375 pixels: cuts of two photographs, enlarged to 900 by 600."""
    large = [
        Image.fromarray(photo).resize((900, 600), Image.Resampling.BICUBIC) for photo in load_sample_images().images
    ]
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        height, width = (int(x) for x in rng.integers((320, 420), (430, 580)))
        top, left = (int(x) for x in rng.integers(0, (600 - height, 900 - width)))
        file = io.BytesIO()
        large[i % 2].crop((left, top, left + width, top + height)).save(file, "JPEG", quality=92)
        found.append(file.getvalue())
    return found


def tiny(n: int) -> list[bytes]:
    """PNG files of a hundred bytes, too large in pixels to be held in memory."""
    found = []
    for i in range(n):
        file = io.BytesIO()
        Image.new("L", (66 + i % 5, 70 + i % 3), i).save(file, "PNG")
        found.append(file.getvalue())
    return found


def write_module(folder: Path, files: Path, name: str, classes: int, samples: int = 0) -> str:
    (folder / f"{name}.py").write_text(OWN.format(files=str(files), classes=classes, samples=samples))
    return name


def write_tar(path: Path, first: int, contents: list[bytes], ending: str, classes: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, content in enumerate(contents, first):
            for end, member in ((ending, content), ("cls", str(i % classes).encode())):
                about = tarfile.TarInfo(f"{i:08d}.{end}")
                about.size = len(member)
                tar.addfile(about, io.BytesIO(member))


def write_hf(folder: Path, contents: Sequence[bytes], classes: int) -> Path:
    """What save_to_disk writes, with a second split of the first two images."""
    import datasets  # an extra of kdcache's
    import pyarrow

    datasets.disable_progress_bars()
    splits = {}
    for split, n in (("train", len(contents)), ("test", 2)):
        images = pyarrow.array(contents[:n], pyarrow.large_binary())
        table = pyarrow.table({"image": images, "label": [i % classes for i in range(n)]})
        splits[split] = datasets.Dataset(datasets.table.InMemoryTable(table))
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


# --- speed


def speed_specs(work: Path, images: int) -> dict[str, str]:
    """The same images in every kind of data; the spec of each."""
    contents = photographs(images)
    folder, tars = work / "images", work / "tars"
    tars.mkdir()
    with (work / "table.csv").open("w") as table:
        table.write("path,label,split\n")
        for i, split in [*((i, "train") for i in range(images)), (0, "val"), (1, "val")]:
            path = folder / split / str(i % 2) / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[i])
            table.write(f"{path.relative_to(work)},{i % 2},{split}\n")
    write_tar(tars / "train.tar", 0, contents, "jpg", 2)
    write_tar(tars / "val.tar", 0, contents[:2], "jpg", 2)
    own = write_module(work, folder / "train", "bench_kinds_own", 2)
    return {
        "imagefolder": f"imagefolder:{folder}",
        "files: csv": f"files:{work}/table.csv",
        "wds:": f"wds:{tars}",
        "hf:": f"hf:{write_hf(work / 'hf', contents, 2)}",
        "paths": f"{own}:paths",
        "own: bytes": f"{own}:contents",
        "own: PIL, unread": f"{own}:lazy",
        "own: PIL, RGB": f"{own}:converted",
        "own: tensors": f"{own}:tensors",
    }


def speed(work: Path, images: int, rounds: int) -> dict[str, Any]:
    """Images/s of every kind, and how they compare with imagefolder's."""
    specs = speed_specs(work, images)
    data = {name: open_data(spec, "train", home=work / "home") for name, spec in specs.items()}
    n = len(data["imagefolder"])
    assert {len(one) for one in data.values()} == {n}
    workers = os.cpu_count() or 1
    renderers = {name: Renderer(one, 224, torch.device("cpu"), "rrc,flip", workers) for name, one in data.items()}
    rates: dict[str, list[float]] = {name: [] for name in data}
    by_processor: dict[str, list[float]] = {name: [] for name in data}
    for turn in range(rounds + 1):  # the first one starts the workers
        for name in random.Random(turn).sample(list(data), len(data)):
            drawn = draw("rrc,flip", 0, turn, range(n), data[name].sizes)
            batches = np.array_split(np.arange(n), -(-n // BATCH))
            start, used = time.perf_counter(), with_workers()
            done = sum(len(pixels) for pixels in renderers[name].batches(drawn, batches))
            rates[name].append(done / (time.perf_counter() - start))
            by_processor[name].append(done / (with_workers() - used))
    decoded = decoding(data, n)
    return {
        "command": f"python bench/kinds.py speed --images {images} --rounds {rounds}",
        "images": n,
        "mean_bytes": round(sum(len(data["imagefolder"].content(i) or b"") for i in range(n)) / n),
        "mean_size": data["imagefolder"].sizes.mean(0).round().tolist(),
        "workers": workers,
        "images_per_second": {name: spread(rate[1:]) for name, rate in rates.items()},
        "relative_to_imagefolder": {name: against(rate[1:], rates["imagefolder"][1:]) for name, rate in rates.items()},
        "by_processor_relative_to_imagefolder": {
            name: against(rate[1:], by_processor["imagefolder"][1:]) for name, rate in by_processor.items()
        },
        "decoded_per_processor_second": {name: spread(rate) for name, rate in decoded.items()},
        "decoded_relative_to_imagefolder": {
            name: against(rate, decoded["imagefolder"]) for name, rate in decoded.items()
        },
    }


def builds(work: Path, images: int, rounds: int) -> dict[str, Any]:
    """Images/s of whole builds from every kind, and how they compare with imagefolder's."""
    specs = speed_specs(work, images)
    env = {**os.environ, "KDCACHE_HOME": str(work / "home"), "PYTHONPATH": str(work)}

    def kdcache(*words: str) -> bytes:
        command = [sys.executable, "-m", "kdcache.cli", *words]
        return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout

    kdcache("teach", "--teacher", "resnet18", "--data", specs["imagefolder"], "--epochs", "1")
    (weights,) = (work / "home").glob("teachers/*/*.safetensors")
    rates: dict[str, list[float]] = {name: [] for name in specs}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(specs), len(specs)):
            out = str(work / f"cache-{turn}-{list(specs).index(name)}")
            what = ("--teacher", "resnet18", "--weights", str(weights), "--data", specs[name], "--out", out)
            built = json.loads(kdcache("build", *what, "--views", "1", "--allow-low-accuracy", "--json"))
            rates[name].append(built["teacher_images"] / built["seconds"])
    return {
        "command": f"python bench/kinds.py build --images {images} --rounds {rounds}",
        "images": images,
        "images_per_second": {name: spread(rate) for name, rate in rates.items()},
        "relative_to_imagefolder": {name: against(rate, rates["imagefolder"]) for name, rate in rates.items()},
    }


def with_workers() -> float:
    """Seconds of processor time of this process and of its workers, which go on living."""
    ticks = 0
    for worker in multiprocessing.active_children():
        ticks += sum(map(int, Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def decoding(data: dict[str, Dataset], n: int) -> dict[str, list[float]]:
    """Images decoded in a second of processor time, a figure for every AT_ONCE images."""
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in data}
    for first in range(0, n - AT_ONCE + 1, AT_ONCE):
        for name in random.Random(first).sample(list(data), len(data)):
            start = time.process_time()
            for i in range(first, first + AT_ONCE):
                data[name].decode(i)
            rates[name].append(AT_ONCE / (time.process_time() - start))
    return rates


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "least": round(min(values), 1),
        "most": round(max(values), 1),
    }


def against(values: list[float], others: list[float]) -> dict[str, float]:
    """The ratios of two rates of the same round: their median and the middle half of them."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(values, others, strict=True)], n=4)
    return {"median": round(median, 3), "lower_quartile": round(low, 3), "upper_quartile": round(high, 3)}


# --- index


def index_specs(work: Path, samples: int, kinds: list[str]) -> dict[str, str]:
    """An index of many samples in each of the kinds; the spec of each."""
    writers: dict[str, Callable[[], str]] = {
        "imagefolder": lambda: f"imagefolder:{work}/images",
        "table": lambda: f"files:{write_table(work, samples)}",
        "paths": lambda: f"{write_module(work, work / 'images', 'bench_kinds_paths', CLASSES)}:paths",
        "parquet": lambda: f"files:{write_parquet(work, samples)}",
        "hf": lambda: f"hf:{write_hf(work / 'hf', [*tiny(LINKS)] * (samples // LINKS + 1), CLASSES)}",
        "wds": lambda: f"wds:{write_tars(work / 'tars', samples)}",
        "own": lambda: f"{write_module(work, work / 'few', 'bench_kinds_many', CLASSES, samples)}:many",
    }
    links = [work / "few" / f"{i:02d}.jpg" for i in range(LINKS)]
    links[0].parent.mkdir()
    for path, content in zip(links, tiny(LINKS), strict=True):
        path.write_bytes(content)
    if {"imagefolder", "table", "parquet", "paths"} & set(kinds):
        for i in range(samples):
            if i < CLASSES:
                (work / "images" / "train" / f"{i:04d}").mkdir(parents=True)
            os.link(links[i % LINKS], work / path_of(i))
    return {kind: writers[kind]() for kind in kinds}


def path_of(i: int) -> str:
    return f"images/train/{i % CLASSES:04d}/n{i % CLASSES:08d}_{i}.jpg"


def write_table(work: Path, samples: int) -> Path:
    with (work / "table.csv").open("w") as table:
        table.write("path,label,split\n")
        table.writelines(f"{path_of(i)},{i % CLASSES},train\n" for i in range(samples))
    return work / "table.csv"


def write_parquet(work: Path, samples: int) -> Path:
    import pyarrow.csv
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.csv.read_csv(write_table(work, samples)), work / "table.parquet")
    return work / "table.parquet"


def write_tars(folder: Path, samples: int) -> Path:
    folder.mkdir()
    contents = [*tiny(LINKS)] * (IN_A_TAR // LINKS + 1)
    for number, first in enumerate(range(0, samples, IN_A_TAR)):
        path, last = folder / f"train-{number:05d}.tar", min(first + IN_A_TAR, samples)
        if number % 2 and last - first == IN_A_TAR:
            os.link(folder / f"train-{number - 1:05d}.tar", path)
        else:
            write_tar(path, first, contents[: last - first], "png", CLASSES)
    write_tar(folder / "val-00000.tar", 0, contents[:CLASSES], "png", CLASSES)
    return folder


def index(work: Path, samples: int, kinds: list[str]) -> dict[str, Any]:
    """What opening costs, by kind."""
    specs = index_specs(work, samples, kinds)
    found = {}
    for kind, spec in specs.items():
        found[kind] = {turn: opened(work, spec) for turn in ("first", "second")}
        print(kind, json.dumps(found[kind]), flush=True)
    return {"command": f"python bench/kinds.py index --samples {samples}", "samples": samples, "opening": found}


def opened(work: Path, spec: str) -> dict[str, float]:
    """Open the train split in a process of its own."""
    env = {**os.environ, "KDCACHE_HOME": str(work / "home"), "PYTHONPATH": str(work)}
    command = [sys.executable, __file__, "open", spec]
    found = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
    assert isinstance(found, dict)
    return found


def processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_kilobytes() -> int:
    """Of this process alone; getrusage's begins with what its parent had."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def open_one(spec: str) -> None:
    """What `opened` runs in a process of its own. Importing is not counted, and no memory of it is taken off."""
    before = peak_kilobytes()
    start, used = time.perf_counter(), processor_seconds()
    data = open_data(spec, "train")
    seconds, processor = time.perf_counter() - start, processor_seconds() - used
    peak = peak_kilobytes()
    start = time.perf_counter()
    data.fingerprint()
    print(
        json.dumps({
            "seconds": round(seconds, 2),
            "processor_seconds": round(processor, 2),
            "fingerprint_seconds": round(time.perf_counter() - start, 2),
            "peak_memory_mb": round(peak / 1000),
            "memory_before_mb": round(before / 1000),
            "samples": len(data),
        })
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "build", "index", "open"])
    parser.add_argument("spec", nargs="?", help="what `index` opens in processes of its own")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--kinds", default="imagefolder,table,parquet,paths,wds,hf,own")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kinds.json")
    a = parser.parse_args()
    if a.part == "open":
        open_one(a.spec)
        return
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        sys.path.insert(0, place)
        load = os.getloadavg()[0]
        if a.part == "index":
            found = index(work, a.samples, a.kinds.split(","))
        else:
            found = (speed if a.part == "speed" else builds)(work, a.images, a.rounds)
    results = json.loads(a.out.read_text()) if a.out.exists() else {}
    results[a.part] = {"machine": machine(), "load_average": load, **found}
    a.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
