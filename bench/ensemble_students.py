"""Students of three teachers' mixed cache beside students of each teacher's own; writes JSON and prints a table.

    python bench/ensemble_students.py --work FOLDER --data cifar10.npz
    python bench/ensemble_students.py --work FOLDER --quick
    python bench/ensemble_students.py --report

--data: x, tx (uint8 [N, 32, 32, 3]) and y, ty of the real CIFAR-10, divided as in study_data.py: three different
networks are taught on nine tenths of the training images, and students learn from 2,500 of these. All caches hold the
same views, and the mixes of all three and of each pair are made of them by `kdcache mix`. The loss, the rate and the
decay are those that docs/study.md chose on held-out images with another teacher, so that nothing is chosen here. Runs
of one seed share their start, their order and their pixels. Figures are of the test images, after the last epoch.

Seed by seed, and the pairs last: stopped or killed at any moment, the same command goes on, and the JSON holds whatever
is done. --quick does the same with the embedded digits in less than a minute, to try the script. --report writes the
tables of docs/ensembles.md from the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from study_data import parts_of_evaluation
from study_report import estimate, filled, markdown, plain, signed

from kdcache.cache import open_cache
from kdcache.cache.files import replace_file
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.ensembles.config import MixConfig
from kdcache.pipeline.ensembles.mix import mix
from kdcache.pipeline.teachers.weights import read_weights, taught_file
from kdcache.pipeline.views.render import Renderer
from kdcache.train.bench.bench import machine
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.evaluate import student_of
from kdcache.train.evaluation.metrics import metrics, predict
from kdcache.train.run import train
from kdcache.train.teach import teach

PAGE = Path(__file__).parents[1] / "docs" / "ensembles.md"
LABELS = "labels"  # students of no teacher
Caches = Mapping[str, Path]  # by what they are made of: a teacher's name, or several with + between them


@dataclass(frozen=True)
class Setting:
    """What is taught, stored and trained. taught: the teachers, and for how many epochs each."""

    taught: dict[str, int]
    taught_on: str
    data: str
    augment: str
    teacher_batch: int
    views: int
    student: str
    loss: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float

    @property
    def whole(self) -> str:
        """What the mix of all teachers is called."""
        return "+".join(self.taught)


# An epoch of vgg8 costs as much as two of the others, and takes it as far.
CIFAR = Setting(
    {"resnet20": 4, "wrn_16_1": 4, "vgg8": 2}, "study_data:teacher", "study_data:students", "crop,flip", 128, 20,
    "resnet8", "kd:alpha=0.1,beta=0.9,temperature=2", 20, 32, 0.025, 0.01,
)  # fmt: skip
QUICK = Setting(
    {"resnet8": 2, "wrn_16_1": 2, "vgg8": 2}, "digits", "digits", "crop", 128, 2, "resnet8", CIFAR.loss, 2, 64, 0.025,
    0.01,
)  # fmt: skip


def caches(setting: Setting, amp: Any, pairs: bool) -> Caches:
    """Teach, build and mix, or find what is there."""
    found: dict[str, Path] = {}
    for name, epochs in setting.taught.items():
        weights = taught_file(name, open_data(setting.taught_on, "train"))
        if not weights.exists():
            teach(TeachConfig(name, setting.taught_on, setting.augment, epochs, setting.teacher_batch, amp=amp))
        asked = BuildConfig(
            name, str(weights), data=setting.data, augment=setting.augment, views=setting.views, amp=amp,
            allow_low_accuracy=True,
        )  # fmt: skip
        found[name] = build(asked).path
    groups = [tuple(setting.taught), *(itertools.combinations(setting.taught, 2) if pairs else ())]
    for group in groups:
        found["+".join(group)] = mix(MixConfig(tuple(str(found[name]) for name in group))).path
    return found


def student(setting: Setting, source: str, seed: int, cache: Path, out: Path) -> Path:
    """Train the student, or go on with it; its file of weights."""
    train(
        TrainConfig(
            "ce" if source == LABELS else setting.loss, str(cache), data=setting.data, student=setting.student,
            epochs=setting.epochs, out=str(out), resume=(out / "config.json").exists(), seed=seed,
            batch_size=setting.batch_size, lr=setting.lr, weight_decay=setting.weight_decay,
            evaluate_every=setting.epochs,
        ),
        keep_finished=True,
    )  # fmt: skip
    return out / "last.safetensors"


class Measures:
    """Figures of logits on the test images: accuracy, and agreement with every teacher and every mean of them."""

    def __init__(self, setting: Setting, caches: Caches) -> None:
        self._data = open_data(setting.data, "eval")
        self.rows = slice(None) if setting.data == "digits" else parts_of_evaluation()["test"]
        self._records = {name: open_cache(path).read_evaluation()[self.rows] for name, path in caches.items()}

    def of_weights(self, path: Path) -> dict[str, Any]:
        state, notes = read_weights(path)
        renderer = Renderer(self._data, notes["input_size"], torch.device("cpu"))
        return self._of(predict(student_of(path, state, notes), self._data, renderer)[self.rows])

    def of_caches(self) -> dict[str, dict[str, Any]]:
        """The same of the teachers' and the means' own answers."""
        return {name: self._of(records.logits()) for name, records in self._records.items()}

    def _of(self, logits: torch.Tensor) -> dict[str, Any]:
        labels = next(iter(self._records.values())).labels[:, 0].long()
        first = logits.argmax(1)
        agreement = {
            name: float((first == records.predictions()).double().mean()) for name, records in self._records.items()
        }
        return {**metrics(logits, labels), "agreement": agreement}


def compared(students: Mapping[str, Any], whole: str, metric: Callable[[Any], float]) -> dict[str, list[float]]:
    """By source: what the students of all teachers' mean are better by than this source's, seed by seed."""
    out: dict[str, list[float]] = {}
    mine = {run["seed"]: run for run in students.values() if run["source"] == whole}
    for run in students.values():
        if run["source"] != whole and run["seed"] in mine:
            out.setdefault(run["source"], []).append(metric(mine[run["seed"]]) - metric(run))
    return out


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """The teachers with their means, and their students by source, with paired differences."""
    whole = "+".join(found["setting"]["taught"])
    rows = [
        [name, f"{100 * of['top1']:.2f}", f"{of['nll']:.3f}", f"{of['ece']:.3f}", f"{100 * of['agreement'][whole]:.2f}"]
        for name, of in found["teachers"].items()
    ]
    teachers = markdown(["teacher", "top-1, %", "NLL", "ECE", "names the mean's class, %"], rows)
    gained = compared(found["students"], whole, lambda run: float(run["top1"]))
    rows = []
    for source in dict.fromkeys(run["source"] for run in found["students"].values()):
        runs = [run for run in found["students"].values() if run["source"] == source]
        own = [run["agreement"][source] for run in runs if source != LABELS]
        mean = [run["agreement"][whole] for run in runs]
        rows.append(
            [
                source, str(len(runs)), *(plain(estimate([run[name] for run in runs]), *how) for name, how in _SHOWN),
                plain(estimate(own), 100, 2) if own else "-", plain(estimate(mean), 100, 2),
                signed(gained[source], 100, 2) if gained.get(source) else "-",
            ]
        )  # fmt: skip
    heads = ["students of", "seeds", "top-1, %", "NLL", "ECE", "name its class, %", "name the mean's class, %"]
    return {"teachers": teachers, "students": markdown([*heads, "all teachers' mean - this, points"], rows)}


_SHOWN = (("top1", (100, 2)), ("nll", (1, 4)), ("ece", (1, 4)))


def jobs(names: Sequence[str], whole: str, seeds: int) -> list[tuple[str, int]]:
    """Source and seed of every run in their order: pairs come last."""
    first = [whole, *(name for name in names if "+" not in name), LABELS]
    pairs = [name for name in names if "+" in name and name != whole]
    return [(source, seed) for sources in (first, pairs) for seed in range(seeds) for source in sources]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="NPZ")
    what.add_argument("--quick", action="store_true")
    what.add_argument("--report", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-pairs", action="store_true", help="leave out the mixes of two teachers")
    parser.add_argument("--amp", choices=["bf16"], help="teach and ask the teachers in bfloat16")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ensemble_students.json")
    a = parser.parse_args()
    if a.report:
        PAGE.write_text(filled(PAGE.read_text(), tables(json.loads(a.out.read_text()))))
        return
    if a.work is None:
        parser.error("--work is missing")
    run(a)


def run(a: argparse.Namespace) -> None:
    """Do what is left of the work, and print the tables."""
    os.environ["KDCACHE_HOME"] = str(a.work / "home")
    if a.data:
        os.environ["STUDY_DATA"] = str(a.data.resolve())
    setting, started, cpu = QUICK if a.quick else CIFAR, time.monotonic(), time.process_time()
    made = caches(setting, a.amp, not a.no_pairs)
    measures = Measures(setting, made)
    words = ["--quick" if a.quick else "--data cifar10.npz", f"--seeds {a.seeds}"]
    words += ["--no-pairs"] * a.no_pairs + [f"--amp {a.amp}"] * bool(a.amp)
    found: dict[str, Any] = {
        "machine": machine(), "threads": torch.get_num_threads(),
        "command": f"python bench/ensemble_students.py --work FOLDER {' '.join(words)}", "setting": asdict(setting),
        "samples": {split: len(open_data(setting.data, split)) for split in ("train", "eval")},
        "teachers": measures.of_caches(), "students": {},
    }  # fmt: skip
    for source, seed in jobs(list(made), setting.whole, a.seeds):
        name = f"{source}-seed{seed}"
        weights = student(setting, source, seed, made.get(source, made[setting.whole]), a.work / "runs" / name)
        found["students"][name] = {"source": source, "seed": seed, **measures.of_weights(weights)}
        found["seconds of the last call"] = {"clock": time.monotonic() - started, "cpu": time.process_time() - cpu}
        a.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(a.out, (json.dumps(found, indent=1) + "\n").encode())
    print("\n\n".join(tables(found).values()))


if __name__ == "__main__":
    main()
