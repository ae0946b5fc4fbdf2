"""The exponential moving average of a network's weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch.optim.swa_utils import get_ema_multi_avg_fn

from kdcache.pipeline.teachers.teacher import Classifier


class WeightAverage:
    """`model`: average <- d average + (1 - d) weights after every update, batch norm's statistics too.

    d = min(decay, (1 + t) / (10 + t)) at update t, so that a short run is not held at its random beginning. Torch's
    AveragedModel would wait for the device in every update, to ask whether it is the first.
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model = deepcopy(model).requires_grad_(False)
        self._decay = decay
        tensors = ([t.detach() for t in (*m.parameters(), *m.buffers())] for m in (self.model, model))
        pairs = list(zip(*tensors, strict=True))
        self._averages = [mine for mine, _ in pairs if mine.is_floating_point()]
        self._weights = [theirs for _, theirs in pairs if theirs.is_floating_point()]
        self._counts = [(mine, theirs) for mine, theirs in pairs if not mine.is_floating_point()]

    def update(self, step: int) -> None:
        """Take in the weights after the update with this number, counted from 0 over the whole run."""
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._averages, self._weights, step)  # type: ignore[no-untyped-call]
        for mine, theirs in self._counts:
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
