"""`kdcache import`: logits that other projects have stored, as a cache.

tinyvit (microsoft/Cream, TinyViT, save_logits.py): for epoch E a folder logits_topK_epochE with, for each process R,
rankR-keys.txt, a key a line, and rankR-values.bin, a record a key: int32 seed of the transforms, K int16 class ids, K
float16 softmax probabilities, largest first. A key is the sample's place in torchvision's ImageFolder, or, of
ImageNet-22k, its file's name without suffix. The last batches are filled up with samples that another process has too:
as there, one record of them counts (here that of the lowest R).

fkd (szq0214/FKD, FKD_SLG): for each image CLASS/NAME.tar, a file of torch.save: [crops [V, 4], flips [V], output
[V, 2, K]], where crops are top, left, height and width over the image's height, width, height and width, and output is
class ids and softmax probabilities, largest first, all float32 or (--use_fp16) float16. [V, 2] is K = 1.

Neither holds the labels' own probability, nor the evaluation split. Gaps are T (log p_1 - log p_j), with T the stored
softmax's temperature. A probability that underflowed to 0 counts as half the smallest number of its type, the largest
that is rounded to 0. The tail is log((1 - sum p) / p_1) where 1 - sum p is above what rounding may have made of it:
half a unit in the last place of each p, and 2^-20 for a softmax computed in float32. Below that it counts as nothing.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import files
from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder
from kdcache.cache.identity import Identity, RecordIdentity, TeacherIdentity, ViewsIdentity, id_dtype
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.build import suspicions
from kdcache.pipeline.build.config import PART
from kdcache.pipeline.build.source import describe_data
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.imports.config import ImportConfig
from kdcache.pipeline.process import provenance
from kdcache.pipeline.process.progress import Progress, duration, size
from kdcache.pipeline.views.policy import ViewParameters

_EPOCH = re.compile(r"logits_top([1-9][0-9]{0,4})_epoch([0-9]{1,6})")
_VALUES = re.compile(r"rank(-?[0-9]{1,6})-values\.bin")
_KEY_BYTES = 1024  # of a key, at most
_TAR_BYTES = 1 << 26  # of a file of FKD's, and of the arrays in it: those of 500 crops take 30 kB
_PART_BYTES = 1 << 31  # of FKD's answers that are in memory at once: all crops of a part
_SOFTMAX = 2.0**-20  # relative error of a softmax in float32
_WHOLE = 0.01  # pixels that a crop may miss the grid by, beside its rounding

_RECONSTRUCT = np.empty(0).__reduce__()[0]
# What NumPy arrays are made of when they are unpickled, by the names that NumPy 1 and 2 give it. None runs code.
_ARRAYS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (codecs.encode, "_codecs.encode"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "?", "u1", "i4", "i8")),
]


@dataclass(frozen=True)
class ImportResult:
    """path, key, views and size (bytes) of the cache; records that this import has written (0: all were there)."""

    path: Path
    key: str
    views: int
    bytes: int
    records: int
    seconds: float


class Answers(NamedTuple):
    """What is stored for n samples in m views: ids uint32 and p [m, n, K] as stored, and how the views were made.

    made: boxes [m, n, 4] in source pixels and flips [m, n], or seeds [m, n].
    """

    ids: NDArray[np.uint32]
    p: NDArray[Any]
    made: dict[str, NDArray[Any]]

    def digest(self) -> bytes:
        h = hashlib.sha256(np.ascontiguousarray(self.ids, "<u4").data)
        h.update(np.ascontiguousarray(self.p, self.p.dtype.newbyteorder("<")).data)
        for rows in self.made.values():
            h.update(np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).data)
        return h.digest()


class Logits(Protocol):
    """Stored logits of a dataset in V views with K classes a record."""

    policy: Literal["stored", "foreign"]
    views: int
    k: int
    dtype: np.dtype[Any]
    part: int

    def units(self) -> Iterator[range]:
        """The views that are read together, part by part."""
        ...

    def read(self, views: range, rows: range, advance: Callable[[int], object]) -> Answers:
        """InputError where the files are not what the format says. advance: told how many records were read."""
        ...

    def where(self, view: int, sample: int) -> str:
        """For messages."""
        ...


def import_logits(config: ImportConfig, say: Callable[[str], None] = print) -> ImportResult:
    """Make a cache of them, or complete it. Everything is read and checked first, as the key is a hash of all of it.

    Killed at any moment, the same import goes on with the same result. Memory: of tinyvit one part of a view, of fkd
    one part of all views, at most about 2 GiB (then fewer samples are a part), and the dataset's names.
    """
    start = time.monotonic()
    data, evaluation = (open_data(config.data, split, unlabelled=config.unlabelled) for split in ("train", "eval"))
    classes = _classes(config, data)
    source: Logits = (TinyViT if config.kind == "tinyvit" else FKD)(Path(config.path), data)
    if source.k >= classes:
        raise InputError(f"{config.path} holds {source.k} classes a record, so there must be more than {classes}")
    units = [(views, part) for views in source.units() for part in range(-(-len(data) // source.part))]
    total = source.views * len(data)
    say(f"{config.path}: top {source.k} of {classes} classes, {source.views} views of {len(data):,} samples")
    digests, tops = [], []
    with Progress("check", total, "records") as progress:
        for views, part in units:
            rows = range(part * source.part, min((part + 1) * source.part, len(data)))
            answers = source.read(views, rows, progress.advance)
            _require_sound(answers, classes, source, views, rows)
            digests.append(answers.digest())
            if views.start == 0 and data.labels.size:
                top = answers.p[0].argmax(1)[:, None]
                tops.append(np.take_along_axis(answers.ids[0], top, 1)[:, 0])
    if data.labels.size and not config.allow_low_accuracy:
        _require_classes(np.concatenate(tops).astype(np.int64), data)
    identity = Identity(
        teacher=TeacherIdentity(
            architecture=f"{config.teacher} (imported from {config.kind})",
            weights=hashlib.sha256(b"kdcache import 1\0" + source.dtype.str.encode() + b"".join(digests)).hexdigest(),
            # Not known, and nothing is ever shown to it.
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
    path = Path(config.out) if config.out else caches_folder() / identity.key
    say(f"cache {identity.key[:12]}: {identity.teacher.architecture} on {data.name}, in {path}")
    files.make_folder(path)
    cache, written = Cache.create(path, identity), 0
    store, writer = cache.train, provenance.writer()
    with cache.writing(say), Progress("import", total, "records") as progress:
        for split, of in ((store, data), (cache.evaluation, evaluation)):
            split.write_labels(of.labels.astype(id_dtype(classes)), writer)
            split.write_sizes(of.sizes, writer)
        # Nothing is known of the tail's classes, so all are as likely.
        sums = np.zeros(store.layout.tail_sums.shape[1:])
        for (views, part), digest in zip(units, digests, strict=True):
            missing = [view for view in views if not store.has(shard_name(view, part))]
            rows = store.rows(part)
            if not missing:
                progress.advance(len(rows) * len(views))
                continue
            answers = source.read(views, rows, progress.advance)
            if answers.digest() != digest:
                raise InputError(f"{config.path} is being changed: import it again when that is over")
            for view in missing:
                at = view - views.start
                made = {name: of_views[at] for name, of_views in answers.made.items()}
                arrays = {**_encoded(answers.ids[at], answers.p[at], config.temperature, classes), **made}
                store.write_shard(view, part, arrays, _parameters(made), writer, sums if view == 0 else None)
                written += len(rows)
        cache.write_prior(writer)
    seconds = time.monotonic() - start
    say(f"done in {duration(seconds)}: {size(cache.size())}, {written:,} of {total:,} records by this import")
    return ImportResult(path, identity.key, source.views, cache.size(), written, seconds)


def _classes(config: ImportConfig, data: Dataset) -> int:
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
    """InputError that names the record for what no softmax gives."""
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
            ("probabilities whose sum is above 1", p.sum(1) > 1 + _rounding(stored)),
        ):
            if bad.any():
                raise InputError(f"{source.where(view, rows[int(bad.argmax())])} has {problem}")


def _rounding(p: NDArray[Any]) -> NDArray[np.float64]:
    """[n] how far the sum of probabilities [n, K], as stored, may be from that of the softmax."""
    out: NDArray[np.float64] = np.spacing(p).astype(np.float64).sum(1) / 2 + _SOFTMAX
    return out


def _encoded(ids: NDArray[np.uint32], stored: NDArray[Any], t: float, classes: int) -> dict[str, NDArray[Any]]:
    """classes, gaps and tail of records given as ids and probabilities [n, K] at temperature t."""
    smallest = float(np.finfo(stored.dtype).smallest_subnormal) / 2
    order = np.lexsort((ids, -stored))  # by probability, then by id
    ids, ordered = (np.take_along_axis(rows, order, 1) for rows in (ids, stored))
    log = np.log(np.maximum(ordered.astype(np.float64), smallest))
    most = np.finfo(np.float16)
    gaps = np.minimum(t * (log[:, :1] - log[:, 1:]), float(most.max))
    rest = 1 - ordered.astype(np.float64).sum(1)
    told = rest > _rounding(ordered)
    tail = np.where(told, np.log(np.where(told, rest, 1.0)) - log[:, 0], -np.inf)[:, None]
    return {
        "classes": ids.astype(id_dtype(classes)),
        "gaps": gaps.astype(np.float16),
        "tail": tail.astype(np.float16),
    }


def _parameters(made: dict[str, NDArray[Any]]) -> str:
    """The digest that a commit holds of how its samples' views were made."""
    if "seeds" in made:
        return files.sha256(b"kdcache imported seeds 1\0" + made["seeds"].astype("<i4").tobytes())
    return ViewParameters(made["boxes"], made["flips"].astype(np.bool_)).digest()


def _require_all(
    found: NDArray[Any], foreign: list[str], doubled: list[str], names: Callable[[int], str], where: str
) -> None:
    """InputError unless each sample was found once, and nothing else was."""
    missing = np.flatnonzero(~found)
    for what, count, first in (
        ("samples without a record", len(missing), names(int(missing[0])) if len(missing) else ""),
        ("records of no sample of the dataset", len(foreign), foreign[0] if foreign else ""),
        ("records of samples that have another", len(doubled), doubled[0] if doubled else ""),
    ):
        if count:
            raise InputError(f"{where}: {count:,} {what}, {first} for one: is --data what they were stored for?")


class TinyViT:
    """TinyViT's folders of epochs: view v is the v-th of them by number."""

    policy: Literal["stored", "foreign"] = "foreign"
    dtype = np.dtype(np.float16)

    def __init__(self, path: Path, data: Dataset) -> None:
        own = [path] if _EPOCH.fullmatch(path.name) else path.iterdir() if path.is_dir() else []
        epochs = sorted((int(m[2]), int(m[1]), p) for p in own if (m := _EPOCH.fullmatch(p.name)))
        if not epochs:
            raise InputError(f"{path} holds no folders logits_topK_epochE, as TinyViT's save_logits.py writes them")
        ks = {k for _, k, _ in epochs}
        if len(ks) > 1 or len({e for e, _, _ in epochs}) < len(epochs):
            raise InputError(f"{path} holds epochs with top {sorted(ks)}: move all but one K elsewhere")
        self.k, self.views, self._folders = ks.pop(), len(epochs), [p for _, _, p in epochs]
        self.part = PART
        self._record = np.dtype([("seed", "<i4"), ("ids", "<u2", (self.k,)), ("p", "<f2", (self.k,))])
        self._data = data
        self._samples: dict[bool, dict[str, int]] = {}
        self._view: tuple[int, list[NDArray[Any]], NDArray[np.int16], NDArray[np.int64]] | None = None

    def units(self) -> Iterator[range]:
        return (range(v, v + 1) for v in range(self.views))

    def where(self, view: int, sample: int) -> str:
        return f"{self._folders[view]}: the record of {self._name(sample)}"

    def read(self, views: range, rows: range, advance: Callable[[int], object]) -> Answers:
        (view,) = views
        if self._view is None or self._view[0] != view:
            self._view = view, *self._open(self._folders[view])
        _, packages, package, row = self._view
        out = np.empty(len(rows), self._record)
        here = package[rows.start : rows.stop]
        for number, records in enumerate(packages):
            at = np.flatnonzero(here == number)
            at = at[np.argsort(row[rows.start + at])]  # as they lie in the file
            out[at] = records[row[rows.start + at]]
        advance(len(rows))
        ids, p = (out[name].reshape(1, len(rows), self.k) for name in ("ids", "p"))
        return Answers(ids.astype(np.uint32), p, {"seeds": out["seed"][None].copy()})

    def _open(self, folder: Path) -> tuple[list[NDArray[Any]], NDArray[np.int16], NDArray[np.int64]]:
        """The records of each process, and of each sample the place in these [N] and in them [N]."""
        ranks = sorted(int(m[1]) for name in files.names(folder) if (m := _VALUES.fullmatch(name)))
        if not ranks:
            raise InputError(f"{folder} holds no rankR-values.bin: was it written to its end?")
        package, row = np.full(len(self._data), -1, np.int16), np.zeros(len(self._data), np.int64)
        packages: list[NDArray[Any]] = []
        foreign: list[str] = []
        doubled: list[str] = []
        for number, rank in enumerate(ranks):
            values = folder / f"rank{rank}-values.bin"
            count, rest = divmod(values.stat().st_size, self._record.itemsize)
            keys = self._keys(folder / f"rank{rank}-keys.txt", count)
            if rest or len(keys) != count:
                raise InputError(
                    f"{values} has {values.stat().st_size:,} bytes, and {len(keys):,} keys need "
                    f"{self._record.itemsize} each: one of the two is cut short, copy both anew"
                )
            packages.append(np.memmap(values, self._record, "r") if count else np.empty(0, self._record))
            if count == 0:
                continue
            samples = self._lookup(keys[0])
            for i, key in enumerate(keys):
                sample = samples.get(key, -1)
                if sample < 0:
                    foreign.append(key)
                elif package[sample] == number:
                    doubled.append(key)
                elif package[sample] < 0:
                    package[sample], row[sample] = number, i
        _require_all(package >= 0, foreign, doubled, self._name, str(folder))
        return packages, package, row

    def _keys(self, path: Path, count: int) -> list[str]:
        limit = (count + 1) * _KEY_BYTES
        content = files.read_range(path, 0, limit + 1, short=True)
        if len(content) > limit:
            raise InputError(f"{path} has more than {limit:,} bytes, too many for the {count:,} records beside it")
        try:
            return content.decode().split("\n")[:-1]
        except UnicodeDecodeError as e:
            raise InputError(f"{path} is no text of keys: {e}") from e

    def _lookup(self, key: str) -> dict[str, int]:
        """Samples by key, for keys like this one: places in torchvision's ImageFolder, or file names."""
        placed = key.isdecimal() and len(key) < 20 and key == str(int(key))
        if placed not in self._samples:
            paths = self._data.paths
            if placed:
                order = sorted(range(len(self._data)), key=lambda i: _in_image_folder(paths[i]) if paths else i)
                self._samples[placed] = {str(place): i for place, i in enumerate(order)}
            else:
                self._samples[placed] = _by_name(paths, lambda path: _stem(path, last=True), self._data.name)
        return self._samples[placed]

    def _name(self, sample: int) -> str:
        return self._data.paths[sample] if self._data.paths else f"image {sample}"


def _in_image_folder(path: str) -> tuple[str, str, str]:
    """By what torchvision's ImageFolder sorts: class, folder, file."""
    folder, _, name = path.rpartition("/")
    return folder.partition("/")[0], folder, name


def _stem(path: str, last: bool) -> str:
    """Without the suffixes of its name: up to the last dot, or, as FKD has it, up to the first."""
    folder, slash, name = path.rpartition("/")
    return name.rpartition(".")[0] or name if last else folder + slash + name.split(".")[0]


def _by_name(paths: tuple[str, ...], name: Callable[[str], str], data: str) -> dict[str, int]:
    """Samples by name; InputError where two have one, or the images have none."""
    if not paths:
        raise InputError(
            f"{data} has no files, and these records go by file names: give imagenet:PATH or imagefolder:PATH"
        )
    found: dict[str, int] = {}
    for i, path in enumerate(paths):
        if (first := found.setdefault(name(path), i)) != i:
            raise InputError(f"{paths[first]} and {path} have one name for these records: which is meant is not known")
    return found


class FKD:
    """FKD's file an image: view v is the v-th crop of each."""

    policy: Literal["stored", "foreign"] = "stored"

    def __init__(self, path: Path, data: Dataset) -> None:
        samples = _by_name(data.paths, lambda p: _stem(p, last=False), data.name)
        # FKD keeps the last three folders of an image's path: dataset, split and class.
        self._files: list[Path | None] = [None] * len(data)
        foreign: list[str] = []
        doubled: list[str] = []
        tars = (Path(folder, name) for folder, _, names in os.walk(path) for name in names if name.endswith(".tar"))
        first = next(tars, None)
        if first is None:
            raise InputError(f"{path} holds no CLASS/NAME.tar, as FKD's generate_soft_label.py writes them")
        for tar in chain([first], tars):
            parts = tar.relative_to(path).with_suffix("").parts
            ends = ("/".join(parts[i:]) for i in range(len(parts)))
            sample = next((samples[end] for end in ends if end in samples), None)
            if sample is None:
                foreign.append(str(tar))
            elif self._files[sample] is not None:
                doubled.append(str(tar))
            else:
                self._files[sample] = tar
        found = np.array([file is not None for file in self._files])
        _require_all(found, foreign, doubled, lambda i: data.paths[i], str(path))
        self._sizes = data.sizes
        _, _, p = self._load(0)
        self.views, self.k, self.dtype = len(p), p.shape[2], p.dtype
        most = _PART_BYTES // (self.views * (8 * self.k + 17))
        self.part = min(PART, 1 << max(0, most.bit_length() - 1))

    def units(self) -> Iterator[range]:
        yield range(self.views)

    def where(self, view: int, sample: int) -> str:
        return f"{self._files[sample]}: crop {view}"

    def read(self, views: range, rows: range, advance: Callable[[int], object]) -> Answers:
        shape = self.views, len(rows)
        ids, p = np.empty((*shape, self.k), np.uint32), np.empty((*shape, self.k), self.dtype)
        boxes, flips = np.empty((*shape, 4), np.int32), np.empty(shape, np.uint8)
        for n, sample in enumerate(rows):
            file = self._files[sample]
            crops, flipped, output = self._load(sample)
            if (output.shape, output.dtype) != ((self.views, 2, self.k), self.dtype):
                raise InputError(
                    f"{file} holds {list(output.shape)} of {output.dtype}, and {self._files[0]} "
                    f"[{self.views}, 2, {self.k}] of {self.dtype}: import only those that are alike"
                )
            named = output[:, 0].astype(np.float64)
            if not ((named >= 0) & (named < 2**32) & (named == np.rint(named))).all():
                raise InputError(f"{file} has class ids that are no whole numbers")
            if self.dtype == np.float16 and named.max() > 2048:
                raise InputError(f"{file} has class ids above 2,048 in float16, which does not hold them")
            ids[:, n], p[:, n] = named, output[:, 1]
            boxes[:, n] = _boxes(crops, self._sizes[sample], f"{file}")
            flips[:, n] = flipped
            advance(self.views)
        return Answers(ids, p, {"boxes": boxes, "flips": flips})

    def _load(self, sample: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """crops [V, 4], flips [V] and output [V, 2, K] of a sample."""
        path = self._files[sample]
        assert path is not None
        found = _torch_load(path)
        if not isinstance(found, (list, tuple)) or len(found) != 3:
            raise InputError(f"{path} does not hold crops, flips and soft labels, as FKD's files do")
        crops, flips, output = (_array(one, path) for one in found)
        if output.ndim == 2 and output.shape[1:] == (2,):  # the label type `smoothing`
            output = output[:, :, None]
        sound = output.ndim == 3 and output.shape[1] == 2 and output.dtype in (np.float16, np.float32) and output.size
        if not sound:
            raise InputError(
                f"{path} holds soft labels {list(output.shape)} of {output.dtype}: known are smoothing, "
                "marginal_smoothing_k5, _k10 and marginal_renorm_k5 ([crops, 2, K], float32 or float16)"
            )
        if crops.shape != (len(output), 4) or flips.shape != (len(output),) or crops.dtype.kind != "f":
            raise InputError(f"{path} holds {len(output)} soft labels, and crops {list(crops.shape)} of {crops.dtype}")
        if flips.dtype.kind not in "biu" or not np.isin(flips, (0, 1)).all():
            raise InputError(f"{path} holds flips that are neither 0 nor 1")
        return crops, flips, output


def _torch_load(path: Path) -> Any:
    """What torch.save put there, without running anything, and in memory in proportion to the file."""
    content = files.read_range(path, 0, _TAR_BYTES + 1, short=True)
    advice = f"{path} is no file of torch.save (1.6 or later), or a damaged one"
    try:
        entries = zipfile.ZipFile(io.BytesIO(content)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as e:
        raise InputError(f"{advice}: {e}") from e
    if (
        len(content) > _TAR_BYTES
        or any(e.compress_type for e in entries)
        or sum(e.file_size for e in entries) > _TAR_BYTES
    ):
        raise InputError(f"{path} holds more than {size(_TAR_BYTES)}, or is compressed, as no file of FKD's is")
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise InputError(f"{path} is refused: it holds more than numbers, or is damaged") from e
    except Exception as e:  # of damaged bytes, torch and NumPy may raise anything
        raise InputError(f"{advice} ({type(e).__name__})") from e


def _array(found: Any, path: Path) -> NDArray[Any]:
    if isinstance(found, torch.Tensor) and found.device.type == "cpu" and found.layout is torch.strided:
        known = found.dtype in (torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int64)
        found = found.detach().resolve_neg().numpy() if known else found
    if not isinstance(found, np.ndarray) or found.nbytes > _TAR_BYTES:
        raise InputError(f"{path} holds no arrays, or such of more than {size(_TAR_BYTES)}")
    return found


def _boxes(crops: NDArray[Any], sizes: NDArray[np.int32], where: str) -> NDArray[np.float64]:
    """[V, 4] top, left, height and width in pixels, from those over the image's height and width."""
    side = np.tile(sizes.astype(np.float64), 2)
    exact = crops.astype(np.float64) * side
    boxes = np.rint(exact)
    off = side * float(np.finfo(crops.dtype).eps) / 4  # by the rounding of numbers below 1
    if not np.isfinite(exact).all() or (np.abs(exact - boxes) > off + _WHOLE).any():
        raise InputError(
            f"{where}: crops that do not fall on whole pixels of {sizes[0]} x {sizes[1]}: give the images that the "
            "soft labels are of, in their sizes"
        )
    end = boxes[:, :2] + boxes[:, 2:]
    # Rounded to a whole pixel they are exact, but in float16 of sides of 2,048 pixels or more.
    if (boxes[:, :2] < 0).any() or (boxes[:, 2:] < 1).any() or (end > side[:2] + np.floor(2 * off[:2])).any():
        raise InputError(f"{where}: crops that leave the image of {sizes[0]} x {sizes[1]}")
    boxes[:, 2:] = np.minimum(end, side[:2]) - boxes[:, :2]
    return boxes
