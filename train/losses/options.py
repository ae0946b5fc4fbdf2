"""The table of losses by name, and specifications such as `nkd:gamma=2`: read, spelled out, and explained.

What is particular to a loss (its options, their ranges and presets) stands on its class.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kdcache.cache.errors import InputError
from kdcache.train.losses.base import Bounds, ByParts, Loss, bounds_of
from kdcache.train.losses.families.correlation import CMKD, DIST, LogitStd
from kdcache.train.losses.families.decoupled import DKD, GKD, IKL
from kdcache.train.losses.families.kd import BDKD, CE, KD, MSE, WSLD, SkewKL, SkewRKL
from kdcache.train.losses.families.nkd import NKD, TFNKD, USKD

_ALL: tuple[type[ByParts], ...] = (
    CE,
    KD,
    NKD,
    TFNKD,
    USKD,
    DKD,
    IKL,
    DIST,
    CMKD,
    LogitStd,
    MSE,
    WSLD,
    GKD,
    SkewKL,
    SkewRKL,
    BDKD,
)
LOSSES: dict[str, type[Any]] = {loss.name: loss for loss in _ALL}

# The settings published for CIFAR-100 are taken for about as many classes; for fewer and for more, the defaults of the
# class, which are those published for ImageNet. A loss sees no pixels, so their number decides nothing.
CIFAR_CLASSES = range(50, 201)


def make_loss(spec: str, classes: int) -> Loss:
    """The loss of `NAME[:key=value,...]`, with the preset for this many classes where an option is not given.

    InputError for a name, a key or a value that does not exist.
    """
    cls, given = read_spec(spec)
    presets = cls.cifar_preset(given) if classes in CIFAR_CLASSES else {}
    loss: Loss = cls(**{**presets, **given})
    return loss


def read_spec(spec: str) -> tuple[type[Any], dict[str, Any]]:
    """The class of `NAME[:key=value,...]` and the options that it gives. Errors as in make_loss."""
    name, _, text = spec.partition(":")
    if name not in LOSSES:
        raise InputError(f"unknown loss {name!r}: take one of {', '.join(LOSSES)}")
    cls = LOSSES[name]
    types = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}
    given: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise InputError(f"loss {name} has no option {key!r}: it has {', '.join(known) or 'none'}")
        if key in given:
            raise InputError(f"loss {name}: {key} is given twice")
        given[key] = _parse(f"loss {name}: {key}", value, types[key], bounds_of(known[key]))
    return cls, given


def spec_of(loss: Loss) -> str:
    """The specification that gives this very loss, with every option spelled out."""
    return ":".join(filter(None, [loss.name, _listed(options_of(loss))]))


def described(spec: str, classes: int) -> str:
    """The loss with its options, for the line at start; where the number of classes chose some of them, the reason."""
    cls, given = read_spec(spec)
    loss = make_loss(spec, classes)
    # Presets that are no different from the defaults, or that were not asked for, chose nothing.
    cifar = {k: v for k, v in cls.cifar_preset(given).items() if k not in given and v != getattr(cls, k)}
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


def options_of(loss: Loss) -> dict[str, Any]:
    """The options that a loss was made with, for a run's settings and for people to read."""
    known = [f.name for f in fields(loss) if f.init]  # type: ignore[arg-type]  # a dataclass, like all of the table
    return {name: getattr(loss, name) for name in known}


def _listed(options: dict[str, Any]) -> str:
    """Options as in a specification, which can be given again."""
    told = {k: f"{v:g}" if isinstance(v, float) else str(v).lower() for k, v in options.items()}
    return ",".join(f"{k}={v}" for k, v in told.items())


def _parse(where: str, value: str, kind: Any, bounds: Bounds) -> Any:
    """The value of an option of this kind. InputError, which begins with `where`, for one that it cannot have."""
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
    bounds.require(where, number, value)
    return number
