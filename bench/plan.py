"""What `kdcache plan` says beside what the build then takes: seconds, bytes and files; writes JSON.

    python bench/plan.py --cifar PATH

Three builds, one after the other: digits; CIFAR-10 (PATH has its images in train/CLASS and test/CLASS); and JPEG files
of 375x500, cut-outs of scikit-learn's photographs, of which the teacher sees 224 pixels. Each teacher is taught for one
epoch: time does not depend on what it has learnt, and bytes are compared with those of the same teacher's cache. Every
plan and every build is a process of its own, and they take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from views import make_files

from kdcache.train.bench.bench import machine

CASES = {
    "digits": ("resnet8", "digits", "--views 16"),
    "cifar10": ("resnet20", "imagefolder:{cifar}", "--views 4 --augment crop,flip"),
    "files": ("resnet18", "imagefolder:{files}", "--views 16 --topk 5 --allow-low-accuracy"),
}


def run(line: str) -> str:
    """What a command prints on standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "kdcache.cli", *shlex.split(line)], check=True, text=True, stdout=subprocess.PIPE
    )
    return done.stdout


def compare(teacher: str, data: str, options: str, seconds: float, rounds: int, place: Path) -> dict[str, Any]:
    """Plans and builds by turns."""
    run(f"teach --teacher {teacher} --data {shlex.quote(data)} --epochs 1")
    what = f"--teacher {teacher} --data {shlex.quote(data)} {options}"
    found: dict[str, Any] = {"build": f"kdcache build {what}", "plan_seconds": seconds, "rounds": []}
    for i in range(rounds):
        out = place / f"{teacher}-{i}"
        told = json.loads(run(f"plan {what} --seconds {seconds} --out {out} --json"))
        start = time.perf_counter()
        built = json.loads(run(f"build {what} --out {out} --json"))
        took = time.perf_counter() - start
        row = {
            "told_seconds": told["time"]["seconds"], "seconds": took, "told_bytes": told["bytes"],
            "bytes": built["bytes"], "told_files": told["files"],
            "files": sum(p.is_file() for p in out.rglob("*")), "rates": told["probe"]["images_per_second"],
        }  # fmt: skip
        found["rounds"].append(row)
        print(json.dumps(row), flush=True)
    for what in ("seconds", "bytes"):
        found[f"told_over_real_{what}"] = median(row[f"told_{what}"] / row[what] for row in found["rounds"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", required=True, help="a folder of CIFAR-10's images in train/CLASS and test/CLASS")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=60, help="of each plan, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/plan.json")
    a = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "command": "python bench/plan.py --cifar PATH"}
    with tempfile.TemporaryDirectory() as name:
        os.environ["KDCACHE_HOME"] = str(Path(name) / "home")
        files = make_files(Path(name)) if "files" in a.only else ""
        for case in a.only:
            teacher, data, options = CASES[case]
            asked = data.format(cifar=a.cifar, files=files)
            found = compare(teacher, asked, options, a.seconds, a.rounds, Path(name))
            found["build"] = found["build"].replace(name, "").replace(a.cifar, "PATH")
            result[case] = found
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
