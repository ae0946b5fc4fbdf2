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
