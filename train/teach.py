"""A teacher for a dataset that has no pretrained one: plain cross-entropy, filed so that build finds it."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.utils.flop_counter import FlopCounterMode

from kdcache.cache.errors import InputError
from kdcache.cache.records.choices import StoreName
from kdcache.cache.registry.registry import Registry
from kdcache.pipeline.build.build import BuildResult
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Draft, draft_build, require_topk
from kdcache.pipeline.cluster.builder import on_cluster
from kdcache.pipeline.cluster.session import require_address
from kdcache.pipeline.data.dataset import Dataset, list_unreadable, open_data
from kdcache.pipeline.data.defaults import DATA, defaults_for
from kdcache.pipeline.pack import PackResult, pack
from kdcache.pipeline.process.functions import names_code
from kdcache.pipeline.process.progress import duration, percent
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.share import build_shared, find_taught, open_plan, open_shared
from kdcache.pipeline.teachers.networks import built_for, outline
from kdcache.pipeline.teachers.pixels import pixels_of_data
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier
from kdcache.pipeline.teachers.weights import taught_file
from kdcache.pipeline.views.policy import parse_policy
from kdcache.pipeline.views.render import Renderer
from kdcache.train import group
from kdcache.train.config import TeachConfig
from kdcache.train.evaluation.metrics import metrics, predict
from kdcache.train.loaders.live import PlainLoader
from kdcache.train.loaders.order import usual_batch
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.runfolder import RunFolder
from kdcache.train.loop.trainer import Training, fit, new_classifier
from kdcache.train.loop.watching import guesses
from kdcache.train.losses import CE

_POLL_SECONDS = 0.5
_LONG = 90.0  # seconds of teaching on the digits, after which a smaller teacher is named
_QUICK = "resnet20"
_USUAL_SIZE = 224  # pixels, at which any network can be built


@dataclass(frozen=True, eq=False)
class TeachPlan:
    """What is taught, on which images and how: every default is looked up.

    batch: samples a batch, on all ranks together. size: the teacher's images, in pixels. path: its file of weights,
    beside which the run that teaches it lies as long as it lasts.
    """

    asked: TeachConfig
    data: Dataset
    evaluation: Dataset
    policy: str
    batch: int
    size: int
    recipe: Recipe
    path: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's config.json holds, so that nothing else is gone on with."""
        asked, recipe = self.asked, self.recipe
        return {
            "teacher": asked.teacher, "data": self.data.fingerprint(), "augment": self.policy, "epochs": recipe.epochs,
            "batch_size": self.batch, "lr": recipe.lr, "weight_decay": recipe.decay, "seed": asked.seed,
            "amp": asked.amp, "stream": "teaching",
        }  # fmt: skip

    @property
    def notes(self) -> dict[str, Any]:
        """What stands in the teacher's file of weights."""
        data = self.data
        return {
            "input_size": self.size, "mean": list(data.mean), "std": list(data.std),
            "class_names": list(data.class_names),
        }  # fmt: skip


def teach(config: TeachConfig, say: Callable[[str], None] = print) -> tuple[Path, float]:
    """Train the teacher and file it; returns its weights' file and its top-1 (0..1) on the evaluation split.

    Stopped, it resumes where it was. A teacher that is filed already is refused with InputError, unless `force`. Under
    torchrun all ranks teach it together.
    """
    with group.joined(config.device) as device:
        return _teach(config, device, group.said_once(say))


def _teach(config: TeachConfig, device: torch.device, say: Callable[[str], None], views: int = 0) -> tuple[Path, float]:
    """views: for how many views of a cache it answers afterwards, which is foretold too."""
    plan, model = _plan(config, device, say)
    name, data, evaluation, size = config.teacher, plan.data, plan.evaluation, plan.size
    loader = PlainLoader(
        data, plan.policy, plan.batch, size, seed=config.seed, device=device, workers=config.workers,
        rank=group.rank(), world=group.world(),
    )  # fmt: skip
    folder = group.from_first(lambda: _open_folder(plan))
    say(f"teaching {name} on {data.name}: {plan.recipe.epochs} epochs of {len(data):,} images on {device}")
    if data.name == DATA:
        _foretell(plan, model, len(loader), views, say)
    renderer = Renderer(evaluation, size, device, workers=config.workers)
    labels = torch.from_numpy(evaluation.labels[:, 0])

    def evaluate(model: Classifier) -> dict[str, float]:
        logits = predict(model, evaluation, renderer, plan.recipe.dtype)
        return group.from_first(lambda: metrics(logits, labels))

    history = fit(model, CE(), loader, plan.recipe, evaluate, folder, plan.notes, say)
    if group.rank() == 0:
        file_classifier(plan.path, model, {**plan.notes, "metrics": history[-1]})
        shutil.rmtree(folder.path)
    group.wait()  # for the file
    if note := guesses(history[-1], len(data.class_names), plan.recipe.lr):
        say(note)
    say(f"{name} has top-1 {percent(history[-1]['top1'])} on {data.name}'s evaluation split: {plan.path}")
    return plan.path, history[-1]["top1"]


def _foretell(plan: TeachPlan, model: Classifier, steps: int, views: int, say: Callable[[str], None]) -> None:
    """Say how long it takes to teach it, and to build a cache of so many views by it afterwards.

    A few steps and answers are timed, by a copy: the model and the random numbers that it draws stay as they are.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        training = Training(copy.deepcopy(model), CE(), plan.recipe, steps)
        rows = plan.batch // group.world()
        images = torch.zeros((rows, 3, plan.size, plan.size), dtype=torch.uint8, device=device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.zeros(rows, dtype=torch.int64, device=device)

        def step() -> None:
            training.learn(images, labels, None)
            training.update()

        def answer() -> None:
            with torch.inference_mode():
                training.model.eval()(images)

        training.model.train()
        a_step, an_image = _seconds(step, device), _seconds(answer, device) / rows
    seconds = plan.recipe.epochs * (steps * a_step + len(plan.evaluation) * an_image)
    then = views * len(plan.data) + len(plan.evaluation)
    later = f", and then to build {views} views of them about {duration(then * an_image)}" if views else ""
    say(f"this takes about {duration(seconds)}{later}")
    if seconds > _LONG:
        say(f"note: a small network takes much less, such as --teacher {_QUICK}")


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """How long a run takes: the shorter of two, after a first one."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _plan(config: TeachConfig, device: torch.device, say: Callable[[str], None]) -> tuple[TeachPlan, Classifier]:
    """Look up the data and every default, and make the network.

    InputError for data without classes, for a teacher that is there, and for a network that does not fit the data.
    """
    with group.one_first():
        data, evaluation = open_data(config.data, "train"), open_data(config.data, "eval")
    for note in filter(None, (data.note, evaluation.note)):
        say(note)
    if not data.labels.shape[1] or len(data.class_names) < 2:
        raise InputError(f"{config.data} has {len(data.class_names)} classes: a teacher is taught two or more")
    path = taught_file(config.teacher, data)
    if path.exists() and not config.force:
        raise InputError(f"{config.teacher} is taught on {data.name} already ({path}): --force teaches it again")
    size = _size_of(config.teacher, data)
    model = _untaught(config, data, size, device)
    defaults = defaults_for(data)
    if data.name == DATA:
        defaults = defaults.to_teach(multiply_adds(model, size) + 2 * sum(w.numel() for w in model.parameters()))
    policy = parse_policy(config.augment or defaults.augment)
    batch = config.batch_size or usual_batch(defaults.train_batch, len(data), policy.mixed, group.world())
    recipe = Recipe(
        epochs=config.epochs or defaults.epochs,
        lr=config.lr or defaults.rate(batch),
        decay=defaults.decay if config.weight_decay is None else config.weight_decay,
        amp=config.amp,
    )
    return TeachPlan(config, data, evaluation, str(policy), batch, size, recipe, path), model


def _untaught(config: TeachConfig, data: Dataset, size: int, device: torch.device) -> Classifier:
    """The network before it is taught. InputError, which tells what helps, if it does not take images so small."""
    name, classes = config.teacher, len(data.class_names)
    try:
        return new_classifier(name, classes, size, data, device, config.seed, whose=f"{data.name} has")
    except InputError as e:
        if data.name != DATA or names_code(name):
            raise
        outline(name, classes, _USUAL_SIZE)  # raises an error of its own for a name that no network has
        raise InputError(f"{e}; on {DATA} take a network for small images, such as {_QUICK}") from e


def multiply_adds(model: Classifier, size: int) -> int:
    """The multiply-adds of the network's answer to one image, those of convolutions and products of matrices."""
    image = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=model.mean.device)
    was_training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(was_training)
    return int(counter.get_total_flops()) // 2


def _open_folder(plan: TeachPlan) -> RunFolder:
    """The folder of the run that teaches it, which goes on where it stopped. InputError where that was another run."""
    work = plan.path.with_suffix(".run")
    if plan.asked.force and not group.restarted():
        shutil.rmtree(work, ignore_errors=True)
    try:
        return RunFolder(work, plan.settings, resume=work.exists())
    except InputError as e:
        raise InputError(f"{e} (--force teaches it from the start)") from e


def build_and_teach(
    config: BuildConfig,
    registry: str | None = None,
    publish: bool = False,
    say: Callable[[str], None] = print,
    teacher: bool = True,
    store: StoreName = "zarr",
    ray: str | None = None,
    trust: str | None = None,
) -> tuple[BuildResult, PackResult | None]:
    """`kdcache build`: build what the registry lacks; with `publish` push it, with another store than zarr pack it.

    teacher: whether its weights are pushed too. ray: the address of the Ray cluster on which the teacher answers, so
    that this process needs no GPU. trust: a file of keys, by one of which a cache in the registry has to be signed. The
    teacher of the embedded digits is taught first where there is none.
    """
    shared = open_shared(registry, publish, trust)
    if ray is not None:
        require_address(ray)
    draft = draft_build(config if ray is None else replace(config, device="cpu"), say)
    if store == "ffcv" and parse_policy(draft.policy).mixed:
        raise InputError(f"--store ffcv has no place for mixed views ({draft.policy}): take --store zarr or hdf5")
    draft = _with_digits_teacher(draft, shared, say)
    plan = open_plan(draft, shared, say)
    with nullcontext(plan) if ray is None else on_cluster(plan, config, ray) as plan:
        built = build_shared(plan, shared, publish, say, teacher, whole=store != "zarr")
    if store == "zarr" or this_rank().rank:
        return built, None
    return built, pack(built.path, store, data=plan.source.train, say=say)


def _with_digits_teacher(draft: Draft, shared: Registry | None, say: Callable[[str], None]) -> Draft:
    """The draft with the weights of the teacher that is taught on the embedded digits, so that the short form works.

    A teacher that is not here is taught first, unless caches here or in the registry are by one already.
    Other data, and teachers whose weights are named or come with a function, stay as they are.
    """
    config = draft.config
    if config.data != DATA or names_code(config.teacher) or config.weights is not None:
        return draft
    data = open_data(DATA, "train") if config.unlabelled else draft.train  # it is taught with labels in any case
    weights = taught_file(config.teacher, data)
    if not weights.exists():
        require_topk(config, len(data.class_names))
        # Raises an error of its own where there is no such network, or none for such images.
        _untaught(TeachConfig(config.teacher), data, _size_of(config.teacher, data), draft.device)
        if found := find_taught(draft, shared, say):
            weights = found
        else:
            _teach_once(draft, weights, say)
    return draft.with_weights(weights)


def _size_of(teacher: str, data: Dataset) -> int:
    """The size of the images that a teacher of that name is taught with, in pixels."""
    return built_for(teacher) or pixels_of_data(data).size


def _teach_once(draft: Draft, taught: Path, say: Callable[[str], None]) -> None:
    """Teach in one of the processes that start together, while the others wait."""
    name = draft.config.teacher
    while this_rank().local_rank and not taught.exists():
        time.sleep(_POLL_SECONDS)
    taught.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(taught.with_suffix(".lock")):
        if not taught.exists():
            say(f"no {name} has been taught on {DATA} yet: teaching one first")
            views = draft.config.views or draft.defaults.views
            _teach(TeachConfig(name), draft.device, say, views)  # without the other ranks


def unreadable_files(data: str, unlabelled: bool, say: Callable[[str], None]) -> list[str]:
    """Every image file of both splits that cannot be read, one `path: reason` each."""
    found = []
    for split in ("train", "eval"):
        say(f"reading every image of {data}, {split}")
        found += list_unreadable(data, split, unlabelled=unlabelled)
    return found
