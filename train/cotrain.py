"""The teacher of bdkd's online form: it answers the loader, and learns from the same batch beside its student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.cache.errors import KdcacheError
from kdcache.pipeline.teachers import Classifier
from kdcache.train.losses import BDKD
from kdcache.train.trainer import Recipe, make_optimiser


class LearningTeacher:
    """To the loader a live teacher, to the trainer a Partner with an optimiser and checkpoints of its own.

    input_size: pixels that the model takes. notes: for its weights' files, from which `kdcache build --weights` reads.
    """

    def __init__(self, model: Classifier, input_size: int, loss: BDKD, recipe: Recipe, notes: dict[str, Any]) -> None:
        self.model, self.input_size, self.notes = model, input_size, notes
        self._loss, self._amp = loss, recipe.amp
        self._optimiser = make_optimiser(model.parameters(), recipe, self.device)
        self._answer: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.model.mean.device

    def logits(self, images: Tensor) -> Tensor:
        """float32 [B, C] in training mode, without gradient; learn() goes back through this answer."""
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._amp):
            self._answer = self.model(images).float()
        if not bool(torch.isfinite(self._answer).all()):
            raise KdcacheError("the learning teacher's logits are not finite: lower --lr")
        return self._answer.detach()

    def learn(self, student: Tensor, labels: Tensor, rate: float) -> Tensor:
        """One step on the batch of the last answer, beside the student's logits [B, C]; the loss."""
        assert self._answer is not None
        value = self._loss.of_teacher(self._answer, labels, student)
        self._answer = None
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        return value.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
