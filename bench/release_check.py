"""Is what `make dist` has made fit to be released? Looks through it, installs it and uses it; writes JSON.

    make release-check                    # make dist, then this
    python bench/release_check.py [--python python3.12 ...] [--work FOLDER]

First the files: what the wheel and the source distribution hold, metadata (twine) and CITATION.cff (cffconvert), both
in an environment of their own. Then, for each version of Python that is on this machine, a virtual environment made
from nothing, in which pip installs the wheel with the extra `report`, and what a new user types: the demo, the first
session of the docs with its short forms, a report, an image folder of one's own, and the README's loop. All of it runs
in a folder far from the repository, with an empty home. The first thing that fails ends the check.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import kdcache
from kdcache.train.bench.bench import machine

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "results" / "release_check.json"
TOLD = ("torch", "torchvision", "numpy", "zarr", "numcodecs", "pillow")  # whose versions are told
KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "OMP_NUM_THREADS")  # of the environment; nothing of kdcache's
PYTHONS = ("python3.11", "python3.12", "python3.13")
LARGEST = 2 << 20  # bytes of the wheel, and of the source distribution
IN_WHEEL = (
    "kdcache/__init__.py",
    "kdcache/cli.py",
    "kdcache/py.typed",
    "kdcache/train/report/templates/",
    "dist-info/licenses/LICENSE",
    "dist-info/entry_points.txt",
)
IN_SOURCES = ("README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "LICENSE", "pyproject.toml", "py.typed")
NOT_IN_EITHER = ("/tests/", "/bench/", "/docs/", "/examples/", ".venv", "__pycache__")


def fail(text: str) -> None:
    raise SystemExit(f"release check: {text}")


def run(command: Sequence[str | Path], where: Path, environment: dict[str, str] | None = None) -> str:
    """What a command prints; its whole output and the end of the check if it fails."""
    done = subprocess.run(
        [str(word) for word in command], cwd=where, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        fail(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def look_through(wheel: Path, sources: Path) -> dict[str, Any]:
    """What the two files hold, and what they must not."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = archive.namelist()
    with tarfile.open(sources) as tar:
        in_sources = tar.getnames()
    for name, held, needed in ((wheel.name, in_wheel, IN_WHEEL), (sources.name, in_sources, IN_SOURCES)):
        if missing := [part for part in needed if not any(part in one for one in held)]:
            fail(f"{name} lacks {', '.join(missing)}")
        # train/bench is a part of the package
        wrong = [one for one in held if any(part in f"/{one.replace('train/bench/', '')}" for part in NOT_IN_EITHER)]
        if wrong:
            fail(f"{name} holds {', '.join(wrong[:5])}")
    for file in (wheel, sources):
        if file.stat().st_size > LARGEST:
            fail(f"{file.name} has {file.stat().st_size} bytes")
        if kdcache.__version__ not in file.name:
            fail(f"{file.name} is not of version {kdcache.__version__}, which __init__.py names")
    return {
        "wheel": {"name": wheel.name, "bytes": wheel.stat().st_size, "files": len(in_wheel)},
        "sources": {"name": sources.name, "bytes": sources.stat().st_size, "files": len(in_sources)},
    }


def environment(python: str, folder: Path, *packages: str | Path) -> Path:
    """A virtual environment with these packages and what they need; its folder of programs."""
    run([python, "-m", "venv", folder], folder.parent)
    run(
        [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q", *packages],
        folder.parent,
    )
    return folder / "bin"


def check_metadata(work: Path, wheel: Path, sources: Path) -> None:
    tools = environment(sys.executable, work / "tools", "twine", "cffconvert")
    run([tools / "twine", "check", "--strict", wheel, sources], work)
    run([tools / "cffconvert", "--validate", "-i", ROOT / "CITATION.cff"], work)


def paint(top: Path) -> None:
    """Images of four classes: noise around a colour."""
    rng = np.random.default_rng(0)
    for kind, colour in {
        "red": (200, 40, 40),
        "green": (40, 190, 60),
        "blue": (50, 60, 210),
        "grey": (120,) * 3,
    }.items():
        (top / kind).mkdir(parents=True)
        for i in range(40):
            noise = rng.normal(0, 50, (48, 48, 3))
            Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(top / kind / f"{i:02d}.jpg")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def use(programs: Path, work: Path) -> dict[str, float]:
    """What a new user types, with how many seconds each took."""
    work.mkdir()
    home = {name: value for name, value in os.environ.items() if name in KEPT}
    home |= {"HOME": str(work), "KDCACHE_HOME": str(work / "home"), "PATH": f"{programs}:{home.get('PATH', '')}"}
    paint(work / "photos")
    readme = (ROOT / "README.md").read_text()
    (loop,) = (block for block in python_blocks(readme) if "CachedLoader" in block)
    photos = "--data imagefolder:photos"
    small = "--epochs 1 --views 1"
    lines = {
        "version": "--version",
        "demo": "demo",
        "build": "build --teacher resnet20",
        "train": "train --loss nkd --out runs/nkd",
        "build again": "build --teacher resnet20",
        "verify": "verify {key}",
        "eval": "eval runs/nkd",
        "report": "report {key} --out cache.html",
        "teach on photos": f"teach {photos} --teacher resnet8 --epochs 3",
        "build from photos": f"build {photos} --teacher resnet8 --views 2",
        "train on photos": f"train {photos} --student resnet8 --loss nkd {small}",
    }
    seconds, key = {}, ""
    for name, line in lines.items():
        started = time.monotonic()
        said = run([programs / "kdcache", *line.format(key=key).split()], work, home)
        seconds[name] = round(time.monotonic() - started, 1)
        if name == "version" and kdcache.__version__ not in said:
            fail(f"kdcache --version says {said.strip()}")
        if name == "build":
            key = re.search(r"cache ([0-9a-f]{12})", said)[1]  # type: ignore[index]
        if name == "build again" and "nothing to compute" not in said:
            fail(f"a second build says {said}")
    started = time.monotonic()
    run([programs / "python", "-W", "error::SyntaxWarning", "-c", loop.replace("CACHE", key)], work, home)
    seconds["the README's loop"] = round(time.monotonic() - started, 1)
    typed = "import importlib.resources as r; assert (r.files('kdcache') / 'py.typed').is_file()"
    run([programs / "python", "-c", typed], work, home)
    return seconds


def starts(python: str) -> bool:
    """Whether this interpreter is here; of pyenv's names some stand for none."""
    return bool(shutil.which(python)) and not subprocess.run([python, "-V"], capture_output=True).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help=f"an interpreter, by default {', '.join(PYTHONS)}")
    parser.add_argument("--work", type=Path, help="an empty folder to work in, by default a temporary one")
    asked = parser.parse_args()
    (wheel,), (sources,) = (sorted((ROOT / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    here = [python for python in asked.python or PYTHONS if starts(python)]
    absent = [python for python in asked.python or PYTHONS if python not in here]
    if not here:
        fail(f"none of {', '.join(absent)} is on this machine")
    files = look_through(wheel, sources)
    found: dict[str, Any] = {"machine": machine(), "files": files, "pythons": {}, "absent": absent}
    with tempfile.TemporaryDirectory(prefix="kdcache-release-") as temporary:
        work = (asked.work or Path(temporary)).absolute()
        check_metadata(work, wheel, sources)
        print("files, metadata and CITATION.cff: fine")
        for python in here:
            started = time.monotonic()
            programs = environment(python, work / f"env-{Path(python).name}", f"{wheel}[report]")
            installed = round(time.monotonic() - started, 1)
            listed = json.loads(run([programs / "python", "-m", "pip", "list", "--format", "json"], work))
            version = run([programs / "python", "-V"], work).split()[1]
            seconds = use(programs, work / f"use-{Path(python).name}")
            packages = {one["name"]: one["version"] for one in listed if one["name"] in TOLD}
            found["pythons"][version] = {"install": installed, "packages": packages, "seconds": seconds}
            print(f"Python {version}: installed in {installed:.0f} s, used in {sum(seconds.values()):.0f} s: fine")
    for python in absent:
        print(f"{python} is not on this machine: not checked")
    OUT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
