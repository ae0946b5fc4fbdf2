"""The command line: parse, call, print.

A command's options are its annotated parameters and the fields of its config (pipeline/commandline/options.py). What
takes long to import is imported by the command that needs it.
"""

import sys
from dataclasses import asdict, replace
from typing import Annotated

import click

from kdcache import __version__
from kdcache.cache.records.choices import FileStore, StoreName
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.commandline.commands import Main, is_set, is_set_for_all, typed_names
from kdcache.pipeline.commandline.options import Argument, CacheFolder, Json, Option, Registry, TypedRegistry, Views
from kdcache.pipeline.commandline.parameters import from_signature
from kdcache.pipeline.commandline.terminal import confirm, figure, of_run, say, show
from kdcache.pipeline.config import GcConfig, VerifyConfig
from kdcache.pipeline.data.defaults import data_option
from kdcache.pipeline.ensembles.config import MixConfig
from kdcache.pipeline.imports.config import ImportConfig
from kdcache.pipeline.sheet.config import ViewsConfig
from kdcache.train.bench.config import BenchConfig
from kdcache.train.config import EvalConfig, TeachConfig, TrainConfig

NoTeacher = Annotated[bool, Option("Publish it without the teacher's weights.")]


def _first_to_say(message: str) -> bool:
    from kdcache.train.group import first_to_say

    return first_to_say(message)


@click.group(
    cls=Main,
    first_to_say=_first_to_say,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="kdcache")
def main() -> None:
    """Run a teacher once, keep what students need, train any number of them without it.

    \b
      kdcache build --teacher resnet34
      kdcache train --loss nkd

    Without --data both work on scikit-learn's digits, to try things out.
    """


@main.command()
@from_signature
def teach(config: TeachConfig, as_json: Json = False) -> None:
    """Train a teacher on a dataset that has no pretrained one.

    Example: kdcache teach --teacher resnet56 --data cifar10 --epochs 60
    """
    from kdcache.train.teach import teach as run

    path, top1 = run(config, say)
    show({"weights": str(path), "top1": top1}, as_json, str(path))


@main.command(name="views")
@from_signature
def views_command(config: ViewsConfig, as_json: Json = False) -> None:
    """Show what a policy makes of some samples. The pixels in the PNG file are those that the teacher is shown in a
    build with the same options.

    \b
    Example: kdcache views
             kdcache views three-augment --data imagenet:/data/imagenet
             kdcache views 'rrc,flip,randaugment(2,9),mixup(0.2)' --data cifar10 --views 16
             kdcache views --list
    """
    from kdcache.pipeline.sheet.sheet import views as run

    if config.policy is not None and "augment" in typed_names():  # a setting of that name counts where none is typed
        raise click.UsageError("Give POLICY or --augment, not both.")
    found, text = run(config, say)
    show(found, as_json, text)


@main.command()
@from_signature
def build(
    config: BuildConfig,
    store: Annotated[StoreName, Option("Also pack it into one file.")] = "zarr",
    list_unreadable: Annotated[
        bool, Option("Name every image file that cannot be read, and stop.", instead=True)
    ] = False,
    registry: Registry = None,
    publish: Annotated[bool, Option("Publish it in the registry.", flags=("--push",))] = False,
    no_teacher: NoTeacher = False,
    as_json: Json = False,
) -> None:
    """Run the teacher once over every view and store its answers.

    \b
    Example: kdcache build --teacher resnet34
             kdcache build --teacher resnet34 --data imagenet:/data/imagenet --views 16
             kdcache build --teacher resnet34 --store hdf5
             kdcache build --teacher resnet34 --registry s3://bucket/kd --push
             kdcache build --data imagefolder:/data/birds --list-unreadable

    With a registry, what is published there is not computed again.
    """
    from kdcache.train.teach import build_and_teach, unreadable_files

    if list_unreadable:
        found = unreadable_files(config.data, config.unlabelled, say)
        show(found, as_json, "\n".join(found) or "every file can be read")
        sys.exit(1 if found else 0)
    built, packed = build_and_teach(config, registry, publish, say, not no_teacher, store)
    if packed is None:
        show(vars(built), as_json, str(built.path))
    else:
        show({**vars(built), "packed": vars(packed)}, as_json, str(packed.path))


@main.command()
@from_signature
def pack(
    cache: Annotated[str, Argument()],
    to: Annotated[FileStore, Option("One file, for h5py or FFCV's loader.")],
    out: Annotated[str | None, Option("[beside the cache, with .h5 or .beton]", metavar="FILE", own=True)] = None,
    views: Views = None,
    data: Annotated[str | None, data_option("For ffcv: where the images are [by the name in the cache].")] = None,
    as_json: Json = False,
) -> None:
    """Write a cache into one file: it is read by its path as a folder is.

    \b
    Example: kdcache pack 1f0c2a --to hdf5
             kdcache pack 1f0c2a --to hdf5 --views 0:16 --out birds.h5
             kdcache pack 1f0c2a --to ffcv --data imagenet:/data/imagenet
    """
    from kdcache.pipeline.pack import pack as run

    result = run(cache, to, out=out, views=views, data=data, say=say)
    show(vars(result), as_json, str(result.path))


@main.command()
@from_signature
def unpack(file: Annotated[str, Argument()], out: CacheFolder = None, as_json: Json = False) -> None:
    """Unpack a cache from an HDF5 file into a folder, to which build can add views.

    Example: kdcache unpack birds.h5
    """
    from kdcache.pipeline.pack import unpack as run

    result = run(file, out, say)
    show(vars(result), as_json, str(result.path))


@main.command()
@from_signature
def mix(config: MixConfig, as_json: Json = False) -> None:
    """Make one cache of several teachers' caches: the mean of their answers. Stopped, the same command goes on.

    Example: kdcache mix 1f0c2a 77ab01 --weights 0.7,0.3
    """
    from kdcache.pipeline.ensembles.mix import mix as run

    result = run(config, say)
    show(asdict(result), as_json, str(result.path))


@main.command()
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


@main.command(name="eval")
@from_signature
def evaluate(config: EvalConfig, as_json: Json = False) -> None:
    """Evaluate a student: top-1, top-5, NLL, Brier score, ECE, agreement with the teacher and KL to it.

    RUN is a run folder, whose last weights are taken, or a weights file. With other data than the run's, classes are
    matched by name, and nothing is compared with the teacher.

    \b
    Example: kdcache eval runs/digits-resnet8-nkd-seed0
             kdcache eval runs/birds/best.safetensors --data imagefolder:/data/other-birds
    """
    from kdcache.train.evaluate import evaluate_run

    asked = vars(config).copy()
    found = evaluate_run(asked.pop("run"), **asked)
    lines = [f"{k:13} {figure(k, v) if isinstance(v, float) else v}" for k, v in found.items()]
    show(found, as_json, "\n".join(lines))


@main.command(name="import")
@from_signature
def import_command(config: ImportConfig, as_json: Json = False) -> None:
    """Make a cache of logits that TinyViT's or FKD's code has stored. Stopped, the same command goes on.

    \b
    Example: kdcache import fkd FKD_effL2_475_soft_label --data imagenet:/data/imagenet --teacher effL2
             kdcache import tinyvit teacher_logits --data imagenet:/data/imagenet

    What they do not hold is recorded as lacking, and losses that need it refuse: see docs/stores.md.
    """
    from kdcache.pipeline.imports.imports import import_logits

    result = import_logits(config, say)
    show(vars(result), as_json, str(result.path))


@main.command(name="ls")
@from_signature
def list_command(registry: Registry = None, as_json: Json = False) -> None:
    """The caches under KDCACHE_HOME, and those in the registry.

    \b
    Example: kdcache ls
             kdcache ls --registry s3://bucket/kd
    """
    from kdcache.pipeline.info import listing

    found, lines, bad = listing(registry, as_json)
    show(found, as_json, "\n".join(lines) or "no caches: see kdcache build --help")
    for line in bad:
        say(f"not a cache: {line}")


@main.command()
@from_signature
def push(
    cache: Annotated[str, Argument()],
    registry: Registry = None,
    name: Annotated[str | None, Option("Have this name stand for it in the registry.", own=True)] = None,
    move: Annotated[bool, Option("Also where that name stands for another cache.")] = False,
    views: Views = None,
    no_teacher: NoTeacher = False,
    as_json: Json = False,
) -> None:
    """Publish a cache and its teacher's weights in the registry. What is there already stays; stopped, the same command
    goes on.

    \b
    Example: kdcache push 1f0c2a --registry s3://bucket/kd
             kdcache push 1f0c2a --registry /mnt/team/kd --name r34-imagenet-v1
    """
    from kdcache.pipeline.share import push as run

    result = run(cache, registry, say=say, teacher=not no_teacher, name=name, move=move, views=views)
    show(vars(result), as_json, result.where)


@main.command()
@from_signature
def pull(
    cache: Annotated[str, Argument("KEY|NAME|URL")],
    registry: Registry = None,
    views: Views = None,
    out: CacheFolder = None,
    as_json: Json = False,
) -> None:
    """Copy a cache from the registry, verified. Stopped, the same command goes on.

    \b
    Example: kdcache pull r34-imagenet-v1 --registry s3://bucket/kd --views 0:50
             kdcache pull https://example.org/kd/names/r34-imagenet-v1
    """
    from kdcache.pipeline.share import pull as run

    result = run(cache, registry, say=say, views=views, out=out)
    show(vars(result), as_json, result.where)


@main.command(name="rm")
@from_signature
def remove_command(
    cache: Annotated[str | None, Argument("KEY|PATH|NAME")] = None,
    registry: TypedRegistry = None,
    name: Annotated[str | None, Option("Remove just this name from the registry.", own=True)] = None,
    yes: Annotated[bool, Option("Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a cache: here, or with --registry there. Stopped, the same command goes on.

    \b
    Example: kdcache rm 1f0c2a
             kdcache rm 1f0c2a --registry s3://bucket/kd
             kdcache rm --name r34-imagenet-v1 --registry s3://bucket/kd
    """
    from kdcache.cache.care import find, remove, remove_name
    from kdcache.pipeline.info import removed_line, summary, weights_place

    if (cache is None) == (name is None):
        raise click.UsageError("Give a cache, or --name NAME.")
    if name is not None:
        from kdcache.pipeline.share import require_registry

        confirm(f"Remove the name {name} from {(url := require_registry(registry))}?", yes)
        remove_name(name, url)
        show({"name": name, "registry": url}, as_json, f"removed the name {name}")
        return
    found, shared = find(str(cache), registry)
    about, line = summary(found), removed_line(found, shared)
    weights = weights_place(found, shared)
    confirm(f"Remove {line}?", yes)
    remove(found, shared)
    if weights:
        say(f"its teacher's weights stay ({weights}): kdcache gc lists them once no cache names them")
    show(about, as_json, f"removed {line}")


@main.command()
@from_signature
def gc(config: GcConfig, as_json: Json = False) -> None:
    """List what nothing needs any more, here and with --registry there; with --delete remove it.

    \b
    Example: kdcache gc
             kdcache gc --delete
             kdcache gc --registry /mnt/team/kd --older 90
    """
    from kdcache.cache import care
    from kdcache.pipeline.build import spool
    from kdcache.pipeline.info import removal

    found = [*care.leavings(config.older, config.registry, config.local_store_size), *spool.leavings(config.older)]
    result = care.gc(found, config.delete)
    show(result, as_json, removal(result, config.delete))


@main.command()
@from_signature
def info(cache: Annotated[str, Argument()], registry: Registry = None, as_json: Json = False) -> None:
    """What a cache is: how large, how complete, how faithful to its teacher.

    Example: kdcache info 1f0c2a
    """
    from kdcache.cache.home import open_cache
    from kdcache.pipeline.info import describe, facts

    opened = open_cache(cache, registry)
    found = facts(opened)
    show(found, as_json, describe(opened, found))


@main.command()
@from_signature
def verify(config: VerifyConfig, as_json: Json = False) -> None:
    """Check that a cache is complete, undamaged, and what the live teacher answers. Exit status 1 if not.

    \b
    Example: kdcache verify 1f0c2a
             kdcache verify 1f0c2a --depth contents     (without the teacher and the images)
             kdcache verify 1f0c2a --depth contents --repair
    """
    from kdcache.cache.home import open_cache
    from kdcache.pipeline.verify import source_of
    from kdcache.pipeline.verify import verify as run

    cache, data = open_cache(config.cache, config.registry), config.data
    named = cache.identity.data.name
    if is_set_for_all("data") and data != named and not str(data).startswith(f"{named}:"):
        data = None  # the setting is for caches of those data
    source = None
    if config.depth == "replay":
        source = source_of(
            cache, data, config.teacher, config.weights, config.class_map, config.device, config.numeric,
            config.registry,
        )  # fmt: skip
    contents = config.depth != "commits"
    report = run(cache, source, contents=contents, replay=config.replay, repair=config.repair)
    show({**vars(report), "passed": report.passed}, as_json, report.text(contents))
    sys.exit(0 if report.passed else 1)


@main.command()
@from_signature
def demo(
    out: Annotated[str | None, Option("Keep everything in this empty folder.", metavar="DIR", own=True)] = None,
    as_json: Json = False,
) -> None:
    """Teach, build and train on the embedded digits; ends with a table.

    Example: kdcache demo
    """
    from kdcache.train.demo import demo as run

    found = run(out, say if as_json else click.echo)
    if as_json:
        show(found, True, "")


@main.command()
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


if __name__ == "__main__":
    main()
