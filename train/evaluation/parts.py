"""How far a student agrees with each of the teachers whose mean it learns from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kdcache.cache.errors import KdcacheError, NotFoundError
from kdcache.cache.home import open_cache, registry_beside
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.stores import Stored
from kdcache.pipeline.trust import trusting

_DIGITS = 6  # of a part's key in the names of figures, since two parts may have networks of one name
Parts = Mapping[str, Tensor]


def parts_of(cache: Stored, registry: str | None, say: Callable[[str], None], trust: str | None = None) -> Parts:
    """What the teacher of each part of a mixed cache names for the evaluation images, by the name of its figure.

    int64 [N] each; nothing for a cache that is not mixed. A part that cannot be read is left out, and `say` says so;
    so is one that is not signed by a key in the file `trust`, if that is given.
    """
    found = {}
    for member in cache.identity.members:
        try:
            part = trusting(_open(member.key, cache, registry), trust)
            found[_name(part)] = part.read_evaluation().predictions()
        except KdcacheError as e:
            why = str(e)
            if isinstance(e, NotFoundError):
                why = "it is not under KDCACHE_HOME (kdcache pull gets it from a registry)"
            say(f"note: agreement with part {member.key[:12]} of the mix is not measured: {why}")
    return found


def agreements(logits: Tensor, parts: Parts) -> dict[str, float]:
    """The share of images, 0..1, for which the student names the class that the part's teacher names; logits [N, C]."""
    first = logits.argmax(1)
    return {name: float(torch.eq(first, named).float().mean()) for name, named in parts.items()}


def _open(key: str, cache: Stored, registry: str | None) -> Cache:
    """The part under KDCACHE_HOME, in the registry, or in that which the mixed cache lies in."""
    try:
        return open_cache(key, registry)
    except NotFoundError:
        beside = registry_beside(cache.where)
        if beside is None:
            raise
        return beside.cache(key)


def _name(part: Cache) -> str:
    network = re.sub(r"[^\w.-]+", "_", part.identity.teacher.network)
    return f"{network}_{part.key[:_DIGITS]}_agreement"
