"""What a build is of: the data with labels in the teacher's classes, the teacher, and the identity they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.identity import DataIdentity, Identity, RecordIdentity, ViewsIdentity
from kdcache.cache.records import default_precision
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import record_arrays
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data import classmap
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.defaults import defaults_for, stored_classes
from kdcache.pipeline.process.progress import size
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import Teacher, load_teacher, pick_device
from kdcache.pipeline.views.policy import check_policy
from kdcache.pipeline.views.render import RENDERER


@dataclass(frozen=True, eq=False)
class Source:
    """Both splits of a dataset with labels in the teacher's classes, the teacher, and the identity they give."""

    train: Dataset
    evaluation: Dataset
    train_labels: NDArray[np.int64]
    evaluation_labels: NDArray[np.int64]
    teacher: Teacher
    identity: Identity


def open_source(config: BuildConfig, say: Callable[[str], None] = lambda _: None) -> Source:
    """Open the data and the teacher and describe what a build of them is. Writes nothing."""
    device = pick_device(config.device)
    data = open_data(config.data, "train", unlabelled=config.unlabelled)
    evaluation = open_data(config.data, "eval", unlabelled=config.unlabelled)
    for note in filter(None, (data.note, evaluation.note)):
        say(note)
    wanted = Wanted(config.teacher_size, config.teacher_mean, config.teacher_std, config.teacher_interpolation)
    teacher = load_teacher(config.teacher, data, device, weights=config.weights, amp=config.amp, wanted=wanted)
    say(f"teacher: {teacher.about}")
    if not config.class_map and teacher.class_names is None and data.class_names:
        say(
            "note: nothing tells the names of the teacher's classes: its class i is taken for the data's class i "
            "(--class-map FILE says otherwise)"
        )
    teacher, to_teacher, class_map = _class_map(data, config.class_map, teacher, say)
    if teacher.classes < 2:
        raise InputError(f"the teacher has {teacher.classes} classes, at least 2 are needed: is {config.data} right?")
    check_options(config, teacher.classes)
    labels = [to_teacher[split.labels] for split in (data, evaluation)]
    policy = check_policy(config.augment or defaults_for(data).augment)
    if not data.in_memory and "crop" in policy.split(","):
        say(f"note: {policy} keeps each image's own frame; rrc,flip is usual for image files")
    k = stored_classes(teacher.classes) if config.topk is None else config.topk
    dense = k is None or k == teacher.classes
    if dense and config.precision == "uint8":
        raise InputError("--precision uint8 is for top-k records (--topk): dense ones take float16 or float32")
    precision = config.precision or default_precision(dense)
    if precision == "uint8" and min(config.temperatures) < 1:
        raise InputError(
            f"temperature {min(config.temperatures):g} asks for finer gaps than uint8 has: give --precision float16"
        )
    identity = Identity(
        teacher=teacher.identity,
        data=describe_data(data, config.full_fingerprint),
        evaluation=describe_data(evaluation, config.full_fingerprint),
        views=ViewsIdentity(policy=policy, seed=config.seed, renderer=RENDERER),
        record=RecordIdentity(
            classes=teacher.classes,
            k=None if dense else k,
            temperatures=() if dense else config.temperatures,
            precision=precision,
            tail_std=config.tail_std and not dense,
            labels=labels[0].shape[1],
        ),
        class_map=class_map,
        part=config.part,
    )
    largest = max(spec.chunk_bytes for spec in record_arrays(identity.record, len(data), config.part))
    if largest > chunks.MAX_CHUNK_BYTES:
        raise InputError(
            f"a shard would hold {size(largest)} in one array, the most is {size(chunks.MAX_CHUNK_BYTES)}: "
            f"{identity.record.k or teacher.classes} classes a record are too many, lower --topk"
        )
    return Source(data, evaluation, labels[0], labels[1], teacher, identity)


def check_options(config: BuildConfig, classes: int) -> None:
    """InputError for what no data can make good, before a teacher of so many classes is taught or asked."""
    if config.augment:
        check_policy(config.augment)
    if config.topk is not None and not 1 <= config.topk <= classes:
        raise InputError(f"--topk {config.topk} does not fit the teacher's {classes} classes")
    if config.out and "://" in config.out:
        raise InputError(f"--out {config.out}: caches are built in folders; --registry URL --push publishes them")


def _class_map(
    data: Dataset, class_map: str | None, teacher: Teacher, say: Callable[[str], None]
) -> tuple[Teacher, NDArray[np.int64], str | None]:
    """The teacher that answers for the data's labels; its class id for each of the dataset's; the map's digest."""
    own = np.arange(len(data.class_names))
    if class_map and len(own):
        groups = classmap.map_classes(data.class_names, class_map, teacher.class_names, teacher.classes)
        if classmap.is_merged(groups):
            say(
                f"note: {class_map} makes one class of several of the teacher's, so students have the data's {len(own)}"
            )
            teacher.model.register_forward_hook(lambda _, __, logits: classmap.merged(logits, groups))
            return replace(teacher, classes=len(own), class_names=data.class_names), own, classmap.digest(groups)
        if both := classmap.shared(data.class_names, groups):
            say(f"note: by {class_map}, {', '.join(both)} are one class of the teacher's, and so of the students'")
        return teacher, np.array(groups, np.int64).reshape(-1), classmap.digest(groups)
    if len(own) not in (0, teacher.classes):
        raise InputError(
            f"the teacher has {teacher.classes} classes, {data.name} has {len(own)}: "
            "give --class-map auto (by class names) or a file"
        )
    return teacher, own, None


def describe_data(data: Dataset, full: bool) -> DataIdentity:
    """What an identity says of one split."""
    return DataIdentity(
        name=data.name,
        split="train" if data.split == "train" else "eval",
        samples=len(data),
        fingerprint=data.fingerprint(full),
        full_contents=full,
        files=not data.in_memory,
    )
