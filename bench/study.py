"""The study of docs/study.md: students from the cache and with the teacher in the loop, by loss, views, tail and seed.

    python bench/study.py --work FOLDER --data cifar10.npz --logits imagenet-logits.npz [--only tune,core]
    python bench/study.py --work FOLDER --report

--data: x, tx (uint8 [N, 32, 32, 3]) and y, ty of the real CIFAR-10. A run is a process of its own with a share of the
cores; each finished one becomes a file in FOLDER/done and a line of the results, and is never run again, also where
only the results are at hand. Stopped (Ctrl-C, SIGTERM) or killed, the same command goes on. --report writes
bench/results/study.json, the plots in docs/study and the tables of docs/study.md from whatever is done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from study_data import parts_of_evaluation
from study_head import heads
from study_jobs import arguments, child, command_of, done, merged, run_all
from study_protocol import (
    AUGMENT,
    BATCH,
    EPOCHS,
    GROUPS,
    STUDENT_BATCH,
    TEACHER,
    TEACHER_EPOCHS,
    TOPK,
    TOPK_TEMPERATURES,
    Head,
    Run,
    cost_left,
    protocol,
    spelled,
    todo,
)
from study_report import write_report
from torch import Tensor

from kdcache.cache import Records, open_cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.process.progress import duration
from kdcache.pipeline.teachers.weights import read_weights, taught_file, weights_hash
from kdcache.pipeline.views.render import Renderer
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.evaluate import student_of
from kdcache.train.evaluation.metrics import metrics, predict, reliability
from kdcache.train.run import train
from kdcache.train.teach import teach

TEACHER_DATA, STUDENT_DATA = "study_data:teacher", "study_data:students"
RESULTS = Path(__file__).parent / "results" / "study.json"


@dataclass(frozen=True)
class Teach:
    """Teach the teacher on all training images that are not held out."""

    epochs: int
    name = "teach"


@dataclass(frozen=True)
class Build:
    """Build a cache of a view for each epoch: dense in float16, exact (dense in float32), or the top 3."""

    records: str

    @property
    def name(self) -> str:
        return f"build-{self.records}"


Job = Teach | Build | Run | Head
_RECORDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "exact": {"precision": "float32"},
    "top3": {"topk": TOPK, "temperatures": TOPK_TEMPERATURES},
}
_KINDS: dict[str, Callable[..., Job]] = {kind.__name__: kind for kind in (Teach, Build, Run, Head)}


# One job, in a process of its own


def perform(job: Job, work: Path, logits: Path | None) -> dict[str, Any]:
    """Do the job, or the rest of it; what its results hold."""
    match job:
        case Teach():
            path = taught()
            if not path.exists():
                teach(TeachConfig(TEACHER, TEACHER_DATA, AUGMENT, job.epochs, BATCH))
            return {"epochs": job.epochs}
        case Build():
            return built(job.records, work)
        case Head():
            assert logits is not None
            return heads(logits, job.seed)
        case Run():
            return trained(job, work)


def taught() -> Path:
    return taught_file(TEACHER, open_data(TEACHER_DATA, "train"))


def cache_in(work: Path, records: str) -> Path:
    return work / "caches" / records


def built(records: str, work: Path) -> dict[str, Any]:
    """A cache of the students' images; its size, and the teacher's own metrics or the mass of its top classes."""
    out = str(cache_in(work, records))
    asked = {"data": STUDENT_DATA, "augment": AUGMENT, "views": EPOCHS, "out": out, **_RECORDS[records]}
    config = BuildConfig(TEACHER, str(taught()), **asked)
    result = build(config)
    found: dict[str, Any] = {"bytes": result.bytes, "views": result.views, "key": result.key}
    if records == "dense":
        answers = open_cache(result.path).read_evaluation()
        found |= measured(answers.logits(), answers)
    elif records == "top3":
        view = open_cache(cache_in(work, "dense")).read(0)
        found["mass"] = {t: float(view.dense(t).topk(TOPK).values.sum(1).mean()) for t in TOPK_TEMPERATURES}
    return found


def trained(run: Run, work: Path) -> dict[str, Any]:
    """A student, and its metrics after the last epoch."""
    out, cache = work / "runs" / run.name, str(cache_in(work, run.records))
    asks = run.online and run.loss != "bdkd"  # whose teacher learns, from new weights
    train(
        TrainConfig(
            spelled(run.loss), cache, data=STUDENT_DATA, student=run.student, epochs=EPOCHS, out=str(out),
            resume=(out / "config.json").exists(), seed=run.seed, batch_size=STUDENT_BATCH, lr=run.lr,
            weight_decay=run.decay, views=None if run.online else run.views, online=run.online, fresh_views=run.online,
            weights=str(taught()) if asks else None, evaluate_every=EPOCHS,
        ),
        keep_finished=True,
    )  # fmt: skip
    return results_of(out, open_cache(cache_in(work, "dense")).read_evaluation())


def results_of(out: Path, answers: Records) -> dict[str, Any]:
    """A finished student's metrics beside the teacher's whole answers, whatever it learnt from."""
    last = out / "last.safetensors"
    state, notes = read_weights(last)
    model = student_of(last, state, notes)
    data = open_data(STUDENT_DATA, "eval")
    answered = predict(model, data, Renderer(data, notes["input_size"], torch.device("cpu")))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        **measured(answered, answers),
        "training_seconds": sum(line["seconds"] for line in lines),
        "weights": weights_hash(state),
        "loss_by_epoch": [round(line["loss"], 5) for line in lines],
    }


def measured(logits: Tensor, records: Records) -> dict[str, dict[str, Any]]:
    """Metrics and reliability on what is held out and on the test images, beside the teacher's records of both."""
    labels = records.labels[:, 0].long()
    found: dict[str, dict[str, Any]] = {}
    for name, rows in parts_of_evaluation().items():
        z, y = logits[rows], labels[rows]
        figures = metrics(z, y, records[rows])
        bins = [[int(n), round(sure, 6), round(right, 6)] for n, sure, right in reliability(z, y).tolist()]
        found[name] = {**{key: round(value, 6) for key, value in figures.items()}, "reliability": bins}
    return found


# All jobs


def collected(work: Path, out: Path, teacher_epochs: int) -> dict[str, Any]:
    """The results so far, those in `out` and those in the work folder, by job."""
    if not out.exists():
        return done(work)
    there = json.loads(out.read_text())
    if there["protocol"] != protocol(teacher_epochs):
        sys.exit(f"{out} holds another study, {there['protocol']}: give another --out")
    return merged(work, out, there["jobs"], "build-dense")


def stages(group: str, teacher_epochs: int) -> list[Job]:
    """What a group's runs need, which is not among the results but in the work folder."""
    if group == "imagenet":
        return []
    others = {"views": [Build("exact")], "more": [Build("exact")], "topk": [Build("top3")]}
    return [Teach(teacher_epochs), Build("dense"), *others.get(group, [])]


def go_on(a: argparse.Namespace) -> int:
    """All that is left of the groups; how many jobs failed."""

    def command(job: Job) -> list[str]:
        return command_of(__file__, a, job)

    def results() -> dict[str, Any]:
        return collected(a.work, a.out, a.teacher_epochs)

    def tell(job: Job, what: str) -> None:
        found = results()
        count, cost = cost_left(a.only, found)
        timed = [job for job in found.values() if "training_seconds" in job]
        spent = sum(job["seconds"] for job in timed)
        units = sum(Run(**job["settings"]).cost for job in timed)
        left = f", about {duration(spent / units * cost / a.jobs)}" if units else ""
        took = f" in {duration(found[job.name]['seconds'])}" if job.name in found else ""
        say(f"{job.name}: {what}{took}; {count} runs of {','.join(a.only)} left{left}")

    failed: list[str] = []
    for name in a.only:
        for stage in stages(name, a.teacher_epochs):
            if not (a.work / "done" / f"{stage.name}.json").exists() and run_all([stage], 1, command, a.work, tell):
                return 1
        while jobs := [job for job in todo(name, results()) if job.name not in failed]:
            failed += run_all(jobs, a.jobs, command, a.work, tell)
    return len(failed)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> None:
    parser = arguments(__doc__, GROUPS, RESULTS, "imagenet")
    parser.add_argument("--teacher-epochs", type=int, default=TEACHER_EPOCHS)
    a = parser.parse_args()
    if unknown := set(a.only) - set(GROUPS):
        parser.error(f"unknown groups {', '.join(unknown)}: take some of {', '.join(GROUPS)}")
    a.work = a.work.absolute()
    if a.report:
        from study_plots import write_plots  # matplotlib is an extra

        found = collected(a.work, a.out, a.teacher_epochs)
        write_report(found, protocol(a.teacher_epochs), a.out, a.docs / "study.md")
        write_plots(found, a.docs / "study")
        return
    if not a.data or not a.data.is_file():
        parser.error("where is CIFAR-10? give --data FILE.npz")
    os.environ |= {"KDCACHE_HOME": str(a.work / "home"), "STUDY_DATA": str(a.data.absolute())}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if a.job:
        kind, fields = json.loads(a.job)
        job = _KINDS[kind](**fields)
        child(job, a.work, lambda: perform(job, a.work, a.logits))
        return
    if "imagenet" in a.only and not (a.logits and a.logits.is_file()):
        parser.error("the group imagenet needs --logits FILE.npz; --only names others")
    try:
        sys.exit(1 if go_on(a) else 0)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")


if __name__ == "__main__":
    main()
