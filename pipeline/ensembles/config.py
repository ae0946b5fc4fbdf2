"""What `kdcache mix` is asked for. Importing this file costs nothing: the command line makes its options from it."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from kdcache.cache.records.choices import Precision
from kdcache.pipeline.build.config import parse_temperatures
from kdcache.pipeline.commandline.options import Argument, CacheFolder, Option, Registry, Trust

_LEAST = 1e-6  # of the sum of all weights


def parse_weights(text: str) -> tuple[float, ...]:
    """Positive numbers such as 0.5,0.5, whose sum may be anything."""
    try:
        found = tuple(float(w) for w in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of numbers such as 0.7,0.3") from None
    if not all(math.isfinite(w) and w > 0 for w in found) or min(found) < _LEAST * math.fsum(found):
        raise ValueError(f"{text!r}: weights are positive, and none is less than a millionth of their sum")
    return found


@dataclass(frozen=True)
class MixConfig:
    """Which caches to mix, and what is stored of the mean. None means what the caches themselves hold.

    weights: one for each cache, in proportion; None for equal ones.
    """

    caches: Annotated[tuple[str, ...], Argument("CACHE CACHE...", several=True)]
    _: KW_ONLY
    weights: Annotated[
        tuple[float, ...] | None,
        Option("Weight of each cache, in their order [equal].", metavar="W,W,...", own=True, parse=parse_weights),
    ] = None
    topk: Annotated[int | None, Option("Classes to store [as many as the caches hold].", ge=1)] = None
    temperatures: Annotated[
        tuple[float, ...] | None,
        Option("Temperatures at which the tail is stored [the caches'].", parse=parse_temperatures),
    ] = None
    precision: Annotated[
        Precision | None, Option("Precision of the stored gaps between logits [the finest of the caches'].")
    ] = None
    registry: Registry = None
    trust: Trust = None
    out: CacheFolder = None
