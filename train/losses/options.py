"""Losses by name: their options and presets, and whether a cache can serve them."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from kdcache.cache.errors import InputError, UnservedError
from kdcache.cache.identity import RecordIdentity
from kdcache.cache.records import STD_TAU, Records
from kdcache.train.losses.families import (
    BDKD,
    CE,
    CMKD,
    DIST,
    DKD,
    GKD,
    IKL,
    KD,
    MSE,
    NKD,
    TFNKD,
    USKD,
    WSLD,
    LogitStd,
    Loss,
    SkewKL,
    SkewRKL,
)

_ALL = (CE, KD, NKD, TFNKD, USKD, DKD, IKL, DIST, CMKD, LogitStd, MSE, WSLD, GKD, SkewKL, SkewRKL, BDKD)
LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in _ALL}

# The published settings for CIFAR-100 are taken for about as many classes; for fewer and for more, the classes' own
# defaults, which are the published ones for ImageNet. A loss sees no pixels, so their number decides nothing.
CIFAR_CLASSES = range(50, 201)
# By name, and by `base` where its two forms are set apart.
_CIFAR_PRESETS: dict[str, dict[str, Any]] = {
    "kd": {"alpha": 0.1, "beta": 0.9, "temperature": 4.0},
    "nkd": {"gamma": 3.5, "temperature": 3.0},
    "uskd": {"alpha": 0.1, "beta": 0.1, "mu": 0.1},
    "dkd": {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "warmup": 20},
    "ikl": {"alpha": 1.0, "beta": 4.0, "temperature": 4.0, "temperature2": 100.0, "pairs": "teacher", "warmup": 20},
    "dist": {"temperature": 4.0},
    "logit-std": {"alpha": 0.1},
    "logit-std:base=dkd": {"alpha": 1.0, "others": 8.0, "warmup": 20},
    "wsld": {"alpha": 2.25, "temperature": 4.0},
}

# Every number must be finite and not negative; these more than that.
_POSITIVE = {"temperature", "temperature2", "tau", "softness", "warmup", "mass", "skew"}
_AT_MOST_ONE = {"label_smoothing", "mass", "low", "high", "skew"}


def make_loss(spec: str, classes: int) -> Loss:
    """The loss of `NAME[:key=value,...]`, with the preset for this many classes where an option is not given.

    InputError for a name, a key or a value that does not exist.
    """
    cls, given = read_spec(spec)
    presets = _cifar_preset(cls, given) if classes in CIFAR_CLASSES else {}
    loss: Loss = cls(**{**presets, **given})
    return loss


def read_spec(spec: str) -> tuple[type[Any], dict[str, Any]]:
    """The class of `NAME[:key=value,...]` and the options that it gives. Errors as in make_loss."""
    name, _, text = spec.partition(":")
    if name not in LOSSES:
        raise InputError(f"unknown loss {name!r}: take one of {', '.join(LOSSES)}")
    cls = LOSSES[name]
    types = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.init]
    given: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise InputError(f"loss {name} has no option {key!r}: it has {', '.join(known) or 'none'}")
        if key in given:
            raise InputError(f"loss {name}: {key} is given twice")
        given[key] = _parse(f"loss {name}: {key}", key, value, types[key])
    return cls, given


def _cifar_preset(cls: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    preset = _CIFAR_PRESETS.get(f"{cls.name}:base={given.get('base')}")
    return _CIFAR_PRESETS.get(cls.name, {}) if preset is None else preset


def spec_of(loss: Loss) -> str:
    """The specification that gives this very loss, with every option spelled out."""
    return ":".join(filter(None, [loss.name, _listed(options_of(loss))]))


def described(spec: str, classes: int) -> str:
    """The loss with its options, for the line at start; where the number of classes chose some of them, the reason."""
    cls, given = read_spec(spec)
    loss = make_loss(spec, classes)
    # Presets that are no different from the defaults, or that were not asked for, chose nothing.
    cifar = {k: v for k, v in _cifar_preset(cls, given).items() if k not in given and v != getattr(cls, k)}
    text = spec_of(loss)
    if not cifar:
        return text
    few, many = CIFAR_CLASSES[0], CIFAR_CLASSES[-1]
    if classes in CIFAR_CLASSES:
        imagenet = _listed({k: getattr(cls, k) for k in cifar})
        return (
            f"{text} (as published for CIFAR-100, since there are {classes} classes; below {few} and above {many} as "
            f"for ImageNet: {imagenet})"
        )
    return (
        f"{text} (as published for ImageNet, since there are {classes} classes; from {few} to {many} as for CIFAR-100: "
        f"{_listed(cifar)})"
    )


def _listed(options: dict[str, Any]) -> str:
    """As in a specification, which can be given again."""
    told = {k: f"{v:g}" if isinstance(v, float) else str(v).lower() for k, v in options.items()}
    return ",".join(f"{k}={v}" for k, v in told.items())


def _parse(where: str, key: str, value: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{where}={value!r} is not one of {', '.join(get_args(kind))}")
        return value
    if kind is bool:
        if value not in ("true", "false"):
            raise InputError(f"{where}={value!r} is neither true nor false")
        return value == "true"
    try:
        number = kind(value)
    except ValueError:
        raise InputError(f"{where}={value!r} is no {'whole ' if kind is int else ''}number") from None
    if not 0 <= number < math.inf:
        raise InputError(f"{where}={value} must be finite and not negative")
    if key in _POSITIVE and number == 0:
        raise InputError(f"{where}={value} must be positive")
    if key in _AT_MOST_ONE and number > 1:
        raise InputError(f"{where}={value} must lie between 0 and 1")
    if key == "skew" and number == 1:
        raise InputError(f"{where}={value} must lie between 0 and 1, without both")
    return number


def options_of(loss: Loss) -> dict[str, Any]:
    """The options a loss was made with, for a run's settings and for the eye."""
    known = [f.name for f in fields(loss) if f.init]  # type: ignore[arg-type]  # a dataclass, like all of them
    return {name: getattr(loss, name) for name in known}


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
    # Some ten thousand are enough for a mean, and all of ImageNet's take gigabytes.
    records = records[torch.arange(0, len(records), max(1, len(records) // 10_000), device=records.gaps.device)]
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
