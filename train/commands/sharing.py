"""The commands that look after caches, here and in a registry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Annotated

import click

from kdcache.pipeline.commandline.commands import command, is_set_for_all, typed_names
from kdcache.pipeline.commandline.options import (
    Argument,
    CacheFolder,
    Json,
    NoTeacher,
    Option,
    Registry,
    Trust,
    TypedRegistry,
    Views,
)
from kdcache.pipeline.commandline.parameters import from_signature
from kdcache.pipeline.commandline.terminal import ask_secretly, confirm, say, show
from kdcache.pipeline.config import GcConfig, ReplayConfig, VerifyConfig

if TYPE_CHECKING:
    from kdcache.cache.signing.keys import SigningKey
    from kdcache.cache.store.cache import Cache


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
    sign: Annotated[str | None, Option("Sign it with this Ed25519 key of OpenSSH's.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Publish a cache and its teacher's weights in the registry. What is there already stays; stopped, the same command
    goes on.

    \b
    Example: kdcache push 1f0c2a --registry s3://bucket/kd
             kdcache push 1f0c2a --registry /mnt/team/kd --name r34-imagenet-v1
             kdcache push 1f0c2a --registry /mnt/team/kd --sign ~/.ssh/id_ed25519
    """
    from kdcache.pipeline.share import push as run
    from kdcache.pipeline.share import require_registry

    require_registry(registry)  # before a passphrase is asked for
    key = None if sign is None else _load_key(sign)
    result = run(cache, registry, say=say, teacher=not no_teacher, name=name, move=move, views=views, key=key)
    show(vars(result), as_json, result.where)


@command()
@from_signature
def pull(
    cache: Annotated[str, Argument("KEY|NAME|URL")],
    asked: ReplayConfig,
    registry: Registry = None,
    views: Views = None,
    out: CacheFolder = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Copy a cache from the registry, verified. Stopped, the same command goes on.

    \b
    Example: kdcache pull r34-imagenet-v1 --registry s3://bucket/kd --views 0:50
             kdcache pull https://example.org/kd/names/r34-imagenet-v1
             kdcache pull r34-imagenet-v1 --registry s3://bucket/kd --trust signers.txt
             kdcache pull r34-imagenet-v1 --registry s3://bucket/kd --replay 500 --data imagenet:/data/imagenet
    """
    from kdcache.pipeline.share import pull as run

    unread = sorted(typed_names() & {field.name for field in fields(asked)} - {"replay"})
    if asked.replay is None and unread:
        raise click.UsageError(
            f"--{unread[0].replace('_', '-')} is for --replay, which asks the teacher: give that too."
        )
    check = None if asked.replay is None else partial(_replay, asked, registry)
    result = run(cache, registry, say=say, views=views, out=out, trust=trust, check=check)
    show(vars(result), as_json, result.where)


def _replay(asked: ReplayConfig, registry: str | None, cache: Cache, views: Sequence[int]) -> None:
    from kdcache.pipeline.verify import require_answers, source_of

    source = source_of(
        cache, _data_of(cache, asked.data), asked.teacher, asked.weights, asked.class_map, asked.device, asked.numeric,
        registry, otherwise="leave out --replay",
    )  # fmt: skip
    say(require_answers(cache, source, asked.replay or 1, views))


@command()
@from_signature
def sign(
    cache: Annotated[str, Argument()],
    key: Annotated[str, Option("An Ed25519 key of OpenSSH's: ssh-keygen -t ed25519 makes one.", metavar="FILE")],
    registry: Registry = None,
    as_json: Json = False,
) -> None:
    """Sign a cache as it is now: one here, or by its address one in a registry. Views that are added later have to be
    signed again.

    \b
    Example: kdcache sign 1f0c2a --key ~/.ssh/id_ed25519
             kdcache sign s3://bucket/kd/names/r34-imagenet-v1 --key ~/.ssh/id_ed25519
    """
    from kdcache.pipeline.trust import sign_cache

    result = sign_cache(cache, _load_key(key), registry, say)
    show(vars(result), as_json, result.signer)


def _load_key(file: str) -> SigningKey:
    from kdcache.cache.signing.keys import load_key

    return load_key(file, ask_secretly)


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
    from kdcache.pipeline.trust import say_signed, trusting
    from kdcache.pipeline.verify import source_of
    from kdcache.pipeline.verify import verify as run

    cache = open_cache(config.cache, config.registry)
    cache = trusting(cache, config.trust, cache.views)
    say_signed(cache, (), say)
    source = None
    if config.depth == "replay":
        source = source_of(
            cache, _data_of(cache, config.data), config.teacher, config.weights, config.class_map, config.device,
            config.numeric, config.registry,
        )  # fmt: skip
    contents = config.depth != "commits"
    report = run(cache, source, contents=contents, replay=config.replay, repair=config.repair)
    show({**vars(report), "passed": report.passed}, as_json, report.text(contents))
    sys.exit(0 if report.passed else 1)


def _data_of(cache: Cache, data: str | None) -> str | None:
    """The images to ask the teacher about; None where the setting for all commands is for caches of other data."""
    named = cache.identity.data.name
    other = is_set_for_all("data") and data != named and not str(data).startswith(f"{named}:")
    return None if other else data


COMMANDS = (list_command, push, pull, sign, remove_command, gc, info, verify)
