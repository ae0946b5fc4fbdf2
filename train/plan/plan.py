"""A run as it will be: all that is asked for is looked up once, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import Dataset, open_data, open_validation
from kdcache.pipeline.data.defaults import Defaults, defaults_for
from kdcache.pipeline.stores import Stored
from kdcache.pipeline.teachers.checkpoints import split_place
from kdcache.pipeline.teachers.networks import built_for, canonical_name
from kdcache.train import group
from kdcache.train.config import DEFAULT_LOSS, TrainConfig
from kdcache.train.evaluation.otherdata import class_ids
from kdcache.train.evaluation.validation import held_out_part
from kdcache.train.loaders.cached import require_data
from kdcache.train.loaders.order import usual_batch
from kdcache.train.loop.logs.logs import require_loggers
from kdcache.train.loop.optimisers import Recipe, default_rates, require_autocast
from kdcache.train.losses.base import Loss, Partnered
from kdcache.train.losses.options import described, make_loss, options_of
from kdcache.train.losses.prepare import require_served
from kdcache.train.plan.choosing import choose_cache
from kdcache.train.plan.feeds import Feed, feed_of
from kdcache.train.plan.resuming import place_of, placed

_WORTH_COMPILING = 10_000  # batches in a run


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """What one run trains, on which images and how. All later code reads the plan and looks up no default.

    asked: the settings as given; those that need no looking up (the seed, the worker processes) are read from here.
    evaluation: the images whose figures are reported. validation: the split that chooses the best weights, if the data
    have one. held_out: bool [N], the training samples that choose them instead. image_size: the student's, in pixels.
    views: how many views are used in turn; None means a new one every epoch. batch: the number of samples in a batch,
    on all ranks together.
    """

    asked: TrainConfig
    device: torch.device
    cache: Stored
    feed: Feed
    data: Dataset
    evaluation: Dataset
    validation: Dataset | None
    held_out: NDArray[np.bool_] | None
    loss: Loss
    loss_spec: str
    student: str
    image_size: int
    views: int | None
    batch: int
    recipe: Recipe
    out: Path

    @property
    def classes(self) -> int:
        """The number of classes that the student answers for: as many as the cache's records have."""
        return self.cache.identity.record.classes

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 [N, L]: the classes of the training samples, numbered as the teacher's, read from the cache."""
        return self.feed.labels()

    @cached_property
    def samples(self) -> NDArray[np.int64] | None:
        """The places of the samples to learn from, in ascending order; None means all of them."""
        return None if self.held_out is None else np.flatnonzero(~self.held_out)

    @property
    def teacher_learns(self) -> bool:
        """Whether a teacher learns beside the student, with weights of its own."""
        return self.asked.online and isinstance(self.loss, Partnered)

    @property
    def settings(self) -> dict[str, Any]:
        """The content of config.json: everything that distinguishes this run from others, and where things lie."""
        asked, recipe, cache = self.asked, self.recipe, self.cache
        return {
            "cache": cache.key, "data": placed(asked.data), "student": self.student, "loss": self.loss.name,
            "loss_options": options_of(self.loss), "epochs": recipe.epochs, "batch_size": self.batch, "lr": recipe.lr,
            "weight_decay": recipe.decay, "momentum": recipe.momentum, "warmup": recipe.warmup, "seed": asked.seed,
            "views": self.views, "image_size": self.image_size, "crops_per_decode": asked.crops_per_decode,
            "online": asked.online,
            "fresh_views": asked.fresh_views, "amp": asked.amp, "optimiser": recipe.optimiser, "sgd_lr": recipe.sgd_lr,
            "sgd_weight_decay": recipe.sgd_decay, "accumulate": recipe.accumulate, "clip": recipe.clip,
            "ema": recipe.ema, "compile": recipe.compile, "renderer": self.feed.renderer,
            "cache_path": place_of(cache.where), "ranks": group.world(), "sync_bn": asked.sync_bn,
            "validation": asked.validation, "teacher": asked.teacher, "save_every": asked.save_every,
            "weights": _placed_weights(asked.weights), "evaluate_every": asked.evaluate_every,
            "student_weights": _placed_weights(asked.student_weights), "log": asked.log,
        }  # fmt: skip

    @property
    def notes(self) -> dict[str, Any]:
        """The notes in the student's weights files, with which they can be read and evaluated on their own."""
        data, has = self.data, self.cache.identity.evaluation
        return {
            "student": self.student, "classes": self.classes, "input_size": self.image_size, "mean": list(data.mean),
            "std": list(data.std), "class_names": list(data.class_names), "class_ids": class_ids(data, self.labels),
            "data": placed(self.asked.data), "evaluation": has.fingerprint, "full_contents": has.full_contents,
            "cache": self.cache.key, "cache_path": place_of(self.cache.where),
            "beside_teacher": self.teacher_learns,
        }  # fmt: skip

    @property
    def rounds(self) -> str | None:
        """A line that tells what its batches and epochs hold, where each image is taken in several crops at once."""
        crops, images = self.asked.crops_per_decode, len(self.data if self.samples is None else self.samples)
        if crops == 1:
            return None
        told = (
            f"each batch of {self.batch:,} holds {self.batch // crops:,} images in {crops} views, an epoch has "
            f"{images // self.batch:,} steps, and {crops} epochs take every image once in each of those views"
        )
        if rest := self.recipe.epochs % crops:
            told += (
                f"; {self.recipe.epochs} is no multiple of {crops}, so {rest}/{crops} of the images are taken in "
                f"{crops} views more than the others"
            )
        return told

    def __str__(self) -> str:
        """The line that announces the run."""
        how = "beside its teacher on" if self.teacher_learns else "online" if self.asked.online else "from cache"
        on, complete = self.data.name, len(self.cache.views)
        if self.samples is not None:
            on = f"{len(self.samples):,} of {len(self.data):,} images of {on}"
        views = f"{complete} views" if self.views == complete else f"{self.views} of {complete} views"
        if self.asked.fresh_views:
            views = "a new view every epoch"
        return (
            f"{self.student} on {on} with {described(self.loss_spec, self.classes)}, {how} {self.cache.key[:12]} "
            f"({views}), {self.recipe.epochs} epochs on {self.device}: {self.out}"
        )


def make_plan(config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> TrainPlan:
    """Look up the cache, the data and every default. A KdcacheError says what does not go together.

    All ranks make the plan together, and one on each machine downloads what is missing.
    """
    _require_possible(config, device)
    with group.one_first():
        cache = choose_cache(config)
    feed = feed_of(cache)
    if config.online:
        feed.live()  # raises an error if there is no live teacher
    record = cache.identity.record
    data, evaluation, validation = _open_splits(config, record.labels == 0, say)
    require_data(cache, data)
    require_data(cache, evaluation)
    held = held_out_part(data, config.validation) if config.validation else None
    count = len(data) if held is None else int((~held).sum())
    defaults = defaults_for(data)
    spec = config.loss or DEFAULT_LOSS
    loss = make_loss(spec, record.classes)
    # The live teacher answers for all classes, at any temperature.
    require_served(loss, record.model_copy(update={"k": None}) if config.online else record)
    student = canonical_name(config.student or defaults.student)
    mixed, crops = cache.identity.views.mixed, config.crops_per_decode
    batch = config.batch_size or usual_batch(defaults.train_batch, count, mixed, group.world(), crops)
    return TrainPlan(
        asked=config,
        device=device,
        cache=cache,
        feed=feed,
        data=data,
        evaluation=evaluation,
        validation=validation,
        held_out=held,
        loss=loss,
        loss_spec=spec,
        student=student,
        image_size=config.image_size or built_for(student) or data.image_size or cache.identity.teacher.input_size,
        # The number is fixed now, since a cache may have more views by the time the run is resumed.
        views=None if config.fresh_views else config.views or len(cache.views) or None,
        batch=batch,
        recipe=_recipe(config, defaults, batch, count // batch, device),
        out=Path(config.out) if config.out else _out_of(config, data.name, student),
    )


def default_out(config: TrainConfig) -> Path:
    """The folder of a run whose settings name none; its name consists of data, student, loss and seed."""
    data = open_data(config.data, "train", unlabelled=True)
    return _out_of(config, data.name, config.student or defaults_for(data).student)


def _out_of(config: TrainConfig, data: str, student: str) -> Path:
    loss = (config.loss or DEFAULT_LOSS).partition(":")[0]
    name = f"{data.replace(':', '-')}-{student.replace('/', '-')}-{loss}-seed{config.seed}"
    return Path(f"runs/{name}{'-online' if config.online else ''}")


def _require_possible(config: TrainConfig, device: torch.device) -> None:
    """InputError for settings that contradict each other or this machine, whatever the data are."""
    if config.sync_bn and (group.world() == 1 or device.type != "cuda"):
        raise InputError(f"--sync-bn is for ranks on GPUs (torchrun), not for {group.world()} on {device.type}")
    require_autocast(device, config.amp)
    require_loggers(config.log)
    if config.fresh_views and not config.online:
        raise InputError("--fresh-views needs the live teacher: give --online too")
    if config.weights and not config.online:
        raise InputError("--weights are for the live teacher: give --online too")


def _open_splits(
    config: TrainConfig, unlabelled: bool, say: Callable[[str], None]
) -> tuple[Dataset, Dataset, Dataset | None]:
    """The train and the eval split, and the validation split if the data have one and no samples are held out."""
    with group.one_first():
        data, evaluation = (open_data(config.data, split, unlabelled=unlabelled) for split in ("train", "eval"))
        third = None if unlabelled or config.validation is not None else open_validation(config.data)
    for split in (data, evaluation, third):
        if split is not None and split.note:
            say(split.note)
    return data, evaluation, third


def _recipe(config: TrainConfig, defaults: Defaults, batch: int, batches: int, device: torch.device) -> Recipe:
    """How the student learns. The rates depend on the samples in an update. batches: their number in an epoch."""
    together = batch * config.accumulate
    lr, decay = default_rates(config.optimiser, defaults, together)
    sgd_lr, sgd_decay = default_rates("sgd", defaults, together) if config.optimiser == "muon" else (None, None)
    epochs = config.epochs or defaults.epochs
    # Compiling takes a minute, which is more than a run on the digits takes.
    long = device.type == "cuda" and epochs * batches >= _WORTH_COMPILING
    return Recipe(
        epochs=epochs,
        lr=config.lr or lr,
        decay=decay if config.weight_decay is None else config.weight_decay,
        warmup=config.warmup,
        amp=config.amp,
        optimiser=config.optimiser,
        sgd_lr=sgd_lr,
        sgd_decay=sgd_decay,
        accumulate=config.accumulate,
        clip=config.clip,
        ema=config.ema,
        compile=long if config.compile is None else config.compile,
    )


def _placed_weights(weights: str | None) -> str | None:
    """The weights as config.json holds them: a file is given by its absolute path."""
    return place_of(weights) if weights and split_place(weights)[0].exists() else weights
