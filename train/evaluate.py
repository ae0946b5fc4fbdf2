"""`kdcache eval`: evaluate a student's weights again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.errors import InputError, MismatchError, NotFoundError
from kdcache.cache.files import is_there
from kdcache.pipeline.commandline.terminal import figure
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.stores import Stored, open_store
from kdcache.pipeline.teachers.checkpoints import open_checkpoint
from kdcache.pipeline.teachers.networks import build_network, load_fitting
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import notes_of, read_weights
from kdcache.pipeline.trust import stored_data, stored_network, trusting
from kdcache.train.evaluation.analysis.analysis import Analysis, analyse, described
from kdcache.train.evaluation.analysis.classes import names_of_classes
from kdcache.train.evaluation.judge import Answers, Judge, on_training_images
from kdcache.train.evaluation.otherdata import labels_of_other, whole_of
from kdcache.train.evaluation.parts import parts_of
from kdcache.train.loaders.cached import require_data
from kdcache.train.loop.watching import PARTNER
from kdcache.train.plan.resuming import exists


def student_of(path: Path, state: dict[str, Tensor], notes: dict[str, Any], student: str | None = None) -> Classifier:
    """The student in a run's file of weights, given what `read_weights` found there; on the CPU.

    student: the network's name, by default that in the notes, unless it is a function.
    """
    name = student or stored_network(notes["student"], path, "--student")
    return _classifier(name, notes["classes"], path, state, notes)


def _classifier(name: str, classes: int, path: Path, state: dict[str, Tensor], notes: dict[str, Any]) -> Classifier:
    """The network of that name with the weights in a file, for images as the file's notes say; on the CPU."""
    network = build_network(name, classes, notes["input_size"])
    load_fitting(network, state, f"the weights in {path} and {name}")
    return Classifier(network, tuple(notes["mean"]), tuple(notes["std"])).to(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Trained:
    """A run's file of weights, read: its notes, the student with the weights in it, on the CPU, and their tensors."""

    path: Path
    notes: dict[str, Any]
    model: Classifier
    state: dict[str, Tensor]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class that the student answers for; its number where the run's data have no name for it."""
        notes = self.notes
        return names_of_classes(notes["classes"], notes["class_names"], notes.get("class_ids") or [])


def open_trained(
    where: str, student: str | None = None, what: str = "eval", say: Callable[[str], None] = print
) -> Trained:
    """Read a run folder's last weights, or a weights file that kdcache wrote; `what` says in errors what they are for.

    student: names the network, where the file names a function. say: gets a note where the file has no checksums.
    """
    path = Path(where)
    if not is_there(path):
        raise NotFoundError(f"there is no run folder or weights file {where}")
    if path.is_dir():
        path = path / "last.safetensors"
        if not path.exists():
            raise NotFoundError(f"{where} is no run with a whole epoch: it has no {path.name}")
    checkpoint = open_checkpoint(path)
    state, notes = checkpoint.tensors, notes_of(checkpoint)
    if not notes:
        raise InputError(f"{path} was not written by kdcache: it does not say which network and data it belongs to")
    if not {"student", "classes", "data", "cache", "evaluation", "full_contents"} <= notes.keys():
        raise InputError(
            f"{path} is a taught teacher, and {what} is for students: kdcache info shows how good a cache's teacher is"
        )
    if not checkpoint.checked:
        say(f"note: {path} has no checksums, since an earlier version wrote it: damage to it would not be found")
    return Trained(path, notes, student_of(path, state, notes, student), state)


@dataclass(frozen=True, eq=False)
class Examined:
    """A student's answers for the evaluation images, and what they tell.

    about: what other data it was asked about, if it was. figures: its `metrics`. images: the evaluation split, whose
    labels need not be counted as the student's are. class_names: of the student's classes.
    """

    weights: Path
    about: dict[str, Any]
    figures: dict[str, float]
    analysis: Analysis
    answers: Answers
    images: Dataset
    class_names: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """All of it but the answers, as plain data."""
        return {"weights": str(self.weights), **self.about, **self.figures, "analysis": asdict(self.analysis)}

    def text(self) -> str:
        """The most of it, for people."""
        lines = [f"{k:13} {v}" for k, v in (("weights", self.weights), *self.about.items())]
        lines += [f"{k:13} {figure(k, v)}" for k, v in self.figures.items()]
        return "\n".join([*lines, *described(self.analysis)])


def evaluate_run(where: str, data: str | None = None, **how: Any) -> dict[str, Any]:
    """Do what `examine_run` does, with the same arguments, and return the facts."""
    return examine_run(where, data, **how).facts()


def examine_run(
    where: str,
    data: str | None = None,
    cache: str | None = None,
    student: str | None = None,
    teacher: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    registry: str | None = None,
    train_images: int | None = None,
    say: Callable[[str], None] = print,
    trust: str | None = None,
) -> Examined:
    """Evaluate a run folder's last weights or a weights file that kdcache wrote.

    data: other than the run's they are any labelled data with its classes, matched by name, and there is no agreement
    with the teacher. student, and teacher where one learnt beside it, name the networks where the file names functions.
    train_images: on how many training images the student is compared with its teacher too; None for 2,000 where the
    cache and the images can be had here. trust: a file of keys, by one of which the cache has to be signed.
    """
    trained = open_trained(where, student, say=say)
    on = pick_device(device)
    model = trained.model.to(on)
    beside = _beside(trained.path, trained.notes, teacher, on)
    found, evaluation, labels, about = _judged_on(trained, data, cache, registry, trust)
    size, names = trained.notes["input_size"], trained.class_names
    parts = {} if found is None else parts_of(found, registry, say, trust)
    answers = Judge(found, evaluation, size, on, workers, labels, parts).answers(model, beside)
    training = None
    if found is not None:
        spec = data or trained.notes["data"]
        training = on_training_images(found, spec, train_images, say, model, size, on, workers, beside)
    elif train_images:
        raise InputError(f"--train-images: nothing is known of what a teacher answers for {about['data']}")
    analysis = analyse(answers, names, training)
    return Examined(trained.path, about, answers.figures(), analysis, answers, evaluation, names)


def _judged_on(
    trained: Trained, data: str | None, cache: str | None, registry: str | None, trust: str | None
) -> tuple[Stored | None, Dataset, NDArray[np.int64] | None, dict[str, Any]]:
    """The cache and the images to evaluate on; for other data than the run's, labels and what to say in place of it."""
    path, notes = trained.path, trained.notes
    if data is not None and cache is None and notes.get("class_ids"):
        other = open_data(data, "eval")
        if other.fingerprint(notes["full_contents"]) != notes["evaluation"]:
            other = whole_of(data, other)
            labels = labels_of_other(other, notes["class_names"], notes["class_ids"], path)
            return None, other, labels, {"data": data, "images": len(other)}
    place = notes.get("cache_path")
    found = open_store(cache or (place if place and exists(place) else notes["cache"]), registry)
    found = trusting(found, trust)
    if cache is None and found.key != notes["cache"]:
        raise MismatchError(f"{found.where} is not the cache of this run any more: give the one to use with --cache")
    evaluation = open_data(
        data or stored_data(notes["data"], path), "eval", unlabelled=found.identity.record.labels == 0
    )
    require_data(found, evaluation)
    return found, evaluation, None, {}


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
    if not teacher and "network" not in theirs:
        raise InputError(f"{file} does not say which network it holds the weights of: give --teacher NAME")
    name = teacher or stored_network(theirs["network"], file, "--teacher")
    return _classifier(name, notes["classes"], file, state, theirs).to(device), theirs["input_size"]
