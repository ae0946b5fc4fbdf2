"""`kdcache train`: a run from its settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache import __version__
from kdcache.cache.errors import InputError, KdcacheError, NotFoundError, UnreadableError
from kdcache.pipeline.data.dataset import open_data, open_validation
from kdcache.pipeline.data.defaults import defaults_for
from kdcache.pipeline.ffcv.beton import Beton
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import (
    Classifier,
    try_out,
)
from kdcache.pipeline.views.render import RENDERER
from kdcache.train import group
from kdcache.train.config import DEFAULT_LOSS, TrainConfig
from kdcache.train.evaluation.judge import Judge
from kdcache.train.evaluation.otherdata import class_ids, labels_of_other
from kdcache.train.evaluation.validation import held_out_part
from kdcache.train.loaders.cached import CachedLoader, OnlineLoader, require_data
from kdcache.train.loaders.ffcv import BetonLoader
from kdcache.train.loop.optimisers import Recipe, default_rates, require_autocast
from kdcache.train.loop.runfolder import RunFolder, best_of, config_of
from kdcache.train.loop.trainer import PARTNER, fit, seeded
from kdcache.train.losses.base import Partnered
from kdcache.train.losses.options import described, make_loss, options_of
from kdcache.train.losses.prepare import prepared, require_served
from kdcache.train.plan.choosing import choose_cache
from kdcache.train.plan.resuming import exists, given_by, place_of, placed, resumed
from kdcache.train.plan.teachers import learning_teacher, same_teacher

_WORTH_COMPILING = 10_000  # batches in a run


def train(
    config: TrainConfig,
    say: Callable[[str], None] = print,
    keep_finished: bool = False,
    given: Collection[str] | None = None,
) -> dict[str, Any]:
    """Train a student; the summary, which also stands in the run folder. keep_finished: of a finished run, that one.

    A run that is resumed goes on with its own settings. Of the fields in `given`, which a user has typed (by default
    those that are not at their defaults), InputError names those in which it is another run.

    Under torchrun all ranks train it together, each with its part of every batch. Started again by torchrun after one
    of them died, they go on with the run.
    """
    with group.joined(config.device) as device:
        say = group.said_once(say)
        return _train(_as_it_was(config, given, say), device, say, keep_finished)


def _as_it_was(config: TrainConfig, given: Collection[str] | None, say: Callable[[str], None]) -> TrainConfig:
    """With the settings of the run that is resumed, or that torchrun has started before, where it is one."""
    if not (config.resume or group.restarted()):
        return config
    out = Path(config.out) if config.out else _default_out(config)
    config = replace(config, out=str(out))
    if not config.resume and not group.from_first(lambda: (out / "config.json").exists()):
        return config
    had = group.from_first(lambda: config_of(out))
    given = given_by(config) if given is None else given
    return resumed(replace(config, resume=True), had, given, out, say)


def _default_out(config: TrainConfig) -> Path:
    data = open_data(config.data, "train", unlabelled=True)
    return _out_of(config, data.name, config.student or defaults_for(data).student)


def _out_of(config: TrainConfig, data: str, student: str) -> Path:
    loss = (config.loss or DEFAULT_LOSS).partition(":")[0]
    name = f"{data.replace(':', '-')}-{student.replace('/', '-')}-{loss}-seed{config.seed}"
    return Path(f"runs/{name}{'-online' if config.online else ''}")


def _train(
    config: TrainConfig, device: torch.device, say: Callable[[str], None], keep_finished: bool
) -> dict[str, Any]:
    if config.sync_bn and (group.world() == 1 or device.type != "cuda"):
        raise InputError(f"--sync-bn is for ranks on GPUs (torchrun), not for {group.world()} on {device.type}")
    require_autocast(device, config.amp)
    if config.fresh_views and not config.online:
        raise InputError("--fresh-views needs the live teacher: give --online too")
    if config.weights and not config.online:
        raise InputError("--weights are those of the live teacher: give --online too")
    with group.one_first():
        cache = choose_cache(config)
    if config.online and cache.identity.views.imported:
        raise InputError(f"{cache.path} was imported, and its teacher is not at hand: train without --online")
    if config.online and isinstance(cache, Beton):
        raise InputError(f"--online renders as the cache was built: give the cache itself, not {cache.path}")
    record = cache.identity.record
    with group.one_first():
        data, evaluation = (open_data(config.data, split, unlabelled=record.labels == 0) for split in ("train", "eval"))
        third = open_validation(config.data) if record.labels and config.validation is None else None
    for note in (one.note for one in (data, evaluation, third) if one and one.note):
        say(note)
    require_data(cache, data)
    require_data(cache, evaluation)
    held = held_out_part(data, config.validation) if config.validation else None
    samples = None if held is None else np.flatnonzero(~held)
    count = len(data) if samples is None else len(samples)
    defaults = defaults_for(data)
    size = config.image_size or data.image_size or cache.identity.teacher.input_size
    loss = make_loss(config.loss or DEFAULT_LOSS, record.classes)
    # The live teacher answers for all classes, at any temperature.
    require_served(loss, record.model_copy(update={"k": None}) if config.online else record)
    student = config.student or defaults.student
    path = Path(config.out) if config.out else _out_of(config, data.name, student)
    # Pinned, for a cache may have got more views by the time that the run is resumed.
    used = None if config.fresh_views else config.views or len(cache.views) or None
    config = replace(config, views=used)
    batch = config.batch_size or min(defaults.train_batch, count)
    together = batch * config.accumulate
    lr, decay = default_rates(config.optimiser, defaults, together)
    sgd_lr, sgd_decay = default_rates("sgd", defaults, together) if config.optimiser == "muon" else (None, None)
    epochs = config.epochs or defaults.epochs
    # A compiler takes a minute, and the digits do not.
    long = device.type == "cuda" and epochs * (count // batch) >= _WORTH_COMPILING
    recipe = Recipe(
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
    partner = learning_teacher(cache, config, data, loss, recipe, device) if isinstance(loss, Partnered) else None
    loader: CachedLoader | OnlineLoader | BetonLoader
    if isinstance(cache, Beton):
        loader = BetonLoader(
            cache, batch, group.rank(), group.world(), seed=config.seed, device=device, image_size=size,
            views=config.views, workers=config.workers, allow_renderer=config.allow_renderer, samples=samples,
        )  # fmt: skip
        if config.allow_renderer and not cache.raw:
            say(
                f"note: rendered by {cache.renderer}, the cache by {cache.identity.views.renderer}: on average "
                f"{loader.difference():.1f} levels of 255 apart"
            )
    elif config.online:
        if config.views and not config.fresh_views and config.views > len(cache.views):
            raise NotFoundError(f"{cache.path} has {len(cache.views)} complete views, not {config.views}: build more")
        teacher = same_teacher(cache, config, data, device) if partner is None else partner
        loader = OnlineLoader(
            cache, data, teacher, batch, fresh_views=config.fresh_views, seed=config.seed, image_size=size,
            views=config.views, workers=config.workers, rank=group.rank(), world=group.world(), samples=samples,
        )  # fmt: skip
    else:
        loader = CachedLoader(
            cache, data, batch, group.rank(), group.world(), seed=config.seed, device=device, image_size=size,
            views=config.views, workers=config.workers, samples=samples,
        )  # fmt: skip
    network = seeded(config.seed, lambda: build_network(student, record.classes, size))
    model = Classifier(network, data.mean, data.std).to(device)
    model.to(memory_format=torch.channels_last)
    if (answers := try_out(model, student, size)) != record.classes:
        raise InputError(f"{student} answers for {answers} classes, the teacher for {record.classes}")
    if config.sync_bn:  # in place
        for one in (model, partner.model) if partner else (model,):
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(one)  # type: ignore[no-untyped-call]
    judge = Judge(cache, evaluation, size, device, config.workers)
    labels = (cache.labels if isinstance(cache, Beton) else cache.train.labels).astype(np.int64)
    validate = None
    if held is not None:
        places = np.flatnonzero(held)
        validate = Judge(None, data.subset(places), size, device, config.workers, labels[places])
    elif third is not None:
        ids = labels_of_other(third, data.class_names, class_ids(data, labels), path)
        validate = Judge(None, third, size, device, config.workers, ids)
    settings = {
        "cache": cache.key, "data": placed(config.data), "student": student, "loss": loss.name,
        "loss_options": options_of(loss), "epochs": recipe.epochs, "batch_size": batch, "lr": recipe.lr,
        "weight_decay": recipe.decay, "momentum": recipe.momentum, "warmup": recipe.warmup, "seed": config.seed,
        "views": config.views, "image_size": size, "online": config.online, "fresh_views": config.fresh_views,
        "amp": config.amp, "optimiser": recipe.optimiser, "sgd_lr": recipe.sgd_lr, "sgd_weight_decay": recipe.sgd_decay,
        "accumulate": recipe.accumulate, "clip": recipe.clip, "ema": recipe.ema, "compile": recipe.compile,
        "renderer": cache.renderer if isinstance(cache, Beton) else RENDERER,
        "cache_path": str(cache.path.absolute()), "ranks": group.world(), "sync_bn": config.sync_bn,
        "validation": config.validation, "teacher": config.teacher, "save_every": config.save_every,
        "weights": _placed_weights(config.weights), "evaluate_every": config.evaluate_every,
    }  # fmt: skip
    live = loader if isinstance(loader, OnlineLoader) else None
    ready = prepared(loss, cache, model, size, config.online, say, samples, live)
    folder = group.from_first(lambda: RunFolder(path, settings, config.resume))
    if keep_finished and (finished := folder.read_summary()):
        say(f"{path} is finished already")
        return finished
    how = "beside its teacher on" if partner else "online" if config.online else "from cache"
    on = data.name if held is None else f"{count:,} of {len(data):,} images of {data.name}"
    say(
        f"{student} on {on} with {described(config.loss or DEFAULT_LOSS, record.classes)}, {how} {cache.key[:12]} "
        f"({_views_said(config, len(cache.views))}), {recipe.epochs} epochs on {device}: {path}"
    )
    has = cache.identity.evaluation
    notes = {
        "student": student, "classes": record.classes, "input_size": size, "mean": list(data.mean),
        "std": list(data.std), "class_names": list(data.class_names), "class_ids": class_ids(data, labels),
        "data": placed(config.data), "evaluation": has.fingerprint, "full_contents": has.full_contents,
        "cache": cache.key, "cache_path": str(cache.path.absolute()), "beside_teacher": partner is not None,
    }  # fmt: skip
    beside = (partner.model, partner.input_size) if partner else None

    def evaluate(m: Classifier) -> dict[str, float]:
        found = judge(m, recipe.dtype, beside)
        return found if validate is None else {**found, **_of_validation(validate(m, recipe.dtype, beside))}

    started = time.monotonic()
    try:
        history = fit(
            model, ready, loader, recipe, evaluate, folder, notes, say, partner, config.save_every,
            config.evaluate_every,
        )  # fmt: skip
    except KdcacheError as e:
        if exists(str(cache.path)):
            raise
        raise UnreadableError(f"{cache.path} has gone: bring the disk or folder back, and go on with --resume") from e
    best = best_of(history)
    summary = {
        **{k: v for k, v in history[-1].items() if k not in ("epoch", "seconds")},
        **({} if best is None else {"best": {k: v for k, v in best.items() if k != "seconds"}}),
        "epochs": len(history),
        "seconds_an_epoch": sorted(line["seconds"] for line in history)[len(history) // 2],
        "seconds": time.monotonic() - started,
        "run": str(path),
        "kdcache": __version__,
        "torch": str(torch.__version__),
        "device": str(device),
        "ranks": group.world(),
    }
    if group.rank() == 0:
        folder.finish(summary)
    return summary


def _placed_weights(weights: str | None) -> str | None:
    """With its whole path where it is a file."""
    return place_of(weights) if weights and Path(weights).exists() else weights


def _views_said(config: TrainConfig, complete: int) -> str:
    if config.fresh_views:
        return "a new view every epoch"
    return f"{complete} views" if config.views == complete else f"{config.views} of {complete} views"


def _of_validation(found: dict[str, float]) -> dict[str, float]:
    """A student's figures as validation_*, a learning teacher's as teacher_validation_*."""
    mark = f"{PARTNER}_"
    of = {k: mark if k.startswith(mark) else "" for k in found}
    return {f"{of[k]}validation_{k.removeprefix(of[k])}": v for k, v in found.items()}
