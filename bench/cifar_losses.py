"""Every loss trains a student on a slice of real CIFAR-10, from a dense and, where it can, a top-3 cache; writes JSON.

    python bench/cifar_losses.py --data imagefolder:PATH --work FOLDER

PATH holds train/CLASS/*.png and test/CLASS/*.png; the results in the repository are of the first 2,000 training images
and the first 1,000 test images. It shows that each loss trains, not which is best: that takes whole runs. Stopped at
any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.weights import read_weights, taught_file
from kdcache.train.bench.bench import machine
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.losses.options import LOSSES, make_loss
from kdcache.train.sweep import sweep
from kdcache.train.teach import teach

TEACHER, STUDENT, CLASSES = "resnet32", "resnet20", 10


def sweeps() -> dict[str, tuple[list[str], bool]]:
    """What is trained from which records: losses, and whether the teacher learns too."""
    needs = {name: make_loss(name, CLASSES).needs for name in LOSSES}
    served = [name for name, n in needs.items() if (n.temperatures or n.standardised) and not n.dense]
    return {"dense": (list(LOSSES), False), "top 3": (served, False), "teacher learns": (["bdkd"], True)}


def trained(folder: Path, summary: dict[str, Any], classes: int) -> dict[str, Any]:
    """A run's figures and its evaluation NLL by epoch: whether it falls, and below that of equal probabilities."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [v for line in lines for v in line.values()]
    nll = [line["nll"] for line in lines]
    return {
        **{k: v for k, v in summary.items() if k not in ("loss", "run", "kdcache", "torch", "device")},
        "nll_by_epoch": nll,
        "finite": all(map(math.isfinite, numbers)),
        "falling": nll[-1] < nll[0],
        "better_than_equal_probabilities": nll[-1] < math.log(classes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/cifar_losses.json")
    a = parser.parse_args()
    os.environ["KDCACHE_HOME"] = str(a.work / "home")

    images = open_data(a.data, "train")
    taught, classes = taught_file(TEACHER, images), len(images.class_names)
    if not taught.exists():
        teach(TeachConfig(TEACHER, data=a.data, epochs=a.teacher_epochs, batch_size=a.batch_size, seed=a.seed))
    caches = {
        name: build(BuildConfig(TEACHER, data=a.data, views=a.epochs, topk=topk, tail_std=True, seed=a.seed))
        for name, topk in (("dense", None), ("top 3", 3))
    }
    runs = []
    for records, (losses, learns) in sweeps().items():
        done = sweep(
            TrainConfig(
                losses[0], cache=str(caches["dense" if learns else records].path), data=a.data, student=STUDENT,
                epochs=a.epochs, batch_size=a.batch_size, online=learns, out=str(a.work / "runs" / records),
                resume=True,
            ),
            losses, [a.seed],
        )  # fmt: skip
        for run in done["runs"]:
            figures = {"error": run["error"]} if "error" in run else trained(Path(run["run"]), run["summary"], classes)
            runs.append({"loss": run["loss"], "records": records, **figures})
    result = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "command": f"python bench/cifar_losses.py --teacher-epochs {a.teacher_epochs} --epochs {a.epochs} "
        f"--batch-size {a.batch_size} --seed {a.seed}",
        "data": {"training_images": len(images), "evaluation_images": len(open_data(a.data, "eval"))},
        "teacher": {"name": TEACHER, "epochs": a.teacher_epochs, **read_weights(taught)[1]["metrics"]},
        "student": STUDENT,
        "epochs": a.epochs,
        "seeds": [a.seed],
        "runs": runs,
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{'loss':10} {'records':15} {'top-1':>6} {'brier':>6} {'ece':>6} {'agreement':>9} {'s/epoch':>7}  nll by epoch"
    )
    for r in runs:
        if "error" in r:
            print(f"{r['loss']:10} {r['records']:15} FAILED: {r['error']}")
            continue
        good = "" if r["finite"] and r["falling"] else "  NOT FALLING"
        good += "" if r["better_than_equal_probabilities"] else "  (more than equal probabilities)"
        print(
            f"{r['loss']:10} {r['records']:15} {100 * r['top1']:6.2f} {r['brier']:6.3f} {r['ece']:6.3f} "
            f"{100 * r['agreement']:9.2f} {r['seconds_an_epoch']:7.1f}  "
            + " ".join(f"{v:.3f}" for v in r["nll_by_epoch"])
            + good
        )


if __name__ == "__main__":
    main()
