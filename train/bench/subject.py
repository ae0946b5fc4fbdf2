"""What is measured: an untrained teacher, and a part of the data that stands for all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdcache.cache.errors import InputError
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Source, open_source
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.defaults import Defaults, defaults_for
from kdcache.pipeline.data.split import describe_data
from kdcache.pipeline.teachers.networks import build_network, built_for
from kdcache.pipeline.teachers.pixels import pixels_of_data
from kdcache.pipeline.teachers.teacher import Classifier, Teacher, file_classifier, try_out
from kdcache.train.bench.config import BenchConfig
from kdcache.train.loop.trainer import seeded

TEACHER, FILES_TEACHER = "resnet56", "resnet34"


def make_source(config: BenchConfig, folder: Path, device: torch.device) -> tuple[Source, int]:
    """An untrained teacher and a part of the data, in whole batches, as a build has them; N of the whole data."""
    data = open_data(config.data, "train")
    defaults = defaults_for(data)
    batch = config.batch_size or defaults.train_batch
    steps = 8 if device.type == "cpu" else 64
    samples = min(config.samples or steps * batch, len(data)) // batch * batch
    if samples < 2 * batch:
        asked = f" and --samples {config.samples}" if config.samples else ""
        raise InputError(
            f"at least two batches are needed, and {config.data} has {len(data)} samples{asked} for batches of "
            f"{batch}: lower --batch-size"
        )
    name = config.teacher or (FILES_TEACHER if not data.in_memory else TEACHER)
    weights = folder / "teacher.safetensors"
    _untrained(name, data, weights)
    found = open_source(
        BuildConfig(name, str(weights), data=config.data, device=config.device, amp=config.amp, workers=config.workers)
    )
    chosen = np.arange(samples) * len(data) // samples
    train, labels = found.train.subset(chosen), found.train_labels[chosen]
    teacher, built = found.teacher, build_batch_of(config, defaults, samples, found.teacher)
    few = np.arange(min(len(found.evaluation), built))
    evaluation = found.evaluation.subset(few)
    identity = found.identity.model_copy(
        update={"data": describe_data(train, False), "evaluation": describe_data(evaluation, False)}
    )
    if config.compile:
        teacher = teacher.compile(built)
    found = replace(
        found, train=train, evaluation=evaluation, train_labels=labels, evaluation_labels=found.evaluation_labels[few],
        teacher=teacher, identity=identity,
    )  # fmt: skip
    return found, len(data)


def build_batch_of(config: BenchConfig, defaults: Defaults, samples: int, teacher: Teacher) -> int:
    """The build's default batch, unless that would leave a batch that is filled up."""
    batch = config.batch_size or defaults.batch_for(teacher.device.type, teacher.input_size, samples)
    return batch if samples % batch == 0 else defaults.train_batch


def _untrained(name: str, data: Dataset, weights: Path) -> None:
    """File a teacher with new weights, and with batch norms that have seen pixels, so that logits have a usual size."""
    size = built_for(name) or pixels_of_data(data).size
    network = seeded(0, lambda: build_network(name, len(data.class_names), size))
    model = Classifier(network, data.mean, data.std)
    try_out(model, name, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what is seen
    with torch.no_grad():
        model.train()(torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8))
    notes = {"input_size": size, "mean": data.mean, "std": data.std, "class_names": data.class_names}
    file_classifier(weights, model, notes)
