"""What a report costs at ImageNet's size: seconds, peak memory and bytes of the page; writes JSON.

    python bench/report.py [--samples 1281167] [--runs 60] [--work FOLDER] [--out FILE]

The cache is synthetic: 1,000 classes, the top 20 in uint8, four views of 1,281,167 samples and 50,000 images for
evaluation. The images are not at hand, as on most machines that look at such a cache. The runs are 60 folders of 300
epochs in 20 groups, without weights. Each report is a process of its own, with one thread. Seconds are those on the
clock and those of the core; `peak_mib` is VmHWM, of which `imported_mib` are there as soon as torch and Matplotlib are
imported. To write the cache takes minutes: with --work it is kept in that folder, and taken from there the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache import Cache, Identity
from kdcache.train.bench.bench import machine

CLASSES, K, VIEWS, EVALUATION, EPOCHS, SEEDS = 1000, 20, 4, 50_000, 300, 3
WRITER = {"host": "bench"}


def identity(samples: int) -> Identity:
    data = {"name": "imagenet", "fingerprint": "f" * 64, "full_contents": False, "files": False}
    return Identity.model_validate(
        {
            "teacher": {
                "architecture": "resnet34", "weights": "a" * 64, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
                "input_size": 224, "numeric": "float32",
            },
            "data": {**data, "split": "train", "samples": samples},
            "evaluation": {**data, "split": "eval", "samples": EVALUATION},
            "views": {"policy": "rrc(0.08,1),flip(0.5)", "seed": 0, "renderer": "torch-uint8-1"},
            "record": {
                "classes": CLASSES, "k": K, "temperatures": (1.0, 2.0, 3.0, 4.0), "precision": "uint8",
                "tail_std": False, "labels": 1,
            },
            "class_map": None,
            "part": 262_144,
        }
    )  # fmt: skip


def fill(path: Path, samples: int) -> None:
    """Write records that cannot be told from real ones by their form; three of four have their label first."""
    cache, rng = Cache.create(path, identity(samples)), np.random.default_rng(0)
    for store, views in ((cache.evaluation, 1), (cache.train, VIEWS)):
        labels = rng.integers(0, CLASSES, (store.samples, 1)).astype(np.uint16)
        store.write_labels(labels, WRITER)
        for view in range(views):
            for part in range(store.parts):
                rows = store.rows(part)
                shard = records(rng, labels[rows.start : rows.stop, 0])
                sums = None
                if store.carries_tail_sums(view):
                    sums = np.full((4, CLASSES), len(rows) / CLASSES)
                store.write_shard(view, part, shard, f"{view} {part}", WRITER, sums)
    cache.write_prior(WRITER)


def records(rng: np.random.Generator, labels: np.ndarray) -> dict[str, np.ndarray]:
    n = len(labels)
    ids = (rng.integers(0, CLASSES, (n, 1)) + np.arange(K) * 37) % CLASSES
    right = rng.random(n) < 0.75
    ids[right] = (labels[right, None].astype(np.int64) + np.arange(K) * 37) % CLASSES
    return {
        "classes": ids.astype(np.uint16),
        "gaps": rng.integers(0, 12, (n, K - 1)).astype(np.uint8),
        "target_gap": np.where(right, 0, rng.uniform(0.5, 12, n)).astype(np.float16)[:, None],
        "tail": rng.integers(20, 60, (n, 4)).astype(np.uint8),
    }


def write_runs(place: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = place / f"run{number:03d}"
        folder.mkdir(parents=True)
        config = {"loss": "nkd", "loss_options": {"gamma": number // SEEDS}, "seed": number % SEEDS, "epochs": EPOCHS}
        (folder / "config.json").write_text(json.dumps(config))
        names = ("loss", "loss_ce", "loss_target", "loss_nontarget", "top1", "nll", "ece", "agreement", "kl")
        figures = np.sort(rng.random((EPOCHS, len(names))), 0)
        lines = [
            {"epoch": e + 1, "seconds": 60.0, **dict(zip(names, of.tolist(), strict=True))}
            for e, of in enumerate(figures)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def peak() -> float:
    """The largest memory that the process has had, in MiB."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def measured(what: str) -> dict[str, Any]:
    """Report on it in a process of its own."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"KDCACHE_HOME": home, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--measure", what, f"{home}/report.html"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(what: str, out: str) -> None:
    import matplotlib.figure  # noqa: F401
    import torch

    from kdcache.train.report.config import ReportConfig
    from kdcache.train.report.report import report

    torch.set_num_threads(1)
    before, clock, core = peak(), time.perf_counter(), time.process_time()
    facts, _ = report(ReportConfig((what,), out=out, judge=0), lambda _: None)
    caches = [one["training"] for one in facts["caches"]]
    read = [{"views": len(of["of_views"]), "records": of["images"], "share": of["share"]} for of in caches]
    figures = {
        "seconds": round(time.perf_counter() - clock, 1), "core_seconds": round(time.process_time() - core, 1),
        "peak_mib": round(peak()), "imported_mib": round(before), "page_bytes": facts["bytes"], "read": read,
    }  # fmt: skip
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "report.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        return measure(*a.measure)
    with tempfile.TemporaryDirectory() as folder:
        cache = (a.work or Path(folder)) / "cache"
        if not (cache / "commits" / "prior.json").exists():  # which is written last
            fill(cache, a.samples)
        write_runs(Path(folder) / "runs", a.runs)
        result = {
            "machine": machine(),
            "command": f"python bench/report.py --samples {a.samples} --runs {a.runs}",
            "cache": {"classes": CLASSES, "k": K, "samples": a.samples, **measured(str(cache))},
            "runs": {"runs": a.runs, "epochs": EPOCHS, **measured(f"{folder}/runs")},
        }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
