"""A team's caches: looked for before the teacher runs, published when they are built, pushed and pulled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from kdcache import __version__
from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder, home, open_cache, open_registry
from kdcache.cache.objects import FolderObjects
from kdcache.cache.pack import choose_views
from kdcache.cache.registry import Registry, check_name, split_url
from kdcache.cache.store import Cache
from kdcache.cache.transfer import Moved, count, into_bucket, into_folder, require_movable
from kdcache.pipeline.build import BuildConfig, BuildResult, Source, build, open_source, teacher_top1
from kdcache.pipeline.defaults import defaults_for
from kdcache.pipeline.progress import Progress, duration, size
from kdcache.pipeline.ranks import this_rank

Say = Callable[[str], None]


@dataclass(frozen=True)
class ShareResult:
    """What was pushed or pulled: key, where it is now, its views; bytes and commits that went, and that were there.

    kept: commits that were there with other rows, as another machine computes them; they stay.
    """

    key: str
    where: str
    views: int
    bytes: int
    new: int
    there: int
    seconds: float
    kept: list[str] = field(default_factory=list)


def require_registry(registry: str | None) -> str:
    """The address of the registry, or InputError."""
    if registry is None:
        raise InputError(
            "no registry is named: give --registry URL, or set KDCACHE_REGISTRY, or registry in kdcache.toml "
            "(see docs/sharing.md)"
        )
    return registry


def push(
    cache: str | Path,
    registry: str | None,
    views: range | None = None,
    name: str | None = None,
    move: bool = False,
    say: Say = print,
) -> ShareResult:
    """Publish complete views of a cache, all by default, and a name for it; what is there already stays as it is."""
    shared = open_registry(require_registry(registry)).require_writable()
    if name is not None:
        check_name(name)
    elif move:
        raise InputError("--move is for a name: give --name too")
    found = open_cache(cache)
    result = _publish(found, shared, choose_views(found, views), say)
    if name is not None:
        shared.give_name(name, found.key, move)
        say(f"{name} is cache {found.key[:12]}")
    return result


def _publish(cache: Cache, shared: Registry, views: Sequence[int], say: Say) -> ShareResult:
    require_movable(cache)
    start, prefix = time.monotonic(), f"caches/{cache.key}"
    with Progress("push", count(cache, views), "parts") as progress:
        if isinstance(shared.objects, FolderObjects):
            moved = into_folder(cache, shared.objects.at(f"{prefix}/identity.json").parent, views, progress.advance)
        else:
            moved = into_bucket(cache, shared.objects, prefix, views, progress.advance)
    if moved.new:
        shared.record(cache, __version__, teacher_top1(cache))
    return _result("pushed", moved, cache, f"{shared.url}/{prefix}", len(views), start, say)


def pull(
    what: str, registry: str | None, out: str | None = None, views: range | None = None, say: Say = print
) -> ShareResult:
    """Copy complete views of a shared cache, all by default, to where builds look for it; a stopped pull goes on.

    what: a key, its first digits, a name, or the address of a cache.
    """
    start = time.monotonic()
    root, wanted = split_url(what) or (require_registry(registry), what)
    shared = open_registry(root, store_bytes=0)
    cache = shared.cache(shared.find(wanted))
    path = Path(out) if out else caches_folder() / cache.key
    chosen = choose_views(cache, views)
    return _result("pulled", _pull(cache, path, chosen), cache, str(path), len(chosen), start, say)


def _pull(cache: Cache, path: Path, views: Sequence[int]) -> Moved:
    with Progress("pull", count(cache, views), "parts") as progress:
        return into_folder(cache, path, views, progress.advance)


def _result(done: str, moved: Moved, cache: Cache, where: str, views: int, start: float, say: Say) -> ShareResult:
    seconds = time.monotonic() - start
    if moved.kept:
        say(
            f"note: {len(moved.kept)} parts were there already with other records, as another machine computes them, "
            f"and stay: {', '.join(moved.kept[:3])}{', ...' if len(moved.kept) > 3 else ''}"
        )
    say(f"{done} {views} views of cache {cache.key[:12]}: {size(moved.bytes)} in {duration(seconds)}, {where}")
    return ShareResult(cache.key, where, views, moved.bytes, moved.new, moved.there, seconds, moved.kept)


def build_shared(
    config: BuildConfig, registry: str | None = None, publish: bool = False, say: Say = print
) -> BuildResult:
    """Build what the registry lacks: views that are published are pulled, the teacher runs for the others.

    publish: push the result. In a folder that is shared it is built right there, so that all who build it divide the
    work by leases.
    """
    if registry is None:
        if publish:
            require_registry(registry)
        return build(config, say)
    shared = open_registry(registry, store_bytes=0)
    if publish:
        shared.require_writable()
    source = open_source(config, say)
    views = config.views if config.views is not None else defaults_for(source.train).views
    source = _as_published(source, config, shared, views, say)
    key = source.identity.key
    own = caches_folder() / key
    if publish and config.out is None and isinstance(shared.objects, FolderObjects):
        path = shared.objects.at(f"caches/{key}/identity.json").parent
        if _is_cache(own):
            _fetch(Cache(own), path, views, say)
        result = build(replace(config, out=str(path)), say, source)
        if result.teacher_images and this_rank().rank == 0:
            shared.record(Cache(path), __version__, result.teacher_top1)
        return result
    path = Path(config.out) if config.out else own
    if not set(range(views)) <= _complete(path) and shared.has(key):
        _fetch(shared.cache(key), path, views, say)
    result = build(replace(config, out=str(path)), say, source)
    if publish and this_rank().rank == 0:  # each returns when all of it is done
        cache = Cache(path)
        _publish(cache, shared, [v for v in cache.views if v < views], say)
    return result


def _fetch(theirs: Cache, path: Path, views: int, say: Say) -> None:
    """Copy what is complete of the first `views` there and not here."""
    if not theirs.complete:
        return
    (home() / "remote").mkdir(parents=True, exist_ok=True)
    with FileLock(home() / "remote" / f"{theirs.key}.lock"):  # of several processes one pulls
        wanted = sorted({v for v in theirs.views if v < views} - _complete(path))
        if wanted:
            say(f"{len(wanted)} of {views} views of cache {theirs.key[:12]} are in {theirs.path}")
            _pull(theirs, path, wanted)


def _as_published(source: Source, config: BuildConfig, shared: Registry, views: int, say: Say) -> Source:
    """The source of the other numeric type, where no type is asked for and only that one is published, complete."""
    identity = source.identity
    if config.amp is not None or _is_cache(caches_folder() / identity.key) or shared.has(identity.key):
        return source
    numeric = "bf16" if identity.teacher.numeric == "float32" else "float32"
    other = identity.model_copy(update={"teacher": identity.teacher.model_copy(update={"numeric": numeric})})
    if shared.has(other.key):
        theirs = shared.cache(other.key)
        if theirs.finished and set(range(views)) <= set(theirs.views):
            say(f"note: {shared.url} has it by a teacher in {numeric}, cache {other.key[:12]}: that one is taken")
            return replace(source, identity=other)
    return source


def _is_cache(path: Path) -> bool:
    return (path / "identity.json").exists()


def _complete(path: Path) -> set[int]:
    return set(Cache(path).train.complete_views()) if _is_cache(path) else set()
