"""A teacher for a dataset that has no pretrained one: plain cross-entropy, filed so that build finds it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock

from kdcache.cache.errors import InputError
from kdcache.cache.registry.registry import Registry
from kdcache.pipeline.build.build import BuildResult
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Draft, draft_build, require_topk
from kdcache.pipeline.data.dataset import list_unreadable, open_data
from kdcache.pipeline.data.defaults import DATA, defaults_for
from kdcache.pipeline.pack import PackResult, pack
from kdcache.pipeline.process.progress import percent
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.share import build_shared, find_taught, open_plan, open_shared
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.pixels import pixels_of_data
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier, try_out
from kdcache.pipeline.teachers.weights import taught_file
from kdcache.pipeline.views.policy import check_policy
from kdcache.pipeline.views.render import Renderer
from kdcache.train import group
from kdcache.train.evaluation.metrics import metrics, predict
from kdcache.train.loaders.live import PlainLoader
from kdcache.train.loop.optimisers import Amp, Recipe
from kdcache.train.loop.runfolder import RunFolder
from kdcache.train.loop.trainer import fit, seeded
from kdcache.train.losses import CE

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TeachConfig:
    """What to teach. None means the default for the dataset's kind (defaults.py)."""

    teacher: str
    data: str = DATA
    augment: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    seed: int = 0
    device: str | None = None
    amp: Amp | None = None
    workers: int | None = None
    force: bool = False


def teach(config: TeachConfig, say: Callable[[str], None] = print) -> tuple[Path, float]:
    """Train the teacher and file it; its weights' file and top-1 (0..1) on the evaluation split.

    Stopped, it resumes where it was. One that is filed already is kept, unless `force`. Under torchrun by all ranks.
    """
    with group.joined(config.device) as device:
        return _teach(config, device, group.said_once(say))


def _teach(config: TeachConfig, device: torch.device, say: Callable[[str], None]) -> tuple[Path, float]:
    with group.one_first():
        data, evaluation = open_data(config.data, "train"), open_data(config.data, "eval")
    for note in filter(None, (data.note, evaluation.note)):
        say(note)
    if not data.labels.shape[1] or len(data.class_names) < 2:
        raise InputError(f"{config.data} has {len(data.class_names)} classes: a teacher is taught two or more")
    path = taught_file(config.teacher, data)
    if path.exists() and not config.force:
        raise InputError(f"{config.teacher} is taught on {data.name} already ({path}): --force teaches it anew")
    defaults = defaults_for(data)
    policy = check_policy(config.augment or defaults.augment)
    batch = config.batch_size or min(defaults.train_batch, len(data))
    size = pixels_of_data(data).size
    network = seeded(config.seed, lambda: build_network(config.teacher, len(data.class_names), size))
    model = Classifier(network, data.mean, data.std).to(device)
    model.to(memory_format=torch.channels_last)
    if (answers := try_out(model, config.teacher, size)) != len(data.class_names):
        raise InputError(f"{config.teacher} answers for {answers} classes, {data.name} has {len(data.class_names)}")
    recipe = Recipe(
        epochs=config.epochs or defaults.epochs,
        lr=config.lr or defaults.rate(batch),
        decay=defaults.decay if config.weight_decay is None else config.weight_decay,
        amp=config.amp,
    )
    settings = {
        "teacher": config.teacher, "data": data.fingerprint(), "augment": policy, "epochs": recipe.epochs,
        "batch_size": batch, "lr": recipe.lr, "weight_decay": recipe.decay, "seed": config.seed, "amp": config.amp,
        "stream": "teaching",
    }  # fmt: skip
    loader = PlainLoader(
        data, policy, batch, size, seed=config.seed, device=device, workers=config.workers,
        rank=group.rank(), world=group.world(),
    )  # fmt: skip
    work = path.with_suffix(".run")

    def open_folder() -> RunFolder:
        if config.force and not group.restarted():
            shutil.rmtree(work, ignore_errors=True)
        try:
            return RunFolder(work, settings, resume=work.exists())
        except InputError as e:
            raise InputError(f"{e} (--force teaches it from the start)") from e

    folder = group.from_first(open_folder)
    notes = {
        "input_size": size, "mean": list(data.mean), "std": list(data.std), "class_names": list(data.class_names),
    }  # fmt: skip
    say(f"teaching {config.teacher} on {data.name}: {recipe.epochs} epochs of {len(data):,} images on {device}")
    renderer = Renderer(evaluation, size, device, workers=config.workers)
    labels = torch.from_numpy(evaluation.labels[:, 0])
    history = fit(
        model,
        CE(),
        loader,
        recipe,
        lambda m: group.from_first(partial(metrics, predict(m, evaluation, renderer, recipe.dtype), labels)),
        folder,
        notes,
        say,
    )
    if group.rank() == 0:
        file_classifier(path, model, {**notes, "metrics": history[-1]})
        shutil.rmtree(work)
    group.wait()  # for the file
    say(f"{config.teacher} has top-1 {percent(history[-1]['top1'])} on {data.name}'s evaluation split: {path}")
    return path, history[-1]["top1"]


def build_and_teach(
    config: BuildConfig,
    registry: str | None = None,
    publish: bool = False,
    say: Callable[[str], None] = print,
    teacher: bool = True,
    store: Literal["zarr", "hdf5", "ffcv"] = "zarr",
) -> tuple[BuildResult, PackResult | None]:
    """`kdcache build`: build what the registry lacks; with `publish` push it, with another store than zarr pack it.

    teacher: whether its weights are pushed too. The teacher of the embedded digits is taught first where there is none.
    """
    if config.data == DATA:
        say(f"data: {DATA}, scikit-learn's 8x8 images, to try things out; --data names your own")
    shared = open_shared(registry, publish)
    draft = draft_build(config, say)
    draft = _with_digits_teacher(draft, shared, say)
    plan = open_plan(draft, shared, say)
    built = build_shared(plan, shared, publish, say, teacher)
    if store == "zarr" or this_rank().rank:
        return built, None
    return built, pack(built.path, store, data=plan.source.train, say=say)


def _with_digits_teacher(draft: Draft, shared: Registry | None, say: Callable[[str], None]) -> Draft:
    """The draft with the weights of the teacher that is taught on the embedded digits, so that the short form works.

    A teacher that is not here is taught first, unless caches here or in the registry are by one already.
    Other data, and teachers whose weights are named or come with a function, stay as they are.
    """
    config = draft.config
    if config.data != DATA or ":" in config.teacher or config.weights is not None:
        return draft
    data = open_data(DATA, "train") if config.unlabelled else draft.train  # it is taught with labels in any case
    weights = taught_file(config.teacher, data)
    if not weights.exists():
        require_topk(config, len(data.class_names))
        build_network(config.teacher, len(data.class_names), pixels_of_data(data).size)  # a known name?
        if found := find_taught(draft, shared, say):
            weights = found
        else:
            _teach_once(draft, weights, say)
    return draft.with_weights(weights)


def _teach_once(draft: Draft, taught: Path, say: Callable[[str], None]) -> None:
    """Teach in one of the processes that start together, while the others wait."""
    name = draft.config.teacher
    while this_rank().local_rank and not taught.exists():
        time.sleep(_POLL_SECONDS)
    taught.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(taught.with_suffix(".lock")):
        if not taught.exists():
            say(f"no {name} has been taught on {DATA} yet: teaching one first")
            _teach(TeachConfig(name), draft.device, say)  # without the other ranks


def unreadable_files(data: str, unlabelled: bool, say: Callable[[str], None]) -> list[str]:
    """Every image file of both splits that cannot be read, one `path: reason` each."""
    found = []
    for split in ("train", "eval"):
        say(f"reading every image of {data}, {split}")
        found += list_unreadable(data, split, unlabelled=unlabelled)
    return found
