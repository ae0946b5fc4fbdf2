"""What a build starts from: both splits of the data, the teacher, and the identity of the cache that they give.

A `Draft` is what is known before the teacher is open, because an untaught teacher may have to be taught first. Opening
its teacher makes a `Source` of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.identity import Identity, RecordIdentity, ViewsIdentity
from kdcache.cache.records.encoding import default_precision
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import record_arrays
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data import classmap
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.defaults import Defaults, defaults_for, stored_classes
from kdcache.pipeline.data.split import Split, describe_data
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.process.progress import size
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import Teacher, load_teacher
from kdcache.pipeline.views.operations.kinds.geometry import Crop
from kdcache.pipeline.views.policy import check_policy, parse_policy
from kdcache.pipeline.views.render import RENDERER

Say = Callable[[str], None]
_PACKED = {".h5": "hdf5", ".beton": "ffcv"}  # what names of files that caches are packed into end with


@dataclass(frozen=True, eq=False)
class Draft:
    """A build before its teacher is open: what was asked for, both splits of the data, and what follows from them.

    defaults: those for the kind of dataset. policy: the view policy, spelled in full.
    """

    config: BuildConfig
    device: torch.device
    train: Dataset
    evaluation: Dataset
    defaults: Defaults
    policy: str

    def with_weights(self, weights: str | Path) -> Draft:
        """The same draft with a file of weights, or their name, for its teacher."""
        return replace(self, config=replace(self.config, weights=str(weights)))


@dataclass(frozen=True, eq=False)
class Source:
    """Both splits of a dataset with labels in the teacher's classes, the teacher, and the identity they give.

    Labels are int64 [N, L]. defaults: those for the kind of dataset.
    """

    train: Dataset
    evaluation: Dataset
    train_labels: NDArray[np.int64]
    evaluation_labels: NDArray[np.int64]
    teacher: Teacher
    identity: Identity
    defaults: Defaults

    def split(self, store: SplitStore) -> Split:
        """The images and labels whose records the store holds, with that store."""
        if store.split == "eval":
            return Split(self.evaluation, self.evaluation_labels, store)
        return Split(self.train, self.train_labels, store)

    def splits(self, cache: Cache) -> tuple[Split, Split]:
        """The train split and the evaluation split, with their stores in the cache."""
        return self.split(cache.train), self.split(cache.evaluation)


def _quiet(_: str) -> None:
    pass


def draft_build(config: BuildConfig, say: Say = _quiet) -> Draft:
    """Open the data and settle what can be settled without a teacher. Writes nothing.

    InputError where the data, the device, the view policy or the place asked for cannot be had.
    """
    device = pick_device(config.device)
    if config.out and "://" in config.out:
        raise InputError(f"--out {config.out}: caches are built in folders; --registry URL --push publishes them")
    if config.out and (suffix := Path(config.out).suffix) in _PACKED and not Path(config.out).exists():
        raise InputError(
            f"--out {config.out}: a cache is built in a folder; with --store {_PACKED[suffix]} the file lies beside it"
        )
    train = open_data(config.data, "train", unlabelled=config.unlabelled)
    evaluation = open_data(config.data, "eval", unlabelled=config.unlabelled)
    for note in filter(None, (train.note, evaluation.note)):
        say(note)
    defaults = defaults_for(train)
    return Draft(config, device, train, evaluation, defaults, check_policy(config.augment or defaults.augment))


def open_source(config: BuildConfig, say: Say = _quiet) -> Source:
    """Open the data and the teacher and describe what a build of them is. Writes nothing."""
    return open_teacher(draft_build(config, say), say)


def open_teacher(draft: Draft, say: Say = _quiet) -> Source:
    """Open the teacher of a draft and describe what a build by it is. Writes nothing.

    NotFoundError where there are no weights of that teacher; InputError where something does not fit.
    """
    config, data = draft.config, draft.train
    wanted = Wanted(config.teacher_size, config.teacher_mean, config.teacher_std, config.teacher_interpolation)
    teacher = load_teacher(config.teacher, data, draft.device, weights=config.weights, amp=config.amp, wanted=wanted)
    say(f"teacher: {teacher.about}")
    if not config.class_map and teacher.class_names is None and data.class_names:
        say(
            "note: nothing tells the names of the teacher's classes: its class i is taken for the data's class i "
            "(--class-map FILE says otherwise)"
        )
    teacher, to_teacher, class_map = _class_map(data, config.class_map, teacher, say)
    if teacher.classes < 2:
        raise InputError(f"the teacher has {teacher.classes} classes, at least 2 are needed: is {config.data} right?")
    same = np.array_equal(to_teacher, np.arange(len(to_teacher)))  # then one copy serves for both
    labels = [split.labels if same else to_teacher[split.labels] for split in (data, draft.evaluation)]
    policy = parse_policy(draft.policy)
    if not data.in_memory and isinstance(policy.geometry, Crop):
        say(f"note: {draft.policy} keeps each image's own frame; rrc,flip is usual for image files")
    views = ViewsIdentity(
        policy=draft.policy, seed=config.seed, renderer=RENDERER, sequence=config.sequence, mixed=policy.mixed
    )
    identity = Identity(
        format=views.format,
        teacher=teacher.identity,
        data=describe_data(data, config.full_fingerprint),
        evaluation=describe_data(draft.evaluation, config.full_fingerprint),
        views=views,
        record=_record(config, teacher.classes, labels[0].shape[1] * (2 if policy.mixed else 1)),
        class_map=class_map,
        part=config.part,
    )
    _require_shards_fit(identity)
    return Source(data, draft.evaluation, labels[0], labels[1], teacher, identity, draft.defaults)


def require_topk(config: BuildConfig, classes: int) -> None:
    """InputError unless --topk fits a teacher of so many classes."""
    if config.topk is not None and not 1 <= config.topk <= classes:
        raise InputError(f"--topk {config.topk} does not fit the teacher's {classes} classes")


def _record(config: BuildConfig, classes: int, labels: int) -> RecordIdentity:
    """What is stored for each view of a sample; InputError where the settings do not fit each other."""
    require_topk(config, classes)
    k = stored_classes(classes) if config.topk is None else config.topk
    dense = k is None or k == classes
    if dense and config.precision == "uint8":
        raise InputError("--precision uint8 is for top-k records (--topk): dense ones take float16 or float32")
    precision = config.precision or default_precision(dense)
    if precision == "uint8" and min(config.temperatures) < 1:
        raise InputError(
            f"temperature {min(config.temperatures):g} asks for finer gaps than uint8 has: give --precision float16"
        )
    return RecordIdentity(
        classes=classes,
        k=None if dense else k,
        temperatures=() if dense else config.temperatures,
        precision=precision,
        tail_std=config.tail_std and not dense,
        labels=labels,
    )


def _require_shards_fit(identity: Identity) -> None:
    record = identity.record
    specs = record_arrays(record, identity.data.samples, identity.part)
    largest = max(spec.chunk_bytes for spec in specs)
    if largest > chunks.MAX_CHUNK_BYTES:
        raise InputError(
            f"a shard would hold {size(largest)} in one array, more than the {size(chunks.MAX_CHUNK_BYTES)} allowed: "
            f"{record.k or record.classes} classes a record are too many, lower --topk"
        )


def _class_map(
    data: Dataset, class_map: str | None, teacher: Teacher, say: Say
) -> tuple[Teacher, NDArray[np.int64], str | None]:
    """The teacher that answers for the data's labels, its class id for each of the data's, and the map's digest."""
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
            f"the teacher has {teacher.classes} classes, but {data.name} has {len(own)}: "
            "give --class-map auto (by class names) or a file"
        )
    return teacher, own, None
