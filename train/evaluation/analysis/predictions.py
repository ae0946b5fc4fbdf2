"""A student's predictions as a table: one row for each evaluation image, as csv or parquet."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcache.cache.errors import InputError, kind_and_message
from kdcache.cache.files import replace_file
from kdcache.cache.records.records import Records
from kdcache.train.evaluation.analysis.analysis import most_probable
from kdcache.train.evaluation.judge import Answers

Columns = dict[str, list[Any]]


def require_format(file: str) -> None:
    """InputError for a file whose name's end tells no format of `FORMATS`, or one that cannot be written here."""
    suffix = Path(file).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"--predictions {file}: the name has to end in {' or '.join(FORMATS)}")
    if Path(file).is_dir():
        raise InputError(f"--predictions {file} is a folder: give a file's name")
    if suffix == ".parquet":
        _pyarrow(file)


def write_predictions(file: str, answers: Answers, image_names: Sequence[str], names: Sequence[str]) -> None:
    """Write the table whole or not at all; what was in the file before is replaced.

    image_names: of the N images, or () where they have none. names: of the C classes. See docs/students.md for the
    columns.
    """
    require_format(file)
    replace_file(Path(file), FORMATS[Path(file).suffix.lower()](columns(answers, image_names, names)))


def columns(answers: Answers, image_names: Sequence[str], names: Sequence[str]) -> Columns:
    """The table's columns by their names; None where something is not known."""
    count = len(answers.logits)
    p = answers.logits.softmax(1)
    prediction = answers.ranked[:, 0]
    unknown = [None] * count
    labelled = answers.labels.numel() > 0
    labels = answers.labels.tolist() if labelled else unknown
    found: Columns = {
        "index": list(range(count)),
        "name": [_utf8(name) for name in image_names] if image_names else unknown,
        "label": labels,
        "label_name": _named(labels, names),
        "prediction": prediction.tolist(),
        "prediction_name": _named(prediction.tolist(), names),
        "correct": (prediction == answers.labels).tolist() if labelled else unknown,
        "probability": _of(p, prediction),
        "label_probability": _of(p, answers.labels) if labelled else unknown,
    }
    for place, classes in enumerate(answers.ranked.unbind(1), 1):
        found[f"class_{place}"], found[f"probability_{place}"] = classes.tolist(), _of(p, classes)
    return {**found, **_of_teacher(answers, names)}


def _of_teacher(answers: Answers, names: Sequence[str]) -> Columns:
    """What the teacher says of the same images, where it is known; no columns where nothing is."""
    teacher = answers.teacher
    if teacher is None:
        return {}
    predictions = most_probable(teacher, 1)[:, 0]
    found: Columns = {
        "teacher_prediction": predictions.tolist(),
        "teacher_prediction_name": _named(predictions.tolist(), names),
    }
    if teacher.classes is None or 1.0 in teacher.temperatures:
        found["teacher_probability"] = teacher.softened(1.0).ranked()[1][:, 0].tolist()
        if answers.labels.numel() and (of_label := _label_probability(teacher, answers.labels)) is not None:
            found["teacher_label_probability"] = of_label
    return found


def _label_probability(teacher: Records, labels: Tensor) -> list[float] | None:
    """The teacher's probability of each label [N] at temperature 1; None where the records do not hold it."""
    if teacher.classes is None:
        return _of(teacher.dense(1.0), labels)
    return teacher.softened(1.0).target()[:, 0].tolist() if teacher.target_gap.shape[1] else None


def _of(p: Tensor, classes: Tensor) -> list[float]:
    found: list[float] = p.gather(1, classes.unsqueeze(1)).squeeze(1).tolist()
    return found


def _named(ids: Sequence[int | None], names: Sequence[str]) -> list[str | None]:
    return [None if c is None else _utf8(names[c]) for c in ids]


def _utf8(name: str) -> str:
    """The name with bytes that are no UTF-8, which file systems allow, spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _csv(table: Columns) -> bytes:
    """UTF-8, comma-separated, quoted where needed (RFC 4180), one line each; nothing between the commas for None."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*(_spelled(column) for column in table.values()), strict=True))
    return out.getvalue().encode()


def _spelled(column: list[Any]) -> list[Any]:
    return [str(value).lower() if isinstance(value, bool) else value for value in column]


def _parquet(table: Columns) -> bytes:
    arrow, parquet = _pyarrow("parquet")
    out = io.BytesIO()
    kinds = {int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_(), str: arrow.string()}
    kinds_of = {**dict.fromkeys(("name", "label_name"), str), "label": int, "correct": bool, "label_probability": float}
    arrays = {name: arrow.array(column, kinds[kinds_of.get(name, type(column[0]))]) for name, column in table.items()}
    parquet.write_table(arrow.table(arrays), out)
    return out.getvalue()


def _pyarrow(file: str) -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as e:
        if isinstance(e, ModuleNotFoundError) and e.name == "pyarrow":
            raise InputError(f"{file}: parquet needs pyarrow: pip install pyarrow, or give a name in .csv") from e
        raise InputError(f"{file}: pyarrow cannot be imported: {kind_and_message(e)}") from e


FORMATS: dict[str, Callable[[Columns], bytes]] = {".csv": _csv, ".parquet": _parquet}
