"""Does it cost accuracy to learn several crops of an image at once? Writes JSON and prints a table.

    python bench/crops_study.py --work FOLDER --data cifar10.npz
    python bench/crops_study.py --work FOLDER --quick

--data: x, tx (uint8 [N, 32, 32, 3]) and y, ty of the real CIFAR-10, divided as in study_data.py. A teacher is taught on
nine tenths of the training images, and students learn from 2,500 of these with `--crops-per-decode` 1, 2 and 4: the
same number of images and steps, the same views of every image as often, the same starts. The rate and the decay are
those that docs/study.md chose on held-out images, so that nothing is chosen here. Figures are of the test images, after
the last epoch; differences are seed by seed, with intervals of 95%.

Seed by seed: stopped or killed at any moment, the same command goes on, and the JSON holds whatever is done. --quick
does the same with the embedded digits in less than a minute, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from ensemble_students import CIFAR, QUICK, Measures, Setting
from study_report import estimate, markdown, plain, signed

from kdcache.cache.files import replace_file
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.weights import taught_file
from kdcache.train.bench.bench import machine
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.run import train
from kdcache.train.teach import teach

CROPS, LOSSES = (1, 2, 4), ("nkd", "ce")
ON_CIFAR = replace(CIFAR, taught={"resnet20": 4}, loss="nkd")
ON_DIGITS = replace(QUICK, taught={"resnet20": 2}, loss="nkd", views=4, epochs=4)
_SHOWN = (("top1", (100, 2)), ("nll", (1, 4)))


def cache_of(setting: Setting) -> tuple[str, Path]:
    """Teach and build, or find what is there: the teacher's name, and its cache."""
    ((name, epochs),) = setting.taught.items()
    weights = taught_file(name, open_data(setting.taught_on, "train"))
    if not weights.exists():
        teach(TeachConfig(name, setting.taught_on, setting.augment, epochs, setting.teacher_batch))
    asked = BuildConfig(
        name, str(weights), data=setting.data, augment=setting.augment, views=setting.views, allow_low_accuracy=True
    )
    return name, build(asked).path


def student(setting: Setting, loss: str, crops: int, seed: int, cache: Path, out: Path) -> Path:
    """Train the student, or go on with it; its file of weights."""
    train(
        TrainConfig(
            loss, str(cache), data=setting.data, student=setting.student, epochs=setting.epochs, out=str(out),
            resume=(out / "config.json").exists(), seed=seed, batch_size=setting.batch_size, lr=setting.lr,
            weight_decay=setting.weight_decay, evaluate_every=setting.epochs, crops_per_decode=crops,
        ),
        keep_finished=True,
    )  # fmt: skip
    return out / "last.safetensors"


def table(students: Mapping[str, Any]) -> str:
    """A row for each loss and number of crops: means over the seeds, and the paired difference from one crop."""
    rows = []
    for loss in LOSSES:
        of_one = {run["seed"]: run["top1"] for run in students.values() if (run["loss"], run["crops"]) == (loss, 1)}
        for crops in CROPS:
            runs = [run for run in students.values() if (run["loss"], run["crops"]) == (loss, crops)]
            lost = [run["top1"] - of_one[run["seed"]] for run in runs if run["seed"] in of_one]
            if not runs:
                continue
            shown = [plain(estimate([run[name] for run in runs]), *how) for name, how in _SHOWN]
            beside = signed(lost, 100, 2) if crops > 1 and lost else "-"
            rows.append([loss, str(crops), str(len(runs)), *shown, beside])
    return markdown(["loss", "crops a decode", "seeds", "top-1, %", "NLL", "beside one crop, points"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="NPZ")
    what.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/crops_study.json")
    a = parser.parse_args()
    os.environ["KDCACHE_HOME"] = str(a.work / "home")
    if a.data:
        os.environ["STUDY_DATA"] = str(a.data.resolve())
    setting, started = ON_DIGITS if a.quick else ON_CIFAR, time.monotonic()
    teacher, cache = cache_of(setting)
    measures = Measures(setting, {teacher: cache})
    found: dict[str, Any] = {
        "machine": machine(), "threads": torch.get_num_threads(),
        "command": f"python bench/crops_study.py --work FOLDER {'--quick' if a.quick else '--data cifar10.npz'}",
        "setting": asdict(setting), "samples": {of: len(open_data(setting.data, of)) for of in ("train", "eval")},
        "teacher": measures.of_caches()[teacher], "students": {},
    }  # fmt: skip
    for seed, loss, crops in ((seed, loss, crops) for seed in range(a.seeds) for loss in LOSSES for crops in CROPS):
        name = f"{loss}-{crops}-seed{seed}"
        weights = student(setting, loss, crops, seed, cache, a.work / "runs" / name)
        run = {"loss": loss, "crops": crops, "seed": seed, **measures.of_weights(weights)}
        found["students"][name] = run
        found["seconds_of_the_last_call"] = time.monotonic() - started
        a.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(a.out, (json.dumps(found, indent=1) + "\n").encode())
    print(table(found["students"]))


if __name__ == "__main__":
    main()
