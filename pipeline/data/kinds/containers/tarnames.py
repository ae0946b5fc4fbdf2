"""Which tars a dataset `wds:...` names, and which of them are which split."""

from __future__ import annotations

import os
import re
from glob import glob, has_magic
from pathlib import Path

from kdcache.cache.errors import InputError
from kdcache.cache.files import expanded, is_folder, is_there
from kdcache.pipeline.data.kinds.base import Asked
from kdcache.pipeline.data.kinds.folders import EVALUATION, TEST, TRAIN, VALIDATION, words_of

BETWEEN = "::"  # what stands between the tars of the train split and those of the eval split
_BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}")
_MOST = 1_000_000  # tars that a pattern may name
_EVALS = (VALIDATION, TEST, EVALUATION)  # the first of them that has tars is the eval split


def spelled(asked: Asked) -> str:
    """What stands behind the name of the kind."""
    return asked.spec.partition(":")[2]


def tars_of(asked: Asked) -> tuple[tuple[Path, ...], tuple[Path, ...] | None, str]:
    """The tars of the train split, those of the eval split or None, and what a note says of tars that are not read.

    InputError for patterns that name no files.
    """
    patterns = spelled(asked).split(BETWEEN)
    if patterns == [""] or len(patterns) > 2 or not all(patterns):
        raise InputError(f"{asked.name} needs tars: {asked.name}:TRAIN::EVAL, or one pattern for both splits")
    if any(re.match(r"[a-z0-9]+://|pipe:", pattern) for pattern in patterns):
        raise InputError(f"{asked.spec}: tars are read from disk, where offsets can be looked up: copy them first")
    if len(patterns) == 2:
        train, evaluation = map(expand, patterns)
        if both := set(train) & set(evaluation):
            raise InputError(f"{min(both)}: is in both splits")
        return train, evaluation, ""
    return _by_names(expand(patterns[0]))


def _by_names(tars: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[Path, ...] | None, str]:
    """Divide tars by the words in their names, or in their folders' names: train, val, test and the like."""
    kinds = {name: kind[0] for kind in (TRAIN, *_EVALS) for name in kind}
    found: dict[str, list[Path]] = {}
    for path in tars:
        of_file = {kinds[word] for word in words_of(path.stem) if word in kinds}
        of_either = of_file or {kinds[word] for word in words_of(path.parent.name) if word in kinds}
        found.setdefault(of_either.pop() if len(of_either) == 1 else "", []).append(path)
    if len(found) == 1:
        return tars, None, ""
    evals = [kind[0] for kind in _EVALS if kind[0] in found]
    if "" in found or "train" not in found or not evals:
        odd = found.get("") or tars
        raise InputError(f"{odd[0]}: its name does not tell whether it is train or val: give wds:TRAIN::EVAL")
    train, evaluation = found.pop("train"), found.pop(evals[0])
    unread = "".join(f"; {len(others):,} tars of {name} are not read" for name, others in found.items())
    return tuple(train), tuple(evaluation), unread


def expand(pattern: str) -> tuple[Path, ...]:
    """The tars that a pattern names: a file, all tars below a folder, {000..099}, {a,b}, and * ? [ ] in byte order."""
    whole = expanded(pattern).absolute()
    if is_folder(whole):
        found = [path for path in whole.rglob("*.tar") if "/." not in f"/{path.relative_to(whole)}"]
        if not found:
            raise InputError(f"{whole}: holds no .tar files")
        return tuple(sorted(found, key=os.fsencode))
    if is_there(whole):
        return (whole,)
    tars: list[Path] = []
    for name in _braces(str(whole)):
        if not has_magic(name):
            tars.append(Path(name))
        elif matches := sorted(glob(name), key=os.fsencode):  # noqa: PTH207  an absolute pattern
            tars += map(Path, matches)
        else:
            raise InputError(f"{name}: no such files")
    for path in tars:
        if not is_there(path):
            named = f", one of {len(tars):,} that {pattern} names" if len(tars) > 1 else ""
            raise InputError(f"{path}: no such file{named}")
    if len(set(tars)) < len(tars):
        raise InputError(f"{pattern}: names {next(path for path in tars if tars.count(path) > 1)} twice")
    return tuple(tars)


def _braces(text: str) -> list[str]:
    """What a shell makes of {000..099} and {a,b}."""
    names = [text]
    while found := _BRACES.search(names[0]):  # what is left of the pattern is the same in all names
        if found[1]:
            low, high = int(found[1]), int(found[2])
            parts = [str(i).zfill(len(found[1])) for i in range(low, min(high, low + _MOST) + 1)]
        else:
            parts = found[3].split(",")
        if not parts or len(parts) * len(names) > _MOST:
            raise InputError(f"{text}: {found[0]} is no range, or the pattern names more than {_MOST:,} tars")
        names = [name.replace(found[0], part, 1) for name in names for part in parts]
    return names
