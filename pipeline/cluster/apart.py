"""Images that are decoded on other nodes than the teacher answers on: by tasks, whose pixels come as Ray's objects."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.identity import SplitName
from kdcache.pipeline.cluster.place import Place, at_this_node
from kdcache.pipeline.views.parameters import ViewParameters
from kdcache.pipeline.views.policy import policy_of
from kdcache.pipeline.views.render import Batch, Renderer

_BATCHES = 4  # that one task renders
_WAITING = 2  # batches of pixels of one task that may wait to be fetched

Rendered = tuple[int, int, NDArray[np.uint8]]  # the places of batch and view, and pixels [B, H, W, 3]
_renderers: dict[tuple[str, str, SplitName], Renderer] = {}  # of this process, which does one task after another


class Apart:
    """Has batches rendered by up to `tasks` tasks at once, in their order.

    The pixels are whole: cut, changed and mixed, which gives the same bytes on a CPU as on a GPU. At most
    `tasks` times `_WAITING` batches of pixels wait, and as many are being made.
    """

    def __init__(self, place: Any, split: SplitName, device: torch.device, tasks: int) -> None:
        self._place, self._split, self._device, self._tasks = place, split, device, tasks

    def views(
        self, parameters: Sequence[ViewParameters], batches: Sequence[Batch], first: int = 0
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """As `Renderer.views`. KdcacheError, which names the node, where an image cannot be rendered."""
        import ray

        task = ray.remote(rendered).options(
            num_cpus=1, num_returns="streaming", scheduling_strategy="SPREAD", max_retries=-1,
            _generator_backpressure_num_objects=_WAITING,
        )  # fmt: skip
        places = deque(range(0, len(batches), _BATCHES))
        under_way: deque[tuple[int, Any]] = deque()
        while places or under_way:
            while places and len(under_way) < self._tasks:
                start = places.popleft()
                some = batches[start : start + _BATCHES]
                under_way.append((start, task.remote(self._place, self._split, *_piece(parameters, some, first))))
            start, found = under_way.popleft()
            for reference in found:
                number, place, pixels = fetched(reference)
                images = torch.tensor(pixels).permute(0, 3, 1, 2)  # a copy, since Ray's objects cannot be written to
                yield start + number, place, images.to(self._device, non_blocking=True)


def _piece(
    parameters: Sequence[ViewParameters], batches: Sequence[Batch], first: int
) -> tuple[list[ViewParameters], list[Batch], int]:
    """The parameters of the samples of some batches alone, and the first of these samples."""
    if any(drawn.mixing is not None and drawn.mixing.theirs is None for drawn in parameters):
        return list(parameters), list(batches), first  # the partners' parameters are among all samples'
    start, stop = min(int(b.min()) for b, _ in batches), max(int(b.max()) for b, _ in batches) + 1
    return [drawn[start - first : stop - first] for drawn in parameters], list(batches), start


def rendered(
    place: Place, split: SplitName, parameters: list[ViewParameters], batches: list[Batch], first: int
) -> Iterator[Rendered]:
    """The task: batches in their views, on one CPU."""
    with at_this_node():
        key = (place.identity.key, place.folder, split)
        if key not in _renderers:
            place.enter()
            torch.set_num_threads(1)
            shown, policy = place.identity.teacher, policy_of(place.identity.views)
            _renderers.clear()
            _renderers[key] = Renderer(
                place.open(split), shown.input_size, torch.device("cpu"), policy, 0, shown.interpolation
            )
        for number, of, images in _renderers[key].views(parameters, batches, first):
            yield number, of, images.permute(0, 2, 3, 1).contiguous().numpy()


def fetched(reference: Any) -> Any:
    """The object. A KdcacheError of whoever was to make it is raised as it was there."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as e:
        raise e.cause from None
