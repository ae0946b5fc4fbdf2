"""TrivialAugment and RandAugment: one or several of fourteen changes, at random.

The fourteen members, in torchvision's order, and how their results compare with torchvision's own on uint8 tensors:

    0 Identity      equal
    1 ShearX        equal but for ties between two pixels
    2 ShearY        as ShearX
    3 TranslateX    equal
    4 TranslateY    equal
    5 Rotate        equal but for ties, and for pixels whose places lie within 1/5,000 of one: 1 in 10,000
    6 Brightness    within one level, and equal where the exact value is not whole
    7 Color         as Brightness
    8 Contrast      as Brightness
    9 Sharpness     as Brightness
    10 Posterize    equal
    11 Solarize     equal
    12 AutoContrast as Brightness
    13 Equalize     equal

That is at the same magnitude. Magnitudes are exact fractions here and float32 in torchvision, which are within a
rounding error. Where torchvision cuts them off afterwards that can be seen: it moves by 15 pixels instead of 16 at
level 15 of TrivialAugment, and leaves pixels of the threshold's own value at levels 16, 18 and 24 of Solarize.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.pipeline.views.draws import below, chance
from kdcache.pipeline.views.operations.kinds import members
from kdcache.pipeline.views.operations.kinds.members import LEVELS
from kdcache.pipeline.views.operations.operation import Drawn, Stage, argument
from kdcache.pipeline.views.operations.pixels import by_loop, in_loops, on_device

MEMBERS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS, COLOR, CONTRAST, SHARPNESS = range(1, 10)
POSTERIZE, SOLARIZE, AUTO_CONTRAST, EQUALIZE = range(10, 14)

_SIGNED = np.array([SHEAR_X <= member <= SHARPNESS for member in range(14)])
_PLAIN = np.array([member in (POSTERIZE, SOLARIZE) for member in range(14)])
_AT_ONCE = 1 << 20  # pixels that are changed at once in steps, which takes some 10 MB of indices


@dataclass(frozen=True)
class Space:
    """How much a level changes.

    shear: thousandths of a pixel a pixel. shift: of the side. turn: degrees. tone: thousandths of brightness, colour,
    contrast and sharpness. bits: what the last level of Posterize takes of eight bits.
    """

    shear: int
    shift: Fraction
    turn: Fraction
    tone: int
    bits: int


WIDE = Space(33, Fraction(32, 224 * LEVELS), Fraction(135, LEVELS), 33, 6)
NARROW = Space(10, Fraction(150, 331 * LEVELS), Fraction(30, LEVELS), 30, 4)


@dataclass(frozen=True)
class Trivial:
    """TrivialAugment (Müller and Hutter 2021) as torchvision's TrivialAugmentWide: one of 14 changes, of any strength.

    Its translations of up to 32 pixels are meant for 224: they are up to 32/224 of the side here, so that two input
    sizes see one view.
    """

    name: ClassVar[str] = "trivial"
    stage: ClassVar[Stage] = "colour"
    stream: ClassVar[int] = 7
    words: ClassVar[int] = 2

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[np.int8]]:
        """member [n] from 0 to 13, and level [n] from -30 to 30."""
        magnitude = below(words[:, 1], 2 * (LEVELS + 1))
        member = below(words[:, 0], len(MEMBERS))
        level = _level(member, magnitude % (LEVELS + 1), magnitude > LEVELS)
        return {"member": member.astype(np.int8), "level": level}

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        return changed(images, drawn["member"][:, None], drawn["level"][:, None], WIDE)


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2020) as torchvision has it: n of 14 changes one after the other, all of strength m.

    n: from 1 to 4. m: from 0 to 30, as in torchvision.
    """

    n: int = argument(2, 1, 4)
    m: int = argument(9, 0, LEVELS)

    name: ClassVar[str] = "randaugment"
    stage: ClassVar[Stage] = "colour"
    stream: ClassVar[int] = 8

    @property
    def words(self) -> int:
        return 2 * self.n

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[np.int8]]:
        """member [samples, n] from 0 to 13, and level [samples, n]: m, -m, or 0 for a member without a strength."""
        member = below(words[:, 0::2], len(MEMBERS))
        level = _level(member, np.full_like(member, self.m), chance(words[:, 1::2], 0.5))
        return {"member": member.astype(np.int8), "level": level}

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        return changed(images, drawn["member"], drawn["level"], NARROW)


def _level(member: NDArray[np.int64], strength: NDArray[np.int64], negative: NDArray[np.bool_]) -> NDArray[np.int8]:
    """The strength with its sign, where the member has either."""
    signed = np.where(negative, -strength, strength)
    level: NDArray[np.int8] = np.where(_SIGNED[member], signed, np.where(_PLAIN[member], strength, 0)).astype(np.int8)
    return level


def changed(images: Tensor, member: NDArray[np.int8], level: NDArray[np.int8], space: Space) -> Tensor:
    """Change every image uint8 [B, 3, H, W], by its members [B, n] at their levels [B, n], one after the other.

    The images may be overwritten.
    """
    if in_loops(images):
        return _by_loop(images, member, level, space)
    last = images.stride(1) == 1
    pixels = by_steps(images.permute(0, 2, 3, 1), member, level, space).permute(0, 3, 1, 2)
    return pixels.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _by_loop(images: Tensor, member: NDArray[np.int8], level: NDArray[np.int8], space: Space) -> Tensor:
    """All changes of one image after the other, on a CPU."""
    from kdcache.pipeline.views.operations.kinds import memberloops  # imports numba, which takes its time

    kinds = _KINDS[member]
    place = level.astype(np.int64) + LEVELS
    place += (member - np.where(kinds == memberloops.MOVED, SHEAR_X, BRIGHTNESS)) * (2 * LEVELS + 1)
    moves = matrices(space, *images.shape[2:]).reshape(-1, 2, 3)
    return by_loop(
        images, memberloops.change, kinds, place, moves, curves(space).reshape(-1, 256), _strengths(level, space)
    )


def by_steps(pixels: Tensor, member: NDArray[np.int8], level: NDArray[np.int8], space: Space) -> Tensor:
    """The first change of all images [B, H, W, 3], then the second one, on any device."""
    for some, levels in zip(member.T, level.T, strict=True):
        pixels = _step(pixels, some, levels, space)
    return pixels


def _step(pixels: Tensor, member: NDArray[np.int8], level: NDArray[np.int8], space: Space) -> Tensor:
    """One change of every image uint8 [B, H, W, 3]: those with the same kind of change together."""
    kind = _KINDS[member]
    order = np.argsort(kind, kind="stable")
    most = max(1, _AT_ONCE // (pixels.shape[1] * pixels.shape[2]))
    taken = on_device(order, pixels.device, torch.int64)
    parts, ends = [], np.searchsorted(kind[order], np.arange(len(_CHANGES) + 1), "right")
    for made, start, end in zip((None, *_CHANGES), (0, *ends[:-1]), ends, strict=True):
        for i in range(start, end, most):
            rows = slice(i, min(i + most, end))
            part = pixels.index_select(0, taken[rows])
            parts.append(made(part, member[order[rows]], level[order[rows]], space) if made else part)
    # Putting all parts together and taking every image from there is faster than writing into places.
    back = on_device(np.argsort(order), pixels.device, torch.int64)
    return torch.cat(parts).index_select(0, back) if parts else pixels


def _moved(pixels: Tensor, member: NDArray[np.int8], level: NDArray[np.int8], space: Space) -> Tensor:
    chosen = matrices(space, *pixels.shape[1:3])[member - SHEAR_X, level.astype(np.int64) + LEVELS]
    return members.moved(pixels, chosen)


@lru_cache
def matrices(space: Space, height: int, width: int) -> members.Matrices:
    """Where pixels come from, [member, level, 2, 3]: ShearX to Rotate."""
    level = np.arange(-LEVELS, LEVELS + 1)
    return np.stack([
        members.sheared(level, 0, space.shear),
        members.sheared(level, 1, space.shear),
        members.shifted(level, 0, width, space.shift),
        members.shifted(level, 1, height, space.shift),
        members.turned(level, height, width, space.turn),
    ])  # fmt: skip


def _curved(pixels: Tensor, member: NDArray[np.int8], level: NDArray[np.int8], space: Space) -> Tensor:
    chosen = curves(space)[member - BRIGHTNESS, level.astype(np.int64) + LEVELS]
    return members.looked_up(pixels, on_device(chosen, pixels.device, torch.uint8).unsqueeze(1))


@lru_cache
def curves(space: Space) -> NDArray[np.uint8]:
    """What becomes of each value, [member, level, 256]: Brightness to Solarize, of which those in between are empty."""
    values = np.arange(256)
    found = np.zeros((SOLARIZE - BRIGHTNESS + 1, 2 * LEVELS + 1, 256), np.uint8)
    for level in range(-LEVELS, LEVELS + 1):
        brightness = values * (1000 + space.tone * level) // 1000
        taken = (2 * space.bits * abs(level) + LEVELS) // (2 * LEVELS)  # bits, rounded
        inverted = 2 * values >= 17 * (LEVELS - abs(level))  # from 255 * (1 - level / 30) on
        found[0, level + LEVELS] = brightness.clip(0, 255)
        found[POSTERIZE - BRIGHTNESS, level + LEVELS] = values >> taken << taken
        found[SOLARIZE - BRIGHTNESS, level + LEVELS] = np.where(inverted, 255 - values, values)
    return found


def _strengths(level: NDArray[np.int8], space: Space) -> members.Strengths:
    return 1000 + space.tone * level.astype(np.int64)


# How members are changed that go together: pixels uint8 [b, H, W, 3], members and levels [b], and the space.
_CHANGES: tuple[Callable[[Tensor, NDArray[np.int8], NDArray[np.int8], Space], Tensor], ...] = (
    _moved,
    _curved,
    lambda pixels, _, level, space: members.coloured(pixels, _strengths(level, space)),
    lambda pixels, _, level, space: members.looked_up(pixels, members.contrasted(pixels, _strengths(level, space))),
    lambda pixels, _, level, space: members.sharpened(pixels, _strengths(level, space)),
    lambda pixels, *_: members.looked_up(pixels, members.stretched(pixels)),
    lambda pixels, *_: members.looked_up(pixels, members.equalized(pixels)),
)
# Which of them each member has; Identity has none.
_KINDS = np.array([0, *[1] * 5, 2, 3, 4, 5, 2, 2, 6, 7], np.int8)
