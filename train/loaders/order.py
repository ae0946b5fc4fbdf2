"""Which samples and which view an epoch takes, and what stands beside each batch of samples.

All of it depends on (seed, epoch) alone, so that every loader gives the same batches and a run can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.errors import InputError, NotFoundError
from kdcache.cache.records.pairs import VIEWS_A_PAIRING
from kdcache.cache.records.records import Records
from kdcache.pipeline.views.render import order_on

_PIECE = 1 << 16  # samples
_GATHERED = 1 << 22  # bytes: far fewer calls than one a batch, and still in the processor's caches


def epoch_batches(
    samples: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    partners: NDArray[np.int64] | None = None,
    crops: int = 1,
) -> list[NDArray[np.int64]]:
    """This rank's part of each batch of an epoch, int64 [B]: a permutation that depends on (seed, epoch) alone.

    The samples left over by whole batches wait for another epoch's permutation. partners int64 [N], where views are
    mixed: each rank's part then holds both samples of every pair, next to each other. Of an odd number of samples the
    one that is its own partner comes last.

    crops: in how many views each sample is taken, so that there are B / crops samples to a batch. So many epochs make a
    round: they have one permutation, and each of them takes a part of it.
    """
    turn, part = divmod(epoch, crops)
    if partners is None:
        order = _permutation(samples, seed, turn)
    else:
        first = np.flatnonzero(np.arange(samples) < partners)
        chosen = first[_permutation(len(first), seed, turn)]
        alone = np.flatnonzero(partners == np.arange(samples))
        order = np.concatenate([np.stack([chosen, partners[chosen]], 1).reshape(-1), alone])
    count = samples // batch_size
    taken = count * (batch_size // crops)
    of_epoch = np.split(order[part * taken : (part + 1) * taken], count)
    return [np.array_split(b, world)[rank] for b in of_epoch]


def usual_batch(default: int, samples: int, mixed: bool, world: int, crops: int = 1) -> int:
    """The images a batch, on all ranks together, where a user names no number.

    Whole pairs for each rank if views are mixed, and each sample in so many crops.
    """
    batch, unit = min(default, samples), crops * (2 * world if mixed else 1)
    return max(unit, batch - batch % unit)


def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    words = np.random.Philox(key=np.array([seed, 1], np.uint64), counter=np.array([0, epoch, 0, 0], np.uint64))
    # Numbers by the upper bits of their words, which have the numbers in the lower ones: ten times as fast as argsort.
    low = np.uint64((1 << count.bit_length()) - 1)
    numbers = words.random_raw(count)
    numbers &= ~low
    for start in range(0, count, _PIECE):  # in place, so that the order is all that is held of so many samples
        numbers[start : start + _PIECE] |= np.arange(start, min(start + _PIECE, count), dtype=np.uint64)
    numbers.sort()
    numbers &= low
    return numbers.view(np.int64)


def gathered(
    records: Records, batches: Sequence[NDArray[np.int64]], *others: Records
) -> Iterator[tuple[Tensor, Records]]:
    """Labels and records of each batch, from the records of all samples. Many batches are gathered at once.

    others: the records of further views. Those of a sample then follow each other, view by view.
    """
    views = (records, *others)
    a_batch = max((len(b) for b in batches), default=1) * len(views) * records.nbytes // len(records)
    at_once = max(1, _GATHERED // a_batch)
    order = order_on(records.gaps.device, batches)
    for start in range(0, len(batches), at_once):
        sizes = [len(b) for b in batches[start : start + at_once]]
        index, order = order[: sum(sizes)], order[sum(sizes) :]
        answers = _in_turns([view[index] for view in views])
        labels, stop = squeezed(answers.labels.long()), 0
        for size in sizes:
            rows = slice(stop, stop := stop + size * len(views))
            yield labels[rows], answers[rows]


def _in_turns(views: Sequence[Records]) -> Records:
    """The records of the same samples in several views, so that those of a sample follow each other."""
    first = views[0]
    if len(views) == 1:
        return first
    joined: dict[str, Any] = {
        field.name: in_turns([getattr(view, field.name) for view in views])
        for field in fields(Records)
        if field.name != "prior" and isinstance(getattr(first, field.name), Tensor)
    }
    return replace(first, **joined)


def in_turns(views: Sequence[Tensor]) -> Tensor:
    """Rows [B, ...] of the same samples in m views as [B * m, ...]: row i of view j becomes row i * m + j."""
    return views[0] if len(views) == 1 else torch.stack(list(views), 1).flatten(0, 1)


class EpochOrder:
    """Which samples stand in which batch of an epoch, and which epoch comes next: a loader's `sampler`.

    epoch: the one that was begun last, or that set_epoch has chosen since. Each beginning takes the next epoch, unless
    set_epoch has chosen one. samples: how many there are, or the places of the chosen ones, int64 in ascending order.
    mixed: whether the views are, so that batches are of pairs; InputError where the settings would part these. crops:
    in how many views each sample of a batch is taken, so that a batch has so many samples less.
    """

    def __init__(
        self,
        samples: int | NDArray[np.int64],
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        mixed: bool = False,
        crops: int = 1,
    ) -> None:
        self._chosen = None if isinstance(samples, int) else samples
        self._samples = samples if isinstance(samples, int) else len(samples)
        if not 1 <= batch_size <= self._samples:
            raise InputError(f"a batch of {batch_size} does not fit the data's {self._samples} samples")
        images, rest = divmod(batch_size, crops)
        if rest:
            raise InputError(
                f"a batch of {batch_size} cannot hold {crops} crops of each of its images: take a multiple of {crops} "
                "for --batch-size"
            )
        if images < world:
            of = f"images of {crops} crops each" if crops > 1 else ""
            raise InputError(f"a batch of {images} {of} cannot be split over {world} ranks".replace("  ", " "))
        if mixed and images % (2 * world):
            raise InputError(
                f"a batch of {batch_size} would part the pairs of mixed views: take a multiple of {2 * world * crops} "
                "for --batch-size"
            )
        if mixed and self._chosen is not None:
            raise InputError(
                "images that are held out would be mixed into those that are learnt from: leave --validation out, or "
                "give data with a split of their own for it"
            )
        self._batch_size, self._seed, self.crops = batch_size, seed, crops
        self._rank, self._world = rank, world
        self._epoch, self._begun = 0, False

    @property
    def epoch(self) -> int:
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that begins next, counted from 0."""
        self._epoch, self._begun = epoch, False

    @property
    def next_epoch(self) -> int:
        return self._epoch + self._begun

    def begin(self, epoch: int) -> None:
        """Note that the first batch of this epoch is ready: only then has it been taken."""
        self._epoch, self._begun = epoch, True

    def __len__(self) -> int:
        return self._samples // self._batch_size

    def batches(self, epoch: int, partners: NDArray[np.int64] | None = None) -> list[NDArray[np.int64]]:
        """This rank's part of each batch. partners int64 [N]: of a view that is mixed."""
        found = epoch_batches(
            self._samples, self._batch_size, self._seed, epoch, self._rank, self._world, partners, self.crops
        )
        return self._places(found)

    def in_order(self) -> list[NDArray[np.int64]]:
        """This rank's share of the batches that hold all samples once, in ascending order; the last may be short."""
        all_of_them = np.split(np.arange(self._samples), range(self._batch_size, self._samples, self._batch_size))
        return self._places(all_of_them[self._rank :: self._world])

    def _places(self, batches: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        return batches if self._chosen is None else [self._chosen[batch] for batch in batches]


class Epochs:
    """What the loaders have in common: an order of epochs, each of which takes a view.

    Where every image is taken in m crops, so many epochs make a round, whose m views all of them take.
    """

    _order: EpochOrder
    _views: Sequence[int] | None  # in turn; None: view e in epoch e

    @property
    def sampler(self) -> EpochOrder:
        """For frameworks that choose the epoch by `loader.sampler.set_epoch(e)`."""
        return self._order

    @property
    def epoch(self) -> int:
        """The epoch that was begun last, or that set_epoch has chosen since; counted from 0."""
        return self._order.epoch

    @property
    def view(self) -> int:
        """The view that `epoch` takes; of several, the first."""
        return self._views_of(self.epoch)[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that begins next, counted from 0: its view and its order."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._order)

    def _views_of(self, epoch: int) -> list[int]:
        """The views that an epoch takes: m epochs with m crops take as often the same ones as m epochs with one."""
        crops = self._order.crops
        first = epoch - epoch % crops
        return [self._in_turn(number) for number in range(first, first + crops)]

    def _in_turn(self, number: int) -> int:
        return number if self._views is None else self._views[number % len(self._views)]

    def _require_crops(self, where: str, mixed: bool) -> None:
        """NotFoundError where there are fewer views than crops; InputError where those of a round pair otherwise."""
        crops, views = self._order.crops, self._views
        if views is not None and len(views) < crops:
            raise NotFoundError(
                f"--crops-per-decode {crops} takes {crops} views at once, and {len(views)} of {where} are in use: "
                "build more, or take less"
            )
        rounds = range(0, crops * (VIEWS_A_PAIRING if views is None else len(views)), crops)
        if mixed and any(len({view // VIEWS_A_PAIRING for view in self._views_of(epoch)}) > 1 for epoch in rounds):
            raise InputError(
                f"{where} mixes its images with others from view {VIEWS_A_PAIRING} on, and so after every "
                f"{VIEWS_A_PAIRING} views: take 2 or 4 for --crops-per-decode, and a multiple of it for --views"
            )


def labels_of(labels: Tensor, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
    """The labels of each batch, or other rows, from those of all samples and on their device."""
    order = order_on(labels.device, batches)
    return (labels[index] for index in torch.split(order, [len(batch) for batch in batches]))


def squeezed(labels: Tensor) -> Tensor:
    """Make labels [B, 1] into [B]. Labels [B, L] with another L stay as they are."""
    return labels[:, 0] if labels.shape[1] == 1 else labels
