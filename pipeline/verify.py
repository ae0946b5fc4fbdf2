"""Is a cache what it says it is? Complete, undamaged, and what the live teacher answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import CorruptError, ForeignError, InputError, KdcacheError, MismatchError, NotFoundError
from kdcache.cache.home import caches_folder
from kdcache.cache.identity import Identity
from kdcache.cache.records.choices import TEMPERATURES
from kdcache.cache.records.records import Records
from kdcache.cache.store import chunks
from kdcache.cache.store.cache import Cache, clear_leavings, odd_leavings
from kdcache.cache.store.layout import parse_shard_name, shard_name
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.build.answers import labels_in, teacher_renderer, view_parameters
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Source, draft_build, open_teacher
from kdcache.pipeline.data.kinds.base import drawn_places
from kdcache.pipeline.data.split import Split, describe_data
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.redrawn import Redrawn
from kdcache.pipeline.teachers import weightstore
from kdcache.pipeline.trust import images_of, stored_network
from kdcache.pipeline.views.parameters import EvaluationView, Parameters, view_of_all
from kdcache.pipeline.views.policy import policy_of

# Total variation between stored and replayed distributions, by the teacher's numeric type: the mean over records, and
# that of any one record. A tail whose code rounding tips, by 12%, moves a single record by up to 11%.
TOLERANCE = {"float32": 0.002, "bf16": 0.02}
RECORD_TOLERANCE = {"float32": 0.15, "bf16": 0.5}
_BATCH = 128


@dataclass
class Report:
    """What was looked at, and every problem found. Without problems it is a pass.

    repaired: the commits that were removed, which the next build makes again. mended: what was repaired without a
    build. unknown: what could not be looked at, and why.
    """

    views: tuple[int, ...] = ()
    shards: int = 0
    replayed: int = 0
    total_variation: float | None = None
    problems: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def text(self, contents: bool = True) -> str:
        """The report for people; contents: whether files were read, and not looked up only."""
        lines = [
            f"{self.shards} shards of {len(self.views)} complete views {'read' if contents else 'looked up'}, "
            f"{self.replayed} records replayed"
        ]
        if self.total_variation is not None:
            lines.append(f"largest mean total variation {self.total_variation:.2e}")
        lines += [f"note: {reason}" for reason in self.unknown]
        lines += [f"FAILED: {p}" for p in self.problems] or ["passed"]
        lines += self.mended
        lines += [f"removed {name}: run kdcache build again to rebuild it" for name in self.repaired]
        return "\n".join(lines)


def verify(
    cache: Cache, source: Source | None = None, *, contents: bool = True, replay: int = 512, repair: bool = False
) -> Report:
    """Look at every commit; with `contents` at every file's digest and values; with a source at the teacher's answers.

    A source is the data and a live teacher: `replay` seeded random records of each view that is looked at are asked for
    again, where all else is sound. repair: remove damaged shards, labels and prior, which the next build makes again,
    write metadata for zarr again and clear away what builders have left; InputError for a packed file and for a cache
    that others share.
    """
    if repair and not cache.writable:
        raise InputError(
            f"--repair is for folders of one's own: copy {cache.where} again, or remove it and pack the cache again"
        )
    report = Report()
    if cache.local and not cache.packed and (odd := odd_leavings(cache)):
        report.problems += odd
        if repair and _try(report, partial(clear_leavings, cache)) is None:
            report.mended.append("cleared away what builders had left")
    cache = cache.fresh()
    report.views = cache.views
    if contents:
        _try(report, cache.check_rest)
    _Look(cache, contents, repair, report).at_all()
    if source is not None and not report.problems:
        try:
            _replay(cache, source, replay, report)
        except MismatchError as e:
            report.problems.append(str(e))
    return report


@dataclass
class _Look:
    """A look at every commit of a cache and at what lies beside it.

    sound: how many commits are as they should be. foreign: those of another cache, and those with another view's
    parameters.
    """

    cache: Cache
    contents: bool
    repair: bool
    report: Report
    sound: int = 0
    foreign: tuple[list[tuple[SplitStore, str]], list[tuple[SplitStore, str]]] = field(default_factory=lambda: ([], []))

    def at_all(self) -> None:
        redrawn, described = Redrawn(self.cache), set[str]()
        for store, name in self._names():
            self._commit(store, name, redrawn)
            if self.contents:
                for file, content in store.metadata(name):
                    if file not in described:
                        described.add(file)
                        self._metadata(store, name, file, content())
        self.report.unknown += redrawn.unknown
        # Where not one is as it should be, it is the identity that is damaged.
        for foreign, own in zip(self.foreign, (self.sound, redrawn.fitting), strict=True):
            if own:
                self._remove(foreign)

    def _commit(self, store: SplitStore, name: str, redrawn: Redrawn) -> None:
        error, foreign = _try(self.report, partial(self._check, store, name)), self.foreign[0]
        if error is None:
            self.sound += 1
            if self.contents and (shard := parse_shard_name(name)):
                error, foreign = _try(self.report, partial(redrawn.require, store, *shard)), self.foreign[1]
        if isinstance(error, ForeignError):
            foreign.append((store, name))
        # What could not be read now may be sound, and what a newer kdcache wrote is.
        elif isinstance(error, (CorruptError, NotFoundError)):
            self._remove([(store, name)])

    def _names(self) -> Iterator[tuple[SplitStore, str]]:
        """Every commit that there is or should be: its split and its name."""
        cache, problems = self.cache, self.report.problems
        has_prior = cache.train.layout.has_prior and (0 in cache.train.complete_views() or cache.train.has("prior"))
        for store in cache.splits:
            yield store, "labels"
            if store.layout.sizes:
                yield store, "sizes"
            committed = store.committed()
            if not committed and (store is cache.train or cache.evaluation_views):
                problems.append(f"{store.where}: nothing is committed: run kdcache build again")
            if not cache.packed and (gaps := sorted(set(range(max(committed, default=0))) - committed.keys())):
                problems.append(f"{store.where}: lacks views {gaps}: run kdcache build again")
            for view, parts in sorted(committed.items()):
                if missing := set(range(store.parts)) - parts:
                    problems.append(
                        f"{store.where}: view {view} lacks parts {sorted(missing)}: run kdcache build again"
                    )
                for part in sorted(parts):
                    self.report.shards += 1
                    yield store, shard_name(view, part)
        if has_prior:
            yield cache.train, "prior"

    def _check(self, store: SplitStore, name: str) -> None:
        shard = parse_shard_name(name)
        if not self.contents and not (shard and shard[1] >= store.parts):  # which is refused before anything is read
            return store.require(name)
        if name == "labels":
            _ = store.labels
        elif name == "sizes":
            _ = store.sizes
        elif name == "prior":
            _ = self.cache.prior
        return store.examine(name)

    def _metadata(self, store: SplitStore, name: str, file: str, content: bytes) -> None:
        def check() -> None:
            try:
                store.require_metadata(file, content)
            except NotFoundError:
                if store.has(name):  # else the build that commits it writes the file too
                    raise

        error = _try(self.report, check)
        if self.repair and isinstance(error, (CorruptError, NotFoundError)):
            store.write_metadata(file, content)
            self.report.mended.append(f"wrote {file} again")

    def _remove(self, found: Sequence[tuple[SplitStore, str]]) -> None:
        for store, name in found if self.repair else ():
            store.remove(name)
            self.report.repaired.append(f"{name} of {store.where}")


def _try(report: Report, check: Callable[[], object]) -> KdcacheError | None:
    try:
        check()
    except KdcacheError as e:
        report.problems.append(str(e))
        return e
    return None


def require_answers(cache: Cache, source: Source, count: int, views: Sequence[int]) -> str:
    """Have the teacher answer again for some records of these views, and return a line on what was compared.

    Which records of which three views nobody can know before. MismatchError if they are not what it answers.
    """
    report, chance = Report(), random.SystemRandom()
    _replay(cache, source, count, report, chance.sample(views, min(3, len(views))), chance.getrandbits(63))
    if report.problems:
        raise MismatchError(f"nothing was copied: {report.problems[0]}")
    return (
        f"asked {source.teacher.identity.network} again for {report.replayed} records of cache {cache.key[:12]}, and "
        f"it answers what they hold (largest mean total variation {report.total_variation:.2e})"
    )


def _replay(cache: Cache, source: Source, count: int, report: Report, views: Sequence[int] = (), salt: int = 0) -> None:
    """Ask the teacher again for some records of the evaluation split and of the first, middle and last view.

    views: to be asked about instead of these three. salt: makes it other records than those that are usual.
    """
    # The answer may be asked for in another numeric type than the cache's: then by the coarser type's tolerance.
    mine, theirs = cache.identity.teacher, source.identity.teacher
    in_type = source.identity.model_copy(update={"teacher": theirs.model_copy(update={"numeric": mine.numeric})})
    cache.identity.require(in_type, cache.where)
    limit, record_limit = (max(t[mine.numeric], t[theirs.numeric]) for t in (TOLERANCE, RECORD_TOLERANCE))
    train, evaluation = source.splits(cache)
    usual = {cache.views[0], cache.views[len(cache.views) // 2], cache.views[-1]}
    chosen = [(evaluation, 0), *((train, view) for view in sorted(views or usual))]
    distances = []
    with Progress("replay", sum(min(count, len(split.data)) for split, _ in chosen), "records") as progress:
        for split, view in chosen:
            index, distance = _distances(cache, source, split, view, count, progress, salt)
            root, mean, worst = split.store.where, float(distance.mean()), int(distance.argmax())
            distances.append(mean)
            report.replayed += len(index)
            if not mean <= limit:
                report.problems.append(
                    f"{root}: view {view} is not what the teacher answers now: mean total variation "
                    f"{mean:.4f}, at most {limit} is allowed; sample {index[worst]} differs most"
                )
            elif not distance[worst] <= record_limit:
                report.problems.append(
                    f"{root}: view {view}, sample {index[worst]} is not what the teacher answers now: total "
                    f"variation {float(distance[worst]):.3f}, at most {record_limit} is allowed"
                )
    report.total_variation = max(distances)


def _distances(
    cache: Cache, source: Source, split: Split, view: int, count: int, progress: Progress, salt: int
) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Up to `count` seeded samples of a view, and how far what is stored of them is from what the teacher answers now.

    MismatchError where labels, image sizes or view parameters are not those of the source.
    """
    split.store.require_labels(split.labels)
    split.store.require_sizes(split.data.sizes)
    _require_parameters(split, source, view)
    index = drawn_places(len(split.data), count, key=salt + 11 + view)
    stored = split.store.read(view, cache.prior, samples=index)
    logits, labels = _answer(source, split, view, index, progress)
    record = source.identity.record
    # Earlier versions rounded each code by itself, and a cache may have views of both kinds: the nearer one counts.
    rounded = (True, False) if record.precision == "uint8" else (True,)
    answers = [chunks.encode_as(record, logits, labels, carry=carry) for carry in rounded]
    return index, torch.stack([_total_variation(stored, a, cache.prior) for a in answers]).amin(0)


def _require_parameters(split: Split, source: Source, view: int) -> None:
    """MismatchError unless the view was built with the parameters that it has now."""
    store = split.store
    for part in range(store.parts):
        digest = view_parameters(split.data, source.identity, view, store.rows(part)).digest()
        if store.commit(shard_name(view, part)).parameters != digest:
            raise MismatchError(f"{store.where}: view {view}, part {part} was built with other view parameters")


def _answer(
    source: Source, split: Split, view: int, index: NDArray[np.int64], progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """The live teacher's logits [n, C] for single samples, asked for in full batches, and their labels [n, L]."""
    data = split.data
    parameters: Parameters = EvaluationView(data.sizes, whole=data.in_memory)
    if data.split == "eval" and data.in_memory:
        parameters = parameters[:]
    elif data.split != "eval":
        parameters = view_of_all(source.identity.views, view, data.sizes, data.in_memory)
    renderer = teacher_renderer(data, source)
    batches = [np.resize(index[i : i + _BATCH], _BATCH) for i in range(0, len(index), _BATCH)]
    logits = []
    for images in renderer.batches(parameters, batches):
        logits.append(source.teacher.logits(images).cpu())
        progress.advance(min(_BATCH, len(index) - _BATCH * (len(logits) - 1)))
    answered = torch.cat(logits)[: len(index)]
    labels = labels_in(split.labels, parameters, range(len(data)))[index]
    return answered, torch.from_numpy(labels)


def _total_variation(a: Records, b: Records, prior: torch.Tensor | None) -> torch.Tensor:
    """Half the L1 distance between the two distributions at temperature 1 (or the lowest one), [B]."""
    t = 1.0 if a.classes is None or 1.0 in a.temperatures else min(a.temperatures)
    p, q = (r.dense(t, "prior", prior) for r in (a, b))
    return (p - q).abs().sum(1) / 2


def _members_at_hand(identity: Identity) -> str:
    """Which commands verify those of an ensemble's members that are under KDCACHE_HOME."""
    here = [m.key[:12] for m in identity.members if (caches_folder() / m.key / "identity.json").exists()]
    return f", or verify its members: {' and '.join(f'kdcache verify {key}' for key in here)}" if here else ""


def source_of(
    cache: Cache,
    data: str | None = None,
    teacher: str | None = None,
    weights: str | None = None,
    class_map: str | None = None,
    device: str | None = None,
    numeric: Literal["float32", "bf16"] | None = None,
    registry: str | None = None,
    otherwise: str = "give --depth contents",
) -> Source:
    """Open the data and the live teacher that the cache names; verify finds what differs from the cache.

    data, teacher: by default those that the cache names, unless these are functions. numeric: the type in which the
    teacher answers, by default the cache's. registry: its weights are looked for there too. otherwise: what helps where
    there is no teacher or there are no images. InputError, NotFoundError or MismatchError where none can be asked.
    """
    i = cache.identity
    if reason := i.without_teacher:
        raise InputError(f"{cache.where} {reason}: {otherwise}{_members_at_hand(i)}")
    policy_of(i.views, cache.where)
    teacher = teacher or stored_network(i.teacher.network, cache.where, "--teacher")
    images = images_of(i.data.name, data, cache.where, f", or {otherwise} to do without them")
    config = BuildConfig(
        teacher=teacher,
        weights=weightstore.weights_of(i, cache.where, weights, registry),
        teacher_size=i.teacher.input_size,
        teacher_mean=i.teacher.mean,
        teacher_std=i.teacher.std,
        teacher_interpolation=i.teacher.interpolation,
        data=images,
        augment=i.views.policy,
        sequence=i.views.sequence,
        topk=i.record.k or i.record.classes,
        temperatures=i.record.temperatures or TEMPERATURES,
        precision=i.record.precision,
        tail_std=i.record.tail_std,
        class_map=class_map,
        unlabelled=i.record.labels == 0,
        seed=i.views.seed,
        device=device,
        amp="bf16" if (numeric or i.teacher.numeric) == "bf16" else None,
        full_fingerprint=i.data.full_contents,
        part=i.part,
    )
    draft = draft_build(config)
    try:
        source = open_teacher(draft)
        if config.weights is None and source.identity.teacher.weights != i.teacher.weights:
            raise NotFoundError  # another teacher of that name, for the same data
    except (InputError, NotFoundError) as e:
        # A teacher of other data does not fit them: it is the data that is wrong where they differ from the cache's.
        found = describe_data(draft.train, i.data.full_contents)
        i.require(i.model_copy(update={"data": found}), cache.where)
        if isinstance(e, NotFoundError):
            raise weightstore.not_to_be_had(i.teacher, registry) from None
        raise
    if weights is None:
        i.require(i.model_copy(update={"data": source.identity.data}), cache.where)
    return source
