"""Prepares a loss before the first step: whether cache and student have what it needs, and what it is given of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import UnservedError
from kdcache.cache.identity import RecordIdentity
from kdcache.cache.records.records import STD_TAU, Records
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.stores import Stored
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.views.parameters import shares_as
from kdcache.train.losses.base import Featured, Loss, Surveying
from kdcache.train.losses.features import FeatureLoss

_ENOUGH = 10_000


class Answering(Protocol):
    """A live teacher that answers a whole view."""

    def answers(self, view: int) -> Iterator[Records]: ...


def require_served(loss: Loss, record: RecordIdentity) -> None:
    """UnservedError, with the build flags that help, unless a cache of such records serves the loss."""
    needs = loss.needs
    if needs.labels and not record.labels:
        raise UnservedError(f"{loss.name} needs labels; this cache was built with --unlabelled")
    if needs.target_gap and "target_gap" in record.lacks:
        raise UnservedError(
            f"{loss.name} needs the teacher's answer for the label, which this imported cache lacks where it is not "
            f"among the top {record.k}: take a loss that does without, such as kd or gkd, or build a cache"
        )
    if not needs.mixed and record.labels > 1:
        raise UnservedError(
            f"{loss.name} has no meaning for mixed labels, which this cache holds: build one without mixup or cutmix "
            "in --augment"
        )
    if record.dense:
        return
    if needs.dense:
        raise UnservedError(
            f"{loss.name} needs all {record.classes} classes' logits; this cache holds the top {record.k}: "
            f"build one with --topk {record.classes}"
        )
    if needs.standardised is not None and not (record.tail_std and needs.standardised == STD_TAU):
        raise UnservedError(
            f"{loss.name} needs the teacher's logits standardised to tau {needs.standardised:g}: build a cache with "
            f"--tail-std (which serves tau={STD_TAU:g}) or with --topk {record.classes}"
        )
    if lacking := [t for t in needs.temperatures if t not in record.temperatures]:
        stored = ",".join(f"{t:g}" for t in record.temperatures)
        wanted = ",".join(f"{t:g}" for t in sorted({*record.temperatures, *lacking}))
        raise UnservedError(
            f"{loss.name} needs the teacher at temperature {', '.join(f'{t:g}' for t in lacking)}; this cache holds "
            f"{stored}: build one with --temperatures {wanted}, or train with temperature={stored.split(',')[0]}"
        )


def head_mass_warning(loss: Loss, records: Records) -> str | None:
    """A line to show where top-k records hold less than half of the teacher at the loss's temperature; or None."""
    if records.classes is None:
        return None
    kept = records.classes.shape[1]
    # Enough of them for a mean: all of ImageNet's take gigabytes.
    records = records[torch.arange(0, len(records), max(1, len(records) // _ENOUGH), device=records.gaps.device)]
    softened = {f"T = {t:g}": records.softened(t, "drop") for t in loss.needs.temperatures}
    if loss.needs.standardised is not None:
        softened["two standard deviations"] = records.standardised(loss.needs.standardised, "drop")
    masses = {at: float(soft.head_mass.mean()) for at, soft in softened.items()}
    low = {at: mass for at, mass in masses.items() if mass < 0.5}
    if not low:
        return None
    held = ", ".join(f"{mass:.0%} at {at}" for at, mass in low.items())
    return (
        f"the {kept} stored classes hold only {held} of the teacher's probability: {loss.name} "
        "mostly learns from the modelled tail. Build with a larger --topk, or train at a lower temperature"
    )


def prepared(
    loss: Loss,
    cache: Stored,
    model: Classifier,
    size: int,
    online: bool,
    say: Callable[[str], None],
    samples: NDArray[np.int64] | None = None,
    live: Answering | None = None,
) -> Loss:
    """The loss, given all that it takes from view 0 and from the student; warns where the tail is most of the teacher.

    samples: the positions of those that it may learn from; by default all. live: the teacher that answers where the
    cache has no view with all classes.
    """
    dense, softened = cache.identity.record.dense, loss.needs.temperatures or loss.needs.standardised

    def first_view() -> Records:
        records, has = cache.read(cache.views[0]), cache.identity
        if has.views.mixed and has.record.labels:
            shares = shares_as(has.views, cache.views[0], has.data.samples, (size, size))
            records = replace(records, label_weights=torch.from_numpy(shares))
        return records if samples is None else records[torch.from_numpy(samples)]

    if isinstance(loss, Surveying) and loss.needs.first_view:
        if live is not None and not (dense and cache.views):
            say(f"the teacher answers view 0 once, for the class prior of {loss.name}")
            loss.prepare(live.answers(0))
        else:
            loss.prepare(first_view().to(next(model.parameters()).device))
    if softened and not (online or dense) and (warning := head_mass_warning(loss, _of_first_part(cache, samples))):
        say(f"warning: {warning}")
    return FeatureLoss(loss, model, size, cache.identity.record.classes) if isinstance(loss, Featured) else loss


def _of_first_part(cache: Stored, samples: NDArray[np.int64] | None) -> Records:
    """Some of the records of the first view's first part, or of those `samples` that lie there.

    All of a view would take seconds before the first batch, and its memory.
    """
    everyone = np.arange(cache.identity.data.samples) if samples is None else samples
    there = everyone[: max(1, np.searchsorted(everyone, cache.identity.part))]
    chosen = there[:: max(1, len(there) // _ENOUGH)]
    if isinstance(cache, Cache):
        return cache.read(cache.views[0], samples=chosen)
    return cache.read(cache.views[0])[torch.from_numpy(chosen)]
