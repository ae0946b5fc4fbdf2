"""The caches that an ensemble is made of: opened, and compared field by field and shard by shard."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kdcache.cache.errors import InputError, MismatchError, NotFoundError
from kdcache.cache.home import open_cache
from kdcache.cache.identity import Identity, MemberIdentity, SplitName
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.ensembles.mean import TEMPERATURE
from kdcache.pipeline.trust import trusting

_THREADS = 8  # for reading commits, which may be far away


class Member(NamedTuple):
    """A cache, and the weight of its answers in the mean. The weights of all members add up to 1."""

    cache: Cache
    weight: float

    @property
    def identity(self) -> Identity:
        return self.cache.identity

    @property
    def name(self) -> str:
        """The teacher's network and the cache's place, for people."""
        return f"{self.identity.teacher.network} ({self.cache.where})"

    def described(self) -> MemberIdentity:
        """What the ensemble's identity says of it."""
        return MemberIdentity(key=self.cache.key, weight=self.weight)


def open_members(
    caches: Sequence[str], weights: Sequence[float] | None, registry: str | None, trust: str | None = None
) -> list[Member]:
    """The caches with their weights in the order of their keys, in whatever order they are given.

    weights: in proportion; None for equal ones. InputError for caches that cannot be mixed at all or are given twice;
    MismatchError where they do not hold answers to the same images; UntrustedError for one that no key in the file
    `trust` has signed, if that is given.
    """
    if len(caches) < 2:
        raise InputError("a mix needs two caches or more, of different teachers: see kdcache ls")
    if weights is not None and len(weights) != len(caches):
        raise InputError(f"--weights has {len(weights)} numbers for {len(caches)} caches: give one for each")
    given = [1.0] * len(caches) if weights is None else weights
    total = math.fsum(given)
    opened = [trusting(open_cache(where, registry), trust) for where in caches]
    found = [Member(cache, w / total) for cache, w in zip(opened, given, strict=True)]
    found.sort(key=lambda member: member.cache.key)
    for one, other in itertools.pairwise(found):
        if one.cache.key == other.cache.key:
            raise InputError(
                f"{one.cache.where} and {other.cache.where} are the same cache ({one.cache.key[:12]}): give each once, "
                "and --weights where one counts for more"
            )
    for member in found:
        _require_mixable(member)
    for other in found[1:]:
        require_alike(found[0], other)
    return found


def _require_mixable(member: Member) -> None:
    identity, where = member.identity, member.cache.where
    if identity.views.imported:
        raise InputError(f"{where} was imported, with views of its own that no other teacher has answered to")
    if identity.record.temperatures and TEMPERATURE not in identity.record.temperatures:
        have = ",".join(f"{t:g}" for t in identity.record.temperatures)
        raise InputError(
            f"{where} does not store temperature 1, at which probabilities are averaged (stored: {have}): build it "
            f"with --temperatures 1,{have}, or dense"
        )


def require_alike(one: Member, other: Member) -> None:
    """MismatchError, with every field that differs, unless both hold answers to the same views in the same classes."""
    mine, theirs = one.identity, other.identity
    own = {"teacher": mine.teacher, "members": mine.members, "format": mine.format}
    may_differ = {"k", "precision", "tail_std"}
    if mine.record.dense or theirs.record.dense:  # which answers at every temperature
        may_differ.add("temperatures")
    record = theirs.record.model_copy(update={name: getattr(mine.record, name) for name in may_differ})
    compared = theirs.model_copy(update={**own, "record": record})
    if found := mine.differences(compared, mine=f"{one.name} has", theirs=f"{other.name}"):
        raise MismatchError(f"these caches cannot be mixed: {'; '.join(found)}")
    for split in ("train", "eval"):
        a, b = one.cache.split(split), other.cache.split(split)
        if wrong := int((a.labels != b.labels).any(1).sum()) if a.labels.size else 0:
            raise MismatchError(f"{a.where} and {b.where} have other labels ({wrong} of {a.samples} differ)")
        if a.layout.sizes and (wrong := int((a.sizes != b.sizes).any(1).sum())):
            raise MismatchError(f"{a.where} and {b.where} are of images of other sizes ({wrong} of {a.samples} differ)")


def common_views(members: Sequence[Member], say: Callable[[str], None]) -> range:
    """The views that can be mixed: 0, 1, ... as far as every member is complete.

    NotFoundError where that is none, or where a member lacks the evaluation split.
    """
    for member in members:
        if not member.cache.complete:
            raise NotFoundError(
                f"{member.name} is not finished: run the command that builds it again, then mix (see kdcache info)"
            )
    views = [set(member.cache.views) for member in members]
    common, count = set.intersection(*views), 0
    while count in common:
        count += 1
    if not count:
        lacking = next((m for m, of in zip(members, views, strict=True) if 0 not in of), members[0])
        raise NotFoundError(f"{lacking.name} lacks view 0, with which a mix begins: build it, or give the whole cache")
    for member, of in zip(members, views, strict=True):
        if more := len(of) - count:
            are = "1 view is" if more == 1 else f"{more} views are"
            say(f"note: {are} left out of {member.name}: not all caches have the views from 0 up to there")
    return range(count)


def require_same_pixels(members: Sequence[Member], split: SplitName, views: Sequence[int]) -> None:
    """MismatchError unless all members' commits name the same view parameters in every shard of these views."""
    first, *others = members
    store = first.cache.split(split)

    def compare(shard: tuple[int, int]) -> str | None:
        name = shard_name(*shard)
        mine = store.commit(name).parameters
        for other in others:
            there = other.cache.split(split)
            if there.commit(name).parameters != mine:
                return f"view {shard[0]}, part {shard[1]} of {store.where} and of {there.where} were drawn differently"
        return None

    with ThreadPoolExecutor(_THREADS) as threads:
        shards = [(view, part) for view in views for part in range(store.parts)]
        for problem in threads.map(compare, shards):
            if problem:
                raise MismatchError(f"{problem}, so they hold answers to other pixels and cannot be mixed")
