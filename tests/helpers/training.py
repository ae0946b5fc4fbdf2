"""Training in tests: a student, the teacher of the `home` fixture, and what a run has written down."""

import json

import torch

from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train.loop.trainer import seeded

BATCH = 128


def quiet(_):
    pass


def teacher_of(home, **changes):
    return open_source(BuildConfig("resnet8", **changes), quiet)


def student(seed=0):
    model = Classifier(seeded(seed, lambda: build_network("resnet8", 10, 8)), (0.3,) * 3, (0.4,) * 3)
    return model.to(memory_format=torch.channels_last)


def metrics_of(folder):
    """What must be equal of a run: everything but times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


class Same(list):
    """A loader of these batches, the same ones in every epoch."""

    def set_epoch(self, epoch):
        pass

    def steps(self, start=0):
        return iter(self[start:])


class Drawn:
    """A loader of `count` batches; `draw(epoch, i)` gives each, and `then` is called before it."""

    def __init__(self, count, draw, then=lambda epoch, batch: None):
        self._count, self._draw, self._then, self._epoch = count, draw, then, 0

    def set_epoch(self, epoch):
        self._epoch = epoch

    def __len__(self):
        return self._count

    def steps(self, start=0):
        for i in range(start, self._count):
            self._then(self._epoch, i)
            yield self._draw(self._epoch, i)
