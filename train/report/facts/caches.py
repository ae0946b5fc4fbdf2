"""What is to be told of a cache: how good its teacher is, what its records hold, and which samples are hard for it.

Every record of the evaluation split is read. Of the training views so many are read as `BUDGET` allows; what was read
is among the facts, so that a page can say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import KdcacheError, NotFoundError
from kdcache.cache.home import caches_folder
from kdcache.cache.identity import SplitName
from kdcache.cache.records.records import Records
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.info import built
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.stores import Stored
from kdcache.train.report.facts.tally import Tally

VIEWS = 4  # training views that are read at most
BUDGET = 250_000_000  # stored values that are read of training views: some six million records of 20 classes
SEED = 0  # of the parts that are read, where not all are
PICKED = 12  # samples in each list
SHOWN = 4  # answers of each sample
_PIECE = 1 << 18  # values of records that are looked at at once
_MASSES = 50_000  # records that the mass by temperature is taken of
T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """What the views that were read of a split say of each of its samples [N], as sums; `seen` counts the views.

    nll is None where the records do not hold the label's probability.
    """

    split: SplitName
    views: tuple[int, ...]
    parts: tuple[int, ...]
    seen: NDArray[np.int32]
    entropy: NDArray[np.float32]
    nll: NDArray[np.float32] | None

    @property
    def read(self) -> NDArray[np.int64]:
        """The samples of which records were read."""
        return np.flatnonzero(self.seen)

    def hardest(self, count: int) -> list[int]:
        """The samples with the highest mean nll of the label, that first; [] where that is not known."""
        return [] if self.nll is None else self._highest(self.nll, count)

    def most_ambiguous(self, count: int) -> list[int]:
        """The samples with the highest mean entropy, that first."""
        return self._highest(self.entropy, count)

    def _highest(self, sums: NDArray[np.float32], count: int) -> list[int]:
        read = self.read
        means = sums[read] / self.seen[read]
        return [int(at) for at in read[np.argsort(-means, kind="stable")[:count]]]


def cache_facts(stored: Stored, names: Sequence[str]) -> tuple[dict[str, Any], dict[SplitName, Samples]]:
    """All facts of a cache that need no images; and of each split that was read, what is said of its samples.

    names: of the teacher's classes. `missing` among the facts holds, by name, why something cannot be told.
    """
    i = stored.identity
    missing: dict[str, str] = {}
    facts: dict[str, Any] = {
        "key": stored.key,
        "where": stored.where,
        "identity": i.model_dump(mode="json"),
        "temperature": shown_temperature(stored),
        "views": list(stored.views),
        "under_way": [],
        "samples": i.data.samples,
        "evaluation_samples": i.evaluation.samples,
        "built": [],
        "members": [{"key": m.key, "weight": m.weight, "here": (caches_folder() / m.key).exists()} for m in i.members],
        "evaluation": None,
        "training": None,
        "mass": {},
        "missing": missing,
        "bytes": stored.size() if isinstance(stored, Cache) else stored.path.stat().st_size,
        "store": ("hdf5" if stored.packed else "zarr") if isinstance(stored, Cache) else "ffcv",
    }
    if isinstance(stored, Cache):
        facts["under_way"] = sorted(set(stored.train.committed()) - set(stored.views))
        facts["built"] = _tried(missing, "built", lambda: built(stored)) or []
    samples: dict[SplitName, Samples] = {}
    if held := _tried(missing, "evaluation", lambda: _evaluation(stored, names)):
        facts["evaluation"], samples["eval"] = held
    if trained := _tried(missing, "training", lambda: _training(stored, names)):
        facts["training"], of_views = trained
        samples["train"] = of_views
        facts["mass"] = _tried(missing, "mass", lambda: _masses(stored, of_views)) or {}
    return facts, samples


def shown_temperature(stored: Stored) -> float:
    """The temperature at which answers are shown: 1, or the lowest one that is stored."""
    record = stored.identity.record
    return 1.0 if record.dense or 1.0 in record.temperatures else min(record.temperatures)


def answers_of(
    stored: Stored, split: SplitName, samples: list[int], views: tuple[int, ...]
) -> dict[int, dict[int, Records]]:
    """The records of some samples of a split by view and sample, each of one row."""
    found: dict[int, dict[int, Records]] = {}
    for view in views:
        found[view] = {}
        for part in sorted({_part_of(stored, split, sample) for sample in samples}):
            for first, records in _pieces(stored, split, view, [part]):
                for sample in samples:
                    if first <= sample < first + len(records):
                        at = sample - first
                        found[view][sample] = records[torch.tensor([at])]
    return found


def distribution(records: Records, temperature: float) -> list[tuple[int, float]]:
    """The most probable classes of one record, and their probabilities."""
    ids, p, _ = records.softened(temperature).ranked()
    return [(int(c), float(x)) for c, x in zip(ids[0, :SHOWN], p[0, :SHOWN], strict=True)]


def mean_distribution(records: list[Records], temperature: float) -> list[tuple[int, float]]:
    """The most probable classes in the mean of the distributions of some records, each of one row."""
    mean = torch.stack([one.dense(temperature)[0] for one in records]).mean(0)
    p, ids = mean.sort(descending=True, stable=True)
    return [(int(c), float(x)) for c, x in zip(ids[:SHOWN], p[:SHOWN], strict=True)]


def _tried(missing: dict[str, str], what: str, work: Callable[[], T]) -> T | None:
    try:
        return work()
    except KdcacheError as e:
        missing[what] = str(e)
        return None


def _tally(stored: Stored, split: SplitName) -> Tally:
    """Accuracy needs one label a record, and its gap."""
    record = stored.identity.record_of(split)
    return Tally(
        record.classes, shown_temperature(stored), record.labels == 1 and record.target_gaps == 1, split == "eval"
    )


def _ranked(stored: Stored) -> int:
    record = stored.identity.record
    return record.k or record.classes


def _evaluation(stored: Stored, names: Sequence[str]) -> tuple[dict[str, Any], Samples]:
    """What the teacher answers on the evaluation split."""
    if "evaluation" in stored.identity.record.lacks:
        raise NotFoundError("the cache was imported without the teacher's answers on the evaluation split")
    tally = _tally(stored, "eval")
    _, samples = _read(stored, "eval", (0,), tuple(range(_parts(stored, "eval"))), tally)
    return tally.facts(names, _ranked(stored)), samples


def _training(stored: Stored, names: Sequence[str]) -> tuple[dict[str, Any], Samples]:
    """What the teacher answers in the training views that are read: in all of them together, and in each."""
    if not stored.views:
        raise NotFoundError("no view is complete yet: kdcache build goes on with it")
    views, parts = _chosen(stored)
    tally = _tally(stored, "train")
    of_views, samples = _read(stored, "train", views, parts, tally)
    share = len(samples.read) / stored.identity.data.samples
    read = {"of_views": of_views, "parts": len(parts), "of_parts": _parts(stored, "train"), "share": share}
    return {**tally.facts(names, _ranked(stored)), **read, "seed": SEED}, samples


def _read(
    stored: Stored,
    split: SplitName,
    views: tuple[int, ...],
    parts: tuple[int, ...],
    tally: Tally,
) -> tuple[list[dict[str, Any]], Samples]:
    """Count views in, and return what is told of each of them and of the samples."""
    count = stored.identity.split(split).samples
    seen = np.zeros(count, np.int32)
    entropy, nll = np.zeros(count, np.float32), np.zeros(count, np.float32)
    labelled, of_views = False, []
    total = len(views) * sum(len(_rows(stored, split, part)) for part in parts)
    with Progress("report", total, "records") as progress:
        for view in views:
            sums = np.zeros(3)
            for first, records in _pieces(stored, split, view, parts):
                rows, found = slice(first, first + len(records)), tally.add(records)
                seen[rows] += 1
                entropy[rows] += found.entropy.numpy()
                sums += (len(records), float(found.entropy.double().sum()), 0)
                if found.nll is not None and found.right is not None:
                    labelled = True
                    nll[rows] += found.nll.numpy()
                    sums[2] += int(found.right.sum())
                progress.advance(len(records))
            top1 = sums[2] / sums[0] if labelled else None
            of_views.append({"view": view, "top1": top1, "entropy": sums[1] / sums[0]})
    return of_views, Samples(split, views, parts, seen, entropy, nll if labelled else None)


def _chosen(stored: Stored) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The views and parts to read: all parts of up to four views, spread evenly; less where that is too much."""
    views, record = stored.views, stored.identity.record
    some = sorted({views[i * (len(views) - 1) // (VIEWS - 1)] for i in range(VIEWS)})
    width = 2 * record.k if record.k else record.classes
    values = stored.identity.data.samples * width
    views = tuple(some[: max(1, min(len(some), BUDGET // values))])
    parts = _parts(stored, "train")
    affordable = max(1, min(parts, int(parts * BUDGET / (values * len(views)))))
    drawn = np.random.Philox(key=SEED).random_raw(parts)
    return views, tuple(sorted(np.argsort(drawn, kind="stable")[:affordable].tolist()))


def _masses(stored: Stored, samples: Samples) -> dict[str, dict[str, float]]:
    """By temperature, the mean mass of the stored classes and labels, and that of the tail."""
    record = stored.identity.record
    if record.dense:
        return {}
    heads = dict.fromkeys(record.temperatures, 0.0)
    step, count = max(1, len(samples.read) // _MASSES), 0
    for _, records in _pieces(stored, "train", samples.views[0], samples.parts):
        some = records[torch.arange(0, len(records), step)]
        count += len(some)
        for t in heads:
            heads[t] += float(some.softened(t).head_mass.double().sum())
    return {f"{t:g}": {"head": head / count, "tail": 1 - head / count} for t, head in heads.items()}


# Parts


def _parts(stored: Stored, split: SplitName) -> int:
    return stored.split(split).parts if isinstance(stored, Cache) else 1


def _rows(stored: Stored, split: SplitName, part: int) -> range:
    return stored.split(split).rows(part) if isinstance(stored, Cache) else range(stored.identity.split(split).samples)


def _part_of(stored: Stored, split: SplitName, sample: int) -> int:
    return sample // stored.split(split).part if isinstance(stored, Cache) else 0


def _pieces(stored: Stored, split: SplitName, view: int, parts: Sequence[int]) -> Iterator[tuple[int, Records]]:
    """The records of some parts of a view in pieces, each with its first sample. Bytes are checked.

    A cache is read part by part, since a whole view can be larger than memory.
    """
    if not isinstance(stored, Cache):
        whole = stored.read_evaluation() if split == "eval" else stored.read(view)
        yield from _cut(whole, 0)
        return
    reader, record = stored.split(split), stored.identity.record_of(split)
    labels = reader.labels_in(view)
    for part in parts:
        rows = reader.rows(part)
        shard = reader.check_shard(view, part)
        yield from _cut(chunks.as_records(record, shard, labels[rows.start : rows.stop], stored.prior), rows.start)


def _cut(records: Records, first: int) -> Iterator[tuple[int, Records]]:
    rows = max(1, _PIECE // (2 * records.gaps.shape[1] or 1))
    for at in range(0, len(records), rows):
        yield first + at, records[at : at + rows]
