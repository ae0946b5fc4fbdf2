"""The teacher's answers: asked for batch by batch, encoded as records, and brought to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.identity import Identity
from kdcache.cache.records.encoding import require_std
from kdcache.cache.records.records import Records
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.source import Source
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.views.parameters import Parameters, ViewParameters, draw_as, evaluation_view
from kdcache.pipeline.views.policy import policy_of
from kdcache.pipeline.views.render import Batch, Renderer

_FINITE, _SUMS = "_finite", "_sums"


class Answer(NamedTuple):
    """The teacher's answers to one batch of one view: which view, by its place; the rows; logits [B, C]."""

    place: int
    rows: range
    records: Records
    logits: torch.Tensor


class Renders(Protocol):
    """What renders batches in several views: a `Renderer`, or what has it done elsewhere."""

    def views(
        self, parameters: Sequence[ViewParameters], batches: Sequence[Batch], first: int = 0
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """As `Renderer.views`."""


class Arriving(Protocol):
    """A batch's records that are here, or on their way."""

    def arrive(self) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], NDArray[np.float64] | None]:
        """As `Copy.arrive`."""


def view_parameters(data: Dataset, identity: Identity, view: int, rows: range) -> ViewParameters:
    """The parameters of a view's samples; where `data` is the evaluation split, those of its only view."""
    if data.split == "eval":
        return evaluation_view(data.sizes[rows.start : rows.stop], whole=data.in_memory)
    return draw_as(identity.views, view, rows, data.sizes)


def labels_in(labels: NDArray[np.int64], drawn: Parameters, rows: range) -> NDArray[np.int64]:
    """Labels [n, L] of the records of some rows: where the view is mixed, the partners' follow the samples' own.

    labels: int64 [N, L'] of all samples. drawn: the parameters of the rows.
    """
    own = labels[rows.start : rows.stop]
    return own if drawn.mixing is None else np.concatenate([own, labels[drawn.mixing.partners]], 1)


def teacher_renderer(data: Dataset, source: Source, workers: int | None = None) -> Renderer:
    """What renders images as the teacher wants them; workers: as in `Renderer`."""
    identity = source.identity
    shown, device = identity.teacher, source.teacher.device
    return Renderer(data, shown.input_size, device, policy_of(identity.views), workers, shown.interpolation)


def answers(
    source: Source,
    renderer: Renders,
    labels: NDArray[np.int64],
    views: Sequence[ViewParameters],
    starts: Sequence[int],
    rows: range,
    batch: int,
    skip: Callable[[int], bool] = lambda _: False,
) -> Iterator[Answer]:
    """The teacher's answers for rows of several views, each view from its own start on, which is a batch boundary.

    Nothing has checked them yet. labels: int64 [N, L]. skip: whether a view, by its place in `views`, is no longer
    wanted. A short last batch is filled up, because logits of small batches can differ in the last bit.
    """
    bounds = [range(i, min(i + batch, rows.stop)) for i in range(rows.start, rows.stop, batch)]
    # A view that lacks nothing starts at the very end, which is inside of a short last batch.
    bounds = [b for b in bounds if min(starts) <= b.start]
    filled = [np.pad(np.arange(b.start, b.stop), (0, batch - len(b)), mode="edge") for b in bounds]
    wanted = [[place for place, start in enumerate(starts) if start <= b.start] for b in bounds]
    y = [torch.tensor(labels_in(labels, drawn, rows)).to(source.teacher.device) for drawn in views]
    for number, place, images in renderer.views(views, list(zip(filled, wanted, strict=True)), rows.start):
        if skip(place):
            continue
        at = bounds[number]
        logits = source.teacher.logits(images)[: len(at)]
        of = y[place][at.start - rows.start : at.stop - rows.start]
        records = chunks.encode_as(source.identity.record, logits, of, check=False)
        yield Answer(place, at, records, logits)


class Copy:
    """Answers on their way to the host: only records cross the bus, and nobody waits for them yet.

    sums: the batch's share of the prior, [T, C], or None.
    """

    def __init__(self, answer: Answer, sums: torch.Tensor | None) -> None:
        logits = answer.logits
        found = {**chunks.as_tensors(answer.records), _FINITE: torch.isfinite(logits).all(1)}
        if sums is not None:
            found[_SUMS] = sums
        self._event = torch.cuda.Event() if logits.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is None:
            self._host = {name: tensor.cpu() for name, tensor in found.items()}
        else:
            self._host = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in found.items()
            }
            self._event.record()

    def wait(self) -> None:
        """Wait until everything is on the host."""
        if self._event is not None:
            self._event.synchronize()

    def arrive(self) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], NDArray[np.float64] | None]:
        """The records' arrays by name, whether each row's logits are finite, and the sums; waits for them."""
        self.wait()
        # Pinned memory is used for the transfer only.
        arrays = {name: t.numpy() if self._event is None else t.numpy().copy() for name, t in self._host.items()}
        return arrays, arrays.pop(_FINITE), arrays.pop(_SUMS, None)


def require_sound(
    arrays: dict[str, NDArray[Any]], finite: NDArray[np.bool_], place: str, rows: range, classes: int
) -> None:
    """InputError unless the records of some rows come from logits that can be stored.

    finite: whether each row's logits are. place: where the rows are, with {} for the sample.
    """
    if not finite.all():
        raise InputError(f"the teacher's logits are not finite: {place.format(rows[int(finite.argmin())])}")
    if "tail_std" in arrays:
        require_std(torch.from_numpy(arrays["tail_std"]), classes)


def teacher_top1(cache: Cache) -> float | None:
    """The teacher's accuracy (0..1) on the evaluation split, from its records; None without records or labels."""
    if not cache.evaluation_views:
        return None
    records = cache.read_evaluation()
    if not records.labels.shape[1]:
        return None
    return float((records.predictions() == records.labels[:, 0].long()).float().mean())
