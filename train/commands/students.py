"""The commands for students, from a cache; and those that show or measure the whole."""

import sys
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated

from kdcache.pipeline.commandline.commands import command, is_set, is_set_for_all, typed_names
from kdcache.pipeline.commandline.options import (
    Json,
    Option,
)
from kdcache.pipeline.commandline.parameters import from_signature
from kdcache.pipeline.commandline.terminal import of_run, say, show
from kdcache.train.bench.config import BenchConfig
from kdcache.train.config import EvalConfig, TrainConfig
from kdcache.train.export.config import ExportConfig
from kdcache.train.report.config import ReportConfig


@command()
@from_signature
def train(
    config: TrainConfig, cache: tuple[str, ...], loss: tuple[str, ...], seed: tuple[int, ...], as_json: Json = False
) -> None:
    """Train a student from a cache; with several losses or seeds all of them, and compare. Exit status 1 if one fails.

    \b
    Example: kdcache train --loss nkd
             kdcache train --loss nkd --student resnet20 --data cifar10 --epochs 60
             kdcache train --loss ce --loss nkd --loss dkd:beta=2 --seed 0 --seed 1 --seed 2
             kdcache train --loss nkd --data cifar10 --cache cifar10.beton     (by FFCV's loader)
             kdcache train --loss nkd --registry s3://bucket/kd --cache r34-imagenet-v1
             kdcache train --loss nkd --cache 1f0c2a --cache 77ab01            (by both teachers: see kdcache mix)
             kdcache train --resume --out runs/digits-resnet8-nkd-seed0
             torchrun --nproc-per-node 4 -m kdcache.cli train --loss nkd       (by 4 processes, each a GPU of its own)
    """
    from kdcache.train.plan.choosing import with_one_cache
    from kdcache.train.run import train as run
    from kdcache.train.sweep import asked, sweep, table

    if not config.online and is_set_for_all("weights"):
        config = replace(config, weights=None)  # the setting is for commands that run the teacher
    config, given = with_one_cache(config, cache, say), typed_names()
    losses, seeds = asked(config, loss, seed, given, is_set("loss"))
    config = replace(config, loss=losses[0], seed=seeds[0])
    if len(losses) * len(seeds) > 1:
        result = sweep(config, tuple(filter(None, losses)), seeds, say, given)
        show(result, as_json, table(result))
        sys.exit(1 if any("error" in one for one in result["runs"]) else 0)
    summary = run(config, say, given=given)
    show(summary, as_json, of_run(summary))


@command("eval")
@from_signature
def evaluate(config: EvalConfig, as_json: Json = False) -> None:
    """Evaluate a student: top-1, top-5, NLL, Brier score, ECE, agreement with the teacher and KL to it; its worst
    classes and largest confusions, and what temperature scaling would change. --json has all of it by class.

    RUN is a run folder, whose last weights are taken, or a weights file. With other data than the run's, classes are
    matched by name, and nothing is compared with the teacher.

    \b
    Example: kdcache eval runs/digits-resnet8-nkd-seed0
             kdcache eval runs/digits-resnet8-nkd-seed0 --predictions answers.csv
             kdcache eval runs/birds/best.safetensors --data imagefolder:/data/other-birds
    """
    from kdcache.train.evaluate import examine_run
    from kdcache.train.evaluation.analysis.predictions import require_format, write_predictions

    asked = vars(config).copy()
    file = asked.pop("predictions")
    if file is not None:
        require_format(file)
    found = examine_run(asked.pop("run"), **asked, say=say)
    if file is not None:
        write_predictions(file, found.answers, found.images.paths, found.class_names)
        say(f"the predictions are in {file}")
    show(found.facts(), as_json, found.text())


@command()
@from_signature
def export(config: ExportConfig, as_json: Json = False) -> None:
    """Write a student into one file that runs without kdcache, with a JSON beside it that tells how to prepare images.
    It is run on evaluation images first and compared with the student.

    RUN is a run folder, whose last weights are taken, or a weights file.

    \b
    Example: kdcache export runs/digits-resnet8-nkd-seed0 --to onnx
             kdcache export runs/birds/best.safetensors --to torchscript --out birds.pt
    """
    from kdcache.train.export.export import export as run

    result = run(config, say)
    show(asdict(result), as_json, str(result))


@command()
@from_signature
def demo(
    out: Annotated[str | None, Option("Keep everything in this empty folder.", metavar="DIR", own=True)] = None,
    as_json: Json = False,
) -> None:
    """Teach, build and train on the embedded digits; ends with a table.

    Example: kdcache demo
    """
    from kdcache.train.demo import demo as run

    if as_json:
        show(run(out, say), True, "")
    else:
        run(out, partial(say, out=True), partial(say, out=True, always=True))


@command()
@from_signature
def bench(
    config: BenchConfig,
    out: Annotated[str | None, Option("Write the figures as JSON.", metavar="FILE", own=True)] = None,
    as_json: Json = False,
) -> None:
    """Measure what a teacher costs here: in every step, in a build, and after how many students a cache has paid.

    The teacher is untrained and a part of the data stands for all of them: time depends on neither.

    \b
    Example: kdcache bench
             kdcache bench --data cifar10 --teacher resnet56 --student resnet20 --batch-size 256 --out bench.json
    """
    from kdcache.train.bench.bench import bench as run
    from kdcache.train.bench.table import table

    found = run(config, say, out)
    show(found, as_json, table(found))


@command("report")
@from_signature
def report_command(config: ReportConfig, as_json: Json = False) -> None:
    """Write one HTML file about caches and runs, to look at: how good they are, and what they look like. A folder of
    runs, such as a sweep's, stands for all runs in it.

    \b
    Example: kdcache report 1f0c2a
             kdcache report 1f0c2a --data imagenet:/data/imagenet --out imagenet.html
             kdcache report runs/sweep
             kdcache report runs/digits-resnet8-nkd-seed0 runs/digits-resnet8-kd-seed0 --judge 0
    """
    from kdcache.train.report.report import report as run

    found, text = run(config, say)
    show(found, as_json, text)


COMMANDS = (train, evaluate, export, report_command, demo, bench)
