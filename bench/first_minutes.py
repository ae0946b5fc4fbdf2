"""How long a new user waits: `kdcache build --teacher NAME` in an empty home, until its lines and until its end.

    python bench/first_minutes.py

Each teacher is first taught by its build (seed 0), and then by `kdcache teach` with two other seeds, for its accuracy.
Every command is a process of its own with an empty KDCACHE_HOME. Writes results/first_minutes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kdcache.train.bench.bench import machine

TEACHERS = (
    "resnet20", "resnet56", "resnet110", "resnet18", "resnet34", "resnet50", "wrn_40_2", "vgg13", "resnet32x4",
    "mobilenet_v3_small", "efficientnet_b0", "timm/resnet18", "timm/resnet50",
)  # fmt: skip
OUT = Path(__file__).parent / "results" / "first_minutes.json"
_SAYS = {"first_line": "", "forecast": "this takes about "}


def measure(line: str) -> dict[str, Any]:
    """Seconds of a command in an empty home, until its end and until its lines; seconds of all cores; its result."""
    found: dict[str, Any] = {"command": f"kdcache {line}", "seconds_until": {}}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "kdcache.cli", *line.split()],
            env={**os.environ, "KDCACHE_HOME": home}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        for text in process.stderr:
            for what, beginning in _SAYS.items():
                if what not in found["seconds_until"] and text.startswith(beginning):
                    found["seconds_until"][what] = time.perf_counter() - start
            if text.startswith(_SAYS["forecast"]):
                found["foretold"] = text.strip()
            if top1 := re.search(r" has top-1 ([\d.]+)%", text):
                found["top1"] = float(top1[1]) / 100
        facts = json.loads(process.stdout.read())
        if process.wait():
            raise SystemExit(f"{line} failed")
        found["seconds"] = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["core_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found | {name: facts[name] for name in ("views", "teacher_top1") if name in facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", default=",".join(TEACHERS))
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    results = []
    for name in asked.teachers.split(","):
        lines = [f"build --teacher {name} --json"]
        lines += [f"teach --teacher {name} --seed {seed} --json" for seed in range(1, asked.seeds)]
        rows = [measure(line) for line in lines]
        results.append({"teacher": name, "runs": rows})
        print(name, *(f"{row['seconds']:.1f} s ({100 * row['top1']:.2f}%)" for row in rows), flush=True)
        OUT.write_text(json.dumps({"machine": machine(), "teachers": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
