"""Labels that are written as text, in tables and tars, and the names of classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from kdcache.cache.errors import InputError

_ID = re.compile(r"0|[1-9][0-9]*")
_NO_ID = re.compile(r"[+-][0-9]+|[+-]?[0-9]+\.[0-9]*|[+-]?\.[0-9]+")  # a number, but no whole number from 0 on
MAX_CLASSES = 1 << 20
LABEL_COLUMNS = ("label", "class", "class_name", "target")  # what a column of labels may be called, in any case


def classes_of(labels: Collection[str], where: Callable[[str], str]) -> tuple[str, ...]:
    """The names of the classes by their ids, for the labels of the train split.

    If every label is a whole number, it is the class's id: the classes are 0 to the largest. Else labels are names, and
    ids go by the names in byte order. InputError for an id that no class can have, and for another number, which is no
    name: it says which sample has the label, as where(label) gives it.
    """
    if all(_ID.fullmatch(label) for label in labels):
        largest = max(labels, key=lambda label: (len(label), label))
        if len(largest) > len(str(MAX_CLASSES)) or int(largest) >= MAX_CLASSES:
            ids = f"ids are 0 to {MAX_CLASSES - 1:,}"
            raise InputError(f"{where(largest)}: label {largest[:20]} is no class: {ids}")
        return tuple(map(str, range(int(largest) + 1)))
    if number := next((label for label in sorted(labels) if _NO_ID.fullmatch(label)), None):
        raise InputError(f"{where(number)}: label {number!r} is neither a class name nor a whole number from 0 on")
    return tuple(sorted(labels, key=lambda label: label.encode("utf-8", "surrogatepass")))


def require_text(names: Sequence[str], where: str) -> None:
    """InputError, which names the place `where`, for a class name that is not UTF-8: no file could hold it."""
    if not _is_text("".join(names)):
        name = next(name for name in names if not _is_text(name))
        raise InputError(f"{where}: class name {name!r} is not UTF-8: rename it")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
