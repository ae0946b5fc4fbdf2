"""The second study (docs/study-views.md): views, strong augmentation and presets.

    python bench/study_again.py --work FOLDER --data cifar10.npz --logits imagenet-logits.npz [--only core,spread]
    python bench/study_again.py --work FOLDER --report

Data, networks and recipe are those of study.py, and nothing is chosen here: the rate, the decay and the weights of kd
and nkd are what its held-out images chose with its own teacher. The teacher is a new one, because `teach` now draws its
views from a stream of its own. Groups of runs, each seed by seed:

core      ce, kd and nkd; and nkd with the teacher in the loop and from float32 records
views     nkd from the first V views, as the front page shows it
spread    nkd from the first V of random and of spread views
strong    ce, kd and nkd in plain, stronger and mixed views, a view for each of twice as many epochs
presets   two gammas by two temperatures of nkd
heads     the same for heads on the logits of 1,000 classes, and on the same teacher's among fewer of them

Stopped (Ctrl-C, SIGTERM) or killed, the same command goes on. --report writes bench/results/study_again.json, the
plots in docs/study and the tables of the page from whatever is done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study
from study_head import presets
from study_jobs import arguments, child, command_of, merged, run_all
from study_protocol import (
    AUGMENT,
    BATCH,
    EPOCHS,
    SMALL_STUDENT,
    STUDENT,
    STUDENT_BATCH,
    TEACHER,
    TEACHER_EPOCHS,
    spelled,
)

from kdcache.cache import open_cache
from kdcache.cache.records.choices import Precision, SequenceName
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.process.progress import duration
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.run import train
from kdcache.train.teach import teach

RESULTS = Path(__file__).parent / "results" / "study_again.json"
LR, DECAY = 0.025, 0.01
KD, NKD = "kd:alpha=0.1,beta=0.9,temperature=2", "nkd:gamma=1.5,temperature=1"
LOSSES = {"ce": "ce", "kd": KD, "nkd": NKD}
PRESETS = tuple(f"nkd:gamma={gamma},temperature={t}" for gamma in (1.5, 3.5) for t in (1, 3))
CLASSES = (10, 30, 100, 300, 1000)
VIEWS = (1, 2, 4, 8, 16)
FEW = VIEWS[:-1]
STRONG = (AUGMENT, f"{AUGMENT},trivial", f"{AUGMENT},mixup(0.2),cutmix(1)")
LONG = 2 * EPOCHS
SEEDS, MANY_SEEDS = range(5), range(10)


@dataclass(frozen=True)
class Teach:
    """Teach the teacher on all training images that are not held out."""

    name = "teach"


@dataclass(frozen=True)
class Cache:
    """Build a cache of the students' images."""

    augment: str = AUGMENT
    sequence: SequenceName = "random"
    precision: Precision = "float16"
    views: int = LONG

    @property
    def name(self) -> str:
        return f"build-{_plain(self.augment)}-{self.sequence}-{self.precision}"


PLAIN, SPREAD = Cache(), Cache(sequence="spread", views=max(VIEWS))
EXACT = Cache(precision="float32", views=EPOCHS)
RANDOM_OR_SPREAD = (PLAIN, SPREAD)


@dataclass(frozen=True)
class Student:
    """Train a student from the first views of a cache, or beside the teacher with a fresh view every epoch (online)."""

    loss: str
    seed: int
    cache: Cache = PLAIN
    views: int = EPOCHS
    epochs: int = EPOCHS
    student: str = STUDENT
    online: bool = False

    @property
    def name(self) -> str:
        how = "online" if self.online else self.cache.name.removeprefix("build-")
        return f"{self.student}-{_plain(self.loss)}-{how}-views{self.views}-epochs{self.epochs}-seed{self.seed}"

    @property
    def cost(self) -> float:
        """How long it takes, roughly, in units of a resnet20's run of EPOCHS from the cache."""
        return (0.5 if self.student == SMALL_STUDENT else 1.0) * self.epochs / EPOCHS * (1.7 if self.online else 1.0)


@dataclass(frozen=True)
class Heads:
    """Fit heads by each preset for so many classes."""

    classes: int
    seed: int
    cost = 0.1

    @property
    def name(self) -> str:
        return f"heads-{self.classes}-seed{self.seed}"


Job = Teach | Cache | Student | Heads
Run = Student | Heads
_KINDS: dict[str, type[Job]] = {kind.__name__: kind for kind in (Teach, Cache, Student, Heads)}


def _plain(text: str) -> str:
    return "-".join(text.replace(":", ",").replace("(", "").replace(")", "").split(","))


def small(loss: str, seed: int, **how: Any) -> Student:
    return Student(loss, seed, student=SMALL_STUDENT, **how)


def strong(loss: str, seed: int, augment: str) -> Student:
    return small(loss, seed, cache=Cache(augment), views=LONG, epochs=LONG)


GROUPS: dict[str, list[Run]] = {
    "core": [
        run
        for seed in SEEDS
        for run in (
            *(Student(loss, seed) for loss in LOSSES.values()),
            Student(NKD, seed, EXACT),
            Student(NKD, seed, online=True),
        )
    ],
    "views": [Student(NKD, seed, views=v) for seed in SEEDS for v in FEW],
    "presets": [small(loss, seed) for seed in SEEDS for loss in PRESETS],
    "spread": [
        small(NKD, seed, cache=cache, views=v) for seed in MANY_SEEDS for v in VIEWS for cache in RANDOM_OR_SPREAD
    ],
    "strong": [strong(loss, seed, augment) for seed in SEEDS for augment in STRONG for loss in LOSSES.values()],
    "heads": [Heads(classes, seed) for seed in SEEDS for classes in CLASSES],
}


def perform(job: Job, work: Path, logits: Path | None) -> dict[str, Any]:
    """Do the job, or the rest of it; what its results hold."""
    match job:
        case Teach():
            if not study.taught().exists():
                teach(TeachConfig(TEACHER, study.TEACHER_DATA, AUGMENT, TEACHER_EPOCHS, BATCH))
            return {"epochs": TEACHER_EPOCHS}
        case Cache():
            return built(job, work)
        case Student():
            return trained(job, work)
        case Heads():
            assert logits is not None
            return {"presets": presets(logits, job.classes, job.seed, PRESETS)}


def cache_in(work: Path, cache: Cache) -> Path:
    return work / "caches" / cache.name


def built(cache: Cache, work: Path) -> dict[str, Any]:
    """The cache's size; of the plain one also the teacher's own metrics."""
    config = BuildConfig(
        TEACHER, str(study.taught()), data=study.STUDENT_DATA, augment=cache.augment, sequence=cache.sequence,
        views=cache.views, precision=cache.precision, out=str(cache_in(work, cache)),
    )  # fmt: skip
    result = build(config)
    found: dict[str, Any] = {"bytes": result.bytes, "views": result.views, "key": result.key}
    if cache == PLAIN:
        answers = open_cache(result.path).read_evaluation()
        found |= study.measured(answers.logits(), answers)
    return found


def trained(run: Student, work: Path) -> dict[str, Any]:
    """A student, and its metrics after the last epoch, beside the teacher's answers."""
    out = work / "runs" / run.name
    train(
        TrainConfig(
            spelled(run.loss), str(cache_in(work, run.cache)), data=study.STUDENT_DATA, student=run.student,
            epochs=run.epochs, out=str(out), resume=(out / "config.json").exists(), seed=run.seed,
            batch_size=STUDENT_BATCH, lr=LR, weight_decay=DECAY, views=None if run.online else run.views,
            online=run.online, fresh_views=run.online, weights=str(study.taught()) if run.online else None,
            evaluate_every=run.epochs,
        ),
        keep_finished=True,
    )  # fmt: skip
    return study.results_of(out, open_cache(cache_in(work, PLAIN)).read_evaluation())


def collected(work: Path, out: Path) -> dict[str, Any]:
    """The results so far, those in `out` and those in the work folder, by job."""
    theirs = json.loads(out.read_text())["jobs"] if out.exists() else {}
    return merged(work, out, theirs, PLAIN.name)


def stages(runs: Sequence[Run]) -> list[Job]:
    """What runs need, which is not among the results but in the work folder, in its order."""
    caches = dict.fromkeys(run.cache for run in runs if isinstance(run, Student))
    return [Teach(), *dict.fromkeys((PLAIN, *caches))] if caches else []


def go_on(a: argparse.Namespace) -> int:
    """All that is left of the groups; how many jobs failed."""

    def command(job: Job) -> list[str]:
        return command_of(__file__, a, job)

    def left(names: Sequence[str]) -> list[Run]:
        found = collected(a.work, a.out)
        return [run for name in names for run in GROUPS[name] if run.name not in found]

    def tell(job: Job, what: str) -> None:
        found, runs = collected(a.work, a.out), left(a.only)
        timed = [read_job("Student", one["settings"]) for one in found.values() if "training_seconds" in one]
        spent, units = sum(found[one.name]["seconds"] for one in timed), sum(one.cost for one in timed)
        eta = f", about {duration(spent / units * sum(run.cost for run in runs) / a.jobs)}" if units else ""
        took = f" in {duration(found[job.name]['seconds'])}" if job.name in found else ""
        print(f"{time.strftime('%H:%M:%S')} {job.name}: {what}{took}; {len(runs)} runs left{eta}", flush=True)

    failed: list[str] = []
    for name in a.only:
        runs = left([name])
        for stage in stages(runs):
            if not (a.work / "done" / f"{stage.name}.json").exists() and run_all([stage], 1, command, a.work, tell):
                return 1
        failed += run_all(runs, a.jobs, command, a.work, tell)
    return len(failed)


def read_job(kind: str, fields: dict[str, Any]) -> Job:
    """The job that asdict made these fields of."""
    if "cache" in fields:
        fields = {**fields, "cache": Cache(**fields["cache"])}
    return _KINDS[kind](**fields)


def main() -> None:
    parser = arguments(__doc__, GROUPS, RESULTS, "heads")
    a = parser.parse_args()
    if unknown := set(a.only) - set(GROUPS):
        parser.error(f"unknown groups {', '.join(unknown)}: take some of {', '.join(GROUPS)}")
    a.work = a.work.absolute()
    if a.report:
        from study_again_report import write  # which takes the groups from here

        write(collected(a.work, a.out), a.out, a.docs)
        return
    if not a.data or not a.data.is_file():
        parser.error("where is CIFAR-10? give --data FILE.npz")
    if "heads" in a.only and not (a.logits and a.logits.is_file()):
        parser.error("the group heads needs --logits FILE.npz; --only names others")
    os.environ |= {"KDCACHE_HOME": str(a.work / "home"), "STUDY_DATA": str(a.data.absolute())}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if a.job:
        job = read_job(*json.loads(a.job))
        child(job, a.work, lambda: perform(job, a.work, a.logits))
        return
    try:
        sys.exit(1 if go_on(a) else 0)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")


if __name__ == "__main__":
    main()
