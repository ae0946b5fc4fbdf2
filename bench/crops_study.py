"""Does it cost accuracy to learn several crops of an image at once? Writes JSON and prints a table.

    python bench/crops_study.py --work FOLDER --data cifar10.npz
    python bench/crops_study.py --work FOLDER --quick
    python bench/crops_study.py --report

--data: x, tx (uint8 [N, 32, 32, 3]) and y, ty of the real CIFAR-10, divided as in study_data.py. A teacher is taught on
nine tenths of the training images, and students learn from 2,500 of these with `--crops-per-decode` m = 1, 2 and 4: the
same number of images and steps, the same views of every image as often, the same starts. The rate and the decay are
those that docs/study.md chose on held-out images, so that nothing is chosen here; and since a batch has so many images
less, the rate is also divided by m. Longer runs in larger batches come last, of nkd with two seeds. Figures are of the
test images, after the last epoch; differences are seed by seed, with intervals of 95%.

Seed by seed: stopped or killed at any moment, the same command goes on, and the JSON holds whatever is done. --quick
does the same with the embedded digits in less than a minute, to try the script. --report writes the table of
docs/study-views.md from the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ensemble_students import CIFAR, QUICK, Measures, Setting
from study_report import estimate, filled, markdown, plain, signed

from kdcache.cache.files import replace_file
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.weights import taught_file
from kdcache.train.bench.bench import machine
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.run import train
from kdcache.train.teach import teach

PAGE = Path(__file__).parents[1] / "docs" / "study-views.md"
LOSSES = ("nkd", "ce")


class Kind(NamedTuple):
    """Crops a decode, what the rate is divided by, images a batch, and epochs."""

    crops: int
    slower: int
    batch: int
    epochs: int


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


def kinds(setting: Setting) -> tuple[list[Kind], list[Kind]]:
    """Those of every loss and seed, and the long ones. Of each batch and epochs, that of one crop comes first."""
    usual = [Kind(*of, setting.batch_size, setting.epochs) for of in ((1, 1), (2, 1), (4, 1), (2, 2), (4, 4))]
    return usual, [Kind(crops, 1, 4 * setting.batch_size, 4 * setting.epochs) for crops in (1, 4)]


def student(setting: Setting, loss: str, kind: Kind, seed: int, cache: Path, out: Path) -> Path:
    """Train the student, or go on with it; its file of weights."""
    train(
        TrainConfig(
            loss, str(cache), data=setting.data, student=setting.student, epochs=kind.epochs, out=str(out),
            resume=(out / "config.json").exists(), seed=seed, batch_size=kind.batch, lr=setting.lr / kind.slower,
            weight_decay=setting.weight_decay, evaluate_every=kind.epochs, crops_per_decode=kind.crops,
        ),
        keep_finished=True,
    )  # fmt: skip
    return out / "last.safetensors"


def table(students: Mapping[str, Any]) -> str:
    """A row for each loss and kind: means over the seeds, and the paired difference from one crop."""
    groups: dict[tuple[str, Kind], dict[int, Any]] = {}
    for run in students.values():
        groups.setdefault((run["loss"], Kind(*run["kind"])), {})[run["seed"]] = run
    rows = []
    for (loss, kind), runs in sorted(groups.items(), key=lambda of: (of[0][1].epochs, of[0][0], of[0][1][::-1])):
        one = groups[loss, Kind(1, 1, kind.batch, kind.epochs)]
        lost = [run["top1"] - one[seed]["top1"] for seed, run in runs.items()]
        shown = [plain(estimate([run[name] for run in runs.values()]), *how) for name, how in _SHOWN]
        rate = "as chosen" if kind.slower == 1 else f"/ {kind.slower}"
        about = [loss, str(kind.epochs), str(kind.batch), str(kind.crops), rate, str(len(runs))]
        rows.append([*about, *shown, signed(lost, 100, 2) if kind.crops > 1 else "-"])
    heads = ["loss", "epochs", "batch", "crops a decode", "rate", "seeds", "top-1, %", "NLL", "beside one crop, points"]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="NPZ")
    what.add_argument("--quick", action="store_true")
    what.add_argument("--report", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/crops_study.json")
    a = parser.parse_args()
    if a.report:
        PAGE.write_text(filled(PAGE.read_text(), {"crops": table(json.loads(a.out.read_text())["students"])}))
        return
    if a.work is None:
        parser.error("--work is missing")
    run(a)


def run(a: argparse.Namespace) -> None:
    """Do what is left of the work, and print the table."""
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
    usual, long = kinds(setting)
    jobs = [
        *itertools.product(range(a.seeds), LOSSES, usual),
        *itertools.product(range(min(2, a.seeds)), LOSSES[:1], long),
    ]
    for seed, loss, kind in jobs:
        name = "-".join([loss, *map(str, kind), f"seed{seed}"])
        weights = student(setting, loss, kind, seed, cache, a.work / "runs" / name)
        found["students"][name] = {"loss": loss, "kind": kind, "seed": seed, **measures.of_weights(weights)}
        found["seconds_of_the_last_call"] = time.monotonic() - started
        a.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(a.out, (json.dumps(found, indent=1) + "\n").encode())
    print(table(found["students"]))


if __name__ == "__main__":
    main()
