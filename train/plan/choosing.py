"""Which cache a run trains from."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace

from kdcache.cache.errors import InputError, MismatchError, NotFoundError
from kdcache.cache.home import list_caches, open_registry
from kdcache.cache.registry.registry import Registry
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.data.dataset import Dataset, is_function, open_data
from kdcache.pipeline.ensembles.config import MixConfig
from kdcache.pipeline.ensembles.mix import mix
from kdcache.pipeline.info import one_line
from kdcache.pipeline.stores import Stored, open_store
from kdcache.pipeline.teachers.networks import canonical_name
from kdcache.pipeline.trust import trusting
from kdcache.train.config import TrainConfig

_EXAMPLE = "resnet34"  # a teacher to name in a message, where the user has named none


def with_one_cache(config: TrainConfig, caches: Sequence[str], say: Callable[[str], None]) -> TrainConfig:
    """The settings with one cache: that of the mean of several teachers' answers where several caches are named.

    It is made first, or found. InputError or MismatchError where they cannot be mixed.
    """
    if len(caches) < 2:
        return config
    if config.online:
        raise InputError(
            f"--online asks one live teacher, and {len(caches)} caches are named: give one --cache, or train without "
            "--online"
        )
    say(f"{len(caches)} caches are named, so their mean is trained from, as kdcache mix makes it")
    mixed = mix(MixConfig(tuple(caches), registry=config.registry, trust=config.trust), say)
    return replace(config, cache=str(mixed.path))


def choose_cache(config: TrainConfig) -> Stored:
    """Find the cache that is asked for, or the only one that matches the data and the teacher.

    NotFoundError where there is none; InputError where several match; MismatchError for another teacher's;
    UntrustedError where --trust is given and its views are not signed.
    """
    found = _found(config)
    return trusting(found, config.trust, found.views[: config.views])


def _found(config: TrainConfig) -> Stored:
    where, teacher = config.cache, canonical_name(config.teacher) if config.teacher else None
    if where is None:
        try:
            return find_cache(config.data, teacher)
        except NotFoundError:
            shared = open_registry(config.registry, config.local_store_size) if config.registry else None
            if shared is None or not shared.objects.listable:
                raise
            return find_cache(config.data, teacher, shared)
    cache = open_store(where, config.registry, config.local_store_size)
    built_by = cache.identity.teacher.network
    if teacher and teacher != built_by:
        raise MismatchError(f"{cache.where} was built by {built_by}, not by {teacher}")
    return cache


def find_cache(data: str, teacher: str | None = None, registry: Registry | None = None) -> Cache:
    """The only cache with complete views of this dataset, and by this teacher where one is named.

    It is looked for under KDCACHE_HOME, or in the registry where one is given. NotFoundError where there is none;
    InputError that lists them where there are several.
    """
    name = data if is_function(data) else data.partition(":")[0]
    opened: dict[bool, Dataset] = {}
    found: dict[str, Cache] = {}
    caches, bad = list_caches() if registry is None else registry.caches()
    for cache in caches:
        identity = cache.identity
        if identity.data.name != name:
            continue
        if teacher and identity.teacher.network != teacher:
            continue
        if not cache.views:
            continue
        unlabelled = identity.record.labels == 0
        if unlabelled not in opened:
            opened[unlabelled] = open_data(data, "train", unlabelled=unlabelled)
        if identity.data.fingerprint != opened[unlabelled].fingerprint(identity.data.full_contents):
            continue
        # A folder and what was packed from it are one cache.
        if cache.key not in found or len(cache.views) > len(found[cache.key].views):
            found[cache.key] = cache
    if not found:
        by = f" by {teacher}" if teacher else ""
        build = shlex.join(["kdcache", "build", "--teacher", teacher or _EXAMPLE, "--data", data])
        also = f" ({len(bad)} that cannot be read are left out: see kdcache ls)" if bad else ""
        raise NotFoundError(f"no cache of {data}{by} with a complete view{also}: run {build} first")
    if len(found) > 1:
        raise InputError(
            f"{len(found)} caches of {data} match, choose one with --cache: " + "; ".join(map(one_line, found.values()))
        )
    return next(iter(found.values()))
