"""`kdcache import`: logits that other projects have stored, as a cache.

A new kind of stored logits is a file like tinyvit.py and fkd.py, a line in `KINDS`, and its name in config.Kind.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder
from kdcache.cache.identity import Identity, RecordIdentity, TeacherIdentity, ViewsIdentity, id_dtype
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.build import suspicions
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.split import describe_data
from kdcache.pipeline.imports.config import ImportConfig, Kind
from kdcache.pipeline.imports.fkd import FKD
from kdcache.pipeline.imports.stored import Answers, Logits, encoded, parameters_digest, rounding
from kdcache.pipeline.imports.tinyvit import TinyViT
from kdcache.pipeline.process import provenance
from kdcache.pipeline.process.progress import Progress, duration, size

KINDS: dict[Kind, Callable[[Path, Dataset], Logits]] = {"tinyvit": TinyViT, "fkd": FKD}


@dataclass(frozen=True)
class ImportResult:
    """path, key, views and size (bytes) of the cache; records that this import has written (0: all were there)."""

    path: Path
    key: str
    views: int
    bytes: int
    records: int
    seconds: float


class _Unit(NamedTuple):
    """Records that are read together: these views of one part. digest: what they were when they were checked."""

    views: range
    part: int
    digest: bytes


def import_logits(config: ImportConfig, say: Callable[[str], None] = print) -> ImportResult:
    """Make a cache of stored logits, or complete it. All is read and checked first, since the key is a hash of it.

    After a kill at any moment the same import goes on, with the same result. Memory holds the dataset's names and one
    part: for tinyvit of one view, for fkd of all views, at most about 2 GiB (then fewer samples are a part). InputError
    where the stored logits are not what their format says, or not of this dataset.
    """
    start = time.monotonic()
    data, evaluation = (open_data(config.data, split, unlabelled=config.unlabelled) for split in ("train", "eval"))
    classes = _classes(config, data)
    source = KINDS[config.kind](Path(config.path), data)
    if source.k >= classes:
        raise InputError(f"{config.path} holds {source.k} classes a record, so there must be more than {classes}")
    total = source.views * len(data)
    say(f"{config.path}: top {source.k} of {classes} classes, {source.views} views of {len(data):,} samples")
    units = _checked(config, source, data, classes)
    identity = _identity(config, source, data, evaluation, classes, units)
    path = Path(config.out) if config.out else caches_folder() / identity.key
    say(f"cache {identity.key[:12]}: {identity.teacher.architecture} on {data.name}, in {path}")
    files.make_folder(path)
    cache, writer = Cache.create(path, identity), provenance.writer()
    with cache.writing(say), Progress("import", total, "records") as progress:
        for split, of in ((cache.train, data), (cache.evaluation, evaluation)):
            split.write_labels(of.labels.astype(id_dtype(classes)), writer)
            split.write_sizes(of.sizes, writer)
        written = sum(_write(config, source, cache, unit, writer, progress) for unit in units)
        cache.write_prior(writer)
    seconds = time.monotonic() - start
    say(f"done in {duration(seconds)}: {size(cache.size())}, {written:,} of {total:,} records by this import")
    return ImportResult(path, identity.key, source.views, cache.size(), written, seconds)


def _checked(config: ImportConfig, source: Logits, data: Dataset, classes: int) -> list[_Unit]:
    """Read and check everything, also that first choices fit the labels, and return the units."""
    units, tops = [], []
    with Progress("check", source.views * len(data), "records") as progress:
        for views in source.units():
            for part in range(-(-len(data) // source.part)):
                rows = range(part * source.part, min((part + 1) * source.part, len(data)))
                answers = source.read(views, rows, progress.advance)
                _require_sound(answers, classes, source, views, rows)
                units.append(_Unit(views, part, answers.digest()))
                if views.start == 0 and data.labels.size:
                    top = answers.p[0].argmax(1)[:, None]
                    tops.append(np.take_along_axis(answers.ids[0], top, 1)[:, 0])
    if data.labels.size and not config.allow_low_accuracy:
        _require_classes(np.concatenate(tops).astype(np.int64), data)
    return units


def _identity(
    config: ImportConfig, source: Logits, data: Dataset, evaluation: Dataset, classes: int, units: list[_Unit]
) -> Identity:
    digests = b"".join(unit.digest for unit in units)
    return Identity(
        teacher=TeacherIdentity(
            architecture=f"{config.teacher} (imported from {config.kind})",
            weights=hashlib.sha256(b"kdcache import 1\0" + source.dtype.str.encode() + digests).hexdigest(),
            # What it was shown is not known, and nothing is ever shown to it.
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            input_size=config.image_size,
            numeric="float32",
        ),
        data=describe_data(data, config.full_fingerprint),
        evaluation=describe_data(evaluation, config.full_fingerprint),
        views=ViewsIdentity(policy=source.policy, seed=0, renderer=config.kind),
        record=RecordIdentity(
            classes=classes,
            k=source.k,
            temperatures=(config.temperature,),
            precision="float16",
            tail_std=False,
            labels=data.labels.shape[1],
            lacks=("evaluation", "target_gap") if data.labels.shape[1] else ("evaluation",),
        ),
        class_map=None,
        part=source.part,
    )


def _write(
    config: ImportConfig, source: Logits, cache: Cache, unit: _Unit, writer: dict[str, str], progress: Progress
) -> int:
    """Commit what is not committed yet of a unit, and return how many records that were."""
    store, classes = cache.train, cache.identity.record.classes
    views, part, digest = unit
    missing = [view for view in views if not store.has(shard_name(view, part))]
    rows = store.rows(part)
    if not missing:
        progress.advance(len(rows) * len(views))
        return 0
    answers = source.read(views, rows, progress.advance)
    if answers.digest() != digest:
        raise InputError(f"{config.path} is being changed: import it again when that is over")
    # Nothing is known of the tail's classes, so all of them count as equally likely.
    sums = np.zeros(store.layout.tail_sums.shape[1:])
    for view in missing:
        at = view - views.start
        made = {name: of_views[at] for name, of_views in answers.made.items()}
        arrays = {**encoded(answers.ids[at], answers.p[at], config.temperature, classes), **made}
        store.write_shard(view, part, arrays, parameters_digest(made), writer, sums if view == 0 else None)
    return len(rows) * len(missing)


def _classes(config: ImportConfig, data: Dataset) -> int:
    """How many classes the teacher had. InputError where that is not known, or contradicts the dataset."""
    own = len(data.class_names)
    if config.classes is None and not own:
        raise InputError(f"{config.data} says nothing of classes here: give --classes, of which the teacher had them")
    if own and config.classes not in (None, own):
        raise InputError(
            f"--classes {config.classes}: {data.name} has {own} classes; --unlabelled does without its labels"
        )
    return config.classes or own


def _require_classes(tops: NDArray[np.int64], data: Dataset) -> None:
    """InputError where the stored first choices [N] are near chance, or fit after the classes change places."""
    labels, names = data.labels[:, 0], dict(enumerate(data.class_names))
    if len(np.unique(labels)) < 2:
        return
    some = suspicions.choose(labels, len(data), suspicions.count_of(len(names), len(data)))
    advice = f"is this {data.name} in the order of classes that was stored? --allow-low-accuracy imports it"
    suspicions.require_order(labels[some], tops[some], names, "the stored answers'", advice)
    found = suspicions.agreement(labels, tops)
    if found.near_chance:
        raise InputError(
            f"the stored answers name the label of {100 * found.accuracy:.1f}% of the images, "
            f"{100 * found.limit:.1f}% would be above chance: are they of {data.name}, with its classes in this order? "
            "--allow-low-accuracy imports them"
        )


def _require_sound(answers: Answers, classes: int, source: Logits, views: range, rows: range) -> None:
    """Raise InputError, which names the record, for anything that no softmax gives."""
    for view, ids, stored in zip(views, answers.ids, answers.p, strict=True):
        given = stored.astype(np.float64)
        none = ~((given >= 0) & (given <= 1)).all(1) | (given[:, 0] == 0)
        p, stored = (np.where(none[:, None], 0, rows) for rows in (given, stored))
        ordered = np.sort(ids, 1)
        for problem, bad in (
            (f"class ids above {classes - 1} (--classes)", (ids >= classes).any(1)),
            ("a class twice", (ordered[:, 1:] == ordered[:, :-1]).any(1)),
            ("probabilities that are none", none),
            ("probabilities that increase along a record", (p[:, 1:] > p[:, :-1]).any(1)),
            ("probabilities whose sum is above 1", p.sum(1) > 1 + rounding(stored)),
        ):
            if bad.any():
                raise InputError(f"{source.where(view, rows[int(bad.argmax())])} has {problem}")
