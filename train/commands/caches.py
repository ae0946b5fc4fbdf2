"""The commands that make caches: they teach, build, mix, import and pack."""

import sys
from dataclasses import asdict
from typing import Annotated

import click

from kdcache.cache.records.choices import FileStore, StoreName
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.commandline.commands import command, is_set, typed_names
from kdcache.pipeline.commandline.options import (
    Argument,
    CacheFolder,
    Json,
    NoTeacher,
    Option,
    Registry,
    Trust,
    Views,
)
from kdcache.pipeline.commandline.parameters import from_signature
from kdcache.pipeline.commandline.terminal import say, show
from kdcache.pipeline.data.defaults import DATA, data_option
from kdcache.pipeline.ensembles.config import MixConfig
from kdcache.pipeline.imports.config import ImportConfig
from kdcache.pipeline.sheet.config import ViewsConfig
from kdcache.train.config import TeachConfig
from kdcache.train.forecast.config import ForecastConfig


@command()
@from_signature
def teach(config: TeachConfig, as_json: Json = False) -> None:
    """Train a teacher on a dataset that has no pretrained one.

    Example: kdcache teach --teacher resnet56 --data cifar10 --epochs 60
    """
    _name_digits(config.data)
    from kdcache.train.teach import teach as run

    path, top1 = run(config, say)
    show({"weights": str(path), "top1": top1}, as_json, str(path))


@command("views")
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


@command("plan")
@from_signature
def plan_command(config: BuildConfig, asked: ForecastConfig, registry: Registry = None, as_json: Json = False) -> None:
    """Tell what a build with the same options will take and what its cache will hold. Nothing is stored.

    \b
    Example: kdcache plan --teacher resnet34
             kdcache plan --teacher resnet34 --data imagenet:/data/imagenet --gpus 8
    """
    _name_digits(config.data)
    from kdcache.train.forecast.forecast import forecast
    from kdcache.train.forecast.table import table

    found = forecast(config, asked, registry, say)
    show(found, as_json, table(found))


@command()
@from_signature
def build(
    config: BuildConfig,
    store: Annotated[StoreName, Option("Also pack it into one file.")] = "zarr",
    list_unreadable: Annotated[
        bool, Option("Name every image file that cannot be read, and stop.", instead=True)
    ] = False,
    registry: Registry = None,
    publish: Annotated[bool, Option("Build it in the registry, with all who do.", flags=("--push",))] = False,
    no_teacher: NoTeacher = False,
    trust: Trust = None,
    ray: Annotated[
        str | None,
        Option(
            "Have it answer on a Ray cluster: that at ADDRESS, or without one that of this machine.",
            metavar="[ADDRESS]",
            bare="here",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the teacher once over every view and store its answers.

    \b
    Example: kdcache build --teacher resnet34
             kdcache build --teacher resnet34 --data imagenet:/data/imagenet --views 16
             kdcache build --teacher resnet34 --store hdf5
             kdcache build --teacher resnet34 --registry s3://bucket/kd --push
             kdcache build --teacher resnet34 --data imagenet:/data/imagenet --ray auto
             kdcache build --data imagefolder:/data/birds --list-unreadable

    With a registry, what is published there is not computed again.
    """
    _name_digits(config.data)
    from kdcache.train.teach import build_and_teach, unreadable_files

    if list_unreadable:
        found = unreadable_files(config.data, config.unlabelled, say)
        show(found, as_json, "\n".join(found) or "every file can be read")
        sys.exit(1 if found else 0)
    if publish and trust is not None:
        if not is_set("trust"):
            raise click.UsageError("--trust is for caches that are fetched, and nothing is signed while all build it.")
        say("note: with --push, what others build in the registry is taken although it is not signed yet")
        trust = None
    built, packed = build_and_teach(config, registry, publish, say, not no_teacher, store, ray, trust)
    if packed is None:
        show(vars(built), as_json, str(built.where or built.path))
    else:
        show({**vars(built), "packed": vars(packed)}, as_json, str(packed.path))


@command()
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


@command()
@from_signature
def unpack(file: Annotated[str, Argument()], out: CacheFolder = None, as_json: Json = False) -> None:
    """Unpack a cache from an HDF5 file into a folder, to which build can add views.

    Example: kdcache unpack birds.h5
    """
    from kdcache.pipeline.pack import unpack as run

    result = run(file, out, say)
    show(vars(result), as_json, str(result.path))


@command()
@from_signature
def mix(config: MixConfig, as_json: Json = False) -> None:
    """Make one cache of several teachers' caches: the mean of their answers. Stopped, the same command goes on.

    Example: kdcache mix 1f0c2a 77ab01 --weights 0.7,0.3
    """
    from kdcache.pipeline.ensembles.mix import mix as run

    result = run(config, say)
    show(asdict(result), as_json, str(result.path))


@command("import")
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


def _name_digits(data: str) -> None:
    """Say at once which data these are where the user may have named none: importing torch takes seconds."""
    if data == DATA:
        say(f"data: {DATA}, scikit-learn's 8x8 images, to try things out; --data names your own")


COMMANDS = (teach, views_command, plan_command, build, pack, unpack, mix, import_command)
