"""A teacher that answers the loader and learns from the same batches beside its student, as bdkd's does online."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train import group
from kdcache.train.loop.optimisers import Recipe, Updater
from kdcache.train.losses.base import Partnered


class LearningTeacher:
    """A live teacher for the loader; for the trainer a Partner with an optimiser and checkpoints of its own.

    input_size: the side in pixels of the images that the model takes. notes: what its weights' files say of it, which
    `kdcache build --weights` reads.
    """

    def __init__(
        self, model: Classifier, input_size: int, loss: Partnered, recipe: Recipe, notes: dict[str, Any]
    ) -> None:
        self.model, self.input_size, self.notes = model, input_size, notes
        self._loss, self._dtype = loss, recipe.dtype
        self._updater = Updater(model.parameters(), recipe, self.device)
        self._answer: Tensor | None = None
        self._weighted = group.Weighted()

    @property
    def device(self) -> torch.device:
        return self.model.mean.device

    def logits(self, images: Tensor) -> Tensor:
        """The answer in training mode, float32 [B, C] without gradient; learn() goes back through it."""
        self.model.train()
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            self._answer = self.model(images).float()
        return self._answer.detach()

    def learn(self, student: Tensor, labels: Tensor, batches: int, weights: Tensor | None = None) -> Tensor:
        """Add the gradients of the last answer's loss, and return that loss.

        student: the student's logits [B, C] of the same batch. batches: how many batches make a step. weights [B, L]:
        those of mixed labels.
        """
        assert self._answer is not None
        value = self._weighted(self._loss.of_teacher(self._answer, labels, student, weights), len(student))
        self._answer = None
        self._updater.backward(value, batches)
        return value.detach()

    def update(self, step: int, steps_per_epoch: int) -> None:
        """Take a step with the gradients that were added since the last one."""
        group.average_gradients(self.model.parameters())
        self._updater.update(step, steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updater": self._updater.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._updater.load_state_dict(state["updater"])
