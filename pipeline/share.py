"""A team's caches: looked for before the teacher runs, published when they are built, pushed and pulled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from filelock import FileLock

from kdcache import __version__
from kdcache.cache.errors import CorruptError, InputError, MismatchError, NotFoundError, UntrustedError
from kdcache.cache.home import caches_folder, home, list_caches, open_cache, open_registry
from kdcache.cache.packing import choose_views
from kdcache.cache.registry.bucket import BucketCache, require_create_only
from kdcache.cache.registry.registry import Registry, check_name, in_bucket, split_url
from kdcache.cache.registry.transfer import Moved, count, into_bucket, into_folder, into_objects, require_movable
from kdcache.cache.signing.keys import SigningKey
from kdcache.cache.store.cache import Cache, restore_identity
from kdcache.pipeline.build.answers import teacher_top1
from kdcache.pipeline.build.build import BuildResult, carry_out
from kdcache.pipeline.build.plan import BuildPlan, plan_build
from kdcache.pipeline.build.source import Draft, Source, open_teacher
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.defaults import DATA
from kdcache.pipeline.process.progress import Progress, duration, size
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.teachers import weightstore
from kdcache.pipeline.teachers.networks import canonical_name
from kdcache.pipeline.trust import (
    fetch_signatures,
    publish_signatures,
    say_signed,
    sign_pushed,
    trusting_registry,
)

Say = Callable[[str], None]
_THREADS = 8  # for reading identities, which may be far away


@dataclass(frozen=True)
class ShareResult:
    """What was pushed or pulled: its key, where it is now, and its views.

    bytes: of data that went. new, there: how many commits were new, and were there already. kept: commits that were
    there already with other rows, as another machine computes them; they stay. teacher: after a push, what became of
    the teacher's weights.
    """

    key: str
    where: str
    views: int
    bytes: int
    new: int
    there: int
    seconds: float
    kept: list[str] = field(default_factory=list)
    teacher: weightstore.Published | None = None


def require_registry(registry: str | None) -> str:
    """The address of the registry; InputError if none is named."""
    if registry is None:
        raise InputError(
            "no registry is named: give --registry URL, or set KDCACHE_REGISTRY or, in kdcache.toml, registry "
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
    teacher: bool = True,
    key: SigningKey | None = None,
) -> ShareResult:
    """Publish complete views of a cache, and a name for it if given. What is there already stays as it is.

    views: all complete ones by default. teacher: whether the teacher's weights are published too. key: what signs it.
    """
    shared = open_registry(require_registry(registry)).require_writable()
    if name is not None:
        check_name(name)
    elif move:
        raise InputError("--move moves a name: give --name too")
    found = open_cache(cache)
    result = _publish(found, shared, choose_views(found, views), say, teacher, key)
    if name is not None:
        shared.give_name(name, found.key, move)
        say(f"{name} is cache {found.key[:12]}")
    return result


def _publish(
    cache: Cache, shared: Registry, views: Sequence[int], say: Say, teacher: bool, key: SigningKey | None = None
) -> ShareResult:
    require_movable(cache)
    start, prefix = time.monotonic(), f"caches/{cache.key}"
    became: list[weightstore.Published | None] = []
    lines: list[str] = []

    def begun() -> None:  # now gc in the registry knows that the teacher's weights are needed
        became.append(_publish_teacher(cache, shared, lines.append, teacher))

    with Progress("push", count(cache, views), "parts") as progress:
        moved = into_objects(cache, shared.objects, prefix, views, progress.advance, begun)
    for line in lines:
        say(line)
    if key is not None:
        sign_pushed(cache, shared, key, moved.theirs, say)
    else:
        publish_signatures(cache, shared)
    if moved.new:
        shared.record(cache, __version__, teacher_top1(cache))
    result = _result("pushed", moved, cache, f"{shared.url}/{prefix}", len(views), start, say)
    return replace(result, teacher=became[0])


def _publish_teacher(cache: Cache, shared: Registry, say: Say, wanted: bool) -> weightstore.Published | None:
    if cache.identity.without_teacher:
        return None
    if not wanted:
        return "kept back"
    return weightstore.publish(cache.identity.teacher, cache.where, shared, say)


def pull(
    what: str,
    registry: str | None,
    out: str | None = None,
    views: range | None = None,
    say: Say = print,
    trust: str | None = None,
    check: Callable[[Cache, Sequence[int]], object] | None = None,
) -> ShareResult:
    """Copy complete views of a shared cache to where builds look for it. The next pull goes on where one was stopped.

    what: a key, its first digits, a name, or the address of a cache. views: all complete ones by default. trust: a file
    of keys, by one of which it has to be signed. check: is called with the cache and the views before anything is
    copied, and raises an error where nothing may be; what it reads is kept, and not fetched again.
    """
    start = time.monotonic()
    root, wanted = split_url(what) or (require_registry(registry), what)
    shared = trusting_registry(open_registry(root, store_bytes=0 if check is None else None), trust)
    cache = shared.cache(shared.find(wanted))
    path = Path(out) if out else caches_folder() / cache.key
    chosen = choose_views(cache, views)
    say_signed(cache, chosen, say)
    if check is not None:
        check(cache, chosen)
    return _result("pulled", _pull(cache, path, chosen), cache, str(path), len(chosen), start, say)


def _pull(cache: Cache, path: Path, views: Sequence[int]) -> Moved:
    with Progress("pull", count(cache, views), "parts") as progress:
        moved = into_folder(cache, path, views, progress.advance)
    fetch_signatures(cache, path)
    return moved


def _result(done: str, moved: Moved, cache: Cache, where: str, views: int, start: float, say: Say) -> ShareResult:
    seconds = time.monotonic() - start
    _say_kept(moved, say)
    say(f"{done} {views} views of cache {cache.key[:12]}: {size(moved.bytes)} in {duration(seconds)}, {where}")
    return ShareResult(cache.key, where, views, moved.bytes, moved.new, moved.there, seconds, moved.kept)


def _say_kept(moved: Moved, say: Say) -> None:
    if moved.kept:
        say(
            f"note: {len(moved.kept)} parts stay as they are: they were there already with other records, as another "
            f"machine computes them ({', '.join(moved.kept[:3])}{', ...' if len(moved.kept) > 3 else ''})"
        )


def open_shared(registry: str | None, publish: bool, trust: str | None = None) -> Registry | None:
    """The registry that a build looks in, if one is named. publish: whether it has to be writable.

    trust: a file of keys, by one of which a cache there has to be signed.
    """
    if publish:
        require_registry(registry)
    if registry is None:
        return None
    shared = trusting_registry(open_registry(registry, store_bytes=0), trust)
    if publish:
        require_create_only(shared.require_writable().objects)
    return shared


def open_plan(draft: Draft, shared: Registry | None, say: Say) -> BuildPlan:
    """Open the draft's teacher, wherever its weights are, and plan the build."""
    return plan_build(draft.config, _open_teacher(draft, shared, say))


def _open_teacher(draft: Draft, shared: Registry | None, say: Say) -> Source:
    """Open the draft's teacher. One that is not here is looked for among the teachers of caches of this data."""
    if (named := draft.config.weights) is not None:
        registries = [] if shared is None else [shared]
        return open_teacher(draft.with_weights(weightstore.named_weights(named, registries, say)), say)
    try:
        return open_teacher(draft, say)
    except NotFoundError:
        if (weights := find_taught(draft, shared, say)) is None:
            raise
    return open_teacher(draft.with_weights(weights), say)


def build_shared(
    plan: BuildPlan,
    shared: Registry | None,
    publish: bool = False,
    say: Say = print,
    teacher: bool = True,
    whole: bool = False,
) -> BuildResult:
    """Pull the views that are published, and build the others.

    publish: build it in the registry, where all who build it divide the work by leases. teacher: whether the teacher's
    weights are pushed too. whole: whether all views are to lie here too in the end.
    """
    if shared is None:
        return carry_out(plan, say, partial(_keep, plan.source, say))
    restore_identity(plan.path, plan.identity)
    plan = _as_published(plan, shared, say)
    there = shared.folder(plan.key)
    if publish and there is None:
        return _build_in_bucket(plan, shared, say, teacher, whole or plan.folder is not None)
    if publish and there is not None and plan.folder is None:
        return _build_there(plan, there, shared, say, teacher)
    if _lacks(plan.path, plan.views) and shared.has(plan.key):
        _fetch(shared.cache(plan.key), plan.path, plan.views, say)
    result = carry_out(plan, say, partial(_keep, plan.source, say))
    if publish and this_rank().rank == 0:  # into a folder from --out; no process comes here before all is built
        cache = Cache(plan.path)
        _publish(cache, shared, [v for v in cache.views if v < plan.views], say, teacher)
    return result


def _build_there(plan: BuildPlan, there: Path, shared: Registry, say: Say, teacher: bool) -> BuildResult:
    """Build in the registry's own folder, beginning with what KDCACHE_HOME has of the cache."""
    own, plan = plan.path, replace(plan, folder=there)
    if _is_cache(own):
        _fetch(Cache(own), plan.path, plan.views, say)

    def begun() -> None:  # before it is built, for those who build it too
        _keep(plan.source, say)
        if this_rank().rank == 0:
            _publish_teacher(Cache(plan.path), shared, say, teacher)

    result = carry_out(plan, say, begun)
    if result.teacher_images and this_rank().rank == 0:
        shared.record(Cache(plan.path), __version__, result.teacher_top1)
    return result


def _build_in_bucket(plan: BuildPlan, shared: Registry, say: Say, teacher: bool, whole: bool) -> BuildResult:
    """Build in a bucket, beginning with what this machine has of the cache, which need not be whole views."""
    bucket, moved = in_bucket(shared, plan.identity), Moved()
    with _alone(plan.key):
        if _is_cache(plan.path):
            moved = into_bucket(Cache(plan.path), bucket, range(plan.views))
    if moved.new:
        say(f"put {moved.new} parts of cache {plan.key[:12]} that are here into {shared.url} ({size(moved.bytes)})")
    _say_kept(moved, say)

    def begun() -> None:
        _keep(plan.source, say)
        if this_rank().rank == 0:
            _publish_teacher(bucket, shared, say, teacher)

    result = carry_out(plan, say, begun, bucket)
    if this_rank().rank == 0:
        theirs = shared.open(plan.key)
        if result.teacher_images or moved.new:
            shared.record(theirs, __version__, result.teacher_top1)
        if not _settle(plan, bucket, theirs, whole):
            say(
                f"other machines have computed some of the {plan.views} views: kdcache train reads them from the "
                f"registry, kdcache pull {plan.key[:12]} copies them here"
            )
            result = replace(result, where=theirs.where)
    return result


def _settle(plan: BuildPlan, bucket: BucketCache, theirs: Cache, whole: bool) -> bool:
    """Have the cache here too: all its views if nobody else has computed any of them, or if the whole is wanted.

    Else it holds what readers of every view need. Returns whether it holds all views.
    """
    own = Cache(plan.path).train if _is_cache(plan.path) else None
    lacking = sorted(set(range(plan.views)) - _complete(plan.path))
    names = [name for name in theirs.train.layout.shards(lacking) if own is None or not own.has(name)]
    at_hand = bucket.at_hand(names)
    with _alone(plan.key):
        if at_hand or whole:
            _pull(theirs, plan.path, lacking)
        else:
            into_folder(theirs, plan.path, [])
    if at_hand:
        bucket.drop(names)
    return at_hand or whole


@contextmanager
def _alone(key: str) -> Iterator[None]:
    """Only one of this machine's processes moves that cache at a time."""
    (home() / "remote").mkdir(parents=True, exist_ok=True)
    with FileLock(home() / "remote" / f"{key}.lock"):
        yield


def _keep(source: Source, say: Say) -> None:
    """File the teacher's weights, in one of the processes that build together."""
    if this_rank().rank == 0:
        weightstore.keep(source.teacher, say)


def find_taught(draft: Draft, shared: Registry | None, say: Say) -> Path | None:
    """The file of weights of the one teacher of that architecture that made caches of this data, here or there.

    None if there is no such teacher; InputError if there are several, which it lists; NotFoundError if the weights of
    the only one cannot be found.
    """
    config, found = draft.config, _caches_of(draft, shared, say)
    if not found:
        return None
    what = f"{config.teacher} on this {config.data} data"
    if len({cache.identity.teacher.weights for cache in found}) > 1:
        each = "; ".join(f"--weights {c.identity.teacher.weights[:12]} of {_described(c, shared)}" for c in found)
        raise InputError(f"there are caches by several teachers {what}: choose one with {each}")
    first = found[0]
    registries = [] if shared is None else [shared]
    weights = weightstore.find_weights(first.identity.teacher, registries, say)
    if weights is None:
        where = "not here: give --registry URL, where they may be published, or --weights FILE"
        if shared is not None:
            where = f"neither here nor in {shared.url}: ask the owner to run kdcache push, or give --weights FILE"
        raise NotFoundError(
            f"{_described(first, shared)} was built by a {what}, whose weights are {where}; kdcache teach teaches "
            "another one, and kdcache train --cache needs no teacher"
        )
    say(f"no {config.teacher} was taught here: using the one of {_described(first, shared)}")
    return weights


def _described(cache: Cache, shared: Registry | None) -> str:
    """Which cache it is, where it is, and who published it."""
    if shared is None or (cache.local and cache.path.parent == caches_folder()):
        return f"cache {cache.key[:12]} here"
    published = shared.published(cache.key)
    by = f" (published by {published.by} on {published.time[:10]})" if published else ""
    return f"cache {cache.key[:12]} in {shared.url}{by}"


def _caches_of(draft: Draft, shared: Registry | None, say: Say) -> list[Cache]:
    """One cache of the draft's data for each teacher of its architecture, those here before those in the registry."""
    config, caches = draft.config, list_caches()[0]
    if shared is not None and shared.objects.listable:
        with ThreadPoolExecutor(_THREADS) as threads:
            caches += [cache for cache in threads.map(partial(_opened, shared), shared.keys()) if cache]
    elif shared is not None:
        say(f"note: {shared.url} cannot be listed, so no teacher is looked for there")
    prints: dict[tuple[bool, bool], str] = {}
    found: dict[str, Cache] = {}
    for cache in caches:
        data, teacher = cache.identity.data, cache.identity.teacher
        if cache.identity.without_teacher or teacher.network != canonical_name(config.teacher):
            continue
        unlabelled = cache.identity.record.labels == 0
        if unlabelled != config.unlabelled and config.data != DATA:  # digits' teacher is taught with labels in any case
            continue
        if (kind := (unlabelled, data.full_contents)) not in prints:
            same = unlabelled == config.unlabelled
            here = draft.train if same else open_data(config.data, "train", unlabelled=unlabelled)
            prints[kind] = here.fingerprint(data.full_contents)
        if data.fingerprint == prints[kind]:
            found.setdefault(teacher.weights, cache)
    return list(found.values())


def _opened(shared: Registry, key: str) -> Cache | None:
    """The cache; None if it cannot be read, which ls reports."""
    try:
        return shared.open(key)
    except (CorruptError, MismatchError, NotFoundError, UntrustedError):
        return None


def _fetch(theirs: Cache, path: Path, views: int, say: Say) -> None:
    """Copy those of the first `views` views that are complete there but not here."""
    if not theirs.complete:
        return
    with _alone(theirs.key):
        wanted = sorted({v for v in theirs.views if v < views} - _complete(path))
        if wanted or not (_is_cache(path) and Cache(path).complete):
            say(f"{len(wanted)} of {views} views of cache {theirs.key[:12]} are in {theirs.where}")
            say_signed(theirs, wanted, say)
            _pull(theirs, path, wanted)


def _as_published(plan: BuildPlan, shared: Registry, say: Say) -> BuildPlan:
    """The plan in the other numeric type, if no type is asked for and only that one is published, and complete.

    The teacher then answers in that type too, so that whatever is still computed agrees with the identity.
    """
    identity = plan.identity
    if not plan.any_numeric or _is_cache(caches_folder() / identity.key) or shared.has(identity.key):
        return plan
    numeric = "bf16" if identity.teacher.numeric == "float32" else "float32"
    other = identity.model_copy(update={"teacher": identity.teacher.model_copy(update={"numeric": numeric})})
    if not shared.has(other.key):
        return plan
    theirs = shared.cache(other.key)
    if not (theirs.complete and set(range(plan.views)) <= set(theirs.views)):
        return plan
    say(f"note: {shared.url} has it from the teacher in {numeric}, as cache {other.key[:12]}, which is used")
    teacher = replace(plan.source.teacher, identity=other.teacher)
    return replace(plan, source=replace(plan.source, identity=other, teacher=teacher))


def _is_cache(path: Path) -> bool:
    return (path / "identity.json").exists()


def _lacks(path: Path, views: int) -> bool:
    """Whether the cache there is not whole, up to that many views."""
    return not (_is_cache(path) and set(range(views)) <= _complete(path) and Cache(path).complete)


def _complete(path: Path) -> set[int]:
    return set(Cache(path).train.complete_views()) if _is_cache(path) else set()
