"""View parameters: a pure function of (policy, seed, view, sample, image sizes), with a digest that commits hold.

There is no other image randomness in either stage. policy.py says what a policy is made of, render.py applies what is
drawn here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import CorruptError
from kdcache.cache.identity import ViewsIdentity
from kdcache.cache.records.choices import SequenceName
from kdcache.cache.records.pairs import pair_numbers, partners
from kdcache.pipeline.views.draws import Samples, chance, words
from kdcache.pipeline.views.operations.kinds.geometry import geometry
from kdcache.pipeline.views.operations.kinds.mix import Mix, label_weights
from kdcache.pipeline.views.operations.operation import Drawn, Operation, of_rows
from kdcache.pipeline.views.policy import Policy, parse_policy, policy_of

# Streams are the second word of Philox's key: whatever the seeds, two streams never give the same draw. The boxes and
# flips of caches have stream 0, the orders of training (train/loaders/order.py) have stream 1, and every operation has
# one of its own.
_GEOMETRY, _CHOICE = 0, 12
TEACHING = 2**32  # is added to the streams of views that teach a teacher
_DIGEST = b"kdcache view parameters 1\0"
_DIGEST_OF_OPERATIONS = b"kdcache view parameters 2\0"

_PIECE = 1 << 16  # samples
_SCATTERED = 10  # samples that follow each other are drawn that many times as fast as scattered ones


@dataclass(frozen=True, eq=False)
class Mixing:
    """How each of n images is mixed with its partner's.

    partners int64 [n]: the samples whose images they are. drawn: weight uint16 [n], that of the sample's own image in
    1/256, and box int32 [n, 4], what is pasted from the partner's (operations/mix.py). theirs: the partners' own
    parameters, without mixing; None where the n samples are all there are, so that the partners are among them.
    """

    partners: NDArray[np.int64]
    drawn: Drawn
    theirs: ViewParameters | None

    def __getitem__(self, index: slice | NDArray[np.int64]) -> Mixing:
        theirs = None if self.theirs is None else self.theirs[index]
        return Mixing(self.partners[index], of_rows(self.drawn, index), theirs)


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """How a view of each of n samples is made.

    boxes int32 [n, 4]: top, left, height and width in source pixels; outside of the image is black.
    flips bool [n]: whether it is mirrored left to right, after the crop.
    drawn: what each operation has drawn for its pixels, by the operation's name and in the order of application.
    mixing: how it is mixed at last, or None.
    """

    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    mixing: Mixing | None = None

    def __len__(self) -> int:
        return len(self.flips)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> ViewParameters:
        drawn = {name: of_rows(arrays, index) for name, arrays in self.drawn.items()}
        mixing = None if self.mixing is None else self.mixing[index]
        return ViewParameters(self.boxes[index], self.flips[index], drawn, mixing)

    def digest(self) -> str:
        """The sha256 of the parameters, in hexadecimal. Each commit holds it, and a reader compares it."""
        h = hashlib.sha256(_DIGEST_OF_OPERATIONS if self.drawn or self.mixing else _DIGEST)
        h.update(np.ascontiguousarray(self.boxes, "<i4").data)
        h.update(np.ascontiguousarray(self.flips, "u1").data)
        named = dict(self.drawn)
        if self.mixing is not None:
            named["mix"] = {"partners": self.mixing.partners, **self.mixing.drawn}
        for name, arrays in named.items():
            for what, rows in arrays.items():
                little = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
                h.update(f"{name}.{what} {little.dtype.str} {little.shape[1:]}\0".encode())
                h.update(little.data)
        return h.hexdigest()


@dataclass(frozen=True, eq=False)
class DrawnView:
    """A view of all N samples of a cache that keeps none of their parameters: whoever asks has them drawn again.

    For views that are not mixed. sizes int32 [N, 2]: height and width of the images.
    """

    views: ViewsIdentity
    view: int
    sizes: NDArray[np.int32]
    mixing: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> ViewParameters:
        samples = range(len(self))[index] if isinstance(index, slice) else index
        return draw_as(self.views, self.view, samples, self.sizes)


@dataclass(frozen=True, eq=False)
class EvaluationView:
    """The unaugmented view of N samples, as `evaluation_view` gives it for those that are asked for."""

    sizes: NDArray[np.int32]
    whole: bool
    mixing: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> ViewParameters:
        return evaluation_view(self.sizes[index], self.whole)


Parameters = ViewParameters | DrawnView | EvaluationView


def draw(
    policy: str | Policy,
    seed: int,
    view: int,
    samples: Samples,
    sizes: NDArray[np.int32],
    *,
    stream: int = 0,
    sequence: SequenceName = "random",
) -> ViewParameters:
    """Draw the parameters of a view for some samples: a range, or int64 [n] in any order.

    sizes int32 [N, 2]: height and width of the images of all N samples. stream: 0 for caches, or TEACHING, so that no
    cached view is one that the teacher was trained on. sequence: whether the numbers of a sample's views are
    independent, or spread evenly.
    """
    if isinstance(policy, str):
        policy = parse_policy(policy)
    own = _unmixed(policy, seed, view, samples, sizes, stream, sequence)
    if not policy.mixed:
        return own
    total = len(sizes)
    partner = partners(seed, view, samples, total)
    everyone = isinstance(samples, range) and len(samples) == total
    theirs = None if everyone else _unmixed(policy, seed, view, partner, sizes, stream, sequence)
    mixing = Mixing(partner, _mixing(policy, seed, view, samples, total, stream, sequence), theirs)
    return ViewParameters(own.boxes, own.flips, own.drawn, mixing)


def draw_as(views: ViewsIdentity, view: int, samples: Samples, sizes: NDArray[np.int32]) -> ViewParameters:
    """Draw the parameters of a cache's view; see `draw` and, for errors, `policy_of`."""
    return draw(policy_of(views), views.seed, view, samples, sizes, sequence=views.sequence)


def view_of_all(views: ViewsIdentity, view: int, sizes: NDArray[np.int32], in_memory: bool) -> Parameters:
    """The parameters of a cache's view of all samples, sizes int32 [N, 2].

    Those of images in memory and of mixed views are drawn at once, others again for whoever asks for some.
    """
    if in_memory or views.mixed:
        return draw_as(views, view, range(len(sizes)), sizes)
    return DrawnView(views, view, sizes)


def shares_as(views: ViewsIdentity, view: int, total: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """Draw the shares [N, 2] that the labels of a mixed view have in images of that height and width."""
    policy = policy_of(views)
    return label_weights(_mixing(policy, views.seed, view, range(total), total, 0, views.sequence), *size)


def imported_view(stored: Mapping[str, NDArray[Any]], sizes: NDArray[np.int32], where: str) -> ViewParameters:
    """Read the parameters of an imported view from its arrays. CorruptError for boxes that leave the images."""
    boxes, flips = stored["boxes"], stored["flips"]
    corner, extent = boxes[:, :2].astype(np.int64), boxes[:, 2:].astype(np.int64)
    if (corner < 0).any() or (extent < 1).any() or (corner + extent > sizes).any() or (flips > 1).any():
        raise CorruptError(f"{where} holds boxes or flips that cannot be: import it again")
    return ViewParameters(boxes, flips.astype(np.bool_))


def evaluation_view(sizes: NDArray[np.int32], whole: bool) -> ViewParameters:
    """The unaugmented view: the whole image, or for files the central square of 224/256 of the shorter side."""
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    if whole:
        boxes = np.stack([np.zeros_like(height), np.zeros_like(height), height, width], 1)
    else:
        side = np.maximum(1, np.minimum(height, width) * 7 // 8)
        boxes = np.stack([(height - side) // 2, (width - side) // 2, side, side], 1)
    return ViewParameters(boxes.astype(np.int32), np.zeros(len(sizes), np.bool_))


def _unmixed(
    policy: Policy,
    seed: int,
    view: int,
    samples: Samples,
    sizes: NDArray[np.int32],
    stream: int,
    sequence: SequenceName,
) -> ViewParameters:
    of = sizes[samples.start : samples.stop] if isinstance(samples, range) else sizes[samples]
    boxes, flips = geometry(policy.geometry, policy.flip, seed, stream + _GEOMETRY, view, samples, of, sequence)
    drawn = {op.name: _drawn(op, seed, stream, view, samples, sequence) for op in policy.operations}
    return ViewParameters(boxes, flips, drawn)


def _drawn(
    op: Operation | Mix, seed: int, stream: int, view: int, samples: Samples, sequence: SequenceName
) -> dict[str, NDArray[Any]]:
    """What an operation draws for the samples, piece by piece, so that the random words take little memory."""
    found: dict[str, NDArray[Any]] = {}
    for at in range(0, max(1, len(samples)), _PIECE):
        piece = slice(at, at + _PIECE)
        drawn = op.draw(words(seed, stream + op.stream, view, samples[piece], op.words, sequence))
        for name, rows in drawn.items():
            if name not in found:
                found[name] = np.empty((len(samples), *rows.shape[1:]), rows.dtype)
            found[name][piece] = rows
    return found


def _mixing(
    policy: Policy, seed: int, view: int, samples: Samples, total: int, stream: int, sequence: SequenceName
) -> Drawn:
    """Draw by the number of the pair, so that both of a pair get the same."""
    numbers = pair_numbers(seed, view, samples, total)
    everyone = range(total - total // 2)
    if len(everyone) <= _SCATTERED * len(numbers):
        return of_rows(_of_pairs(policy, seed, view, everyone, stream, sequence), numbers)
    return _of_pairs(policy, seed, view, numbers, stream, sequence)


def _of_pairs(policy: Policy, seed: int, view: int, pairs: Samples, stream: int, sequence: SequenceName) -> Drawn:
    found = [_drawn(mix, seed, stream, view, pairs, sequence) for mix in policy.mixes]
    if len(found) == 1:
        return found[0]
    result, other = found
    for at in range(0, len(pairs), _PIECE):
        piece = slice(at, at + _PIECE)
        second = ~chance(words(seed, stream + _CHOICE, view, pairs[piece], 1, sequence)[:, 0], 0.5)
        for name, rows in result.items():
            rows[piece][second] = other[name][piece][second]
    return result
