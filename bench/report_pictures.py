"""Draws the pictures of docs/report.md: pages about the demo and about a sweep on CIFAR-10, as Chromium shows them.

    python bench/report_pictures.py --data imagefolder:cifar10 --work FOLDER [--out docs/report]

What is not in FOLDER yet is made there first: the demo, a teacher of the data, its cache, and students by three losses
with three seeds each. That takes minutes with 2,500 images; the pages themselves take seconds. --data is any of the
specs of `kdcache build`. The pages are kept in FOLDER as demo.html and sweep.html.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from kdcache.tests.helpers.chromium import Page, browser
from kdcache.tests.helpers.places import ROOT

TEACHER, STUDENT, LOSSES, SEEDS = "resnet20", "resnet8", ("ce", "kd", "nkd"), ("0", "1", "2")
RECIPE = ("--batch-size", "64", "--lr", "0.05")
COLOURS = 256
# Of each page, by the name of the picture: where it begins (the text of a heading), its width and height, and dark.
SHOTS = {
    "demo.html": {
        "cache": (None, 1080, 1150, False),
        "gallery": ("What does it look like?", 1080, 880, False),
        "phone": (None, 390, 1000, True),
    },
    "sweep.html": {
        "sweep": (None, 1080, 1150, False),
        "curves": ("How did they learn?", 1080, 700, True),
        "answers": ("What do they answer?", 1080, 1050, False),
        "sweep-phone": (None, 390, 1000, False),
    },
}


def kdcache(work: Path, home: str, *words: str) -> None:
    """Run a command in the folder of work, so that no picture shows where that is."""
    environment = os.environ | {"KDCACHE_HOME": str(work.absolute() / home)}
    subprocess.run([sys.executable, "-m", "kdcache.cli", *words], env=environment, cwd=work, check=True)


def make(work: Path, data: str, epochs: int) -> None:
    """Make what is not there yet, and then the pages."""
    if not (work / "demo").exists():
        kdcache(work, "home", "demo", "--out", "demo")
    if not (work / "sweep" / "sweep.json").exists():
        about = ("--data", data)
        kdcache(
            work, "home", "teach", "--teacher", TEACHER, "--augment", "crop,flip", "--epochs", "40", *about, *RECIPE
        )
        kdcache(work, "home", "build", "--teacher", TEACHER, "--augment", "crop,flip", "--views", "8", *about)
        losses = [word for loss in LOSSES for word in ("--loss", loss)]
        seeds = [word for seed in SEEDS for word in ("--seed", seed)]
        words = [*about, "--student", STUDENT, "--epochs", str(epochs), *RECIPE, *losses, *seeds]
        kdcache(work, "home", "train", *words, "--out", "sweep")
    caches = [f"demo/home/caches/{path.name}" for path in (work / "demo" / "home" / "caches").iterdir()]
    kdcache(work, "demo/home", "report", *caches, "--out", "demo.html")
    kdcache(work, "home", "report", "sweep", "--out", "sweep.html")


def shoot(page: Page, file: Path, out: Path) -> None:
    """Take the pictures of one page, in few colours, which keeps them small."""
    for name, (heading, width, height, dark) in SHOTS[file.name].items():
        page.open(file, width, height, dark)
        top = 0
        if heading:
            found = f"[...document.querySelectorAll('h3')].find(one => one.innerText == {heading!r})"
            top = int(page.value(f"{found}.getBoundingClientRect().top + scrollY - 16"))
        target = out / f"{name}.png"
        page.picture(target, height, top)
        with Image.open(target) as picture:
            small = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(target, optimize=True)
        print(f"{target}: {target.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "report")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(parents=True, exist_ok=True)
    make(a.work, a.data, a.epochs)
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as page:
        for name in SHOTS:
            shoot(page, a.work / name, a.out)


if __name__ == "__main__":
    main()
