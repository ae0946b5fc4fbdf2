"""What opening a dataset of each kind costs, the first time and the second, and how fast its images are decoded.

    python bench/data_kinds.py --work FOLDER [--samples 200000] [--kinds tars,table,own]

The samples are copies of 32 small JPEG files, in tars of 10,000, as files that a table lists, and in a Dataset that
gives bytes. An index knows only places and sizes, so copies stand for so many different images. Decoding is timed in
one process, in turns with imagefolder, over 1,800 images, 100 at a time. Writes JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from kdcache.pipeline.data.dataset import open_data
from kdcache.train.bench.bench import machine

CLASSES, IN_A_TAR, DECODED, AT_ONCE, ROUNDS = 1000, 10_000, 2000, 100, 3
MODULE = """
from pathlib import Path

TOP = Path({top!r})

class Own:
    classes = [str(i) for i in range({classes})]

    def __init__(self, split):
        self.n = {samples} if split == "train" else 1000
        self.images = [path.read_bytes() for path in sorted(TOP.glob("*.jpg"))]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.images[i % len(self.images)], i % {classes}
"""


def images(folder: Path) -> list[bytes]:
    """JPEG files of 120 to 200 pixels a side, the same ones every time."""
    photographs, rng, found = load_sample_images().images, np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(32):
        height, width = rng.integers(120, 200, 2)
        top, left = rng.integers(0, 200, 2)
        file = io.BytesIO()
        Image.fromarray(photographs[i % 2][top : top + height, left : left + width]).save(file, "JPEG", quality=85)
        (folder / f"{i:02d}.jpg").write_bytes(file.getvalue())
        found.append(file.getvalue())
    return found


def write_tars(folder: Path, samples: int, contents: list[bytes]) -> str:
    """Train tars, and a val tar of 1,000 samples."""
    folder.mkdir(exist_ok=True)
    for split, n in (("train", samples), ("val", 1000)):
        for first in range(0, n, IN_A_TAR):
            with tarfile.open(folder / f"{split}-{first // IN_A_TAR:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for i in range(first, min(first + IN_A_TAR, n)):
                    pair = {"jpg": contents[i % len(contents)], "cls": str(i % CLASSES).encode()}
                    for ending, content in pair.items():
                        about = tarfile.TarInfo(f"{i:08d}.{ending}")
                        about.size = len(content)
                        tar.addfile(about, io.BytesIO(content))
    return f"wds:{folder}"


def write_table(folder: Path, samples: int, contents: list[bytes]) -> str:
    """A table of hard links to the images, in folders of 1,000."""
    folder.mkdir(exist_ok=True)
    for i, content in enumerate(contents):
        (folder / f"{i:02d}.bin").write_bytes(content)
    with (folder / "table.csv").open("w") as table:
        table.write("path,label,split\n")
        for split, n in (("train", samples), ("val", 1000)):
            for i in range(n):
                path = Path(split, f"{i // 1000:04d}", f"{i:08d}.jpg")
                if not i % 1000:
                    (folder / path.parent).mkdir(parents=True, exist_ok=True)
                os.link(folder / f"{i % len(contents):02d}.bin", folder / path)
                table.write(f"{path},{i % CLASSES},{split}\n")
    return f"files:{folder}/table.csv"


def write_own(folder: Path, samples: int, contents: list[bytes]) -> str:
    """A module whose Dataset gives bytes."""
    images(folder)
    (folder / "bench_own.py").write_text(MODULE.format(top=str(folder), samples=samples, classes=CLASSES))
    sys.path.insert(0, str(folder))
    return "bench_own:Own"


WRITERS: dict[str, Callable[[Path, int, list[bytes]], str]] = {
    "tars": write_tars,
    "table": write_table,
    "own": write_own,
}


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    found = work()
    return round(time.perf_counter() - start, 2), found


def decoding(work: Path, contents: list[bytes]) -> dict[str, float]:
    """Decoded images/s of each kind, and of imagefolder over the same files."""
    folder = work / "decoding"
    spec = write_table(folder, DECODED, contents)
    for i in range(DECODED):
        path = folder / "classes" / f"{i % 2}" / f"{i:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / f"train/{i // 1000:04d}/{i:08d}.jpg", path)
    own = write_own(work / "decoding_own", DECODED, contents)
    specs = {"table": spec, "tars": write_tars(work / "decoding_tars", DECODED, contents), "own": own}
    data = {name: open_data(spec, "train") for name, spec in specs.items()}
    data["imagefolder"] = open_data(f"imagefolder:{folder}/classes", "train")
    seconds = dict.fromkeys(data, 0.0)
    n = min(map(len, data.values())) // AT_ONCE * AT_ONCE
    for first in list(range(0, n, AT_ONCE)) * ROUNDS:
        for name, one in data.items():
            start = time.perf_counter()
            for i in range(first, first + AT_ONCE):
                one.decode(i)
            seconds[name] += time.perf_counter() - start
    return {name: n * ROUNDS / spent for name, spent in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder on a disk with room")
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--kinds", default="tars,table,own")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_kinds.json")
    a = parser.parse_args()
    os.environ["KDCACHE_HOME"] = str(a.work / "home")
    contents = images(a.work / "images")
    found: dict[str, dict[str, float]] = {}
    for kind in a.kinds.split(","):
        spec = WRITERS[kind](a.work / kind, a.samples, contents)
        first, _ = timed(lambda spec=spec: open_data(spec, "train"))
        again, data = timed(lambda spec=spec: open_data(spec, "train"))
        fingerprint, _ = timed(data.fingerprint)
        found[kind] = {"opened_first_s": first, "opened_again_s": again, "fingerprint_s": fingerprint}
        print(kind, found[kind], flush=True)
    rates = decoding(a.work, contents)
    results = {
        "machine": machine(),
        "command": f"python bench/data_kinds.py --samples {a.samples}",
        "samples": a.samples,
        "seconds": found,
        "decoded_images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "relative_to_imagefolder": {name: round(rate / rates["imagefolder"], 3) for name, rate in rates.items()},
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "load_average": os.getloadavg()[0],
    }
    a.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
