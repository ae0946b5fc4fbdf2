"""The commands that look after caches, here and in a registry."""

import sys
from typing import Annotated

import click

from kdcache.pipeline.commandline.commands import command, is_set_for_all
from kdcache.pipeline.commandline.options import (
    Argument,
    CacheFolder,
    Json,
    NoTeacher,
    Option,
    Registry,
    TypedRegistry,
    Views,
)
from kdcache.pipeline.commandline.parameters import from_signature
from kdcache.pipeline.commandline.terminal import confirm, say, show
from kdcache.pipeline.config import GcConfig, VerifyConfig


@command("ls")
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


@command()
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


@command()
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


@command("rm")
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


@command()
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


@command()
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


@command()
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


COMMANDS = (list_command, push, pull, remove_command, gc, info, verify)
