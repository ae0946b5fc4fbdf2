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
from kdcache.cache.errors import KdcacheError, NotFoundError, UnreadableError
from kdcache.pipeline.process.provenance import public, writer
from kdcache.pipeline.teachers.sources.files import start_from
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train import group
from kdcache.train.config import TrainConfig
from kdcache.train.evaluation.analysis.classes import names_of_classes
from kdcache.train.evaluation.ending import AnalysedEnd
from kdcache.train.evaluation.gallery import gallery
from kdcache.train.evaluation.judge import Answers, Judge, on_training_images
from kdcache.train.evaluation.otherdata import class_ids, labels_of_other
from kdcache.train.evaluation.parts import parts_of
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.ffcv import FFCVLoader
from kdcache.train.loaders.live import OnlineLoader
from kdcache.train.loop.cotrain import LearningTeacher
from kdcache.train.loop.logs.logs import Logged
from kdcache.train.loop.runfolder import RunFolder, best_of, config_of, goes_on
from kdcache.train.loop.trainer import fit, new_classifier
from kdcache.train.loop.watching import PARTNER, guesses
from kdcache.train.losses.prepare import prepared
from kdcache.train.plan.plan import TrainPlan, default_out, make_plan
from kdcache.train.plan.resuming import exists, given_by, resumed
from kdcache.train.plan.teachers import learning_teacher, live_teacher


def train(
    config: TrainConfig,
    say: Callable[[str], None] = print,
    keep_finished: bool = False,
    given: Collection[str] | None = None,
) -> dict[str, Any]:
    """Train a student, and return the summary, which also stands in the run folder.

    A run that is resumed goes on with its own settings. `given` are the fields that a user has typed, by default those
    that are not at their defaults: InputError names those in which the run differs. A run that is finished is refused,
    or with keep_finished left as it is: then its summary is returned.

    Under torchrun all ranks train the student together, each with its part of every batch. Started again by torchrun
    after one of them died, they go on with the run.
    """
    with group.joined(config.device) as device:
        say = group.said_once(say)
        return _train(_as_it_was(config, given, say), device, say, keep_finished)


def _as_it_was(config: TrainConfig, given: Collection[str] | None, say: Callable[[str], None]) -> TrainConfig:
    """The settings of the run that is resumed or that torchrun has started before; for a new run, those asked for."""
    if not (config.resume or group.restarted()):
        return config
    out = Path(config.out) if config.out else default_out(config)
    config = replace(config, out=str(out))
    if not config.resume and not group.from_first(lambda: (out / "config.json").exists()):
        return config
    had = group.from_first(lambda: config_of(out))
    given = given_by(config) if given is None else given
    return resumed(replace(config, resume=True), had, given, out, say)


def _train(
    config: TrainConfig, device: torch.device, say: Callable[[str], None], keep_finished: bool
) -> dict[str, Any]:
    plan = make_plan(config, device, say)
    partner = learning_teacher(plan)
    loader = _loader(plan, partner, say)
    model = new_classifier(
        plan.student, plan.classes, plan.image_size, plan.data, device, config.seed, whose="the teacher for"
    )
    if config.student_weights and not group.from_first(lambda: goes_on(plan.out, config.resume)):
        say(start_from(model.network, plan.student, config.student_weights, plan.image_size))
    if config.sync_bn:  # in place
        for one in (model, partner.model) if partner else (model,):
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(one)  # type: ignore[no-untyped-call]
    evaluate, ending = _evaluation(plan, partner, say)
    live = loader if isinstance(loader, OnlineLoader) else None
    loss = prepared(plan.loss, plan.cache, model, plan.image_size, config.online, say, plan.samples, live)
    folder = group.from_first(lambda: RunFolder(plan.out, plan.settings, config.resume))
    if keep_finished and (finished := folder.read_summary()):
        say(f"{plan.out} is finished already")
        return finished
    say(str(plan))
    if plan.rounds:
        say(plan.rounds)
    started = time.monotonic()
    try:
        history = fit(
            model, loss, loader, plan.recipe, evaluate, folder, plan.notes, say, partner, config.save_every,
            config.evaluate_every, _logged(plan, loader, partner, ending),
        )  # fmt: skip
    except KdcacheError as e:
        where = plan.cache.where
        if exists(where):
            raise
        raise UnreadableError(f"{where} has gone: bring the disk or folder back, and go on with --resume") from e
    if note := guesses(history[-1], plan.classes, plan.recipe.lr):
        say(note)
    summary = _summary(plan, history, time.monotonic() - started)
    if group.rank() == 0:
        folder.finish(summary)
    return summary


def _logged(
    plan: TrainPlan,
    loader: CachedLoader | OnlineLoader | FFCVLoader,
    partner: LearningTeacher | None,
    ending: AnalysedEnd | None,
) -> Logged | None:
    """What loggers that were asked for get of the run: its settings, its cache, who trains it, some views, its end."""
    if plan.asked.log is None:
        return None
    identity = plan.cache.identity
    facts = {
        **plan.settings, "cache_teacher": identity.teacher.architecture, "cache_data": identity.data.name,
        "cache_policy": identity.views.policy, "cache_views": len(plan.cache.views),
        "provenance": writer(str(plan.device)),
    }  # fmt: skip
    ids, names = plan.notes["class_ids"], plan.notes["class_names"]
    known = {i: name for i, name in zip(ids, names, strict=bool(ids)) if i is not None}
    # A teacher that learns would learn from these views too.
    pictures = gallery(loader, known, plan.recipe.dtype) if partner is None else None
    return Logged(plan.asked.log, public(facts), pictures, ending)


def _loader(
    plan: TrainPlan, partner: LearningTeacher | None, say: Callable[[str], None]
) -> CachedLoader | OnlineLoader | FFCVLoader:
    """The run's batches: from the cache, or answered by the live teacher, which may be the one that learns."""
    asked = plan.asked
    shared: dict[str, Any] = {
        "seed": asked.seed, "image_size": plan.image_size, "views": plan.views, "workers": asked.workers,
        "rank": group.rank(), "world": group.world(), "samples": plan.samples,
        "crops_per_decode": asked.crops_per_decode,
    }  # fmt: skip
    if not asked.online:
        return plan.feed.loader(plan.data, plan.batch, asked.allow_renderer, say, device=plan.device, **shared)
    cache = plan.feed.live()
    if plan.views is not None and plan.views > len(cache.views):
        raise NotFoundError(f"{cache.where} has {len(cache.views)} complete views, not {plan.views}: build more")
    teacher = live_teacher(plan) if partner is None else partner
    return OnlineLoader(cache, plan.data, teacher, plan.batch, fresh_views=asked.fresh_views, **shared)


def _evaluation(
    plan: TrainPlan, partner: LearningTeacher | None, say: Callable[[str], None]
) -> tuple[Callable[[Classifier], dict[str, float]], AnalysedEnd | None]:
    """What measures a student: on the evaluation split, and on the images that choose the best weights, if any.

    Also what does so at the end of a run that is logged.
    """
    on = (plan.image_size, plan.device, plan.asked.workers)
    judge = Judge(
        plan.cache, plan.evaluation, *on, parts=parts_of(plan.cache, plan.asked.registry, say, plan.asked.trust)
    )
    validate = None
    if plan.held_out is not None:
        places = np.flatnonzero(plan.held_out)
        validate = Judge(None, plan.data.subset(places), *on, plan.labels[places])
    elif plan.validation is not None:
        known = class_ids(plan.data, plan.labels)
        ids = labels_of_other(plan.validation, plan.data.class_names, known, plan.out)
        validate = Judge(None, plan.validation, *on, ids)
    beside = (partner.model, partner.input_size) if partner else None

    def evaluate(
        model: Classifier, more: Callable[[Answers], dict[str, float]] = lambda answers: {}
    ) -> dict[str, float]:
        found = judge(model, plan.recipe.dtype, beside, more)
        return found if validate is None else {**found, **_of_validation(validate(model, plan.recipe.dtype, beside))}

    def on_training(model: Classifier) -> Answers | None:
        return on_training_images(plan.cache, plan.data, None, say, model, *on, beside)

    if plan.asked.log is None:
        return evaluate, None
    names = names_of_classes(plan.classes, plan.data.class_names, class_ids(plan.data, plan.labels))
    return evaluate, AnalysedEnd(evaluate, on_training, names)


def _of_validation(found: dict[str, float]) -> dict[str, float]:
    """Rename figures to validation_* for the student and to teacher_validation_* for a teacher that learns."""
    mark = f"{PARTNER}_"
    of = {k: mark if k.startswith(mark) else "" for k in found}
    return {f"{of[k]}validation_{k.removeprefix(of[k])}": v for k, v in found.items()}


def _summary(plan: TrainPlan, history: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What summary.json holds: the last epoch's figures, the best one's where weights were chosen, times, versions."""
    best = best_of(history)
    return {
        **{k: v for k, v in history[-1].items() if k not in ("epoch", "seconds")},
        **({} if best is None else {"best": {k: v for k, v in best.items() if k != "seconds"}}),
        "epochs": len(history),
        "seconds_an_epoch": sorted(line["seconds"] for line in history)[len(history) // 2],
        "seconds": seconds,
        "run": str(plan.out),
        "kdcache": __version__,
        "torch": str(torch.__version__),
        "device": str(plan.device),
        "ranks": group.world(),
    }
