"""Maps the classes of a dataset to those of a teacher that numbers them differently."""

import csv
import difflib
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from kdcache.cache.errors import InputError
from kdcache.cache.files import expanded, is_there, sha256

_SHOWN = 5  # names in one message
_MOST_DIGITS = 20  # of a class id
_SYNSET = re.compile(r"n\d{8}")


def map_classes(
    class_names: Sequence[str], spec: str, teacher_classes: Sequence[str] | None, teacher_count: int
) -> list[tuple[int, ...]]:
    """Find the class of the teacher for each class of the data, or the several classes that make it up together.

    spec is 'auto' or the path of a file. A .json file holds an object; a .csv or .tsv file has no heading. Each entry
    gives a class of the dataset, and the teacher's class by name or id. Where there are several, they stand in further
    columns, or in JSON in a list. Entries for classes that the dataset does not have are ignored.

    'auto' matches classes by name, where case does not matter and _ counts as a space. For a teacher of ImageNet's
    1,000 classes it also matches folders that are named by ImageNet's synsets (n01440764), by timm's list.

    teacher_classes: the names of the teacher's teacher_count classes, where they are known.

    A file may give one class of the teacher to several classes of the data. But where it makes up a class of several,
    no class of the teacher may be part of two.

    InputError for a file that cannot be read, a class without a counterpart, an id out of range, and 'auto' where two
    classes have the same counterpart.
    """
    groups: list[tuple[int, ...]]
    if spec == "auto":
        groups = [(i,) for i in _auto(class_names, teacher_classes, teacher_count)]
    else:
        given = _read(expanded(spec))
        if missing := [name for name in class_names if name not in given]:
            raise InputError(f"{spec}: has no line for {_listed(missing, given)}")
        known = teacher_classes or ()
        groups = [tuple(_resolve(spec, given[name], known, teacher_count)) for name in class_names]
    taken: dict[int, str] = {}
    for name, group in zip(class_names, groups, strict=True):
        for i in group:
            if i in taken and (spec == "auto" or is_merged(groups)):
                both = f"{taken[i]!r} and {name!r} are both" if taken[i] != name else f"{name!r} is twice"
                raise InputError(f"class map {spec}: {both} the teacher's class {i}")
            taken[i] = name
    return groups


def is_merged(groups: Sequence[Sequence[int]]) -> bool:
    """Whether some class of the data is made up of several classes of the teacher."""
    return any(len(group) > 1 for group in groups)


def digest(groups: Sequence[Sequence[int]]) -> str | None:
    """The digest of a map for a cache's identity; None where both sides number the classes alike."""
    if is_merged(groups):
        return sha256(b"kdcache merged classes 1\0" + json.dumps(groups).encode())
    ids = np.array(groups, "<i8").reshape(-1)
    return None if np.array_equal(ids, np.arange(len(ids))) else sha256(ids.tobytes())


def merged(logits: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Compute the logits float32 [B, D] of groups of classes from the logits [B, C] of the classes.

    A group's logit is the log-sum-exp of its classes' logits, so that its probability is the sum of its classes'
    probabilities, among all classes that are in a group.
    """
    return torch.stack([logits[:, list(group)].float().logsumexp(1) for group in groups], 1)


def shared(class_names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    """List the classes of the data that share a class of the teacher, each group as "'A' and 'B'"."""
    by_id: dict[int, list[str]] = {}
    for name, group in zip(class_names, groups, strict=True):
        by_id.setdefault(group[0], []).append(repr(name))
    return [" and ".join(names) for names in by_id.values() if len(names) > 1]


def _auto(names: Sequence[str], teacher_classes: Sequence[str] | None, teacher_count: int) -> list[int]:
    synsets = all(_SYNSET.fullmatch(name) for name in names)
    imagenet = teacher_count == 1000 and (
        teacher_classes is None or list(teacher_classes) == ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    )
    if synsets and imagenet:
        teacher_classes = _imagenet_synsets()
    if teacher_classes is None:
        raise InputError("class map auto: the names of the teacher's classes are not known: give a file")
    ids = _finder(teacher_classes)
    if missing := [name for name in names if ids(name) is None]:
        unmatched = _listed(missing, teacher_classes)
        raise InputError(f"class map auto: the teacher has no class {unmatched}; give a file that maps them")
    return [i for name in names if (i := ids(name)) is not None]


def _resolve(spec: str, wanted: Sequence[str | int], teacher_classes: Sequence[str], count: int) -> Iterator[int]:
    find = _finder(teacher_classes)
    for value in wanted:
        found = find(value) if isinstance(value, str) else value
        if found is None and str(value).isdecimal() and len(str(value)) < _MOST_DIGITS:
            found = int(value)
        if found is None:
            raise InputError(f"{spec}: the teacher has no class {_listed([str(value)], teacher_classes)}")
        if not 0 <= found < count:
            raise InputError(f"{spec}: there is no class {found}: the teacher's are 0 to {count - 1}")
        yield found


def _finder(names: Sequence[str]) -> Callable[[str], int | None]:
    """Make a function that finds the place of a name in `names`: the exact one, else the only one that reads alike."""
    exact = {name: i for i, name in enumerate(names)}
    alike: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        alike.setdefault(_folded(name), []).append(i)

    def find(name: str) -> int | None:
        near = alike.get(_folded(name), [])
        return exact.get(name, near[0] if len(near) == 1 else None)

    return find


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _listed(missing: Sequence[str], known: Iterable[str]) -> str:
    """List up to five of the missing names, each with the known names that are nearest to it."""
    folded = {_folded(name): name for name in known}
    parts = []
    for name in missing[:_SHOWN]:
        near = [repr(folded[key]) for key in difflib.get_close_matches(_folded(name), folded, n=2)]
        parts.append(repr(name) + (f" (nearest: {', '.join(near)})" if near else ""))
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return ", ".join(parts) + more


def _imagenet_synsets() -> list[str]:
    """ImageNet's 1,000 synset ids in the order of its classes."""
    try:
        timm_data = import_module("timm.data")
    except ImportError as e:
        raise InputError(
            "class map auto: the list of ImageNet's synsets comes with timm, which is not installed: "
            "pip install timm, or give a file"
        ) from e
    names: list[str] = timm_data.ImageNetInfo("imagenet-1k").label_names()
    return names


def _read(path: Path) -> dict[str, list[str | int]]:
    """Read the file: the teacher's classes, by name or id, for each class of the dataset."""
    if is_there(path) and not path.is_file():
        raise InputError(f"class map {path}: is no plain file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text, object_pairs_hook=tuple)  # keeps a key that is there twice
        else:
            dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
            rows = tuple(line for line in csv.reader(io.StringIO(text), dialect, strict=True) if line)
    except (OSError, RecursionError, ValueError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"class map {path}: cannot be read: {reason}") from e
    result: dict[str, list[str | int]] = {}
    if not isinstance(rows, tuple):
        raise InputError(f"class map {path}: is not a JSON object")
    for name, *values in rows:
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        if not values or any(type(value) not in (str, int) for value in values):
            raise InputError(
                f"class map {path}: {reprlib.repr((name, *values))} is not a dataset class and teacher classes or ids"
            )
        if name in result:
            raise InputError(f"class map {path}: has two lines for {name!r}")
        result[name] = values
    return result
