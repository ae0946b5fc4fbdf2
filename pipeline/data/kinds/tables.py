"""Image files that a table lists: a path and a label a row, and perhaps the split."""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache.errors import InputError, first_sentence
from kdcache.cache.files import is_there
from kdcache.pipeline.data.decode import in_one_line
from kdcache.pipeline.data.imagefiles import FilesDone, unreadable_files
from kdcache.pipeline.data.kinds.base import Asked, Kind, TakesPath, paths_at
from kdcache.pipeline.data.kinds.files import FileDataset, Listing, open_listing
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
_SPLITS = {name: kind[0] for kind in (TRAIN, *_EVALS) for name in kind} | {"": ""}  # "" without such a column
_FORMATS = ".csv, .tsv, .jsonl and .parquet"


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a table, by column.

    labels: int64 [N], the place of each row's label in `texts`; 0 where labels are not read. splits: int8 [N], the
    place of each row's split in `names`. lines: int64 [N], for messages.
    """

    table: Path
    paths: Sequence[str]  # as they are written
    labels: np.ndarray
    texts: tuple[str, ...]
    splits: np.ndarray
    names: tuple[str, ...]
    lines: np.ndarray

    def where(self, row: int) -> str:
        """What messages call a row."""
        return _at(self.table, int(self.lines[row]))

    def of(self, split: str) -> np.ndarray:
        """The rows of a split by path in byte order, int64 [n]. InputError for a path that stands there twice."""
        rows = np.flatnonzero(self.splits == self.names.index(split)).tolist() if split in self.names else []
        paths = [self.paths[row] for row in rows]
        # Text without other letters sorts as its bytes do, in half the time.
        ascii = all(map(str.isascii, paths))
        keys = paths if ascii else [path.encode("utf-8", "surrogateescape") for path in paths]
        order = sorted(range(len(rows)), key=keys.__getitem__)
        ordered = [paths[i] for i in order]
        if (twice := next((i for i, same in enumerate(map(eq, ordered, ordered[1:])) if same), None)) is not None:
            first, second = sorted(rows[i] for i in order[twice : twice + 2])
            path = in_one_line(self.paths[first])
            raise InputError(f"{self.where(second)}: {path} stands in {_unit(self.table)} {self.lines[first]} already")
        return np.array(rows, np.int64)[order]


class Table(Kind):
    """`files:TABLE`, whose paths are relative to the table."""

    takes_path: TakesPath = "must"

    def open(self, asked: Asked) -> FileDataset:
        rows = _read(asked)
        labelled = not asked.unlabelled
        own, whole = _part(rows, asked.split, labelled=labelled)

        def train() -> tuple[Path, Sequence[str]]:
            found, _ = _part(rows, "train", labelled=labelled)
            return found.root, found.paths

        return open_listing(asked, asked.name, own, train, apart=not whole)

    def unreadable(self, asked: Asked, progress: FilesDone | None = None) -> list[str]:
        """List the files without opening the dataset, since that is refused where a header cannot be read."""
        own, _ = _part(_read(asked), asked.split, labelled=not asked.unlabelled)
        return unreadable_files(own.root, own.paths, progress)


def _part(rows: Rows, split: str, *, labelled: bool) -> tuple[Listing, bool]:
    """The files of a split by path in byte order, and whether there are no splits in the table.

    Without a split column, every tenth row of a class is held out for the eval split.
    """
    table = rows.table
    unread = ""
    if whole := "" in rows.names:
        train = evaluation = rows.of("")
    else:
        train = rows.of("train")
        evals = [kind[0] for kind in _EVALS if kind[0] in rows.names]
        if not train.size:
            raise InputError(f"{table}: has no row whose split is train")
        if split != "train" and not evals:
            raise InputError(f"{table}: has rows of train, but none of val, test or eval, as the eval split needs")
        evaluation = rows.of(evals[0]) if evals else train[:0]
        counts = zip(rows.names, np.bincount(rows.splits, minlength=len(rows.names)).tolist(), strict=True)
        unread = "".join(f"; {n:,} rows of {name} are not read" for name, n in counts if name in evals[1:])
    chosen = train if split == "train" else evaluation
    names = _class_names(rows, train) if labelled else ()
    labels = _labels(rows, chosen, names) if labelled else np.zeros(len(chosen), np.int64)
    if whole:
        kept = held_out(labels, HELD_OUT) == (split == "eval")
        if not kept.any():
            raise InputError(f"{table}: has no tenth image in any class to hold out for the eval split")
        chosen, labels = chosen[kept], labels[kept]
    column = labels[:, None] if labelled else np.empty((len(chosen), 0), np.int64)
    note = note_of(table, split, len(chosen), names, whole) + unread
    return Listing(table.parent, paths_at(rows.paths, chosen), column, names, note), whole


def _class_names(rows: Rows, train: np.ndarray) -> tuple[str, ...]:
    def where(label: str) -> str:
        return rows.where(int(train[rows.labels[train] == rows.texts.index(label)].min()))

    return classes_of([rows.texts[code] for code in np.unique(rows.labels[train]).tolist()], where)


def _labels(rows: Rows, chosen: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The class of each of these rows, int64 [n]."""
    ids = {name: i for i, name in enumerate(names)}
    labels: np.ndarray = np.array([ids.get(text, -1) for text in rows.texts], np.int64)[rows.labels[chosen]]
    if (unknown := np.flatnonzero(labels < 0)).size:
        row = int(chosen[unknown[0]])
        raise InputError(f"{rows.where(row)}: label {rows.texts[rows.labels[row]]!r} is no class of the train split")
    return labels


def _read(asked: Asked) -> Rows:
    """Read the whole table. InputError names the line that cannot be taken."""
    table = asked.path
    if table is None:
        raise InputError(f"{asked.name} needs a table: {asked.name}:TABLE, one of {_FORMATS}")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
    if (read := readers.get(table.suffix.lower())) is None:
        raise InputError(f"{table}: is no table of a known kind, which are {_FORMATS}")
    if is_there(table) and not table.is_file():
        raise InputError(f"{table}: is no plain file")
    rows = _in_columns(table, read(table), labelled=not asked.unlabelled)
    if not rows.paths:
        raise InputError(f"{table}: has no rows")
    return rows


def _in_columns(table: Path, cells: Iterator[_Cells], *, labelled: bool) -> Rows:
    """Put the rows of a table into columns. Each label and each split is looked at where it comes first."""
    paths: list[str] = []
    lines, codes, splits = array("q"), array("q"), array("b")
    labels = _Labels(table)
    names: dict[str, int] = {}
    by_name: dict[Any, int] = {}
    try:
        for line, path, label, split in cells:
            if path.__class__ is not str or not path or not (path.isprintable() or _is_path(path)):
                raise InputError(f"{_at(table, line)}: {path!r} is no path of a file")
            codes.append(labels.code(label, line) if labelled else 0)
            if split.__class__ is not str or (place := by_name.get(split)) is None:
                place = by_name[split] = names.setdefault(_split(_at(table, line), split), len(names))
            paths.append(path)
            lines.append(line)
            splits.append(place)
    except UnicodeDecodeError as e:
        raise InputError(f"{table}: is not UTF-8 near row {len(paths) + 1}: save it as UTF-8") from e
    except (OSError, csv.Error) as e:
        reason = e.strerror if isinstance(e, OSError) else f"near row {len(paths) + 1}: {e}"
        raise InputError(f"{table}: cannot be read: {reason}") from e
    texts = tuple(map(str, labels.known))
    return Rows(table, paths, np.array(codes), texts, np.array(splits, np.int8), tuple(names), np.array(lines))


@dataclass
class _Labels:
    """The labels of a table, as text or as numbers, by the order in which they come first."""

    table: Path
    known: dict[str | int, int] = field(default_factory=dict)
    first: int = 0  # the line of the first label

    def code(self, label: Any, line: int) -> int:
        """The place of a label among those that are known. InputError for one that can be none."""
        kind = label.__class__  # 1, 1.0 and True are one key of a dict
        code = self.known.get(label) if kind is str or kind is int else None
        return self._added(label, line) if code is None else code

    def _added(self, label: Any, line: int) -> int:
        where = _at(self.table, line)
        if label.__class__ not in (str, int) or label == "":
            raise InputError(f"{where}: label {label!r} is neither a class name nor a whole number")
        if isinstance(label, int) and label < 0:
            raise InputError(f"{where}: label {label} is no class: ids begin at 0")
        if not self.known:
            self.first = line
        elif next(iter(self.known)).__class__ is not label.__class__:
            one, other = ("text", "a number") if isinstance(label, str) else ("a number", "text")
            first = f"{_unit(self.table)} {self.first}"
            raise InputError(f"{where}: label {label!r} is {one}, and that of {first} is {other}: write all in one way")
        return self.known.setdefault(label, len(self.known))


def _at(table: Path, line: int) -> str:
    """What messages call a row."""
    return f"{table}, {_unit(table)} {line}"


def _unit(table: Path) -> str:
    return "row" if table.suffix.lower() == ".parquet" else "line"


def _split(where: str, split: Any) -> str:
    """'train', the first name of each kind of evaluation split, or '' without a split column."""
    if not isinstance(split, str):
        raise InputError(f"{where}: has no split")
    if (name := _SPLITS.get(split.casefold())) is None:
        raise InputError(f"{where}: split {split!r} is none of train, val, test and eval")
    return name


def _is_path(name: str) -> bool:
    """Whether a name with unusual characters, such as a narrow space or a line break, can be that of a file."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _columns(where: object, names: Sequence[str]) -> dict[str, str]:
    """The column for each of path, label and split, where there is one. InputError where it is not clear which."""
    found = {}
    for what, known in (("path", _PATH), ("label", LABEL_COLUMNS), ("split", _SPLIT)):
        of_kind = [name for name in names if name.strip().casefold() in known]
        if len(of_kind) > 1:
            raise InputError(f"{where}: {' and '.join(of_kind)} may each be the {what}: keep one")
        if of_kind:
            found[what] = of_kind[0]
    if "path" not in found:
        has = ", ".join(map(repr, names[:8])) or "nothing"
        raise InputError(f"{where}: a column path is needed ({', '.join(_PATH)}), there is {has}")
    return found


_Cells = tuple[int, Any, Any, Any]  # line, path, label or None, and split: None where it is empty, "" without a column


def _csv(table: Path) -> Iterator[_Cells]:
    """The rows of a .csv or .tsv file with a heading. A row's line is the one that it ends in."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, "excel-tab" if table.suffix.lower() == ".tsv" else "excel", strict=True)
        heading = next(lines, [])
        columns = _columns(_at(table, 1), heading)
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
                raise InputError(f"{_at(table, line)}: is no JSON: {e}") from e
            if not isinstance(row, dict):
                raise InputError(f"{_at(table, line)}: is no JSON object")
            columns = _columns(_at(table, line), list(row))
            keys = columns.keys() | set() if keys is None else keys
            if columns.keys() != keys:
                raise InputError(f"{_at(table, line)}: has not the same of path, label and split as the lines before")
            path, label = (row.get(columns.get(what)) for what in ("path", "label"))
            yield line, path, label, row[columns["split"]] or None if "split" in columns else ""


def _parquet(table: Path) -> Iterator[_Cells]:
    """The rows of a .parquet file, counted from 1."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise InputError(f"{table}: needs the package pyarrow: pip install pyarrow") from e
    try:
        with pq.ParquetFile(table) as file:
            columns = _columns(table, file.schema_arrow.names)
            line = 0
            for batch in file.iter_batches(columns=list(columns.values())):
                read = {what: batch.column(name).to_pylist() for what, name in columns.items()}
                none = [None] * len(batch)
                labels, splits = read.get("label", none), read.get("split", [""] * len(batch))
                for path, label, split in zip(read["path"], labels, splits, strict=True):
                    line += 1
                    yield line, path, label, split or None if "split" in columns else ""
    except pa.ArrowException as e:
        raise InputError(f"{table}: cannot be read as parquet: {first_sentence(e)}") from e
