"""`kdcache eval`: evaluate a student's weights again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.errors import InputError, MismatchError, NotFoundError
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.stores import open_store
from kdcache.pipeline.teachers.networks import build_network, load_fitting
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.pipeline.trust import stored_data, stored_network
from kdcache.train.evaluation.judge import Judge
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


def evaluate_run(
    where: str,
    data: str | None = None,
    cache: str | None = None,
    student: str | None = None,
    teacher: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    registry: str | None = None,
    say: Callable[[str], None] = print,
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
    found = open_store(cache or (place if place and exists(place) else notes["cache"]), registry)
    if cache is None and found.key != notes["cache"]:
        raise MismatchError(f"{found.where} is not the cache of this run any more: give the one to use with --cache")
    evaluation = open_data(
        data or stored_data(notes["data"], path), "eval", unlabelled=found.identity.record.labels == 0
    )
    require_data(found, evaluation)
    judge = Judge(found, evaluation, notes["input_size"], on, workers, parts=parts_of(found, registry, say))
    return {"weights": str(path), **judge(model, beside=beside)}


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
    return _classifier(name, notes["classes"], file, state, theirs).to(device), theirs["input_size"]
