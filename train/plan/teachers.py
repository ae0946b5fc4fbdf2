"""The teacher that a run needs beside the cache: the one that answers live, or the one that learns too."""

from __future__ import annotations

import torch

from kdcache.cache.errors import InputError, MismatchError, NotFoundError
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.ffcv.beton import Beton
from kdcache.pipeline.teachers import weightstore
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import Classifier, Teacher, load_teacher, try_out
from kdcache.pipeline.trust import stored_network
from kdcache.train.config import TrainConfig
from kdcache.train.loop.cotrain import LearningTeacher
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import seeded
from kdcache.train.losses.base import Partnered


def same_teacher(cache: Cache | Beton, config: TrainConfig, data: Dataset, device: torch.device) -> Teacher:
    """The live teacher, which must be the one that the cache was built by."""
    had = cache.identity.teacher
    name = config.teacher or stored_network(had.network, cache.path, "--teacher")
    amp = "bf16" if had.numeric == "bf16" else None
    weights = weightstore.weights_of(cache.identity, cache.path, config.weights, config.registry)
    try:
        teacher = load_teacher(name, data, device, weights=weights, amp=amp, wanted=Wanted.of(had))
    except NotFoundError:
        raise weightstore.not_to_be_had(had, config.registry) from None
    if found := had.differences(teacher.identity, theirs="found"):
        raise MismatchError(f"the live teacher is not that of cache {cache.key[:12]}: {'; '.join(found)}")
    if teacher.classes != cache.identity.record.classes:
        raise MismatchError(
            f"the class map of cache {cache.key[:12]} makes one class of several of the teacher's, and a live teacher "
            "does not: train without --online"
        )
    return teacher


def learning_teacher(
    cache: Cache | Beton, config: TrainConfig, data: Dataset, loss: Partnered, recipe: Recipe, device: torch.device
) -> LearningTeacher | None:
    """The teacher that learns beside the student, online; None from a cache."""
    if not config.online:
        if any(getattr(loss, name) != getattr(type(loss), name) for name in loss.partner_options):
            *most, last = loss.partner_options
            raise InputError(f"{loss.name}'s {', '.join(most)} and {last} are of a teacher that learns: give --online")
        return None
    record, had = cache.identity.record, cache.identity.teacher
    if not record.labels:
        raise InputError(f"{loss.name}'s teacher learns from labels too, and this cache was built with --unlabelled")
    mean, std = data.mean, data.std
    if loss.starts_taught:
        teacher = same_teacher(cache, config, data, device)
        model, mean, std = teacher.model, had.mean, had.std
    else:
        if config.weights:
            raise InputError(f"--weights are those of a taught teacher: give --loss {loss.name}:start=taught")
        name = config.teacher or stored_network(had.network, cache.path, "--teacher")
        # A seed that no student has: two of one kind must not start from equal weights.
        network = seeded(-1 - config.seed, lambda: build_network(name, record.classes, had.input_size))
        model = Classifier(network, mean, std).to(device)
        model.to(memory_format=torch.channels_last)
        if (answers := try_out(model, name, had.input_size)) != record.classes:
            raise InputError(f"{name} answers for {answers} classes, the cache holds {record.classes}")
    notes = {
        "network": had.network, "input_size": had.input_size, "mean": list(mean), "std": list(std),
        "interpolation": had.interpolation, "class_names": list(data.class_names),
    }  # fmt: skip
    return LearningTeacher(model, had.input_size, loss, recipe, notes)
