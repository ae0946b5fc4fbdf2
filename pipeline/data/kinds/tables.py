"""Image files that a table lists: a path and a label a row, and perhaps the split."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.decode import in_one_line
from kdcache.pipeline.data.imagefiles import FilesDone, load_folder, unreadable_files
from kdcache.pipeline.data.kinds.base import Asked, Kind, TakesPath
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.pipeline.data.kinds.folders import (
    EVALUATION,
    HELD_OUT,
    TEST,
    TRAIN,
    VALIDATION,
    held_out,
    note_of,
)
from kdcache.pipeline.data.labels import LABEL_COLUMNS, classes_of

# What the columns may be called, in any case.
_PATH = ("path", "file", "filename", "file_name", "filepath", "image")
_SPLIT = ("split",)
_EVALS = (VALIDATION, TEST, EVALUATION)  # the first of them that has rows is the eval split
_FORMATS = ".csv, .tsv and .jsonl"


class Row(NamedTuple):
    """A row of a table. label: as it is written; None where labels are not read. split: "" without that column."""

    path: str
    label: str | None
    split: str
    line: int


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one split, by path in byte order, and the class names of the train split."""

    paths: tuple[str, ...]  # relative to the table's folder, or absolute
    labels: np.ndarray  # int64 [N, 1], or [N, 0] when unlabelled
    class_names: tuple[str, ...]
    whole: bool  # whether there are no splits in the table, so that some rows are held out
    unread: str  # what a note says of rows that belong to neither split


class Table(Kind):
    """`files:TABLE`, whose paths are relative to the table."""

    takes_path: TakesPath = "must"

    def open(self, asked: Asked) -> FileDataset:
        table, rows = _read(asked)
        part = _part(table, rows, asked.split, labelled=not asked.unlabelled)
        found = train = load_folder(table.parent, part.paths, asked.home)
        if asked.split != "train":  # mean and std are always those of the train split
            others = _part(table, rows, "train", labelled=not asked.unlabelled)
            train = load_folder(table.parent, others.paths, asked.home, decode=False)
        return FileDataset(
            name=asked.name,
            split=asked.split,
            labels=part.labels,
            class_names=part.class_names,
            sizes=found.sizes,
            mean=train.mean,
            std=train.std,
            note=note_of(table, asked.split, len(part.paths), part.class_names, part.whole) + part.unread,
            root=table.parent,
            paths=part.paths,
            pixels=found.images,
            apart=not part.whole,
        )

    def unreadable(self, asked: Asked, progress: FilesDone | None = None) -> list[str]:
        """List the files without opening the dataset, since that is refused where a header cannot be read."""
        table, rows = _read(asked)
        part = _part(table, rows, asked.split, labelled=not asked.unlabelled)
        return unreadable_files(table.parent, part.paths, progress)


def _part(table: Path, rows: Sequence[Row], split: str, *, labelled: bool) -> Part:
    """Choose the rows of a split. Without a split column, every tenth row of a class is held out for the eval split."""
    by_split = _by_split(table, rows)
    unread = ""
    if whole := "" in by_split:
        train = evaluation = _sorted(table, rows)
    else:
        train = _sorted(table, by_split.pop("train", []))
        names = [kind[0] for kind in _EVALS if kind[0] in by_split]
        if not train:
            raise InputError(f"{table}: has no row whose split is train")
        if split != "train" and not names:
            raise InputError(f"{table}: has rows of train, but none of val, test or eval, as the eval split needs")
        evaluation = _sorted(table, by_split.pop(names[0])) if names else []
        unread = "".join(f"; {len(others):,} rows of {name} are not read" for name, others in by_split.items())
    names_of = classes_of({str(row.label) for row in train}, partial(_where, table, train)) if labelled else ()
    chosen = train if split == "train" else evaluation
    labels = _labels(table, chosen, names_of) if labelled else np.zeros(len(chosen), np.int64)
    if whole:
        kept = held_out(labels, HELD_OUT) == (split == "eval")
        if not kept.any():
            raise InputError(f"{table}: has no tenth image in any class to hold out for the eval split")
        chosen, labels = [chosen[i] for i in np.flatnonzero(kept)], labels[kept]
    column = labels[:, None] if labelled else np.empty((len(chosen), 0), np.int64)
    return Part(tuple(row.path for row in chosen), column, names_of, whole, unread)


def _where(table: Path, rows: Sequence[Row], label: str) -> str:
    """The first line that has the label."""
    return f"{table}, line {min(row.line for row in rows if row.label == label)}"


def _by_split(table: Path, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by split: 'train', the first name of each kind of evaluation split, or '' without a split column."""
    kinds = {name: kind[0] for kind in (TRAIN, *_EVALS) for name in kind} | {"": ""}
    found: dict[str, list[Row]] = {}
    for row in rows:
        if (name := kinds.get(row.split.casefold())) is None:
            raise InputError(f"{table}, line {row.line}: split {row.split!r} is none of train, val, test and eval")
        found.setdefault(name, []).append(row)
    return found


def _sorted(table: Path, rows: Sequence[Row]) -> list[Row]:
    """By path in byte order. InputError for a path that stands there twice."""
    ordered = sorted(rows, key=lambda row: row.path.encode("utf-8", "surrogateescape"))
    for one, other in pairwise(ordered):
        if one.path == other.path:
            first, second = sorted((one.line, other.line))
            raise InputError(f"{table}, line {second}: {in_one_line(one.path)} stands in line {first} already")
    return ordered


def _labels(table: Path, rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
    ids = {name: i for i, name in enumerate(names)}
    labels = np.array([ids.get(str(row.label), -1) for row in rows], np.int64)
    if (unknown := np.flatnonzero(labels < 0)).size:
        row = rows[int(unknown[0])]
        raise InputError(f"{table}, line {row.line}: label {row.label!r} is no class of the train split")
    return labels


def _read(asked: Asked) -> tuple[Path, list[Row]]:
    """Read the whole table. InputError names the line that cannot be taken."""
    table = asked.path
    if table is None:
        raise InputError(f"{asked.name} needs a table: {asked.name}:TABLE, one of {_FORMATS}")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines}
    read = readers.get(table.suffix.lower())
    if read is None:
        hint = " (parquet is not read yet: convert it)" if table.suffix.lower() == ".parquet" else ""
        raise InputError(f"{table}: is no table of a known kind, which are {_FORMATS}{hint}")
    rows = []
    first: tuple[bool, int] | None = None  # whether labels are numbers, and the line that says so
    try:
        for line, path, label, split in read(table):
            is_number = isinstance(label, int)
            first = first or (is_number, line)
            if is_number != first[0] and isinstance(label, str | int) and not asked.unlabelled:
                raise InputError(
                    f"{table}, line {line}: label {label!r} is {'a number' if is_number else 'text'}, and that of "
                    f"line {first[1]} is {'a number' if first[0] else 'text'}: write all in one way"
                )
            rows.append(_row(table, line, path, label, split, labelled=not asked.unlabelled))
    except UnicodeDecodeError as e:
        raise InputError(f"{table}: is not UTF-8 near row {len(rows) + 1}: save it as UTF-8") from e
    except (OSError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) else f"near row {len(rows) + 1}: {e}"
        raise InputError(f"{table}: cannot be read: {reason}") from e
    if not rows:
        raise InputError(f"{table}: has no rows")
    return table, rows


def _row(table: Path, line: int, path: Any, label: Any, split: Any, *, labelled: bool) -> Row:
    if not isinstance(path, str) or not path or not (path.isprintable() or _is_path(path)):
        raise InputError(f"{table}, line {line}: {path!r} is no path of a file")
    if not labelled:
        label = None
    elif isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise InputError(f"{table}, line {line}: label {label!r} is neither a class name nor a whole number")
    elif isinstance(label, int) and label < 0:
        raise InputError(f"{table}, line {line}: label {label} is no class: ids begin at 0")
    if not isinstance(split, str):
        raise InputError(f"{table}, line {line}: has no split")
    return Row(path, None if label is None else str(label), split, line)


def _is_path(name: str) -> bool:
    """Whether a name with unusual characters, such as a narrow space or a line break, can be that of a file."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _columns(table: Path, names: Sequence[str], line: int) -> dict[str, str]:
    """The column for each of path, label and split, where there is one. InputError where it is not clear which."""
    found = {}
    for what, known in (("path", _PATH), ("label", LABEL_COLUMNS), ("split", _SPLIT)):
        of_kind = [name for name in names if name.strip().casefold() in known]
        if len(of_kind) > 1:
            raise InputError(f"{table}, line {line}: {' and '.join(of_kind)} may each be the {what}: keep one")
        if of_kind:
            found[what] = of_kind[0]
    if "path" not in found:
        has = ", ".join(map(repr, names[:8])) or "nothing"
        raise InputError(f"{table}, line {line}: a column path is needed ({', '.join(_PATH)}), there is {has}")
    return found


_Cells = tuple[int, Any, Any, Any]  # line, path, label or None, and split: None where it is empty, "" without a column


def _csv(table: Path) -> Iterator[_Cells]:
    """The rows of a .csv or .tsv file with a heading. A row's line is the one that it ends in."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, "excel-tab" if table.suffix.lower() == ".tsv" else "excel", strict=True)
        heading = next(lines, [])
        columns = _columns(table, heading, 1)
        if len(set(heading)) < len(heading):
            raise InputError(f"{table}, line 1: two columns have one name")
        places = {what: heading.index(name) for what, name in columns.items()}
        path, label, split = (places.get(what) for what in ("path", "label", "split"))
        assert path is not None
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(heading):
                raise InputError(f"{table}, line {lines.line_num}: has {len(cells)} cells, the heading {len(heading)}")
            named = None if label is None else cells[label]
            yield lines.line_num, cells[path], named, "" if split is None else cells[split] or None


def _json_lines(table: Path) -> Iterator[_Cells]:
    """The objects of a .jsonl file, one a line. A key may be missing in a line only if it is missing in all."""
    with table.open(encoding="utf-8-sig", newline="\n") as file:
        keys: set[str] | None = None
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as e:
                raise InputError(f"{table}, line {line}: is no JSON: {e}") from e
            if not isinstance(row, dict):
                raise InputError(f"{table}, line {line}: is no JSON object")
            columns = _columns(table, list(row), line)
            keys = columns.keys() | set() if keys is None else keys
            if columns.keys() != keys:
                raise InputError(f"{table}, line {line}: has not the same of path, label and split as the lines before")
            path, label = (row.get(columns.get(what)) for what in ("path", "label"))
            yield line, path, label, row[columns["split"]] or None if "split" in columns else ""
