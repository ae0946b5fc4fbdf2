"""View policies as text: OP[(ARG,...)][,OP...], which stands in the identity of a cache in its canonical form.

The operations are classes in operations/; a new one is a file or a class there and a line in `_ALL`. How a policy's
parameters are drawn says parameters.py, how they are applied render.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.errors import CorruptError, InputError, MismatchError
from kdcache.cache.identity import ViewsIdentity
from kdcache.pipeline.process.functions import did_you_mean
from kdcache.pipeline.views.operations.kinds.auto import RandAugment, Trivial
from kdcache.pipeline.views.operations.kinds.colour import Blur, Color, Gray, Solarize, Three
from kdcache.pipeline.views.operations.kinds.erase import Erase
from kdcache.pipeline.views.operations.kinds.geometry import Crop, Flip, Geometry, ResizedCrop, Whole
from kdcache.pipeline.views.operations.kinds.mix import Cutmix, Mix, Mixup
from kdcache.pipeline.views.operations.operation import STAGES, Drawn, Operation, bounds, of_rows

# In the order in which they are applied: by stage, and within a stage as here. That order is part of what a policy
# means, so a new operation goes to the end of its stage.
_ALL: tuple[type[Any], ...] = (
    Crop, ResizedCrop, Flip,
    Three, Trivial, RandAugment, Color, Gray, Blur, Solarize,
    Erase,
    Mixup, Cutmix,
)  # fmt: skip
OPERATIONS: dict[str, type[Any]] = {kind.name: kind for kind in _ALL}

NAMED = {
    # DeiT III, arXiv 2204.07118: one of gray, solarize and blur, then colour jitter of 0.3.
    "three-augment": "rrc,flip,three,color(0.3,0.3,0.3,0)",
    # TinyViT, arXiv 2207.10666: what its stored logits are made with, where mixup and cutmix are off.
    "tinyvit": "rrc,flip,randaugment(2,9),erase(0.25)",
    # Apple's reinforced data sets, arXiv 2303.08983: random resized crop, RandAugment, random erasing.
    "ml-dr": "rrc,flip,randaugment(2,9),erase(0.25)",
    # "A good teacher is patient and consistent", arXiv 2106.05237: Inception crop, flip and mixup, for long runs.
    "funmatch": "rrc,flip,mixup(1)",
}
_OPERATION = re.compile(r"\s*([^\s,()]+)\s*(?:\(([^()]*)\))?\s*(,|$)")
_WHOLE = Whole()
_SHORT = (Crop, ResizedCrop, Flip)  # written without arguments where these are the usual ones, as format 1 did


@dataclass(frozen=True)
class Policy:
    """How views are made, stage by stage.

    geometry: the rule for boxes. flip: what mirrors views, or None. operations: what changes the pixels of single
    images, in the order of application. mixes: what mixes pairs of images; of two, each pair gets one.
    """

    geometry: Geometry = _WHOLE
    flip: Flip | None = None
    operations: tuple[Operation, ...] = ()
    mixes: tuple[Mix, ...] = ()

    def apply(self, images: Tensor, drawn: Mapping[str, Drawn], rows: NDArray[np.int64]) -> Tensor:
        """Change uint8 images [B, 3, H, W] by the operations on pixels.

        rows [B]: where in `drawn` the images' parameters are. The images may be overwritten. Images of the evaluation
        split, for which nothing was drawn, stay as they are.
        """
        for operation in self.operations:
            if (all_rows := drawn.get(operation.name)) is not None:
                images = operation.apply(images, of_rows(all_rows, rows))
        return images

    @property
    def mixed(self) -> bool:
        """Whether each view is of two images."""
        return bool(self.mixes)

    def __str__(self) -> str:
        """The canonical text."""
        geometry = [] if isinstance(self.geometry, Whole) else [self.geometry]
        flip = [] if self.flip is None else [self.flip]
        return ",".join(_text(one) for one in (*geometry, *flip, *self.operations, *self.mixes)) or "none"


@lru_cache(256)
def parse_policy(text: str) -> Policy:
    """The policy of a text. InputError for what is unknown, out of range or contradictory."""
    found: dict[str, Any] = {}
    for operation in _operations(text, text):
        if operation.name in found:
            raise InputError(f"view policy {text!r} names {operation.name} twice")
        found[operation.name] = operation
    if "crop" in found and "rrc" in found:
        raise InputError(f"view policy {text!r} has two crops: take crop for small images, or rrc")
    ordered = [found[name] for name in OPERATIONS if name in found]
    of = {stage: tuple(op for op in ordered if op.stage == stage) for stage in STAGES}
    flip = found.pop("flip", None)
    boxes = [op for op in of["geometry"] if op is not flip]
    return Policy(boxes[0] if boxes else _WHOLE, flip, (*of["colour"], *of["erase"]), of["mix"])


def policy_of(views: ViewsIdentity, where: str = "the cache") -> Policy:
    """The policy of a cache's views. Imported caches, whose views are not drawn, have one that does nothing.

    where: the cache, for people. MismatchError for what only another kdcache can draw; CorruptError for what none
    writes.
    """
    if views.imported:
        return Policy()
    try:
        policy = parse_policy(views.policy)
    except InputError as e:
        raise MismatchError(f"{where} has views that this kdcache cannot draw ({e}): update kdcache") from None
    if str(policy) != views.policy:
        wrong = f"view policy {views.policy!r}, which kdcache spells {str(policy)!r}"
    elif policy.mixed != views.mixed:
        wrong = f"view policy {views.policy!r}, but views that are {'' if views.mixed else 'not '}said to be mixed"
    else:
        return policy
    raise CorruptError(f"the identity of {where} has {wrong}: it is damaged or forged, copy the cache again")


def check_policy(text: str) -> str:
    """The policy's canonical text. InputError as in `parse_policy`."""
    return str(parse_policy(text))


def _operations(text: str, whole: str) -> Iterator[Any]:
    if text.strip() == "none":
        return
    at = 0
    while True:
        if (found := _OPERATION.match(text, at)) is None:
            raise InputError(f"view policy {whole!r} cannot be read from {text[at:]!r} on: write OP(ARG,...),OP,...")
        name, arguments, comma = found.groups()
        if name in NAMED and arguments is None:
            yield from _operations(NAMED[name], whole)
        elif name in OPERATIONS:
            yield _made(OPERATIONS[name], arguments, whole)
        else:
            hint = did_you_mean(name, [*OPERATIONS, *NAMED])
            raise InputError(
                f"unknown operation {name!r} in view policy {whole!r}{hint} (kdcache views --list shows all operations)"
            )
        if not comma:
            return
        at = found.end()


def _made(kind: type[Any], text: str | None, whole: str) -> Any:
    """The operation with the arguments in the text."""
    fields = dataclasses.fields(kind)
    given = [] if text is None or not text.strip() else text.split(",")
    usage = f"{kind.name}({','.join(field.name for field in fields)})" if fields else f"{kind.name}, without arguments"
    if len(given) > len(fields):
        raise InputError(f"{kind.name} in view policy {whole!r} has {len(given)} arguments: write {usage}")
    values = []
    for field, typed in zip(fields, given, strict=False):
        least, most = bounds(field)
        integer = isinstance(field.default, int)
        try:
            value = int(typed) if integer else float(typed)
        except ValueError:
            what = "a whole number" if integer else "a number"
            raise InputError(
                f"{kind.name} in view policy {whole!r}: {field.name} {typed.strip()!r} is not {what}"
            ) from None
        if not least <= value <= most or not math.isfinite(value):
            raise InputError(
                f"{kind.name} in view policy {whole!r}: {field.name} {typed.strip()} is not from {least:g} to {most:g}"
            )
        values.append(value)
    return kind(*values)


def _text(operation: Any) -> str:
    fields = dataclasses.fields(operation)
    values = [getattr(operation, field.name) for field in fields]
    if not fields or (isinstance(operation, _SHORT) and values == [field.default for field in fields]):
        return str(operation.name)
    return f"{operation.name}({','.join(_number(value) for value in values)})"


def _number(value: float) -> str:
    """The shortest text that is read as this number again."""
    return repr(value).removesuffix(".0")
