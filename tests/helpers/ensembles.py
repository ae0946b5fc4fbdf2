"""Caches of several teachers' random logits over the same data, and the mean of their answers in float64."""

import numpy as np
import torch

from kdcache.tests.helpers.caches import Filled, identity

WEIGHTS = "abcdef"


class Answered(Filled):
    """A cache like `Filled`, whose labels and sizes are those of every other one, and whose logits are its own.

    number: the teacher's. wide: how far its logits are spread.
    """

    def __init__(self, path, about, views=2, number=0, wide=3.0):
        self._own, self._wide, self.more = np.random.default_rng(100 + number), wide, (number, wide)
        teacher = about.teacher.model_copy(
            update={"architecture": f"net{number}", "weights": WEIGHTS[number] * 64, "input_size": 8 + number}
        )
        super().__init__(path, about.model_copy(update={"teacher": teacher}), views)

    def draw(self, store):
        z = self._own.normal(0, self._wide, (store.samples, self.about.record.classes)).astype(np.float32)
        return torch.from_numpy(z)

    def add_view(self):
        """Build one view more."""
        view = len(self.cache.views)
        self.logits["train", view] = self.draw(self.cache.train)
        for part in range(self.cache.train.parts):
            self.write(self.cache.train, view, part)


def answered(folder, count=2, views=2, **about):
    """Caches by that many teachers, in folders of their own."""
    return [Answered(folder / f"net{n}", identity(**about), views, n) for n in range(count)]


def softmax64(z):
    """Probabilities float64 of logits [..., C]."""
    e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mean64(caches, weights, split, view):
    """The weighted mean float64 [N, C] of what the teachers answered, before it was stored."""
    return sum(w * softmax64(c.logits[split, view].numpy()) for c, w in zip(caches, weights, strict=True))
