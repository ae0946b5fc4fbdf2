"""Seconds and memory of drawing a view of ImageNet's size, beside the code that drew all samples at once; writes JSON.

    python bench/draws.py [--samples 1281167] [--rounds 5] [--before COMMIT] [--out FILE]

Boxes and flips of `rrc,flip` and `crop,flip` for images of four usual sizes: for the range of all samples by both
codes, whose results are compared, and by today's also for all samples in a random order and for the spread sequence.
Beside them, four random words a sample. All take turns, on one thread. Seconds are those of the processor; medians,
and the fastest and slowest. Peaks are those that NumPy allocates beside the result, measured in another call.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from kdcache.pipeline.views.draws import words
from kdcache.pipeline.views.operations.kinds.geometry import Crop, Flip, ResizedCrop, geometry
from kdcache.train.bench.bench import machine

BEFORE = "4c07a56"  # the last commit that drew all samples at once
FILE = "pipeline/views/draws.py"
SIZES = [(375, 500), (500, 375), (333, 500), (500, 500)]
SEED, STREAM, VIEW = 0, 0, 1


def old_draws(commit: str) -> ModuleType:
    """The module as it was at a commit. It imports nothing of kdcache."""
    text = subprocess.run(["git", "show", f"{commit}:{FILE}"], check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "old_draws.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("old_draws", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def cases(samples: int, commit: str) -> dict[str, Callable[[], Any]]:
    """What is measured, by name. Each returns arrays."""
    old = old_draws(commit)
    sizes = np.resize(np.array(SIZES, np.int32), (samples, 2))
    order = np.random.default_rng(0).permutation(samples)
    found: dict[str, Callable[[], Any]] = {}
    for name, rule, before in (("rrc,flip", ResizedCrop(), old.ResizedCrop()), ("crop,flip", Crop(), old.Crop())):

        def as_before(before: Any = before) -> Any:
            height, width = sizes.T.astype(np.int64)
            u = old.uniforms(SEED, STREAM, VIEW, range(samples), before.blocks)
            return before.boxes(u, height, width).astype(np.int32), u[:, 0] < 0.5

        def now(which: Any = range(samples), sequence: Any = "random", rule: Any = rule) -> Any:
            return geometry(rule, Flip(), SEED, STREAM, VIEW, which, sizes, sequence)

        found[f"{name}: before"] = as_before
        found[name] = now
        found[f"{name}: scattered"] = lambda now=now: now(order)
        found[f"{name}: spread"] = lambda now=now: now(sequence="spread")
    found["4 words"] = lambda: (words(SEED, STREAM, VIEW, range(samples), 4),)
    found["4 words: scattered"] = lambda: (words(SEED, STREAM, VIEW, order, 4),)
    return found


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def peak(work: Callable[[], Any]) -> float:
    """MiB beside the result."""
    tracemalloc.start()
    result = work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (most - sum(array.nbytes for array in result)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/draws.json")
    a = parser.parse_args()
    works = cases(a.samples, a.before)
    for name in ("rrc,flip", "crop,flip"):
        for then, now in zip(works[f"{name}: before"](), works[name](), strict=True):
            assert np.array_equal(then, now), f"{name} is drawn otherwise than before"
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(a.rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    result = {
        "machine": machine() | {"numpy": np.__version__},
        "command": f"python bench/draws.py --samples {a.samples} --rounds {a.rounds} --before {a.before}",
        "seconds": {name: statistics.median(took) for name, took in times.items()},
        "seconds, fastest and slowest": {name: [min(took), max(took)] for name, took in times.items()},
        "mib_beside_the_result": {name: peak(work) for name, work in works.items()},
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
