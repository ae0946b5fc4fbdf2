"""`kdcache train` and `kdcache eval`: a run from its settings, and its weights looked at again."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache import __version__
from kdcache.cache.errors import InputError, KdcacheError, MismatchError, NotFoundError, UnreadableError
from kdcache.cache.home import list_caches, open_cache, open_registry
from kdcache.cache.records import Records, encode
from kdcache.cache.registry.registry import Registry
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.data.dataset import Dataset, is_function, open_data, open_validation
from kdcache.pipeline.data.defaults import defaults_for
from kdcache.pipeline.ffcv.beton import Beton
from kdcache.pipeline.info import one_line
from kdcache.pipeline.teachers import weightstore
from kdcache.pipeline.teachers.networks import build_network, load_fitting
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import (
    Classifier,
    Teacher,
    load_teacher,
    pick_device,
    read_weights,
    try_out,
)
from kdcache.pipeline.trust import stored_data, stored_network
from kdcache.pipeline.views.render import RENDERER, Renderer
from kdcache.train import group
from kdcache.train.config import DEFAULT_LOSS, TrainConfig
from kdcache.train.evaluation.metrics import metrics, predict
from kdcache.train.evaluation.otherdata import labels_of_other, whole_of
from kdcache.train.evaluation.validation import held_out_part
from kdcache.train.loaders.cached import CachedLoader, OnlineLoader, require_data
from kdcache.train.loaders.ffcv import BetonLoader
from kdcache.train.loop.cotrain import LearningTeacher
from kdcache.train.loop.optimisers import Recipe, default_rates, require_autocast
from kdcache.train.loop.runfolder import RunFolder, best_of, settings_of
from kdcache.train.loop.trainer import PARTNER, fit, seeded
from kdcache.train.losses import BDKD, IKL, USKD, Loss
from kdcache.train.losses.features import FeatureLoss
from kdcache.train.losses.options import described, head_mass_warning, make_loss, options_of, require_served
from kdcache.train.resuming import exists, given_by, place_of, placed, resumed

_WORTH_COMPILING = 10_000  # batches in a run
_EXAMPLE = "resnet34"  # of a teacher, where the user has named none


def find_cache(data: str, teacher: str | None = None, registry: Registry | None = None) -> Cache:
    """The only cache under KDCACHE_HOME with complete views of this dataset (and teacher's architecture).

    Where there is none, the only one in the registry.
    NotFoundError where there is none; InputError that lists them where there are several.
    """
    name = data if is_function(data) else data.partition(":")[0]
    opened: dict[bool, Dataset] = {}
    found: dict[str, Cache] = {}
    caches, bad = list_caches() if registry is None else registry.caches()
    for cache in caches:
        identity = cache.identity
        if identity.data.name != name:
            continue
        if teacher and identity.teacher.network != teacher:
            continue
        if not cache.views:
            continue
        unlabelled = identity.record.labels == 0
        if unlabelled not in opened:
            opened[unlabelled] = open_data(data, "train", unlabelled=unlabelled)
        if identity.data.fingerprint != opened[unlabelled].fingerprint(identity.data.full_contents):
            continue
        # A folder and what was packed from it are one cache.
        if cache.key not in found or len(cache.views) > len(found[cache.key].views):
            found[cache.key] = cache
    if not found:
        by = f" by {teacher}" if teacher else ""
        build = shlex.join(["kdcache", "build", "--teacher", teacher or _EXAMPLE, "--data", data])
        also = f" ({len(bad)} that cannot be read are left out: see kdcache ls)" if bad else ""
        raise NotFoundError(f"no cache of {data}{by} with a complete view{also}: run {build} first")
    if len(found) > 1:
        raise InputError(
            f"{len(found)} caches of {data} match, choose one with --cache: " + "; ".join(map(one_line, found.values()))
        )
    return next(iter(found.values()))


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
    had = group.from_first(lambda: settings_of(out))
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
        cache = cache_of(config)
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
    partner = _learning_teacher(cache, config, data, loss, recipe, device) if isinstance(loss, BDKD) else None
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
        teacher = _same_teacher(cache, config, data, device) if partner is None else partner
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


def class_ids(data: Dataset, labels: NDArray[np.int64]) -> list[int | None]:
    """What the student answers for each class name, given the cache's labels [N, L] of the data; [] without labels."""
    if not data.labels.shape[1] or labels.shape[1] != 1:
        return []
    ids = dict(zip(data.labels[:, 0].tolist(), labels[:, 0].tolist(), strict=True))
    return [ids.get(c) for c in range(len(data.class_names))]


def prepared(
    loss: Loss,
    cache: Cache | Beton,
    model: Classifier,
    size: int,
    online: bool,
    say: Callable[[str], None],
    samples: NDArray[np.int64] | None = None,
    live: OnlineLoader | None = None,
) -> Loss:
    """The loss with all that it takes from view 0 and from the student; a warning where the tail is most of it.

    samples: those that it may learn from; by default all. live: answers where the cache has no view with all classes.
    """
    dense, softened = cache.identity.record.dense, loss.needs.temperatures or loss.needs.standardised

    def first_view() -> Records:
        records = cache.read(cache.views[0])
        return records if samples is None else records[torch.from_numpy(samples)]

    if isinstance(loss, IKL) and loss.pairs == "prior":
        if live is not None and not (dense and cache.views):
            say(f"the teacher answers view 0 once, for the class prior of {loss.name}")
            loss.prepare(live.answers(0))
        else:
            loss.prepare(first_view().to(next(model.parameters()).device))
    if softened and not (online or dense) and (warning := head_mass_warning(loss, first_view())):
        say(f"warning: {warning}")
    return FeatureLoss(loss, model, size, cache.identity.record.classes) if isinstance(loss, USKD) else loss


class Judge:
    """Evaluates students on the evaluation split, beside the teacher's records of it where there are any.

    Or beside a teacher that learnt with the student, and its input size: then agreement and kl are with that one, and
    its own metrics come too, named teacher_*. labels: int64 [N, L] in the student's classes, where there is no cache.
    """

    def __init__(
        self,
        cache: Cache | Beton | None,
        evaluation: Dataset,
        size: int,
        device: torch.device,
        workers: int | None,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        self._data, self._size, self._device, self._workers = evaluation, size, device, workers
        self._renderers: dict[int, Renderer] = {}
        self._records: Records | None = None
        labels = evaluation.labels if labels is None else labels
        if cache is not None:
            if "evaluation" not in cache.identity.record.lacks:
                self._records = cache.read_evaluation()
            labels = cache.evaluation.labels.astype("int64")
        self._labels = torch.from_numpy(labels[:, 0] if labels.shape[1] else labels.reshape(-1))

    def __call__(
        self, model: Classifier, dtype: torch.dtype | None = None, beside: tuple[Classifier, int] | None = None
    ) -> dict[str, float]:
        logits = self._predict(model, self._size, dtype)
        answers = None if beside is None else self._predict(*beside, dtype)
        return group.from_first(lambda: self._metrics(logits, answers))

    def _metrics(self, logits: Tensor, answers: Tensor | None) -> dict[str, float]:
        if answers is None:
            return metrics(logits, self._labels, self._records)
        theirs = {f"{PARTNER}_{name}": value for name, value in metrics(answers, self._labels).items()}
        return {**metrics(logits, self._labels, encode(answers, None, precision="float32")), **theirs}

    def _predict(self, model: Classifier, size: int, dtype: torch.dtype | None) -> Tensor:
        if size not in self._renderers:
            self._renderers[size] = Renderer(self._data, size, self._device, workers=self._workers)
        return predict(model, self._data, self._renderers[size], dtype)


def student_of(path: Path, state: dict[str, Tensor], notes: dict[str, Any], student: str | None = None) -> Classifier:
    """The student in a run's file of weights, given what `read_weights` found there; on the CPU.

    student: the network's name, by default that in the notes, unless it is a function.
    """
    name = student or stored_network(notes["student"], path, "--student")
    network = build_network(name, notes["classes"], notes["input_size"])
    load_fitting(network, state, f"the weights in {path} and {name}")
    return Classifier(network, tuple(notes["mean"]), tuple(notes["std"])).to(memory_format=torch.channels_last)


def evaluate_run(
    where: str,
    data: str | None = None,
    cache: str | None = None,
    student: str | None = None,
    teacher: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    registry: str | None = None,
) -> dict[str, Any]:
    """Metrics of a run folder's last weights or of a weights file that kdcache wrote.

    data: other than the run's they are any labelled data with its classes, matched by name, and there is no agreement
    with the teacher. student, and teacher where one learnt beside it, name the networks where the file names functions.
    """
    path = Path(where)
    if not path.exists():
        raise NotFoundError(f"there is no run folder or weights file {where}")
    if path.is_dir():
        path = path / "last.safetensors"
        if not path.exists():
            raise NotFoundError(f"{where} is no run with a whole epoch: it has no {path.name}")
    state, notes = read_weights(path)
    if not notes:
        raise InputError(f"{path} was not written by kdcache: it does not say which network and data it belongs to")
    if not {"student", "classes", "data", "cache"} <= notes.keys():
        raise InputError(
            f"{path} is a taught teacher, and eval is for students: kdcache info shows how good a cache's teacher is"
        )
    on = pick_device(device)
    model = student_of(path, state, notes, student).to(on)
    beside = _beside(path, notes, teacher, on)
    if data is not None and cache is None and notes.get("class_ids"):
        other = open_data(data, "eval")
        if other.fingerprint(notes["full_contents"]) != notes["evaluation"]:
            other = whole_of(data, other)
            labels = labels_of_other(other, notes["class_names"], notes["class_ids"], path)
            figures = Judge(None, other, notes["input_size"], on, workers, labels)(model, beside=beside)
            return {"weights": str(path), "data": data, "images": len(other), **figures}
    place = notes.get("cache_path")
    found = _open(cache or (place if place and exists(place) else notes["cache"]), registry)
    if cache is None and found.key != notes["cache"]:
        raise MismatchError(f"{found.path} is not the cache of this run any more: give the one to use with --cache")
    evaluation = open_data(
        data or stored_data(notes["data"], path), "eval", unlabelled=found.identity.record.labels == 0
    )
    require_data(found, evaluation)
    return {"weights": str(path), **Judge(found, evaluation, notes["input_size"], on, workers)(model, beside=beside)}


def _beside(
    path: Path, notes: dict[str, Any], teacher: str | None, device: torch.device
) -> tuple[Classifier, int] | None:
    """The teacher that learnt with the student of these weights, as filed beside them, and its input size."""
    if not notes.get("beside_teacher"):
        return None
    file = path.with_name(f"{PARTNER}-{path.name}")
    if not file.exists():
        raise NotFoundError(f"{path} learnt beside a teacher, whose weights are not there any more: {file}")
    state, theirs = read_weights(file)
    name = teacher or stored_network(theirs["network"], file, "--teacher")
    network = build_network(name, notes["classes"], theirs["input_size"])
    load_fitting(network, state, f"the weights in {file} and {name}")
    model = Classifier(network, tuple(theirs["mean"]), tuple(theirs["std"])).to(device)
    model.to(memory_format=torch.channels_last)
    return model, theirs["input_size"]


def _open(where: str, registry: str | None, store_bytes: int | None = None) -> Cache | Beton:
    return Beton(where) if where.endswith(".beton") else open_cache(where, registry, store_bytes)


def cache_of(config: TrainConfig) -> Cache | Beton:
    """The cache asked for, or the only one that matches."""
    where = config.cache
    if where is None:
        try:
            return find_cache(config.data, config.teacher)
        except NotFoundError:
            shared = open_registry(config.registry, config.local_store_size) if config.registry else None
            if shared is None or not shared.objects.listable:
                raise
            return find_cache(config.data, config.teacher, shared)
    cache = _open(where, config.registry, config.local_store_size)
    built_by = cache.identity.teacher.network
    if config.teacher and config.teacher != built_by:
        raise MismatchError(f"{cache.path} was built by {built_by}, not by {config.teacher}")
    return cache


def _same_teacher(cache: Cache | Beton, config: TrainConfig, data: Dataset, device: torch.device) -> Teacher:
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


def _learning_teacher(
    cache: Cache | Beton, config: TrainConfig, data: Dataset, loss: BDKD, recipe: Recipe, device: torch.device
) -> LearningTeacher | None:
    """The teacher that learns beside bdkd's student, online; None from a cache."""
    if not config.online:
        if (loss.teacher_alpha, loss.regulariser, loss.start) != (BDKD.teacher_alpha, BDKD.regulariser, BDKD.start):
            raise InputError("bdkd's teacher_alpha, regulariser and start are of a teacher that learns: give --online")
        return None
    record, had = cache.identity.record, cache.identity.teacher
    if not record.labels:
        raise InputError("bdkd's teacher learns from labels too, and this cache was built with --unlabelled")
    mean, std = data.mean, data.std
    if loss.start == "taught":
        teacher = _same_teacher(cache, config, data, device)
        model, mean, std = teacher.model, had.mean, had.std
    else:
        if config.weights:
            raise InputError("--weights are those of a taught teacher: give --loss bdkd:start=taught")
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
